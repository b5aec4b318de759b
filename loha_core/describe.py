"""What is in a file, for people."""

from __future__ import annotations

import json
from collections import Counter

from . import names, spelling
from .adapter import Adapter
from .formats.grouping import split_other

# The width of cross-attention's context tells the family of Stable Diffusion.
_CONTEXT = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}
_TELLTALES = {
    "single_transformer_blocks": "Flux",
    "single_blocks": "Flux",
    "joint_blocks": "SD3",
    "norm1_context": "SD3 or Flux",
}


def base_model(adapter: Adapter) -> str:
    """The family that the adapter was probably made for, from its metadata, else from names and shapes."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if adapter.metadata.get(key):
            return adapter.metadata[key]
    flat = {names.flat(name): factors for name, factors in adapter.layers.items()}
    for name, factors in flat.items():
        if "attn2_to_k" in name or "attn2_to_v" in name:
            return _CONTEXT.get(factors.shape[1], f"cross-attention of width {factors.shape[1]}")
    if flat and all(spelling.identity(name)[0].startswith("te") for name in adapter.layers):
        return "a text encoder (CLIP)" if any("self_attn_q_proj" in name for name in flat) else "unknown"
    found = (family for part, family in _TELLTALES.items() if any(part in name for name in flat))
    return next(found, "unknown")


def trigger_words(adapter: Adapter, limit: int = 20) -> list[str]:
    """Trigger phrase if the trainer wrote one, else the most frequent tags of its captions."""
    for key in ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words"):
        if adapter.metadata.get(key):
            return [word.strip() for word in adapter.metadata[key].split(",") if word.strip()]
    try:
        folders = json.loads(adapter.metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(limit)]


def suspicious(adapter: Adapter) -> list[str]:
    """What a user should know before trusting the file."""
    found = list(adapter.notes)
    for name, factors in adapter.layers.items():
        if any(not t.float().any() for part, t in factors.tensors().items() if part != "dora_scale"):
            found.append(f"{name}: a factor is all zero, so this layer does nothing (untrained?)")
        elif factors.rank >= min(factors.shape[:2]):
            found.append(f"{name}: rank {factors.rank} is no smaller than the weight {factors.shape}")
        elif abs(factors.scale) > 100:
            found.append(f"{name}: alpha/rank is {factors.scale:g}")
    return found


def describe(adapter: Adapter, limit: int = 10) -> str:
    """A summary in plain text, at most ``limit`` lines for each kind of oddity."""
    layers = adapter.layers.values()
    lines = [
        f"file          {adapter.source}",
        f"dialect       {adapter.dialect}",
        f"base model    {base_model(adapter)}",
        f"LoHa layers   {len(adapter.layers)} ({adapter.parameter_count():,} parameters)",
        f"where         {_counts(Counter(names.split(name)[0] or 'unnamed network' for name in adapter.layers))}",
        f"rank          {_counts(adapter.ranks)}",
        f"alpha         {_counts(Counter(f'{f.alpha:g}' for f in layers))}",
        f"dtype         {_counts(Counter(str(f.dtype).removeprefix('torch.') for f in layers))}",
        f"Tucker        {sum(f.is_tucker for f in layers)} layers",
        f"DoRA          {sum(f.dora_scale is not None for f in layers)} layers",
    ]
    if adapter.extras:
        kinds = Counter((split_other(key) or ("", "not an adapter's key"))[1] for key in adapter.extras)
        lines.append(f"other         {len(adapter.extras)} tensors: {_counts(kinds)}")
    if words := trigger_words(adapter):
        lines.append(f"trigger words {', '.join(words)}")
    odd = suspicious(adapter)
    lines += [f"suspicious    {line}" for line in odd[:limit]]
    if len(odd) > limit:
        lines.append(f"suspicious    … and {len(odd) - limit} more")
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """A file's own words may hold line breaks and a terminal's control sequences; here they are only text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _counts(counter: Counter) -> str:  # type: ignore[type-arg]
    return ", ".join(f"{value} ×{count}" for value, count in counter.most_common(8)) or "none"
