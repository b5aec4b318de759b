"""How strongly an adapter acts on each weight: multipliers by block of the model and by the name of the layer.

`naming.layouts` says which blocks a model has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import LoHaError, about
from .naming.layouts import (
    ALL,
    BASE,
    DEFAULT_FAMILIES,
    FAMILIES,
    LAYOUTS,
    PARTS,
    THIRDS,
    Layout,
    block_of_key,
    part_named,
)
from .naming.patterns import checked

__all__ = ["FAMILIES", "LAYOUTS", "PRESETS", "BlockStrength", "Layout", "Rule", "Setting", "block_of_key"]

_ALIASES = {"MID": "M", "JOINT": "J", "DOUBLE": "D", "SINGLE": "S"}
_SELECTOR = re.compile(r"([a-z_]+?)(?:(\d+)(?:-(?:([a-z_]+?))?(\d+))?)?", re.IGNORECASE)
_NO_END = 10**6

# Settings to start from, written as a user would write them.
PRESETS = {
    "ALL": "ALL=1",
    "NONE": "ALL=0",
    "INALL": "ALL=0, BASE=1, IN=1",
    "MIDALL": "ALL=0, BASE=1, MID=1",
    "OUTALL": "ALL=0, BASE=1, OUT=1",
    "DOUBLE": "ALL=0, BASE=1, DOUBLE=1",
    "SINGLE": "ALL=0, BASE=1, SINGLE=1",
    **{third: f"ALL=0, BASE=1, {third}=1" for third in THIRDS},
}


@dataclass(frozen=True)
class Setting:
    """A multiplier for the blocks ``start`` … ``stop`` of a part, or for BASE, or for ALL."""

    part: str
    start: int
    stop: int  # inclusive
    value: float

    def covers(self, block: tuple[str, int] | None) -> bool:
        if self.part == ALL or block is None:
            return self.part in (ALL, BASE)
        return self.part == block[0] and self.start <= block[1] <= self.stop


@dataclass(frozen=True)
class Rule:
    """A multiplier for every layer whose name the expression is found in."""

    pattern: re.Pattern[str]
    value: float


@dataclass(frozen=True)
class BlockStrength:
    """The multiplier of an adapter's strength for each weight: that of its block times that of its layer.

    Of several settings that cover a block the last counts, and of several rules that match a layer the last; what
    none speaks of keeps 1.

    >>> strength = BlockStrength.parse("SD1.5", "ALL=0, OUT03-OUT05=0.5", "attn2: 0.1")
    >>> strength("diffusion_model.output_blocks.4.1.proj_in.weight")
    0.5
    >>> strength("diffusion_model.output_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")
    0.05
    """

    settings: tuple[Setting, ...] = ()
    rules: tuple[Rule, ...] = ()
    layout: Layout | None = None  # of the model it is meant for, if that is known

    def __call__(self, key: str, name: str = "") -> float:
        """The multiplier for one weight.

        Args:
            key: the weight's key in the model, as ComfyUI names it.
            name: the layer's name in the adapter's file.
        """
        return self.of_block(block_of_key(key, self.layout)) * self.of_layer(key, name)

    def of_block(self, block: tuple[str, int] | None) -> float:
        return next((s.value for s in reversed(self.settings) if s.covers(block)), 1.0)

    def of_layer(self, key: str, name: str = "") -> float:
        matching = (r.value for r in reversed(self.rules) if r.pattern.search(key) or r.pattern.search(name))
        return next(matching, 1.0)

    def table(self) -> dict[str, float]:
        """Block -> multiplier, BASE first; whole parts where the layout is not known."""
        if self.layout is None:
            parts = dict.fromkeys((*PARTS.values(), *(s.part for s in self.settings if s.part not in (ALL, BASE))))
            ranges = {_range_label(s): s.value for s in self.settings if s.part not in (ALL, BASE)}
            whole_parts = {part: self.of_block((part, _NO_END)) for part in parts}
            return {BASE: self.of_block(None), **whole_parts, **ranges}
        blocks = {f"{p}{n:02d}": self.of_block((p, n)) for p, count in self.layout.parts for n in range(count)}
        return {BASE: self.of_block(None), **blocks}

    @classmethod
    def parse(
        cls, model: str | Layout | Iterable[str] | None, vector: str = "", rules: str = "", *, preset: str = ALL
    ) -> BlockStrength:
        """From what a user writes.

        Args:
            model: a family's name out of FAMILIES, a layout, the keys of the model's weights, or None if it is not
                known.
            vector: one number for each block in order, as block-weight tools write it ("1,0,0,…"; a name before a
                colon is ignored), or named ("IN=0.5, OUT03-OUT05=0, BASE=1"). A block that a vector of numbers leaves
                out goes with the one listed before it in its part (the first one listed, if none is before it); a
                part that it leaves out takes the last number. Named settings start from the preset.
            rules: lines of "regular expression: multiplier", searched in the model's and in the file's name of a
                layer. Empty lines and lines that begin with # are ignored.
            preset: out of PRESETS.

        Raises:
            LoHaError: says which value or line is wrong.
        """
        layout = _layout(model)
        if preset not in PRESETS:
            raise LoHaError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
        parsed = tuple(_rule(number, line) for number, line in enumerate(rules.splitlines(), 1) if _is_rule(line))
        text = vector.rpartition(":")[2].strip().strip(",")
        if text and "=" not in text:
            values = [_number(entry, f"value {n} of the vector") for n, entry in enumerate(text.split(","), 1)]
            layout, labels = _labels_of_vector(layout, len(values))
            return cls(tuple(_vector_settings(labels, values, layout)), parsed, layout)
        with about(f"preset {preset}"):
            settings = [s for entry in PRESETS[preset].split(",") for s in _named_settings(entry, layout)]
        settings += [s for entry in re.split(r"[,\n]", text) if entry.strip() for s in _named_settings(entry, layout)]
        return cls(tuple(settings), parsed, layout)


def _layout(model: str | Layout | Iterable[str] | None) -> Layout | None:
    if model is None or isinstance(model, Layout):
        return model
    if not isinstance(model, str):
        return Layout.of_keys(model)
    if model not in LAYOUTS:
        raise LoHaError(f"no model family {model!r}; there are {', '.join(FAMILIES)}")
    return LAYOUTS[model]


def _is_rule(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _number(text: str, *where: str) -> float:
    """A finite number out of ``text``, or an error that says where it stands."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    hint = ""
    if text.strip().upper() in ("A", "B", "R", "U"):
        hint = "; the letters A, B, R and U of other block-weight tools must be replaced by numbers"
    elif " " in text.strip():
        hint = "; separate values by commas"
    with about(*where):
        raise LoHaError(f"expected a number such as 0.5, found {text.strip()!r}{hint}")


