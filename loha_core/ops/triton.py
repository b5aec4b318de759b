"""Merging in one GPU kernel: factors in, W read once and written once (CUDA, ROCm; TRITON_INTERPRET=1 for tests).

A program owns a tile of W. It multiplies both halves for that tile, rank by rank in float32, adds s·M₁∘M₂ of every
update of the stack to its tile of W and rounds once. DoRA's norms cost one more read of W, in the same kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import algebra
from ..errors import LoHaError
from ..factors import LoHaFactors
from .tiles import left, right

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A tile of two float32 products fits the registers of 8 warps; a tensor core multiplies at least 16 deep.
BLOCK_O, BLOCK_N, BLOCK_R, WARPS = 64, 128, 16, 8

_ADD, _ROW_NORMS, _COLUMN_NORMS, _DORA_ROWS, _DORA_COLUMNS = range(5)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    weight, source, a1, b1, a2, b2, offsets, scales, vector,
    out, n, kernel, updates, rank, scale, strength,
    w_o, w_i, w_k, s_o, s_i, s_k,
    a1_o, a1_r, a2_o, a2_r, b1_r, b1_n, b2_r, b2_n,
    MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile. A single update is (rank, scale), a stack is in the tables ``offsets`` and ``scales``; ``vector`` holds
    DoRA's ratios or takes its sums.

    weight, source: element (o, i, k) lies at o·w_o + i·w_i + k·w_k; column c of the factors is c = i·kernel + k.
    """
    blocks_n = tl.cdiv(n, BLOCK_N)
    block_o = tl.program_id(0) // blocks_n
    block_n = tl.program_id(0) % blocks_n
    rows = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    in_rows = rows < out
    in_columns = columns < n
    inside = in_rows[:, None] & in_columns[None, :]
    # A fused weight may hold more than 2³¹ numbers.
    wide_rows = rows.to(tl.int64)
    wide_columns = columns.to(tl.int64)

    delta = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    for u in range(updates):
        first, last, s = 0, rank, scale
        if updates > 1:
            first, last, s = tl.load(offsets + u), tl.load(offsets + u + 1), tl.load(scales + u)
        m1 = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
        m2 = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
        for start in range(first, last, BLOCK_R):
            r = start + ranks
            left_mask = in_rows[:, None] & (r < last)[None, :]
            right_mask = (r < last)[:, None] & in_columns[None, :]
            x1 = tl.load(a1 + wide_rows[:, None] * a1_o + r[None, :] * a1_r, mask=left_mask, other=0.0)
            y1 = tl.load(b1 + r[:, None] * b1_r + wide_columns[None, :] * b1_n, mask=right_mask, other=0.0)
            m1 += tl.dot(x1.to(tl.float32), y1.to(tl.float32), input_precision=PRECISION)
            x2 = tl.load(a2 + wide_rows[:, None] * a2_o + r[None, :] * a2_r, mask=left_mask, other=0.0)
            y2 = tl.load(b2 + r[:, None] * b2_r + wide_columns[None, :] * b2_n, mask=right_mask, other=0.0)
            m2 += tl.dot(x2.to(tl.float32), y2.to(tl.float32), input_precision=PRECISION)
        delta += s * m1 * m2

    i = wide_columns // kernel
    k = wide_columns % kernel
    read = source + wide_rows[:, None] * s_o + (i * s_i + k * s_k)[None, :]
    x = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    y = x + delta
    if MODE == 1:
        tl.store(vector + block_n * out + rows, tl.sum(y * y, 1), mask=in_rows)
    elif MODE == 2:
        tl.store(vector + block_o.to(tl.int64) * n + columns, tl.sum(y * y, 0), mask=in_columns)
    else:
        if MODE == 3:
            y = x + strength * (y * tl.load(vector + rows, mask=in_rows, other=0.0)[:, None] - x)
        elif MODE == 4:
            y = x + strength * (y * tl.load(vector + columns, mask=in_columns, other=0.0)[None, :] - x)
        written = weight + wide_rows[:, None] * w_o + (i * w_i + k * w_k)[None, :]
        if weight.dtype.element_ty == tl.bfloat16:
            # To nearest, ties to even, by hand: the interpreter's own conversion cuts off.
            bits = y.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            y = bits.to(tl.float32, bitcast=True)
        tl.store(written, y.to(weight.dtype.element_ty), mask=inside)


