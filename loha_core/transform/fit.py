"""The best true LoHa of a rank for a given update: both halves free, by alternating least squares.

With the right factors held, ‖ΔW − (A₁B₁)∘(A₂B₂)‖² falls apart into the rows of A₁ and A₂: row o is the vector
a₁⊗a₂ (r²,) that best combines the rows of K, the Khatri–Rao product of B₁ and B₂. All that it needs of ΔW = UV and K
are KKᵀ (r², r²) and ΔW·Kᵀ = U(VKᵀ) (o, r²), so that nothing o×i is ever built. The columns go likewise. A row's
problem, too, alternates between a₁ and a₂, each linear, of r unknowns.

Two things lead out of the poor local minima in which most random starts end. Every row also tries the combination
without the constraint, whose leading singular pair is a₁, a₂: once the other side is right, that is the answer at
once. And where rows and columns have settled into camps that follow different solutions, a few steps that look only
at the better half of each let one camp win (least trimmed squares).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import columnwise
from ..factors import LoHaFactors
from . import lowrank

_EXACT = 1e-7  # relative error at which the search ends
_RIDGE = 1e-11  # of a Gram matrix's mean diagonal; keeps degenerate rows solvable
_SAMPLE = 320  # rows and columns that starts are tried on, at least; with fewer there are more local minima


class Fit(NamedTuple):
    """A fitted LoHa, its relative error, that of the svd of its rank, and that of the LoRA with as many parameters."""

    factors: LoHaFactors
    error: float
    svd_error: float
    lora_error: float


class Halves(NamedTuple):
    """A₁ (o, r), A₂ (o, r), B₁ (n, r), B₂ (n, r): the right factors transposed, so that both sides are alike."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor


def fit(u: Tensor, v: Tensor, rank: int, *, seed: int = 0, starts: int = 24, iterations: int = 60) -> Fit:
    """A LoHa of ``rank`` near U·V; never further than U·V's truncation to that rank, from which one start goes.

    Args:
        u, v: (o, R), (R, n).
        seed: of the random starts.
        starts: random starts at most, where the update may be a LoHa of this rank exactly; two where it cannot.
        iterations: on all rows and columns, of the better start.

    Returns:
        factors in the dtype of u, with alpha = rank. ``lora_error`` is the error of the best LoRA of rank 2r, which
        has as many parameters.
    """
    left, sigma, right = lowrank.svd(u, v)
    tails = torch.cat([sigma.square().flip(0).cumsum(0).flip(0), sigma.new_zeros(1)])
    size = float(tails[0]) ** 0.5
    if size == 0:
        zeros = [torch.zeros_like(side[:, :1]).expand(-1, rank) for side in (u, v.T)]
        return Fit(LoHaFactors(zeros[0], zeros[1].T, zeros[0], zeros[1].T, alpha=rank), 0.0, 0.0, 0.0)
    # A LoHa of rank r has matrix rank r² at most: what lies beyond is lost in any case.
    svd_error, lora_error, floor = (float(tails[min(k, len(sigma))]) ** 0.5 / size for k in (rank, 2 * rank, rank**2))
    kept = max(1, int((tails > 1e-18 * size**2).sum()))
    x, y = left[:, :kept] * (sigma[:kept] / size).sqrt(), right[:kept].T * (sigma[:kept] / size).sqrt()
    random = torch.Generator().manual_seed(seed)
    halves, error = _truncated(left, sigma / size, right, rank, random), svd_error
    if error > _EXACT:
        may_be_exact = floor < 1e-2 or bool(sigma[rank**2 - 1] > 3 * sigma[rank**2])
        may_be_exact = may_be_exact and 2 * rank**2 < min(len(x), len(y))  # beyond, it is hardly ever found
        goal = max(_EXACT, floor * (1 + 1e-3))
        halves, error = _descend(x, y, halves, 8, error, goal)
        # Far below the svd's error after a few steps, it is on its way to the optimum.
        if error > max(2 * floor, 0.1 * svd_error):
            restarted, restarted_error = _started(x, y, rank, starts if may_be_exact else 2, 1.5 * floor + 1e-4, random)
            if restarted_error < error:
                halves, error = restarted, restarted_error
        halves, error = _descend(x, y, halves, iterations, error, goal)
    return Fit(_as_factors(halves, size, rank, u.dtype), error, svd_error, lora_error)


