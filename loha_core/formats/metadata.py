"""Metadata of adapters that were made out of others: what stays true is kept, and what was done is written in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..adapter import Adapter

HISTORY = "loha_history"
# They speak of the file that was, and would win over what is true now when it is saved.
_STALE = ("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module")
_PHRASE = "modelspec.trigger_phrase"
_TAGS = "ss_tag_frequency"


def metadata(sources: Sequence[Adapter], operation: str, **details: Any) -> dict[str, str]:
    """The first source's metadata without what is stale, with all trigger words, and one more entry of its history.

    Args:
        details: what to write beside the operation's name and the sources, for JSON; None is left out.
    """
    kept = {k: v for k, v in sources[0].metadata.items() if k not in _STALE and not is_hash(k)}
    if phrases := [a.metadata[_PHRASE] for a in sources if a.metadata.get(_PHRASE)]:
        kept[_PHRASE] = ", ".join(dict.fromkeys(phrases))
    if tags := _tags([a.metadata[_TAGS] for a in sources if a.metadata.get(_TAGS)]):
        kept[_TAGS] = tags
    earlier = [e for a in sources for e in history(a.metadata)]
    kept[HISTORY] = json.dumps([*earlier, entry(sources, operation, **details)], ensure_ascii=False)
    return kept


def entry(sources: Sequence[Adapter], operation: str, **details: Any) -> dict[str, Any]:
    """What was done, for the history; details that are None are left out."""
    what = {"operation": operation, "sources": [PurePath(a.source).name for a in sources]}
    return what | {name: value for name, value in details.items() if value is not None}


def is_hash(key: str) -> bool:
    """Whether a metadata key holds a hash of the tensors that were."""
    return key.startswith("sshs_") or key == "modelspec.hash_sha256"


def lora_metadata(kept: Mapping[str, str], ranks: Sequence[int], alphas: Sequence[float]) -> dict[str, str]:
    """What kohya's readers look for in a LoRA; the commonest rank and alpha stand for all."""
    if not ranks:
        return dict(kept)
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    own = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    return dict(kept) | own


def history(found: Mapping[str, str]) -> list[Any]:
    """The entries that a file's metadata has so far."""
    try:
        entries = json.loads(found.get(HISTORY, "[]"))
    except (ValueError, RecursionError):
        return []
    return entries if isinstance(entries, list) else []


def _tags(texts: Sequence[str]) -> str | None:
    """Tag counts by folder; folders of one name add up. The first as it is where another cannot be read."""
    if len(texts) < 2:
        return texts[0] if texts else None
    found: dict[str, dict[str, int]] = {}
    try:
        for text in texts:
            for folder, tags in json.loads(text).items():
                counts = found.setdefault(folder, {})
                for tag, count in tags.items():
                    counts[tag] = counts.get(tag, 0) + count
    except (ValueError, AttributeError, TypeError, RecursionError):
        return texts[0]
    return json.dumps(found, ensure_ascii=False)
