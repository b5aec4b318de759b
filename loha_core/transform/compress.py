"""How a product U·V is written as a layer: exactly, truncated, or fitted by a LoHa whose halves are both free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import LoHaError
from ..factors import Layer, LoHaFactors, LoRAFactors
from ..formats import container
from . import fit, lowrank
from .lowrank import product, size_of
from .report import LayerError

Method = Literal["exact", "svd", "fit"]
Kind = Literal["loha", "lora"]
METHODS = ("exact", "svd", "fit")
KINDS = ("loha", "lora")


@dataclass(frozen=True)
class Factoring:
    """The form that results take.

    Attributes:
        method: "exact" (all columns), "svd" (the best of a rank; a LoHa then carries it in its first half, its second
            is ones) or "fit" (a true LoHa of ``rank``, of matrix rank up to rank²).
        rank, energy, max_error: one of them for "svd"; "fit" needs a rank, "exact" none.
        kind: "loha" or "lora" layers.
        dtype: of the results; float32 (float64 for float64 inputs) by default.
        seed: of the random starts of "fit".

    Raises:
        LoHaError: says which value is wrong.
    """

    method: Method = "svd"
    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    kind: Kind = "loha"
    dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.kind not in KINDS:
            raise LoHaError(f"{self.method!r} as {self.kind!r}: there are {', '.join(METHODS)}; {', '.join(KINDS)}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise LoHaError(f"factors are floating point; they cannot be {self.dtype}")
        given = [bound for bound in (self.rank, self.energy, self.max_error) if bound is not None]
        if self.method == "exact":
            if given:
                raise LoHaError("an exact result has the rank that it has; choose svd or fit to give one")
            return
        lowrank.check_bound(self.rank, self.energy, self.max_error)
        if self.method == "fit" and (self.rank is None or self.kind == "lora"):
            raise LoHaError("fit makes LoHa layers of a rank; give rank, or choose svd for LoRA, energy or max_error")

    def __call__(self, name: str, u: Tensor, v: Tensor, shape: tuple[int, ...]) -> tuple[Layer, LayerError]:
        """U·V (o, R)·(R, n) as a layer for a weight of ``shape``, (o, i, *k) or (o, n).

        Raises:
            LoHaError: values that are not finite, also after the cast.
        """
        target, columns, size = (u, v), u.shape[1], size_of(name, u, v)
        beyond = 0.0
        if self.rank is not None and (whole := lowrank.dense(u, v)) is not None:
            # Written out, an update has its whole rank; what is looked for lies in its leading range.
            u, v = lowrank.range_of(whole, (self.rank**2 if self.method == "fit" else self.rank) + 32, steps=3)
            beyond = max(0.0, size**2 - lowrank.norm(u, v) ** 2) ** 0.5
        error, lora_error = 0.0, None
        if self.method == "fit" and size > 0:
            assert self.rank is not None
            found = fit.fit(u, v, self.rank, seed=self.seed)
            layer: Layer = found.factors
            error, lora_error = found.error, found.lora_error
        else:
            if self.method != "exact":
                u, v, error = lowrank.truncate(u, v, self.rank, self.energy, self.max_error)
            layer = as_layer(u, v, self.kind, shape)
        if beyond:
            kept = max(0.0, size**2 - beyond**2)  # the rest is orthogonal to it
            error = ((error**2 * kept + beyond**2) ** 0.5) / size
            lora_error = lora_error and ((lora_error**2 * kept + beyond**2) ** 0.5) / size
        if self.dtype is not None and self.dtype != layer.dtype:
            layer = cast(name, layer, self.dtype)
            error = lowrank.distance(target, product(layer)) / (size or 1)
        return layer, LayerError(name, layer.rank, columns, size, error, lora_error)


def as_layer(u: Tensor, v: Tensor, kind: str, shape: tuple[int, ...]) -> Layer:
    """U·V as a LoHa whose second half is all ones, or as a LoRA whose factors are shaped like the weight."""
    if kind == "loha":
        return LoHaFactors.from_product(u, v)
    kernel = shape[2:]
    return LoRAFactors(u.reshape(*u.shape, *[1] * len(kernel)), v.reshape(v.shape[0], shape[1], *kernel), u.shape[1])


def cast(name: str, layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer in another dtype; alpha stays as it is.

    Raises:
        LoHaError: a value is too large for it.
    """
    tensors = container.cast(layer.tensors(), dtype, Path(name))
    if isinstance(layer, LoHaFactors):
        return replace(layer, **tensors)  # type: ignore[arg-type]
    return LoRAFactors.of(tensors, layer.alpha)