def _truncated(left: Tensor, sigma: Tensor, right: Tensor, rank: int, random: torch.Generator) -> Halves:
    """The svd in the first half; the second is all ones, with directions to grow in."""
    width = min(rank, len(sigma))
    root = sigma[:width].sqrt()
    a1, b1 = (torch.zeros(len(side), rank, dtype=left.dtype) for side in (left, right.T))
    a1[:, :width], b1[:, :width] = left[:, :width] * root, right[:width].T * root
    a2, b2 = torch.zeros_like(a1), torch.randn(b1.shape, generator=random, dtype=b1.dtype)
    a2[:, 0], b2[:, 0] = 1, 1
    return Halves(a1, a2, b1, b2)


def _started(
    x: Tensor, y: Tensor, rank: int, starts: int, goal: float, random: torch.Generator
) -> tuple[Halves, float]:
    """The best of several random starts, tried on some rows and columns, then carried over to all."""
    rows, columns = (_sampled(side, max(_SAMPLE, 3 * rank**2), random) for side in (x, y))
    small_x, small_y = x[rows], y[columns]
    best, least = None, float("inf")
    for _ in range(starts):
        n, m = len(small_x), len(small_y)
        halves = Halves(*(torch.randn(k, rank, generator=random, dtype=x.dtype) for k in (n, n, m, m)))
        halves, error = _descend(small_x, small_y, halves, 60, goal=goal)
        for _ in range(2 if starts > 2 else 0):
            if error < goal:
                break
            halves, _ = _descend(small_x, small_y, halves, 15, fraction=0.5)
            halves, error = _descend(small_x, small_y, halves, 60, goal=goal)
        if best is None or error < least:
            best, least = halves, error
        if least < goal:
            break
    assert best is not None
    # Rows from the sampled columns, then columns from all rows, then back and forth.
    ones = [torch.ones(len(side), rank, dtype=x.dtype) for side in (x, y)]
    a1, a2, _ = _side(x, small_y, ones[0], ones[0], best.b1, best.b2, 4)
    b1, b2, _ = _side(y, x, ones[1], ones[1], a1, a2, 4)
    return _descend(x, y, Halves(a1, a2, b1, b2), 8)


