"""An adapter seen as updates of weights: its LoHa layers, and the LoRA layers that share the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import algebra, lowrank
from .errors import LoHaError
from .factors import LoHaFactors
from .formats import container
from .mixed import Layer, LoRAFactors

# Differences of whole tensors: they add up as they are.
DIFFERENCES = ("diff", "diff_b", "w_norm", "b_norm")


def product(layer: Layer) -> tuple[Tensor, Tensor]:
    """ΔW·scale = U·V exactly, of no more columns than the weight's shorter side; in float32 or float64."""
    if isinstance(layer, LoRAFactors):
        return lowrank.collapse(*layer.product())
    if layer.is_tucker:
        return lowrank.collapse(*lowrank.product(layer))
    # Not all r² columns say something: the second half of a sum is ones in one column, and of several parts of a
    # fused weight each has columns of its own.
    a1, a2, b1, b2 = layer.w1_a, layer.w2_a, layer.w1_b, layer.w2_b
    acting = ((a1 != 0).float().T @ (a2 != 0).float()) * ((b1 != 0).float() @ (b2 != 0).float().T)
    first, second = acting.nonzero().unbind(1)
    if len(first) >= min(layer.shape):
        return lowrank.as_product(layer.delta())
    if not len(first):  # a product has a column, be it of zeros
        first = second = torch.zeros(1, dtype=torch.long, device=a1.device)
    dtype = algebra.compute_dtype(*layer.tensors().values())
    a1, b1, a2, b2 = (part.to(dtype) for part in (a1, b1, a2, b2))
    return a1[:, first] * a2[:, second] * layer.scale, b1[first] * b2[second]


def flat_shape(layer: Layer) -> tuple[int, int]:
    """(o, i·∏k)."""
    out, *inner = layer.shape
    return out, torch.Size(inner).numel()


def scaled(layer: Layer, weight: float) -> Layer:
    """weight·ΔW: only alpha changes, so that the factors stay bit for bit."""
    return layer if weight == 1 else replace(layer, alpha=layer.alpha * weight)


def as_layer(u: Tensor, v: Tensor, kind: str, shape: tuple[int, ...]) -> Layer:
    """U·V as a LoHa whose second half is all ones, or as a LoRA whose factors are shaped like the weight."""
    if kind == "loha":
        return lowrank.as_loha(u, v)
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


def size_of(name: str, u: Tensor, v: Tensor) -> float:
    """‖UV‖.

    Raises:
        LoHaError: it is not finite.
    """
    size = lowrank.norm(u, v)
    if not math.isfinite(size):
        raise LoHaError(f"{name}: the update is not finite; a weight is too large, or the adapter is broken")
    return size


@dataclass(frozen=True)
class LayerError:
    """What became of one layer.

    Attributes:
        rank: of the result.
        exact_rank: the number of columns that the exact result has.
        size: ‖ΔW‖ as wanted.
        error: ‖ΔW − result‖ / ‖ΔW‖.
        lora_error: for a fit, the error of the best LoRA with as many parameters; else None.
    """

    name: str
    rank: int
    exact_rank: int
    size: float
    error: float
    lora_error: float | None = None


@dataclass
class ErrorReport:
    """The relative error of each layer, and what else a user should know."""

    layers: list[LayerError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """‖wanted − result‖ / ‖wanted‖ over all layers together."""
        return self._overall(lambda layer: layer.error)

    @property
    def lora_error(self) -> float | None:
        """The same for LoRAs of equal size, where the layers were fitted."""
        if not self.layers or any(layer.lora_error is None for layer in self.layers):
            return None
        return self._overall(lambda layer: layer.lora_error or 0.0)

    def _overall(self, error_of: Callable[[LayerError], float]) -> float:
        total = sum(layer.size**2 for layer in self.layers)
        lost = sum((error_of(layer) * layer.size) ** 2 for layer in self.layers)
        return (lost / total) ** 0.5 if total else 0.0

    def lines(self, limit: int = 10) -> Iterator[str]:
        ranks = sorted({layer.rank for layer in self.layers})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}…{ranks[-1]}" if ranks else "none"
        yield f"{len(self.layers)} layers, rank {shown}; relative error {self.error:.3g}"
        if self.lora_error is not None:
            wins = sum(layer.error < (layer.lora_error or 0.0) for layer in self.layers)
            better = "better" if self.error < self.lora_error else "not better"
            yield f"a LoRA of equal size: {self.lora_error:.3g}; LoHa is {better}, and wins {wins} layers"
        worst = sorted(self.layers, key=lambda layer: -layer.error)
        for layer in worst[:limit]:
            if layer.error > 1e-6:
                yield f"{layer.error:<6.3g} rank {layer.rank}/{layer.exact_rank}  {layer.name}"
        yield from (f"note: {note}" for note in self.notes[:limit])
        if len(self.notes) > limit:
            yield f"note: … and {len(self.notes) - limit} more"

    def text(self, limit: int = 10) -> str:
        """Plain text: the overall error, the worst layers and the notes, at most ``limit`` of each."""
        return "\n".join(self.lines(limit))
