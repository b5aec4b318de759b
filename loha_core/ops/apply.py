"""Add LoHa updates into a weight, in place and in one pass: W ← W + Σ strength·ΔW.

>>> w, a, b = torch.zeros(4, 6), torch.ones(4, 2), torch.ones(2, 6)
>>> add_delta_(w, LoHaFactors(a, b, a, b, alpha=2), 0.5)[0, 0]     # 0.5 · (1+1) · (1+1)
tensor(2.)
>>> print(plan((1280, 1280), LoHaFactors(*[torch.ones(1280, 4), torch.ones(4, 1280)] * 2, alpha=4)))
khatri_rao: cost in MFLOP: tiles 114.9 (26.2 MFLOP, 39.3 MB); khatri_rao 87.3 (52.4 MFLOP, 13.4 MB)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import groupby
from math import prod
from typing import cast, get_args

import torch
from torch import Tensor

from .. import algebra
from ..errors import LoHaError
from ..factors import LoHaFactors, shape_mismatch
from . import tiles
from .cost import Backend, Choice, Plan, choose_backend

__all__ = ["Plan", "add_delta_", "plan"]

_BACKENDS = ("auto", *get_args(Backend))


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
        backend: "auto", or one of "dense", "tiles", "khatri_rao" or "triton".

    Returns:
        weight.

    Raises:
        LoHaError: shapes that do not fit, or a back end that cannot; before anything is written.
    """
    stack = [factors] if isinstance(factors, LoHaFactors) else list(factors)
    strengths = list(strength) if isinstance(strength, Sequence) else [strength] * len(stack)
    if len(strengths) != len(stack):
        raise LoHaError(f"{len(stack)} updates but {len(strengths)} strengths; give one for all or one for each")
    _check_weight(weight, source)
    _check_fits(stack, weight.shape)
    with _writing(weight):
        acting = [(_on(weight.device, f), float(s)) for f, s in zip(stack, strengths, strict=True) if s != 0]
        if not acting or weight.numel() == 0:
            return weight if source is None else weight.copy_(source)
        reading = weight if source is None else source
        shape, updates = tuple(weight.shape), [f for f, _ in acting]
        if backend == "auto" and weight.is_cuda and _fused(weight.device, updates, weight, reading):
            backend = "triton"
        choices = _choose(shape, updates, weight.device, weight.dtype, backend)
        if choices[0].backend == "triton":
            from . import triton as triton_merge

            triton_merge.merge(weight, reading, acting)
        elif choices[0].backend == "dense":
            [(f, s)] = acting
            tiles.add_dense_(weight if source is None else weight.copy_(source), f, f.scale * s)
        else:
            tiles.merge(weight, reading, _steps(shape, acting, choices), algebra.compute_dtype(weight))
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
    _check_fits(stack, shape)
    device = torch.device(device)
    like = torch.empty(tuple(shape), dtype=dtype, device="meta")
    backend = "triton" if _fused(device, stack, like, like) else "auto"
    return Plan(tuple(_choose(shape, stack, device, dtype, backend)))


def _fused(device: torch.device, stack: Sequence[LoHaFactors], weight: Tensor, source: Tensor) -> bool:
    """Whether the GPU's kernel can do it: on a GPU it is always the cheapest."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from . import triton as triton_merge

    return triton_merge.why_unsupported(weight, source, stack) is None and triton_merge.is_available(device)


def _writing(weight: Tensor) -> AbstractContextManager[object]:
    """No gradient is recorded; and an inference tensor may only be written in inference mode."""
    if torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode() if weight.is_inference() else torch.no_grad()


def _on(device: torch.device, f: LoHaFactors) -> LoHaFactors:
    tensors = (f.w1_a, f.w1_b, f.w2_a, f.w2_b, f.t1, f.t2, f.dora_scale)  # for each layer of a model: no detours
    return f if all(t is None or t.device == device for t in tensors) else f.to(device)


def _check_weight(weight: Tensor, source: Tensor | None) -> None:
    if not weight.is_floating_point() or weight.dim() == 0:
        kind = f"{weight.dim()} dimensions and dtype {weight.dtype}"
        raise LoHaError(f"the weight has {kind}; an update needs a matrix or more, of floating point")
    if source is not None and (source.shape != weight.shape or source.device != weight.device):
        kind = f"{tuple(source.shape)} on {source.device}"
        raise LoHaError(f"the source is {kind}; the weight is {tuple(weight.shape)} on {weight.device}")


def _check_fits(stack: Sequence[LoHaFactors], shape: Sequence[int]) -> None:
    for f in stack:
        if mismatch := shape_mismatch(f, tuple(shape)):
            raise LoHaError(mismatch)


def _choose(
    shape: Sequence[int], stack: Sequence[LoHaFactors], device: torch.device, dtype: torch.dtype, backend: str
) -> list[Choice]:
    """One back end for each update; "triton" takes all of them or none."""
    if backend not in _BACKENDS:
        raise LoHaError(f"no back end {backend!r}; there are: {', '.join(_BACKENDS)}")
    plain = len(stack) == 1 and _is_plain(stack[0], dtype)
    if backend == "dense" and not plain:
        raise LoHaError("the back end 'dense' takes one flat update without DoRA, in the weight's float32 or float64")
    if backend != "auto":
        return [Choice(cast(Backend, backend))] * len(stack)
    out, n = (shape[0], prod(shape[1:])) if shape else (1, 1)
    itemsize = 8 if dtype == torch.float64 else 4
    return [choose_backend(out, n, f.rank, device.type, itemsize, plain) for f in stack]


def _is_plain(f: LoHaFactors, dtype: torch.dtype) -> bool:
    one_dtype = f.w1_a.dtype == f.w1_b.dtype == f.w2_a.dtype == f.w2_b.dtype == dtype
    return one_dtype and dtype in (torch.float32, torch.float64) and not f.is_tucker and f.dora_scale is None


def _steps(
    shape: tuple[int, ...], stack: Sequence[tuple[LoHaFactors, float]], choices: Sequence[Choice]
) -> list[tiles.Step]:
    """Neighbours without DoRA become one sum, and those of them that go by Khatri–Rao one product."""
    steps: list[tiles.Step] = []
    for is_dora, run in groupby(zip(stack, choices, strict=True), lambda entry: entry[0][0].dora_scale is not None):
        if not is_dora:
            steps.append(tiles.Step(_terms([(f, f.scale * s, choice.backend) for (f, s), choice in run])))
            continue
        for (f, strength), choice in run:
            assert f.dora_scale is not None
            dora = tiles.Dora(strength, f.dora_scale, algebra.dora_axis(f.dora_scale, shape))
            steps.append(tiles.Step(_terms([(f, f.scale, choice.backend)]), dora))
    return steps


def _terms(updates: Sequence[tuple[LoHaFactors, float, Backend]]) -> list[tiles.Term]:
    wide = [(f, scale) for f, scale, backend in updates if backend == "khatri_rao"]
    terms: list[tiles.Term] = [tiles.KhatriRao(wide)] if wide else []
    return terms + [tiles.Products(f, scale) for f, scale, backend in updates if backend != "khatri_rao"]
