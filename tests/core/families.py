"""Adapters for every family in the tables, small, with the names of either side."""

from __future__ import annotations

import torch

from loha_core import Adapter, LoHaFactors
from loha_core.naming.families import Family, Weight
from loha_core.naming.names import flat, split

COLUMNS = 8


def weights(family: Family, blocks: int = 2) -> dict[str, tuple[int, int]]:
    """The original's weights -> a shape that the spans of their parts fit, with the first blocks of every list."""
    found: dict[str, tuple[int, int]] = {}
    for row in family.rows:
        for number in range(blocks if "N" in row.native.split(".") else 1):
            name = ".".join(str(number) if part == "N" else part for part in row.native.split("."))
            weight = family.weight(split(flat(name))[1])
            assert weight is not None and weight.name == name, name
            found[name] = (_rows(weight), COLUMNS)
    return found


def _rows(weight: Weight) -> int:
    spans = [part.span for part in weight.parts if part.span]
    if not spans:
        return 6
    if spans[0].swapped:
        return 2 * COLUMNS
    a, b = max((span.stop for span in spans), key=lambda stop: stop[::-1])
    return 2 * COLUMNS if b else round(a * COLUMNS)


def factors(shape: tuple[int, int], rank: int, alpha: float, seed: int) -> LoHaFactors:
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, *size, generator=rng) for size in ((shape[0], rank), (rank, shape[1])))
    return LoHaFactors(a[0], b[0], a[1], b[1], alpha)


def native(family: Family, *, rank: int = 2, alpha: float = 3.0, seed: int = 0) -> Adapter:
    """A LoHa for all of the original's weights, under kohya's names."""
    layers = {
        f"lora_unet_{flat(name)}": factors(shape, rank, alpha, seed + n)
        for n, (name, shape) in enumerate(weights(family).items())
    }
    return Adapter(layers, source=f"{family.name}.safetensors")
