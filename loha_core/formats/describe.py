"""What is in a file, for people."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from ..adapter import Adapter, split_key
from ..factors import LoHaFactors
from ..naming import names, recognise, spelling
from ..naming.families import Family

# The width of cross-attention's context tells the family of Stable Diffusion.
_CONTEXT = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}
_UNET = re.compile(r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_")
# What the layers of text encoders are called, less their prefix.
_TEXT = {
    "CLIP": re.compile(r"(?:text_model_)?encoder_layers_\d+_|(?:text_model_)?embeddings_|resblocks_\d+_"),
    "T5": re.compile(r"encoder_block_\d+_layer_\d+_"),
    "Qwen or Llama type": re.compile(
        r"(?:model_)?(?:language_model_)?layers_\d+_(?:self_attn_[qkvo]_proj|mlp_(?:gate|up|down)_proj)"
    ),
}


def base_model(adapter: Adapter) -> str:
    """The family that the adapter was probably made for, from its metadata, else from names and shapes."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if adapter.metadata.get(key):
            return adapter.metadata[key]
    paths = {spelling.identity(name)[1]: f for name, f in adapter.layers.items() if not is_text(name)}
    if family := _transformer(paths):
        return family
    for path, factors in paths.items():
        if _UNET.match(path) and ("attn2_to_k" in path or "attn2_to_v" in path):
            return _CONTEXT.get(factors.shape[1], f"cross-attention of width {factors.shape[1]}")
    return _text_encoders(adapter.layers) or "unknown"


def is_text(name: str) -> bool:
    return name.startswith("text_encoders.") or spelling.identity(name)[0].startswith("te")


def _transformer(paths: Mapping[str, LoHaFactors]) -> str | None:
    """The families of transformers that know these names, and their sizes where numbers and widths of blocks tell."""
    families = recognise.families_of(paths)
    inputs = Counter(factors.shape[1] for factors in paths.values()).most_common(1)
    # A model that is not in the tables may have a width of its own.
    width = next((w for w, _ in inputs for f in families for size in f.sizes if size.width == w), None)
    candidates: dict[int, dict[str, None]] = {}
    for family in families:
        counts = recognise.counts_of(family, paths)
        size = recognise.size_of(family, counts, width)
        candidates.setdefault(_distance(family, counts, width), {})[size.name if size else family.name] = None
    return " or ".join(candidates[min(candidates)]) if candidates else None


def _distance(family: Family, counts: tuple[int, ...], width: int | None) -> int:
    """How badly the family's models fit: 0 one has just these blocks, 1 more of them, 2 fewer or another width."""
    sizes = [size for size in family.sizes if width is None or size.width in (None, width)]
    if any(size.blocks == counts for size in sizes):
        return 0
    return 1 if any(size.reaches(counts) for size in sizes) else 2


def _text_encoders(layers: Iterable[str]) -> str | None:
    """What the text encoders are, if these are all that the names are of."""
    kinds: dict[str, None] = {}
    for name in layers:
        path = re.sub(r"^text_encoders_\w+?_transformer_", "", names.split(name)[1]).removeprefix("text_model_")
        kind = next((kind for kind, pattern in _TEXT.items() if pattern.match(path)), None)
        if kind is None:
            return None
        kinds[kind] = None
    return f"a text encoder ({', '.join(kinds)})" if kinds else None


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
    remarks = list(adapter.notes)
    for name, factors in adapter.layers.items():
        if any(not t.float().any() for part, t in factors.tensors().items() if part != "dora_scale"):
            remarks.append(f"{name}: a factor is all zero, so this layer does nothing (untrained?)")
        elif factors.rank >= min(factors.shape[:2]):
            remarks.append(f"{name}: rank {factors.rank} is no smaller than the weight {factors.shape}")
        elif abs(factors.scale) > 100:
            remarks.append(f"{name}: alpha/rank is {factors.scale:g}")
    return remarks


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
        kinds = Counter((split_key(key) or ("", "not an adapter's key"))[1] for key in adapter.extras)
        lines.append(f"other         {len(adapter.extras)} tensors: {_counts(kinds)}")
    if words := trigger_words(adapter):
        lines.append(f"trigger words {', '.join(words)}")
    remarks = suspicious(adapter)
    lines += [f"suspicious    {line}" for line in remarks[:limit]]
    if len(remarks) > limit:
        lines.append(f"suspicious    … and {len(remarks) - limit} more")
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """A file's own words may hold line breaks and a terminal's control sequences; here they are only text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _counts(counter: Counter) -> str:  # type: ignore[type-arg]
    return ", ".join(f"{value} ×{count}" for value, count in counter.most_common(8)) or "none"
