"""Merging with torch alone, on any device: W is walked in tiles that stay in cache, and nothing else has its size.

A term (``Products`` or ``KhatriRao``) adds its s·ΔW into one tile; a step is a sum of terms or a DoRA; a merge is
one walk over the tiles with all steps, after one walk without writing for each DoRA's norms.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from .. import algebra
from ..factors import LoHaFactors
from . import gemm
from .cost import KHATRI_RAO_BYTES, WHOLE

# Numbers per tile. CPU: both products stay in L2 and L3, and starting the threads costs little. GPU: enough to fill it.
CPU_TILE, GPU_TILE = 1 << 20, 2 << 20
# Rows of a product are this many numbers apart from ending where the next begins: where a row is a multiple of 4 KiB
# (1024, 3072, 5120 columns), rows that follow each other compete for the same few lines of cache; 2x slower, measured.
PADDING = 16
# So few numbers that the allocator has memory for them at hand.
FRESH = 128 << 10
# The most bytes of tiles that are kept for the next call.
KEPT = 32 << 20
# Numbers of prepared row factors, and of column factors: small beside W even where the rank is enormous.
PREPARED = 2 << 20


class Term(Protocol):
    """s·ΔW of one or more updates."""

    def rows(self, rows: slice) -> None:
        """Make ready what depends on the rows of W."""

    def columns(self, columns: slice) -> None:
        """Make ready what depends on the columns of W."""

    def add_(self, x: Tensor, rows: slice, scratch: Tensor) -> None:
        """x += s·ΔW[rows, the columns], ``rows`` counted from the first one made ready."""


class Products:
    """x += s·(A₁B₁)∘(A₂B₂): two products in one bmm, and one addcmul."""

    def __init__(self, f: LoHaFactors, scale: float, dtype: torch.dtype) -> None:
        self.factors, self.scale, self.dtype = f, scale, dtype

    def rows(self, rows: slice) -> None:
        self.a = torch.stack(left(self.factors, rows)).to(self.dtype)

    def columns(self, columns: slice) -> None:
        self.b = torch.stack(right(self.factors, columns, self.dtype))

    def add_(self, x: Tensor, rows: slice, scratch: Tensor) -> None:
        a, b = self.a[:, rows], self.b
        if gemm.by_onednn(a[0], b[0]):
            m1, m2 = gemm.matmul(a[0], b[0]), gemm.matmul(a[1], b[1])
        else:
            m1, m2 = torch.bmm(a, b, out=scratch[:, : x.shape[0], : x.shape[1]])
        x.addcmul_(m1, m2, value=self.scale)


class KhatriRao:
    """x += Σ U·V, the updates' Khatri–Rao factors side by side: one addmm."""

    def __init__(self, terms: Sequence[tuple[LoHaFactors, float]], dtype: torch.dtype) -> None:
        self.terms, self.dtype = terms, dtype

    def rows(self, rows: slice) -> None:
        u = []
        for f, scale in self.terms:
            a1, a2 = (a.to(self.dtype) for a in left(f, rows))
            u.append(algebra.columnwise(a1.T * scale, a2.T).T)
        self.u = u[0] if len(u) == 1 else torch.cat(u, 1)

    def columns(self, columns: slice) -> None:
        v = [algebra.columnwise(*right(f, columns, self.dtype)) for f, _ in self.terms]
        self.v = v[0] if len(v) == 1 else torch.cat(v)

    def add_(self, x: Tensor, rows: slice, scratch: Tensor) -> None:
        gemm.addmm_(x, self.u[rows], self.v)


def left(f: LoHaFactors, rows: slice) -> tuple[Tensor, Tensor]:
    """A₁, A₂ of these rows, (h, r) each."""
    if f.is_tucker:
        return f.w1_a[:, rows].T, f.w2_a[:, rows].T
    return f.w1_a[rows], f.w2_a[rows]


