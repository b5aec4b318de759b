"""How a product U·V is written as a layer: exactly, truncated, or fitted by a LoHa whose halves are both free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LoHaError, about
from ..factors import Layer, LoHaFactors, LoRAFactors
from ..formats import container
from . import fit, lowrank
from .report import LayerError

Method = Literal["exact", "svd", "fit"]
Kind = Literal["loha", "lora"]
METHODS = ("exact", "svd", "fit")
KINDS = ("loha", "lora")


@dataclass(frozen=True)
class Compression:
    """The form that resulting layers take.

    Attributes:
        method: "exact" (all columns), "svd" (the best approximation of a rank; a LoHa then carries it in its first
            half, its second is ones) or "fit" (a true LoHa of ``rank``, of matrix rank up to rank²).
        rank, energy, max_error: one of them for "svd": the rank, the share of ‖ΔW‖² to keep, or the largest relative
            error. "fit" needs a rank, "exact" takes none.
        kind: "loha" or "lora" layers (not with "fit").
        dtype: of the results; float32 (float64 for float64 inputs) by default.
        seed: of the random starts of "fit".

    Raises:
        LoHaError: says which value is wrong.

    >>> Compression(rank=8).method
    'svd'
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
        check_dtype(self.dtype)
        if self.method == "exact":
            if any(bound is not None for bound in (self.rank, self.energy, self.max_error)):
                raise LoHaError("an exact result has the rank that it has; choose svd or fit to give one")
            return
        lowrank.check_bound(self.rank, self.energy, self.max_error)
        if self.method == "fit" and (self.rank is None or self.kind == "lora"):
            raise LoHaError("fit makes LoHa layers of a rank; give rank, or choose svd for LoRA, energy or max_error")

    def details(self) -> dict[str, Any]:
        """What a file's history says of it."""
        return {"method": self.method, "rank": self.rank, "energy": self.energy, "max_error": self.max_error}

    def compress(self, name: str, u: Tensor, v: Tensor, shape: tuple[int, ...]) -> tuple[Layer, LayerError]:
        """U·V (o, R)·(R, n) as a layer for a weight of ``shape``, (o, i, *k) or (o, n).

        Raises:
            LoHaError: values that are not finite, also after the cast.
        """
        target, columns, size = (u, v), u.shape[1], lowrank.finite_norm(name, u, v)
        outside = 0.0
        if self.rank is not None and (matrix := lowrank.dense(u, v)) is not None:
            # A dense update has full rank; its best approximation lies in its leading range.
            u, v = lowrank.range_of(matrix, (self.rank**2 if self.method == "fit" else self.rank) + 32, steps=3)
            outside = max(0.0, size**2 - lowrank.norm(u, v) ** 2) ** 0.5
        error, lora_error = 0.0, None
        if self.method == "fit" and size > 0:
            assert self.rank is not None
            fitted = fit.fit(u, v, self.rank, seed=self.seed)
            layer: Layer = fitted.factors
            error, lora_error = fitted.error, fitted.lora_error
        else:
            if self.method != "exact":
                u, v, error = lowrank.truncate(u, v, self.rank, self.energy, self.max_error)
            layer = as_layer(u, v, self.kind, shape)
        if outside:
            inside = max(0.0, size**2 - outside**2)  # the range and what lies outside are orthogonal
            error = ((error**2 * inside + outside**2) ** 0.5) / size
            lora_error = lora_error and ((lora_error**2 * inside + outside**2) ** 0.5) / size
        if self.dtype is not None and self.dtype != layer.dtype:
            layer = cast(name, layer, self.dtype)
            error = lowrank.distance(target, lowrank.product(layer)) / (size or 1)
        return layer, LayerError(name, layer.rank, columns, size, error, lora_error)


def as_layer(u: Tensor, v: Tensor, kind: str, shape: tuple[int, ...]) -> Layer:
    """U·V as a LoHa whose second half is all ones, or as a LoRA whose factors are shaped like the weight."""
    if kind == "loha":
        return LoHaFactors.from_product(u, v)
    kernel = shape[2:]
    return LoRAFactors(u.reshape(*u.shape, *[1] * len(kernel)), v.reshape(v.shape[0], shape[1], *kernel), u.shape[1])


def kind_of(layer: Layer) -> Kind:
    return "loha" if isinstance(layer, LoHaFactors) else "lora"


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse what factors cannot be."""
    if dtype is not None and not dtype.is_floating_point:
        raise LoHaError(f"factors are floating point; they cannot be {dtype}")


def cast(name: str, layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer in another dtype; alpha stays as it is.

    Raises:
        LoHaError: a value is too large for it.
    """
    with about(name):
        tensors = container.cast(layer.tensors(), dtype)
    if isinstance(layer, LoHaFactors):
        return replace(layer, **tensors)  # type: ignore[arg-type]
    return LoRAFactors.of(tensors, layer.alpha)


EXACT = Compression("exact")
