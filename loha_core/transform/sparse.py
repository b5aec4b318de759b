"""Merging by elements: TIES, DARE and magnitude pruning. Only here are updates written out, a layer at a time.

TIES-Merging (arXiv 2306.01708): keep the largest elements, elect a sign for each, average those that agree with it.
DARE (arXiv 2311.03099): drop elements at random and scale up what stays.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoHaError, check_number
from . import lowrank

METHODS = ("ties", "dare", "dare_ties", "magnitude_prune")
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Sparse:
    """Products of one layer -> their combination, as a product.

    Attributes:
        method: out of METHODS.
        density: fraction of the elements that is kept, in (0, 1].
        majority_sign: "total" (the sign of the sum) or "frequency" (of the majority).
        seed: of DARE's choice; the layer's name goes into it, so that layers differ and their order does not matter.

    Raises:
        LoHaError: says which value is wrong.
    """

    method: str
    density: float = 0.5
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.majority_sign not in SIGNS:
            raise LoHaError(f"{self.method!r}, {self.majority_sign!r}: there are {', '.join(METHODS + SIGNS)}")
        check_number("density", self.density, above=0, maximum=1)

    def apply(
        self, name: str, products: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        return lowrank.as_product(self.combine([u @ v for u, v in products], weights, random))

    def combine(self, updates: Sequence[Tensor], weights: Sequence[float], random: torch.Generator) -> Tensor:
        """Updates of one shape, one dtype -> the merged one, of that shape."""
        if self.method.startswith("dare"):
            kept = [keep_random(update, self.density, random) for update in updates]
        else:
            kept = [keep_largest(update, self.density) for update in updates]
        if not self.method.endswith("ties"):
            return sum_(kept, weights)
        votes = sum_(kept if self.majority_sign == "total" else [update.sign() for update in kept], [1.0] * len(kept))
        elected = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
        agree = [update.sign() == elected for update in kept]
        total = sum_([update * mask for update, mask in zip(kept, agree, strict=True)], weights)
        return total / sum_([mask.to(total.dtype) for mask in agree], [1.0] * len(agree)).clamp_min_(1)


def keep_largest(update: Tensor, density: float) -> Tensor:
    """The ⌊density·numel⌋ elements of the largest magnitude, the others zero."""
    if density >= 1:
        return update
    magnitude = update.abs().flatten()
    chosen = torch.topk(magnitude, int(density * update.numel()), sorted=False).indices
    kept = torch.zeros_like(magnitude)
    kept[chosen] = update.flatten()[chosen]
    return kept.view_as(update)


def keep_random(update: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Each element with probability ``density``, divided by it; the others zero."""
    if density >= 1:
        return update
    return update * torch.bernoulli(torch.full_like(update, density), generator=random) / density


def sum_(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = updates[0] * weights[0]
    for update, weight in zip(updates[1:], weights[1:], strict=True):
        total.add_(update, alpha=weight)
    return total