def _rule(number: int, line: str) -> Rule:
    with about(f"rule in line {number}"):
        pattern, colon, value = (text.strip() for text in line.rpartition(":"))
        if not colon or not pattern:
            raise LoHaError(f"expected 'expression: number' such as 'attn2.*: 0.3', found {line!r}")
        multiplier = _number(value)
        return Rule(checked(pattern, anywhere=True), multiplier)


def _labels_of_vector(layout: Layout | None, length: int) -> tuple[Layout, tuple[str, ...]]:
    """The layout that a vector of this many numbers is for, and the label of each number."""
    layouts = [layout] if layout else [LAYOUTS[name] for name in DEFAULT_FAMILIES]
    matches = _of_length(layouts, length) or _of_length([] if layout else LAYOUTS.values(), length)
    if len(matches) == 1:
        return matches[0]
    if matches:
        families = " or ".join(match.family for match, _ in matches)
        raise LoHaError(f"a vector of {length} numbers may mean {families}: choose the family, or connect the model")
    known = "; ".join(f"{c.family}: {', '.join(str(n) for n in sorted(map(len, c.vectors())))}" for c in layouts)
    more = "" if layout else "; other families have lengths of their own"
    what = "number" if length == 1 else "numbers"
    raise LoHaError(
        f"the vector has {length} {what}; known lengths are {known}{more}. "
        f"Or name the blocks: {'OUT=0.5' if layout is None else layout.labels()[0] + '=0.5'}, BASE=1"
    )


def _of_length(layouts: Iterable[Layout], length: int) -> list[tuple[Layout, tuple[str, ...]]]:
    """Those with vectors of this length, and their labels; one of several whose blocks are the same."""
    distinct: dict[tuple[object, ...], tuple[Layout, tuple[str, ...]]] = {}
    for layout in layouts:
        for labels in layout.vectors():
            if len(labels) == length:
                distinct.setdefault((tuple(layout.lists), layout.parts, labels), (layout, labels))
    return list(distinct.values())


def _vector_settings(labels: tuple[str, ...], values: list[float], layout: Layout) -> Iterable[Setting]:
    """A vector's numbers as settings, each for its block and the unlisted ones that follow it in its part."""
    base = values[0] if labels[0] == BASE else 1.0
    yield Setting(ALL, 0, 0, values[-1])
    yield Setting(BASE, 0, 0, 1.0)
    yield from (Setting(part, 0, _NO_END, base) for part in sorted(layout.side_parts()))
    seen: set[str] = set()
    for label, value in zip(labels, values, strict=True):
        part = label.rstrip("0123456789")
        start = int(label[len(part) :]) if part in seen else 0
        seen.add(part)
        yield Setting(part, start, _NO_END, value)


def _named_settings(entry: str, layout: Layout | None) -> list[Setting]:
    """'IN=0.5', 'IN04=1', 'OUT03-OUT05=0' or 'LATE=0.5' as settings."""
    selector, equals, value = (text.strip() for text in entry.partition("="))
    match = _SELECTOR.fullmatch(selector)
    if not equals or not match:
        raise LoHaError(f"expected 'block=number' such as IN04=0.5 or OUT03-OUT05=0, found {entry.strip()!r}")
    multiplier = _number(value, selector)
    part = _part(match[1], layout)
    if part in (ALL, BASE) and match[2] is None:
        return [Setting(part, 0, 0, multiplier)]
    if part in THIRDS and match[2] is None:
        if layout is None:
            raise LoHaError(f"which blocks {part} means, the model tells: choose the family, or connect it")
        return [Setting(*stretch, multiplier) for stretch in layout.thirds()[part]]
    counts = dict(layout.parts) if layout else dict.fromkeys(PARTS.values(), _NO_END)
    start = int(match[2] or 0)
    stop = int(match[4]) if match[4] else start if match[2] else _NO_END
    last = max(start, stop) if match[2] else start
    if part not in counts or last >= counts[part]:
        blocks = f"{layout.family} has {layout}" if layout else "connect the model to name blocks of its own"
        raise LoHaError(f"no block {selector}; {blocks}")
    if stop < start or (match[3] and _part(match[3], layout) != part):
        raise LoHaError(f"{selector}: a range goes up within one part, such as IN04-IN08")
    return [Setting(part, start, stop, multiplier)]


def _part(text: str, layout: Layout | None) -> str:
    """A part as users may spell it -> as it is called here."""
    known = part_named(text, layout) if layout else None
    return known or _ALIASES.get(text.upper(), text.upper())


def _range_label(setting: Setting) -> str:
    if setting.start == 0 and setting.stop == _NO_END:
        return setting.part
    last = "" if setting.stop == setting.start else f"-{setting.stop:02d}"
    return f"{setting.part}{setting.start:02d}{last}"