class Packed(NamedTuple):
    """The factors of a stack side by side, a (o, R) and b (R, n). Two updates or more also bring tables, on the device:
    ``offsets`` (u + 1) says where each begins among the R ranks, ``scales`` (u) is alpha/r times its strength."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    ends: list[int]
    scale: float
    offsets: Tensor
    scales: Tensor


def merge(weight: Tensor, source: Tensor, stack: Sequence[tuple[LoHaFactors, float]]) -> None:
    """weight ← source + Σ strength·ΔW, or source with one DoRA. Every tensor is on the weight's device.

    Raises:
        LoHaError: a dtype, strides or a stack that this kernel doesn't take, see ``why_unsupported``.
    """
    if problem := why_unsupported(weight, source, [f for f, _ in stack]):
        raise LoHaError(f"the back end 'triton' does not take {problem}; 'tiles' does")
    f, strength = stack[0]
    if f.dora_scale is None:
        _launch(weight, source, _pack([(f, f.scale * s) for f, s in stack]), _ADD)
    else:
        _merge_dora(weight, source, f, f.dora_scale, strength)
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)  # autograd doesn't see what a kernel writes


def why_unsupported(weight: Tensor, source: Tensor, stack: Sequence[LoHaFactors]) -> str | None:
    """What of this merge the kernel cannot do, or None."""
    if weight.dtype not in DTYPES or source.dtype not in (*DTYPES, torch.float64):
        return f"a weight of {weight.dtype}"
    if len(stack) > 1 and any(f.dora_scale is not None for f in stack):
        return "DoRA within a stack (it would round in between)"
    if _axes(weight) is None or _axes(source) is None:
        return f"a weight {tuple(weight.shape)} with strides {weight.stride()}"
    return None


@cache
def is_available(device: torch.device) -> bool:
    """Whether a kernel can be built and run here: Triton also needs a C compiler and a GPU that it knows."""
    tiny = torch.ones(2, 2, device=device)
    try:
        a = torch.ones(2, 2, device=device)
        merge(tiny, tiny, [(LoHaFactors(a, a, a, a, 2.0), 1.0)])
        return bool((tiny == 5).all())
    except Exception as error:  # whatever a driver or a compiler throws; the other back ends need neither
        logging.getLogger(__name__).warning("Triton cannot be used on %s, merging without it: %s", device, error)
        return False


def _merge_dora(weight: Tensor, source: Tensor, f: LoHaFactors, magnitude: Tensor, strength: float) -> None:
    out, n, kernel = weight.shape[0], prod(weight.shape[1:]), prod(weight.shape[2:])
    packed = _pack([(f, f.scale)])
    tiny = torch.finfo(torch.float32).tiny
    if algebra.dora_axis(magnitude, tuple(weight.shape)) == 0:
        sums = torch.empty(triton.cdiv(n, BLOCK_N), out, device=weight.device)
        _launch(weight, source, packed, _ROW_NORMS, sums)
        norms = sums.sum(0, dtype=torch.float64).sqrt_()
        ratio = magnitude.flatten() / norms.clamp_min_(tiny)
        _launch(weight, source, packed, _DORA_ROWS, ratio.float(), strength)
    else:
        sums = torch.empty(triton.cdiv(out, BLOCK_O), n, device=weight.device)
        _launch(weight, source, packed, _COLUMN_NORMS, sums)
        norms = sums.sum(0, dtype=torch.float64).view(-1, kernel).sum(1).sqrt_()
        ratio = (magnitude.flatten() / norms.clamp_min_(tiny)).repeat_interleave(kernel)
        _launch(weight, source, packed, _DORA_COLUMNS, ratio.float(), strength)


def _launch(
    weight: Tensor, source: Tensor, packed: Packed, mode: int, vector: Tensor | None = None, strength: float = 1.0
) -> None:
    target, origin = _axes(weight), _axes(source)
    assert target is not None and origin is not None
    out, inputs, kernel = target.shape
    n = inputs * kernel
    p = packed
    grid = (triton.cdiv(out, BLOCK_O) * triton.cdiv(n, BLOCK_N),)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        _merge_kernel[grid](
            target, origin, p.a1, p.b1, p.a2, p.b2, p.offsets, p.scales, p.scales if vector is None else vector,
            out, n, kernel, len(p.ends), p.ends[0], p.scale, strength,
            *target.stride(), *origin.stride(),
            *p.a1.stride(), *p.a2.stride(), *p.b1.stride(), *p.b2.stride(),
            MODE=mode, PRECISION=_precision(), BLOCK_O=BLOCK_O, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, num_warps=WARPS,
        )  # fmt: skip


def _pack(stack: Sequence[tuple[LoHaFactors, float]]) -> Packed:
    """A single update goes in as it is, without a copy; Tucker cores are multiplied into B first."""
    lefts = [left(f, slice(None)) for f, _ in stack]
    rights = [right(f, slice(0, prod(f.shape[1:])), torch.float32 if f.is_tucker else f.dtype) for f, _ in stack]
    a1, a2, b1, b2 = (
        halves[0] if len(halves) == 1 else torch.cat(halves, axis)
        for axis, pairs in ((1, lefts), (0, rights))
        for halves in zip(*pairs, strict=True)
    )
    ends = list(accumulate(f.rank for f, _ in stack))
    if len(stack) == 1:
        return Packed(a1, b1, a2, b2, ends, stack[0][1], a1, a1)
    offsets = torch.tensor([0, *ends], dtype=torch.int32, device=a1.device)
    scales = torch.tensor([scale for _, scale in stack], dtype=torch.float32, device=a1.device)
    return Packed(a1, b1, a2, b2, ends, 0.0, offsets, scales)


def _axes(weight: Tensor) -> Tensor | None:
    """weight as a view (o, i, k); None if its strides forbid it. A channels-last convolution is such a view."""
    if weight.dim() == 2:
        return weight.unsqueeze(2)
    try:
        return weight.view(weight.shape[0], -1, 1)
    except RuntimeError:
        pass
    try:
        return weight.view(*weight.shape[:2], -1)
    except RuntimeError:
        return None


def _precision() -> str:
    """float32 products: three TF32 ones where there are tensor cores for it, the plain way elsewhere."""
    return "tf32x3" if torch.version.cuda else "ieee"
