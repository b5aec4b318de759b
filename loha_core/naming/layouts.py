"""The blocks of a model: what they are called, how many there are, and in which of them a weight lies.

A block is named by its part and number: a U-Net has ``IN00``…, ``M00``… and ``OUT00``…, other families what
`naming.tables` says, such as Flux ``D00``… and ``S00``…. A model of no family calls its parts by its module lists, such
as ``blocks07``. Everything outside the blocks, text encoders included, is ``BASE``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..errors import LoHaError
from .families import Family
from .names import flat
from .recognise import diffusion_paths, families_of
from .tables import FAMILIES as TABLES

BASE, ALL = "BASE", "ALL"
# Module lists as ComfyUI names them -> the short name that users of block weights know, whatever the family.
PARTS = {
    "input_blocks": "IN",
    "middle_block": "M",
    "output_blocks": "OUT",
    "joint_blocks": "J",
    "double_blocks": "D",
    "single_blocks": "S",
}
_MODULE_LISTS = r"middle_block|\w*blocks|\w*layers"
THIRDS = ("EARLY", "MIDDLE", "LATE")


@lru_cache(maxsize=256)
def _pattern(lists: str) -> re.Pattern[str]:
    return re.compile(rf"(?:model\.)?diffusion_model\.(?:transformer\.)?({lists})\.(?:block)?(\d+)\.")


def block_of_key(key: str, layout: Layout | None = None) -> tuple[str, int] | None:
    """The part and number of the block that a weight of ComfyUI's lies in; None for BASE.

    Args:
        layout: of the model, for what its family calls the part.

    >>> block_of_key("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")
    ('IN', 4)
    >>> block_of_key("diffusion_model.time_embed.0.weight") is None
    True
    """
    if layout and (match := layout.pattern.match(key)):
        return layout.lists[match[1]], int(match[2])
    match = _pattern(_MODULE_LISTS).match(key)
    return (PARTS.get(match[1], match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Layout:
    """The blocks of a model: how many there are in each part, in the order in which the model runs them.

    Args:
        family: a name in LAYOUTS, one of the tables' families (with other counts), or "this model".
    """

    family: str
    parts: tuple[tuple[str, int], ...]

    @property
    def table(self) -> Family | None:
        """The names of the family's weights; None for U-Nets and models of no family."""
        return TABLES.get(_TABLE_OF.get(self.family, self.family))

    @cached_property
    def lists(self) -> Mapping[str, str]:
        """The model's module lists, dotted -> the parts that they are."""
        table = self.table
        known = {label: module for label, module in table.blocks} if table else {v: k for k, v in PARTS.items()}
        return {known.get(part, part): part for part, _ in self.parts}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return _pattern("|".join(map(re.escape, self.lists)))

    @classmethod
    def of_keys(cls, keys: Iterable[str]) -> Layout:
        """From the keys of a model's weights, as ComfyUI names them.

        Raises:
            LoHaError: no key lies in a block.
        """
        keys = list(keys)
        counts = _counted(keys, None)
        families = [] if "IN" in counts else families_of(diffusion_paths(keys).values())
        layouts = [layout for family in families if (layout := cls._of_table(family, keys)).parts]
        if layouts:
            return next((layout for layout in layouts if layout.family in LAYOUTS), layouts[0])
        if not counts:
            raise LoHaError("the connected model has no numbered blocks; leave the vector and the preset at ALL")
        return cls.of_parts(counts.items())

    @classmethod
    def _of_table(cls, family: Family, keys: list[str]) -> Layout:
        """The parts in the table's order, and after them the lists that the table does not have."""
        counts = _counted(keys, cls(family.name, _parts(family, (1,) * len(family.blocks))))
        in_table = {label: counts.pop(label) for label, _ in family.blocks if label in counts}
        return cls.of_parts((in_table | counts).items(), family.name)

    @classmethod
    def of_parts(cls, counts: Iterable[tuple[str, int]], family: str = "") -> Layout:
        """From its parts and how many blocks each has.

        Args:
            family: one of the tables'. The name is that of its one model that has these, if there is one.
        """
        parts = tuple(counts)
        known = [layout for layout in LAYOUTS.values() if layout.parts == parts]
        if family:
            known = [layout for layout in known if _TABLE_OF.get(layout.family) == family]
        if known and (len(known) == 1 or known[0].family in DEFAULT_FAMILIES):
            return known[0]
        return cls(family or "this model", parts)

    def labels(self) -> list[str]:
        return [f"{part}{number:02d}" for part, count in self.parts for number in range(count)]

    def thirds(self) -> dict[str, list[tuple[str, int, int]]]:
        """EARLY, MIDDLE and LATE -> (part, first, last) of each part's stretch in that third of the model's run."""
        blocks = [(part, number) for part, count in self.parts for number in range(count)]
        edges = [round(n * len(blocks) / 3) for n in range(4)]
        thirds: dict[str, list[tuple[str, int, int]]] = {}
        for name, start, stop in zip(THIRDS, edges, edges[1:], strict=False):
            within = blocks[start:stop]
            numbers = {part: [n for p, n in within if p == part] for part, _ in within}
            thirds[name] = [(part, each[0], each[-1]) for part, each in numbers.items()]
        return thirds

    def side_parts(self) -> set[str]:
        """Parts that count as BASE for tools that know only lists called blocks or layers: refiners before them."""
        return {part for module, part in self.lists.items() if not re.fullmatch(_MODULE_LISTS, module)}

    def vectors(self) -> list[tuple[str, ...]]:
        """The labels that a vector's numbers are for, one tuple for every length in use; no two have one length."""
        labels, side = (*self.labels(),), self.side_parts()
        main = tuple(f"{part}{number:02d}" for part, n in self.parts if part not in side for number in range(n))
        is_unet = "input_blocks" in self.lists  # where as many numbers as blocks have long meant something else
        candidates = [*_circulating(self), (BASE, *labels), *([] if is_unet else [labels])]
        if side and main:
            candidates += [(BASE, *main), main]
        by_length: dict[int, tuple[str, ...]] = {}
        for candidate in candidates:
            by_length.setdefault(len(candidate), candidate)
        return list(by_length.values())

    def __str__(self) -> str:
        return ", ".join(f"{part}00…{part}{count - 1:02d}" if count > 1 else f"{part}00" for part, count in self.parts)


