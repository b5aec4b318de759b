"""Which family of diffusion models names belong to, by the tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache

from .families import Family, Size, Weight
from .names import flat, split
from .tables import FAMILIES

# A list's name and the number of a block: all blocks of a list have the same names within, but for the first of some.
_BLOCK = re.compile(r"^(\w*?(?:blocks|block|layers|refiner))_[1-9]\d*_")


def families_of(paths: Iterable[str]) -> list[Family]:
    """The families that know the most of ``paths``, which are as `names.split` gives them, of either side.

    Several if their tables know equally many; none if no table knows half of them.

    >>> any(family.name == "Flux" for family in families_of(["double_blocks_0_img_mod_lin", "vector_in_in_layer"]))
    True
    """
    distinct = set(paths)
    known: Counter[str] = Counter()
    for path in distinct:
        known.update(_families_with(_BLOCK.sub(r"\1_1_", path)))
    most = max(known.values(), default=0)
    return [family for name, family in FAMILIES.items() if known[name] == most and 2 * most >= len(distinct) > 0]


def family_of(paths: Iterable[str], name: str = "") -> Family | None:
    """The one of `families_of` that is called ``name``, or has a model of that name; else the first; or None."""
    families = families_of(paths)
    named = (f for f in families if name == f.name or name in (size.name for size in f.sizes))
    return next(named, families[0] if families else None)


def diffusion_paths(keys: Iterable[str]) -> dict[str, str]:
    """The keys of a diffusion model's weights -> their paths, as `names.split` gives them; norms are left out.

    A whole checkpoint has text encoders and more beside it, and a prefix that says so; a bare file has nothing else.
    """
    modules = {key: key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    parts = {key: split(name) for key, name in modules.items() if "norm" not in name.rpartition(".")[2]}
    component = "unet" if any(c == "unet" for c, _ in parts.values()) else ""
    return {key: path for key, (c, path) in parts.items() if c == component}


def known_weights(keys: Iterable[str]) -> Iterator[tuple[str, Family, Weight]]:
    """(key, family, weight) for each of a model's weights, by the original's names, in every family that these fit."""
    paths = diffusion_paths(keys)
    for family in families_of(paths.values()):
        for key, path in paths.items():
            if (weight := family.weight(path)) is not None:
                yield key, family, weight


@lru_cache(maxsize=4096)
def _families_with(path: str) -> tuple[str, ...]:
    return tuple(name for name, family in FAMILIES.items() if family.knows(path))


def native_path(family: Family, path: str) -> str | None:
    """What the original calls a weight that either side calls ``path``, flat; None if the table lacks it."""
    if family.weight(path):
        return path
    place = family.part(path)
    return flat(place[0]) if place else None


def counts_of(family: Family, paths: Iterable[str]) -> tuple[int, ...]:
    """How many blocks of each of the family's lists the paths, of either side, are in."""
    return family.counted(native for path in paths if (native := native_path(family, path)))


def size_of(family: Family, counts: tuple[int, ...], width: int | None = None) -> Size | None:
    """The one of a family's models that has this many blocks, or more if none has as many; None if several have.

    Args:
        counts: as `counts_of` gives them; an adapter need not reach the last blocks.
        width: the model's, if it is known.
    """
    sizes = [s for s in family.sizes if None in (width, s.width) or s.width == width]
    candidates = [s for s in sizes if s.blocks == counts] or [s for s in sizes if s.reaches(counts)]
    return candidates[0] if len(candidates) == 1 else None
