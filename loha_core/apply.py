"""Add LoHa updates into a weight, in place and in one pass: W ← W + Σ strength·ΔW.

>>> w, a, b = torch.zeros(4, 6), torch.ones(4, 2), torch.ones(2, 6)
>>> add_delta_(w, LoHaFactors(a, b, a, b, alpha=2), 0.5)[0, 0]     # 0.5 · (1+1) · (1+1)
tensor(2.)
>>> print(plan((1280, 1280), LoHaFactors(*[torch.ones(1280, 4), torch.ones(4, 1280)] * 2, alpha=4)))
khatri_rao: 1280x1280, rank 4: khatri_rao 52.4 MFLOP + 13.4 MB = 73.9, tiles 26.2 MFLOP + 39.3 MB = 89.1 \
(1 byte = 1.6 FLOP)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import get_args

import torch
from torch import Tensor

from . import algebra
from .bind import misfit
from .errors import LoHaError
from .factors import LoHaFactors
from .kernels import cost, tiles
from .kernels.cost import Backend, Plan

__all__ = ["Plan", "add_delta_", "plan"]


def add_delta_(
    weight: Tensor,
    factors: LoHaFactors | Sequence[LoHaFactors],
    strength: float | Sequence[float] = 1.0,
    *,
    source: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """W ← W + Σ strength·ΔW, in place; with DoRA W ← W + strength·(W' − W), W' = m∘(W+ΔW)/‖W+ΔW‖.

    A stack is applied in its order. Arithmetic is in float32 (float64 for a float64 weight), and the result is
    rounded to the weight's dtype once. Beside the weight at most a few MiB are allocated, whatever its size.

    Args:
        weight: (o, i) or (o, i, *k) of any floating dtype, fp8 included, and any strides.
        factors: one update or a stack of them, on any device.
        strength: one for all, or one for each update; 0 leaves the weight as it is, bit for bit.
        source: where W is read, a backup for instance; the weight itself by default. Its shape is the weight's.
        backend: "auto", "tiles", "khatri_rao" or "triton".

    Returns:
        weight.

    Raises:
        LoHaError: shapes that do not fit, or a back end that cannot; before anything is written.
    """
    stack = [factors] if isinstance(factors, LoHaFactors) else list(factors)
    strengths = list(strength) if isinstance(strength, Sequence) else [strength] * len(stack)
    if len(strengths) != len(stack):
        raise LoHaError(f"{len(stack)} updates but {len(strengths)} strengths; give one for all or one for each")
    _check(weight, source, stack)
    acting = [(f, float(s)) for f, s in zip(stack, strengths, strict=True) if s != 0]
    # An inference tensor may only be written in inference mode; any other must not record a gradient.
    with torch.inference_mode() if weight.is_inference() else torch.no_grad():
        if not acting or weight.numel() == 0:
            return weight if source is None else weight.copy_(source)
        acting = [(f.to(device=weight.device), s) for f, s in acting]
        chosen = _choose(weight.shape, [f for f, _ in acting], weight.device, weight.dtype, backend)
        if chosen[0] == "triton":
            from .kernels import triton_merge

            triton_merge.merge(weight, weight if source is None else source, acting)
        else:
            dtype = algebra.compute_dtype(weight)
            steps = _steps(tuple(weight.shape), acting, chosen, dtype)
            tiles.merge(weight, weight if source is None else source, steps, dtype)
    return weight


def plan(
    shape: Sequence[int],
    factors: LoHaFactors | Sequence[LoHaFactors],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """What ``add_delta_`` would do with a weight of this shape, device and dtype, and why; ``print`` it.

    Raises:
        LoHaError: an update does not fit the shape.
    """
    stack = [factors] if isinstance(factors, LoHaFactors) else list(factors)
    device, shape = torch.device(device), tuple(shape)
    for f in stack:
        if problem := misfit(f, shape):
            raise LoHaError(problem)
    chosen = _choose(shape, stack, device, dtype, "auto")
    if chosen and chosen[0] == "triton":
        return Plan(chosen, tuple("one read and one write of W" for _ in stack))
    size = 8 if dtype == torch.float64 else 4
    return Plan(chosen, tuple(cost.explain(shape[0], prod(shape[1:]), f.rank, device.type, size) for f in stack))


def _check(weight: Tensor, source: Tensor | None, stack: Sequence[LoHaFactors]) -> None:
    if not weight.is_floating_point():
        raise LoHaError(f"the weight has dtype {weight.dtype}; an update needs a floating-point weight")
    if source is not None and (source.shape != weight.shape or source.device != weight.device):
        found = f"{tuple(source.shape)} on {source.device}"
        raise LoHaError(f"the source is {found}; the weight is {tuple(weight.shape)} on {weight.device}")
    shape = tuple(weight.shape)
    for f in stack:
        if problem := misfit(f, shape):
            raise LoHaError(problem)


def _choose(
    shape: Sequence[int], stack: Sequence[LoHaFactors], device: torch.device, dtype: torch.dtype, backend: str
) -> tuple[Backend, ...]:
    """One back end for each update; "triton" takes all of them or none."""
    if backend != "auto" and backend not in get_args(Backend):
        raise LoHaError(f"no back end {backend!r}; there are: auto, {', '.join(get_args(Backend))}")
    if backend in ("tiles", "khatri_rao"):
        return (backend,) * len(stack)  # type: ignore[return-value]
    out, n = (shape[0], prod(shape[1:])) if shape else (1, 1)
    size = 8 if dtype == torch.float64 else 4
    return tuple(cost.choose(out, n, f.rank, device.type, size) for f in stack)


def _steps(
    shape: tuple[int, ...], stack: Sequence[tuple[LoHaFactors, float]], chosen: Sequence[Backend], dtype: torch.dtype
) -> list[tiles.Step]:
    """Neighbours without DoRA become one sum, and those of them that go by Khatri–Rao one product."""
    steps: list[tiles.Step] = []
    wide: list[tuple[LoHaFactors, float]] = []
    for (f, strength), backend in zip(stack, chosen, strict=True):
        by_rows = backend == "tiles"
        if f.dora_scale is not None:
            term = tiles.Products(f, f.scale, dtype) if by_rows else tiles.KhatriRao([(f, f.scale)], dtype)
            axis = algebra.dora_axis(f.dora_scale, shape)
            steps.append(tiles.Dora(term, strength, f.dora_scale, axis, prod(shape[2:])))
            continue
        if not steps or isinstance(steps[-1], tiles.Dora):
            wide = []
            steps.append(tiles.Sum([]))
        terms = steps[-1].terms
        if by_rows:
            terms.append(tiles.Products(f, f.scale * strength, dtype))
        else:
            if not wide:
                terms.append(tiles.KhatriRao(wide, dtype))
            wide.append((f, f.scale * strength))
    return steps