def _parts(family: Family, counts: Iterable[int]) -> tuple[tuple[str, int], ...]:
    return tuple((label, n) for (label, _), n in zip(family.blocks, counts, strict=True) if n)


def _counted(keys: Iterable[str], layout: Layout | None) -> dict[str, int]:
    """Part -> how many blocks of it the keys are in."""
    counts: dict[str, int] = {}
    for key in keys:
        if block := block_of_key(key, layout):
            counts[block[0]] = max(counts.get(block[0], 0), block[1] + 1)
    return counts


# The names that saved workflows have for their families come first, and stay.
_DEFAULT_LAYOUTS = (
    Layout("SD1.5", (("IN", 12), ("M", 3), ("OUT", 12))),
    Layout("SDXL", (("IN", 9), ("M", 3), ("OUT", 9))),
    Layout("SD3", (("J", 24),)),
    Layout("SD3.5 large", (("J", 38),)),
    Layout("Flux", (("D", 19), ("S", 38))),
)
_TABLE_OF = {size.name: family.name for family in TABLES.values() for size in family.sizes}
LAYOUTS = {layout.family: layout for layout in _DEFAULT_LAYOUTS} | {
    size.name: Layout(size.name, _parts(family, size.blocks)) for family in TABLES.values() for size in family.sizes
}
FAMILIES = tuple(LAYOUTS)
# Whose vector it is, if only its length is known; of the others where it is none of these.
DEFAULT_FAMILIES = tuple(layout.family for layout in _DEFAULT_LAYOUTS)

# The vectors in circulation, besides those that simply list all: LoRAs without convolutions (17, 12), LyCORIS as
# sd-webui-lora-block-weight counts (26, 20) and as Inspire counts (27, 21), and Flux's.
_VECTORS = {
    "SD1.5": (
        "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03-11",
        "BASE IN00-11 M00 OUT00-11",
        "BASE IN01-11 M00-02 OUT00-11",
    ),
    "SDXL": ("BASE IN04 IN05 IN07 IN08 M00 OUT00-05", "BASE IN00-08 M00 OUT00-08", "BASE IN01-08 M00-02 OUT00-08"),
    "Flux": ("D00-18", "D00-18 S00-37", "BASE D00-18", "BASE D00-16", "BASE D00-18 S00-34"),
}


def _circulating(layout: Layout) -> list[tuple[str, ...]]:
    """Those of the family that has these blocks: Chroma's are Flux's."""
    family = next((name for name in _VECTORS if LAYOUTS[name].parts == layout.parts), "")
    return [tuple(_expand(text)) for text in _VECTORS.get(family, ())]


def _expand(text: str) -> Iterator[str]:
    """'BASE IN00-02' -> BASE, IN00, IN01, IN02."""
    for word in text.split():
        first, _, last = word.partition("-")
        part = first.rstrip("0123456789")
        numbers = range(int(first[len(part) :]), int(last) + 1) if last else None
        yield from [first] if numbers is None else [f"{part}{number:02d}" for number in numbers]


def part_named(text: str, layout: Layout) -> str | None:
    """The part that a user means by its name or its module list, in any case; None if the model has none such."""
    parts = {PARTS[module]: part for module, part in layout.lists.items() if module in PARTS}
    parts |= {flat(module).upper(): part for module, part in layout.lists.items()}
    parts |= {part.upper(): part for part, _ in layout.parts}
    return parts.get(text.upper())
