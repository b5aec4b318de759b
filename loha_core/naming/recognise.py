"""Which family of diffusion models names are of, by the tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from .families import Family, Size
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
        known.update(_knowing(_BLOCK.sub(r"\1_1_", path)))
    most = max(known.values(), default=0)
    return [family for name, family in FAMILIES.items() if known[name] == most and 2 * most >= len(distinct) > 0]


def family_of(paths: Iterable[str], name: str = "") -> Family | None:
    """The one of `families_of` that ``name``, a family's or one of its models', speaks of; else the first; or None."""
    found = families_of(paths)
    named = (f for f in found if name == f.name or name in (size.name for size in f.sizes))
    return next(named, found[0] if found else None)


def diffusion_paths(keys: Iterable[str]) -> dict[str, str]:
    """The weights' keys that are of the diffusion model -> their paths, as `names.split` gives them.

    A whole checkpoint has text encoders and more beside it, and a prefix that says so; a bare file has nothing else.
    """
    found = {key: split(key.removesuffix(".weight")) for key in keys if key.endswith(".weight")}
    wanted = "unet" if any(component == "unet" for component, _ in found.values()) else ""
    return {key: path for key, (component, path) in found.items() if component == wanted}


@lru_cache(maxsize=4096)
def _knowing(path: str) -> tuple[str, ...]:
    return tuple(name for name, family in FAMILIES.items() if family.knows(path))


def native_path(family: Family, path: str) -> str | None:
    """What the original calls a weight that either side calls ``path``, flat; None if the table lacks it."""
    if family.weight(path):
        return path
    found = family.part(path)
    return flat(found[0]) if found else None


def counts_of(family: Family, paths: Iterable[str]) -> tuple[int, ...]:
    """How many blocks of each of the family's lists the paths, of either side, are in."""
    return family.counted(native for path in paths if (native := native_path(family, path)))


def size_of(family: Family, counts: tuple[int, ...], width: int | None = None) -> Size | None:
    """The one of a family's models that has this many blocks, or more if none has as many; None if several have.

    Args:
        counts: as `counts_of` gives them; an adapter need not reach the last blocks.
        width: the model's, if it is known.
    """
    fitting = [s for s in family.sizes if None in (width, s.width) or s.width == width]
    exact = [s for s in fitting if s.blocks == counts]
    larger = [s for s in fitting if all(has >= least for has, least in zip(s.blocks, counts, strict=True))]
    found = exact or larger
    return found[0] if len(found) == 1 else None