def _sampled(side: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Indices of ``count`` rows, those of a larger norm with a larger probability."""
    if len(side) <= count:
        return torch.arange(len(side))
    weight = torch.linalg.vector_norm(side, dim=1)
    return torch.multinomial(weight + weight.mean() * 1e-3, count, generator=random)


def _descend(
    x: Tensor,
    y: Tensor,
    halves: Halves,
    iterations: int,
    error: float = float("inf"),
    goal: float = _EXACT,
    fraction: float = 1.0,
) -> tuple[Halves, float]:
    """Alternate until nothing moves; X·Yᵀ is the target. The relative error comes with the result.

    Args:
        goal: the error at which it ends.
        fraction: of the rows and columns that the other side is computed from: those that fit best.
    """
    total = float(((x.T @ x) * (y.T @ y)).sum())
    every = slice(None)
    rows: Tensor | slice = every
    columns: Tensor | slice = every
    slow = 0
    for _ in range(iterations):
        a1, a2, change = _side(x, y[columns], halves.a1, halves.a2, halves.b1[columns], halves.b2[columns], 1)
        if fraction < 1:
            rows = _best(change, x, y[columns], fraction)
        (b1, a1), (b2, a2) = _orthonormal(halves.b1, a1), _orthonormal(halves.b2, a2)
        b1, b2, change = _side(y, x[rows], b1, b2, a1[rows], a2[rows], 1)
        if fraction < 1:
            columns = _best(change, y, x[rows], fraction)
        halves = Halves(a1, a2, b1, b2)
        if fraction == 1:
            before, error = error, (max(0.0, total + float(change.sum())) / total) ** 0.5
            slow = slow + 1 if error > before * (1 - 1e-3) else 0
            if error <= goal or slow >= 3:
                break
    return halves, error


def _best(change: Tensor, x: Tensor, y: Tensor, fraction: float) -> Tensor:
    """The rows of X·Yᵀ with the least relative error."""
    sizes = ((x @ (y.T @ y)) * x).sum(1).clamp_min(1e-300)
    return (change / sizes).argsort()[: max(1, int(fraction * len(x)))]


def _orthonormal(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product A·Bᵀ with B's columns orthonormal, which keeps the least squares well conditioned."""
    if len(b) < b.shape[1]:
        return b, a
    q, r = torch.linalg.qr(b)
    return q, a @ r.T


def _side(
    x: Tensor, y: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """New A₁, A₂ for the target X·Yᵀ and given B₁, B₂; and each row's ‖error‖² − ‖target‖².

    Each row gets the best of what it was, of alternating from there, and of alternating from the free solution.
    """
    rank = b1.shape[1]
    k = columnwise(b1.T, b2.T)
    gram = k @ k.T
    products = x @ (y.T @ k.T)
    z = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    best = a1, a2, ((z @ gram) * z).sum(1) - 2 * (z * products).sum(1)
    # Gram (p, q; s, t), ordered so that the half that is given comes first: (q, t; p, s) and (p, s; q, t).
    square = gram.view(rank, rank, rank, rank)
    by2 = square.permute(1, 3, 0, 2).reshape(rank**2, -1)
    by1 = square.permute(0, 2, 1, 3).reshape(rank**2, -1)
    targets = products.unflatten(1, (rank, rank))
    for c1, c2 in ((a1, a2), *_free(products, gram, rank, len(b1))):
        for _ in range(sweeps):
            c1, _ = _half(c2, by2, targets)
            c2, change = _half(c1, by1, targets.mT)
        better = change < best[2]
        keep = better.unsqueeze(1)
        best = torch.where(keep, c1, best[0]), torch.where(keep, c2, best[1]), torch.where(better, change, best[2])
    return _balanced(*best)


def _free(products: Tensor, gram: Tensor, rank: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """The rows without the constraint that they are a₁⊗a₂, brought back to it; none where they are not determined."""
    if rank**2 > count:
        return []
    ridge = gram.diagonal().mean() * _RIDGE
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(rank**2, dtype=gram.dtype))
    if bool(failed):
        return []
    return [_leading(torch.cholesky_solve(products.T, factor).T.unflatten(1, (rank, rank)))]


def _half(other: Tensor, gram: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One half's rows, with the other half's given: r unknowns each. And ‖error‖² − ‖target‖² of each row."""
    normal = ((other.unsqueeze(2) * other.unsqueeze(1)).flatten(1) @ gram).unflatten(1, (other.shape[1], -1))
    right = targets @ other.unsqueeze(2)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = diagonal.mean(1, keepdim=True) * _RIDGE + torch.finfo(normal.dtype).tiny
    factor, _ = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge.expand_as(diagonal)))
    solution = torch.cholesky_solve(right, factor)
    change = (solution * (normal @ solution - 2 * right)).sum((1, 2))
    return solution.squeeze(2), torch.where(torch.isfinite(change), change, torch.inf)


def _leading(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """About the leading singular pair of each (r, r) matrix, by three steps of the power method."""
    start = torch.linalg.vector_norm(matrices, dim=2).argmax(1)
    right = matrices[torch.arange(len(matrices)), start]
    left = right
    for _ in range(3):
        left = (matrices @ right.unsqueeze(2)).squeeze(2)
        left = left / torch.linalg.vector_norm(left, dim=1, keepdim=True).clamp_min(1e-300)
        right = (matrices.mT @ left.unsqueeze(2)).squeeze(2)
    return left, right


def _balanced(a1: Tensor, a2: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both halves of a row equally long: their product alone is determined."""
    n1, n2 = (torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(1e-150) for a in (a1, a2))
    ratio = (n2 / n1).sqrt()
    return a1 * ratio, a2 / ratio, change


def _as_factors(halves: Halves, size: float, rank: int, dtype: torch.dtype) -> LoHaFactors:
    """Each half by its own svd, singular values split evenly, both of one size: good to round, good to train."""
    tensors, scale = [], (size**0.5)
    for a, b in ((halves.a1, halves.b1), (halves.a2, halves.b2)):
        left, sigma, right = lowrank.svd(a, b.T)
        root = (sigma * scale).sqrt()
        width = len(sigma)
        wide_a, wide_b = (torch.zeros(len(side), rank, dtype=a.dtype) for side in (a, b))
        wide_a[:, :width], wide_b[:, :width] = left * root, right.T * root
        tensors.append((wide_a, wide_b))
    (a1, b1), (a2, b2) = tensors
    n1, n2 = (float(torch.linalg.vector_norm(a)) or 1.0 for a in (a1, a2))
    ratio = (n2 / n1) ** 0.5
    parts = (a1 * ratio, b1.T * ratio, a2 / ratio, b2.T / ratio)
    w1_a, w1_b, w2_a, w2_b = (part.to(dtype).contiguous() for part in parts)
    return LoHaFactors(w1_a, w1_b, w2_a, w2_b, alpha=rank)
