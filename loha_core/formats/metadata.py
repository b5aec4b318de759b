"""Metadata of adapters: what kohya's readers look for, and the history of those that were made out of others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..adapter import Adapter
from ..factors import Layer, LoHaFactors

HISTORY = "loha_history"
# They describe the source file, and would win over what is true of the new one when it is saved.
_STALE = ("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module")
_PHRASE = "modelspec.trigger_phrase"
_TAGS = "ss_tag_frequency"


def network(layers: Iterable[Layer], **arguments: Any) -> dict[str, str]:
    """The ``ss_network_…`` entries of LoHa layers, or of LoRA layers: module, commonest rank and alpha, arguments.

    Args:
        layers: all of one kind; no layer gives no entry.
        arguments: of the network, for a LoHa, beside those that its layers tell.
    """
    layers = list(layers)
    if not layers:
        return {}
    ranks, alphas = Counter(layer.rank for layer in layers), Counter(layer.alpha for layer in layers)
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    entries = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if isinstance(layers[0], LoHaFactors):
        is_tucker = any(isinstance(layer, LoHaFactors) and layer.is_tucker for layer in layers)
        entries["ss_network_module"] = "lycoris.kohya"
        entries["ss_network_args"] = json.dumps({"algo": "loha", "use_tucker": is_tucker} | arguments)
    return entries


def derived(sources: Sequence[Adapter], operation: str, **details: Any) -> dict[str, str]:
    """The first source's metadata without what is stale, with all trigger words, and one more entry of its history.

    Args:
        details: what to write beside the operation's name and the sources, for JSON; None is left out.
    """
    kept = {k: v for k, v in sources[0].metadata.items() if k not in _STALE and not is_hash(k)}
    if phrases := [a.metadata[_PHRASE] for a in sources if a.metadata.get(_PHRASE)]:
        kept[_PHRASE] = ", ".join(dict.fromkeys(phrases))
    if tags := _tags([a.metadata[_TAGS] for a in sources if a.metadata.get(_TAGS)]):
        kept[_TAGS] = tags
    earlier = [entry for a in sources for entry in history(a.metadata)]
    kept[HISTORY] = json.dumps([*earlier, history_entry(sources, operation, **details)], ensure_ascii=False)
    return kept


def history_entry(sources: Sequence[Adapter], operation: str, **details: Any) -> dict[str, Any]:
    """What was done, for the history; details that are None are left out."""
    entry = {"operation": operation, "sources": [PurePath(a.source).name for a in sources]}
    return entry | {name: value for name, value in details.items() if value is not None}


def is_hash(key: str) -> bool:
    """Whether a metadata key holds a hash of the file's tensors."""
    return key.startswith("sshs_") or key == "modelspec.hash_sha256"


def history(entries: Mapping[str, str]) -> list[Any]:
    """The history in a file's metadata; empty where there is none that can be read."""
    try:
        past = json.loads(entries.get(HISTORY, "[]"))
    except (ValueError, RecursionError):
        return []
    return past if isinstance(past, list) else []


def _tags(texts: Sequence[str]) -> str | None:
    """Tag counts by folder; folders of one name add up. The first as it is where another cannot be read."""
    if len(texts) < 2:
        return texts[0] if texts else None
    total: dict[str, dict[str, int]] = {}
    try:
        for text in texts:
            for folder, tags in json.loads(text).items():
                counts = total.setdefault(folder, {})
                for tag, count in tags.items():
                    counts[tag] = counts.get(tag, 0) + count
    except (ValueError, AttributeError, TypeError, RecursionError):
        return texts[0]
    return json.dumps(total, ensure_ascii=False)