def right(f: LoHaFactors, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B₁, B₂ of these columns, (r, w) each. A Tucker half is flat once its core is multiplied into B:

    M[o,(i,k)] = Σ_p a[p,o] · (Σ_q t[p,q,k]·b[q,i]), which costs r²·i·∏k, next to nothing beside o·i·∏k·r.
    """
    if f.t1 is None or f.t2 is None:
        return f.w1_b[:, columns].to(dtype), f.w2_b[:, columns].to(dtype)
    k = prod(f.t1.shape[2:])
    inputs = slice(columns.start // k, columns.stop // k)
    halves = ((f.t1, f.w1_b), (f.t2, f.w2_b))
    b1, b2 = (torch.einsum("pqk,qi->pik", t.flatten(2).to(dtype), b[:, inputs].to(dtype)) for t, b in halves)
    return b1.flatten(1), b2.flatten(1)


@dataclass
class Sum:
    """x += Σ s·ΔW."""

    terms: Sequence[Term]


@dataclass
class Dora:
    """x += strength·(m∘y/‖y‖ − x), y = x + ΔW. The norms run over a whole row or column, so they come first."""

    term: Term
    strength: float
    magnitude: Tensor
    axis: int
    kernel: int
    squares: Tensor = field(init=False)
    ratio: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Sums over tiles in float64 where there is such a thing: they cost nothing.
        wide = torch.float32 if self.magnitude.device.type == "mps" else torch.float64
        self.magnitude = self.magnitude.flatten().to(wide)
        self.squares = torch.zeros_like(self.magnitude)

    def measure(self, y: Tensor, rows: slice, columns: slice) -> None:
        if self.axis == 0:
            self.squares[rows] += torch.linalg.vector_norm(y, dim=1).to(self.squares.dtype).square()
            return
        inputs = slice(columns.start // self.kernel, columns.stop // self.kernel)
        norms = torch.linalg.vector_norm(y.view(y.shape[0], -1, self.kernel), dim=(0, 2))
        self.squares[inputs] += norms.to(self.squares.dtype).square()

    def settle(self, dtype: torch.dtype) -> None:
        """m/‖y‖, as a column or a row that fits W; a slice of zeros stays zero."""
        ratio = (self.magnitude / self.squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)).to(dtype)
        self.ratio = ratio.unsqueeze(1) if self.axis == 0 else ratio.repeat_interleave(self.kernel).unsqueeze(0)

    def apply_(self, x: Tensor, y: Tensor, rows: slice, columns: slice) -> None:
        y.mul_(self.ratio[rows] if self.axis == 0 else self.ratio[:, columns])
        x.lerp_(y, self.strength)


Step = Sum | Dora


def add_whole_(weight: Tensor, f: LoHaFactors, scale: float) -> None:
    """W += scale·(A₁B₁)∘(A₂B₂) for flat factors of W's dtype, by three calls: a small weight needs no tiles."""
    if gemm.by_onednn(f.w1_a, f.w1_b):
        m1, m2 = gemm.matmul(f.w1_a, f.w1_b), gemm.matmul(f.w2_a, f.w2_b)
    elif weight.numel() <= FRESH:
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
    if device.type != "cpu" or size > KEPT:
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
    for index, step in enumerate(steps):
        if isinstance(step, Dora):
            _walk(weight, source, steps[:index], dtype, measured=step)
            step.settle(dtype)
    _walk(weight, source, steps, dtype)


def _single_product(weight: Tensor, source: Tensor, steps: Sequence[Step], dtype: torch.dtype) -> bool:
    """Whether the merge is one addmm into W, and if so, do it: BLAS has tiles of its own."""
    match steps:
        case [Sum(terms=[KhatriRao() as term])]:
            matrix = _matrix(weight)
        case _:
            return False
    if matrix is None or 1 not in matrix.stride() or weight.dtype != dtype:
        return False
    if _rank([term]) * sum(matrix.shape) * dtype.itemsize > KHATRI_RAO_BYTES:
        return False
    if source is not weight:
        weight.copy_(source)
    term.rows(slice(0, matrix.shape[0]))
    term.columns(slice(0, matrix.shape[1]))
    if matrix.numel() <= WHOLE:
        gemm.addmm_(matrix, term.u, term.v)
    else:
        matrix.addmm_(term.u, term.v)
    return True


def _walk(
    weight: Tensor, source: Tensor, steps: Sequence[Step], dtype: torch.dtype, measured: Dora | None = None
) -> None:
    """All steps on each tile; then W's tile is written or, if ``measured``, only looked at."""
    out, n, kernel = weight.shape[0], weight[0].numel(), prod(weight.shape[2:])
    target, origin = _matrix(weight), _matrix(source)
    matrices = target is not None and origin is not None
    in_place = matrices and weight.dtype == dtype and measured is None
    terms = [t for step in steps for t in (step.terms if isinstance(step, Sum) else [step.term])]
    if measured is not None:
        terms.append(measured.term)
    dora = any(isinstance(step, Dora) for step in steps)
    height, width = tile_shape(out, n, kernel, _rank(terms), weight.device, matrices)
    by_products = any(isinstance(term, Products) for term in terms)
    products, x_buffer, y_buffer = scratch(
        (2 * by_products, height, width + PADDING),
        (0 if in_place else height * width,),
        (dora * height * width,),
        dtype=dtype,
        device=weight.device,
    )
    for band in _slices(out, max(height, PREPARED // _rank(terms) // height * height)):
        for term in terms:
            term.rows(band)
        for columns in _slices(n, width):
            for term in terms:
                term.columns(columns)
            for inner in _slices(band.stop - band.start, height):
                rows = slice(band.start + inner.start, band.start + inner.stop)
                if target is not None and origin is not None:
                    tile, read = target[rows, columns], origin[rows, columns]
                else:
                    tile, read = weight[rows], source[rows]
                x = tile if in_place else x_buffer[: tile.numel()].view(tile.shape)
                if x is not tile or source is not weight:
                    x.copy_(read)
                x = x if x.dim() == 2 else x.flatten(1)
                for step in steps:
                    _apply(step, x, y_buffer, rows, columns, inner, products)
                if measured is not None:
                    measured.term.add_(x, inner, products)
                    measured.measure(x, rows, columns)
                elif not in_place:
                    tile.copy_(x.view(tile.shape))


def _apply(step: Step, x: Tensor, y: Tensor, rows: slice, columns: slice, inner: slice, scratch: Tensor) -> None:
    if isinstance(step, Sum):
        for term in step.terms:
            term.add_(x, inner, scratch)
        return
    y = y[: x.numel()].view(x.shape).copy_(x)
    step.term.add_(y, inner, scratch)
    step.apply_(x, y, rows, columns)


def tile_shape(out: int, n: int, kernel: int, rank: int, device: torch.device, matrix: bool) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows if their factors are small, else a multiple of the kernel's size."""
    inputs = max(1, PREPARED // (rank * kernel))
    width = min(n, inputs * kernel) if matrix else n
    height = max(1, (CPU_TILE if device.type == "cpu" else GPU_TILE) // width)
    bands = -(-out // height)
    return -(-out // bands), width


def _rank(terms: Sequence[Term]) -> int:
    """Numbers per row of W that the terms make ready."""
    return sum(
        2 * t.factors.rank if isinstance(t, Products) else sum(f.rank**2 for f, _ in t.terms)
        for t in terms
        if isinstance(t, Products | KhatriRao)
    )


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _matrix(weight: Tensor) -> Tensor | None:
    """weight as (o, n) without a copy; None if its strides forbid it (a channels-last convolution)."""
    if weight.dim() == 2:
        return weight
    try:
        return weight.view(weight.shape[0], -1)
    except RuntimeError:
        return None
