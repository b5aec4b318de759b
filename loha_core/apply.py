"""Add LoHa updates into a weight, in place: W ← W + Σ strength·ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import algebra
from .errors import LoHaError
from .factors import LoHaFactors


@dataclass(frozen=True)
class Plan:
    """Which back end a merge takes, and why."""

    backend: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}"


def plan(
    shape: Sequence[int],
    factors: LoHaFactors | Sequence[LoHaFactors],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """The back end that ``add_delta_`` would choose for a weight of this shape."""
    return Plan("whole", "the only one yet")


def add_delta_(
    weight: Tensor,
    factors: LoHaFactors | Sequence[LoHaFactors],
    strength: float | Sequence[float] = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """W ← W + Σ strength·ΔW, in place; with DoRA W ← W + strength·(W' − W).

    A stack is applied in its order. Arithmetic is in float32 (float64 for a float64 weight) and rounded once.

    Args:
        weight: any rank, dtype and strides; (o, i), (o, i, k), (o, i, kh, kw), …
        factors: one update or a stack of them.
        strength: one for all, or one per update; 0 leaves the weight as it is, bit for bit.
        backend: "auto", or the name of a back end.

    Returns:
        weight

    Raises:
        LoHaError: shapes that do not fit, before anything is written.
    """
    stack = [factors] if isinstance(factors, LoHaFactors) else list(factors)
    strengths = [float(s) for s in strength] if isinstance(strength, Sequence) else [float(strength)] * len(stack)
    if len(strengths) != len(stack):
        raise LoHaError(f"{len(stack)} updates but {len(strengths)} strengths")
    for f in stack:
        _check(weight, f)
    wanted = [(f, s) for f, s in zip(stack, strengths, strict=True) if s != 0]
    if not wanted or weight.numel() == 0:
        return weight
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.inference_mode() if weight.is_inference() else torch.no_grad():
        result = weight.to(compute, copy=True)
        for f, s in wanted:
            f = f.to(device=weight.device, dtype=compute)
            update = algebra.delta(f).reshape(weight.shape)
            if f.dora_scale is None:
                result += s * update
            else:
                result += s * (algebra.dora(result, update, f.dora_scale) - result)
        weight.copy_(result)
    return weight


def _check(weight: Tensor, f: LoHaFactors) -> None:
    """Raises LoHaError unless the update fits the weight."""
    shape = tuple(weight.shape)
    wanted = shape if f.is_tucker else (shape[0], weight[0].numel()) if shape else ()
    if not weight.is_floating_point() or f.shape != wanted:
        raise LoHaError(f"the update is for {f.shape}; the weight is {shape} of {weight.dtype}")
    if f.dora_scale is not None:
        try:
            algebra.dora_axis(f.dora_scale, shape)
        except ValueError as error:
            raise LoHaError(str(error)) from error
