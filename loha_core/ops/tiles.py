"""Merging with torch alone, on any device: W is walked in tiles that stay in cache, and nothing else has its size.

A merge is a row of steps. A step adds its terms' s·ΔW to W, or turns W by DoRA. All steps act on a tile before the next
tile is read; a DoRA's norms run over whole rows or columns, so a walk that writes nothing measures them before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .. import algebra
from ..factors import LoHaFactors
from . import gemm
from .cost import MAX_DENSE_NUMBERS, MAX_KHATRI_RAO_BYTES

# Numbers per tile. CPU: both products stay in L2 and L3, and starting the threads costs little. GPU: enough to fill it.
CPU_TILE, GPU_TILE = 1 << 20, 2 << 20
# Rows of a product are this many numbers apart from ending where the next begins: where a row is a multiple of 4 KiB
# (1024, 3072, 5120 columns), rows that follow each other compete for the same few lines of cache; 2x slower, measured.
PADDING = 16
# For so few numbers the allocator has memory at hand.
MAX_ALLOCATED_NUMBERS = 128 << 10
# Of tiles, kept for the next call.
MAX_KEPT_BYTES = 32 << 20
# Of the terms' row factors at a time, and of their column factors: small beside W even where the rank is enormous.
MAX_FACTOR_NUMBERS = 2 << 20


@dataclass(frozen=True, eq=False)
class Products:
    """x += s·(A₁B₁)∘(A₂B₂): two products in one bmm, and one addcmul."""

    factors: LoHaFactors
    scale: float

    @property
    def width(self) -> int:
        """Numbers of the factors per row of W."""
        return 2 * self.factors.rank

    def left(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """What depends on the rows of W: A₁ and A₂, (2, h, r)."""
        return torch.stack(left(self.factors, rows)).to(dtype)

    def right(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """What depends on the columns of W: B₁ and B₂, (2, r, w)."""
        return torch.stack(right(self.factors, columns, dtype))

    def add_(self, x: Tensor, a: Tensor, b: Tensor, scratch: Tensor) -> None:
        """x (h, w) += s·ΔW from the factors of these rows and columns; ``scratch`` (2, ≥h, ≥w)."""
        if gemm.by_onednn(a[0], b[0]):
            m1, m2 = gemm.matmul(a[0], b[0]), gemm.matmul(a[1], b[1])
        else:
            m1, m2 = torch.bmm(a, b, out=scratch[:, : x.shape[0], : x.shape[1]])
        x.addcmul_(m1, m2, value=self.scale)


@dataclass(frozen=True, eq=False)
class KhatriRao:
    """x += Σ U·V, several updates' Khatri–Rao factors side by side: one addmm. Its methods are those of `Products`."""

    updates: Sequence[tuple[LoHaFactors, float]]

    @property
    def width(self) -> int:
        return sum(f.rank**2 for f, _ in self.updates)

    def left(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """U, (h, Σ r²)."""
        halves = [([a.to(dtype) for a in left(f, rows)], scale) for f, scale in self.updates]
        return _joined([algebra.columnwise(a1.T * scale, a2.T).T for (a1, a2), scale in halves], 1)

    def right(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """V, (Σ r², w)."""
        return _joined([algebra.columnwise(*right(f, columns, dtype)) for f, _ in self.updates], 0)

    def add_(self, x: Tensor, u: Tensor, v: Tensor, scratch: Tensor) -> None:
        gemm.addmm_(x, u, v)


Term = Products | KhatriRao


def _joined(tensors: list[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def left(f: LoHaFactors, rows: slice) -> tuple[Tensor, Tensor]:
    """A₁, A₂ of these rows, (h, r) each."""
    if f.is_tucker:
        return f.w1_a[:, rows].T, f.w2_a[:, rows].T
    return f.w1_a[rows], f.w2_a[rows]


def right(f: LoHaFactors, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B₁, B₂ of these columns, (r, w) each. A Tucker half is flat once its core is multiplied into B:

    M[o,(i,k)] = Σ_p a[p,o] · (Σ_q t[p,q,k]·b[q,i]), r²·i·∏k operations where the product has o·i·∏k·r.
    """
    if f.t1 is None or f.t2 is None:
        return f.w1_b[:, columns].to(dtype), f.w2_b[:, columns].to(dtype)
    k = prod(f.t1.shape[2:])
    inputs = slice(columns.start // k, columns.stop // k)
    halves = ((f.t1, f.w1_b), (f.t2, f.w2_b))
    b1, b2 = (torch.einsum("pqk,qi->pik", t.flatten(2).to(dtype), b[:, inputs].to(dtype)) for t, b in halves)
    return b1.flatten(1), b2.flatten(1)


@dataclass(frozen=True, eq=False)
class Dora:
    """x += strength·(m∘y/‖y‖ − x), y = x + ΔW; m (o,) along axis 0 or (i,) along axis 1."""

    strength: float
    magnitude: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class Step:
    """x += Σ s·ΔW or, with a DoRA, what it makes of that sum."""

    terms: Sequence[Term]
    dora: Dora | None = None


Prepared = Sequence[tuple[Step, Tensor | None]]  # with DoRA's m/‖y‖, (o, 1) or (1, n)


def add_dense_(weight: Tensor, f: LoHaFactors, scale: float) -> None:
    """W += scale·(A₁B₁)∘(A₂B₂) for flat factors of W's dtype, by three calls: a small weight needs no tiles."""
    if gemm.by_onednn(f.w1_a, f.w1_b):
        m1, m2 = gemm.matmul(f.w1_a, f.w1_b), gemm.matmul(f.w2_a, f.w2_b)
    elif weight.numel() <= MAX_ALLOCATED_NUMBERS:
        m1, m2 = torch.mm(f.w1_a, f.w1_b), torch.mm(f.w2_a, f.w2_b)
    else:
        shape = (weight.shape[0], f.w1_b.shape[1])
        m1, m2 = scratch(shape, shape, dtype=weight.dtype, device=weight.device)
        torch.mm(f.w1_a, f.w1_b, out=m1)
        torch.mm(f.w2_a, f.w2_b, out=m2)
    matrix = _matrix(weight)
    if matrix is None:
        weight.addcmul_(m1.view(weight.shape), m2.view(weight.shape), value=scale)
    else:
        matrix.addcmul_(m1, m2, value=scale)


_kept = threading.local()


def scratch(*shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Uninitialised tensors for the length of a call. On a CPU they lie in the same memory each time: a system gives
    new memory page by page, and for 8 MiB that takes twice as long as what is then computed there."""
    sizes = [-(-prod(shape) // 16) * 16 for shape in shapes]  # each on a cache line of its own
    size = sum(sizes) * dtype.itemsize
    if device.type != "cpu" or size > MAX_KEPT_BYTES:
        memory = torch.empty(sum(sizes), dtype=dtype, device=device)
    else:
        if getattr(_kept, "memory", None) is None or _kept.memory.numel() < size:
            _kept.memory = None
            with torch.inference_mode(False):  # usable in both modes
                _kept.memory = torch.empty(size, dtype=torch.uint8)
        memory = _kept.memory[:size].view(dtype)
    parts = memory.split(sizes)
    return [part[: prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]


def merge(weight: Tensor, source: Tensor, steps: Sequence[Step], dtype: torch.dtype) -> None:
    """weight ← the steps applied to source, computed in ``dtype`` and rounded once. The two may be one tensor."""
    if _single_product(weight, source, steps, dtype):
        return
    prepared: list[tuple[Step, Tensor | None]] = []
    for step in steps:
        prepared.append((step, _dora_ratio(source, prepared, step, dtype)))
    in_place = weight.dtype == dtype and _matrix(weight) is not None and _matrix(source) is not None
    for x, rows, columns in _walk(weight, source, prepared, dtype, in_place):
        if not in_place:
            tile = _tile(weight, rows, columns)
            tile.copy_(x.view(tile.shape))


def _single_product(weight: Tensor, source: Tensor, steps: Sequence[Step], dtype: torch.dtype) -> bool:
    """Whether the merge is one addmm into W, and if so, do it: BLAS has tiles of its own."""
    match steps:
        case [Step(terms=[KhatriRao() as term], dora=None)]:
            matrix = _matrix(weight)
        case _:
            return False
    if matrix is None or 1 not in matrix.stride() or weight.dtype != dtype:
        return False
    if term.width * sum(matrix.shape) * dtype.itemsize > MAX_KHATRI_RAO_BYTES:
        return False
    if source is not weight:
        weight.copy_(source)
    u, v = term.left(slice(0, matrix.shape[0]), dtype), term.right(slice(0, matrix.shape[1]), dtype)
    if matrix.numel() <= MAX_DENSE_NUMBERS:
        gemm.addmm_(matrix, u, v)
    else:
        matrix.addmm_(u, v)
    return True


def _dora_ratio(source: Tensor, before: Prepared, step: Step, dtype: torch.dtype) -> Tensor | None:
    """DoRA's m/‖y‖, as a column or a row that fits W; a slice of zeros stays zero."""
    if (dora := step.dora) is None:
        return None
    kernel = prod(source.shape[2:])
    # Sums over tiles in float64, where the device has it.
    wide = torch.float32 if source.device.type == "mps" else torch.float64
    magnitude = dora.magnitude.flatten().to(wide)
    squares = torch.zeros_like(magnitude)
    for y, rows, columns in _walk(source, source, [*before, (Step(step.terms), None)], dtype, in_place=False):
        if dora.axis == 0:
            squares[rows] += torch.linalg.vector_norm(y, dim=1).to(wide).square()
        else:
            norms = torch.linalg.vector_norm(y.view(y.shape[0], -1, kernel), dim=(0, 2))
            squares[columns.start // kernel : columns.stop // kernel] += norms.to(wide).square()
    ratio = (magnitude / squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)).to(dtype)
    return ratio.unsqueeze(1) if dora.axis == 0 else ratio.repeat_interleave(kernel).unsqueeze(0)


def _walk(
    target: Tensor, source: Tensor, steps: Prepared, dtype: torch.dtype, in_place: bool
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Each tile of source after all steps, (h, w), with its rows and columns: in target, or else in a buffer.

    Where one of the two has no matrix's strides, a tile has all columns.
    """
    out, n, kernel = source.shape[0], source[0].numel(), prod(source.shape[2:])
    terms = [term for step, _ in steps for term in step.terms]
    factor_width = sum(term.width for term in terms)
    matrices = _matrix(target) is not None and _matrix(source) is not None
    height, width = tile_shape(out, n, kernel, factor_width, source.device, matrices)
    has_products, has_dora = any(isinstance(t, Products) for t in terms), any(step.dora for step, _ in steps)
    products, x_buffer, y_buffer = scratch(
        (2 * has_products, height, width + PADDING),
        (0 if in_place else height * width,),
        (has_dora * height * width,),
        dtype=dtype,
        device=source.device,
    )
    for band in _slices(out, max(height, MAX_FACTOR_NUMBERS // factor_width // height * height)):
        lefts = {term: term.left(band, dtype) for term in terms}
        for columns in _slices(n, width):
            rights = {term: term.right(columns, dtype) for term in terms}
            for inner in _slices(band.stop - band.start, height):
                rows = slice(band.start + inner.start, band.start + inner.stop)
                tile = _tile(source, rows, columns)
                x = _tile(target, rows, columns) if in_place else x_buffer[: tile.numel()].view(tile.shape)
                if not in_place or source is not target:
                    x.copy_(tile)
                x = x if x.dim() == 2 else x.flatten(1)
                for step, ratio in steps:
                    y = x if step.dora is None else y_buffer[: x.numel()].view(x.shape).copy_(x)
                    for term in step.terms:
                        term.add_(y, lefts[term].narrow(-2, inner.start, len(x)), rights[term], products)
                    if step.dora is not None and ratio is not None:
                        y.mul_(ratio[rows] if step.dora.axis == 0 else ratio[:, columns])
                        x.lerp_(y, step.dora.strength)
                yield x, rows, columns


def tile_shape(out: int, n: int, kernel: int, rank: int, device: torch.device, matrix: bool) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows if their factors are small, else a multiple of the kernel's size."""
    inputs = max(1, MAX_FACTOR_NUMBERS // (rank * kernel))
    width = min(n, inputs * kernel) if matrix else n
    height = max(1, (CPU_TILE if device.type == "cpu" else GPU_TILE) // width)
    bands = -(-out // height)
    return -(-out // bands), width


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _tile(weight: Tensor, rows: slice, columns: slice) -> Tensor:
    """(h, w) of a matrix; whole rows, (h, i, *k), of what is none."""
    matrix = _matrix(weight)
    return weight[rows] if matrix is None else matrix[rows, columns]


def _matrix(weight: Tensor) -> Tensor | None:
    """weight as (o, n) without a copy; None if its strides forbid it (a channels-last convolution)."""
    if weight.dim() == 2:
        return weight
    try:
        return weight.view(weight.shape[0], -1)
    except RuntimeError:
        return None
