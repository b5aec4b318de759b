"""Updates as products U·V: sums of LoHas written as one, and their best approximation at a lower rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import algebra
from ..errors import LoHaError, check_number
from ..factors import Layer, LoHaFactors, LoRAFactors

# --- layers as products ----------------------------------------------------------------------------------------------


def product(layer: Layer) -> tuple[Tensor, Tensor]:
    """ΔW·scale = U·V exactly, of no more columns than the weight's shorter side; in float32 or float64."""
    if isinstance(layer, LoRAFactors) or layer.is_tucker:
        return collapse(*layer.product())
    # Many of the r² columns may be zero: the second half of a sum is ones in one column, and the parts of a fused
    # weight have different columns.
    a1, a2, b1, b2 = layer.w1_a, layer.w2_a, layer.w1_b, layer.w2_b
    acting = ((a1 != 0).float().T @ (a2 != 0).float()) * ((b1 != 0).float() @ (b2 != 0).float().T)
    first, second = acting.nonzero().unbind(1)
    if len(first) >= min(layer.shape):
        return as_product(layer.delta())
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


def exact_sum(stack: Sequence[LoHaFactors], weights: Sequence[float]) -> LoHaFactors:
    """Σ weight·ΔW as one LoHa of rank Σ r², which any reader reproduces (DESIGN §4).

    The first half is the sum; the second half is all ones. Tucker updates come out flat, if their kernels are.

    Raises:
        LoHaError: shapes that differ, or DoRA, which is no sum.
    """
    if len(stack) != len(weights) or not stack:
        raise LoHaError(f"{len(stack)} updates and {len(weights)} weights; expected as many, and at least one")
    if any(f.dora_scale is not None for f in stack):
        raise LoHaError("a DoRA update depends on the weight that it acts on; it has no exact sum as a LoHa")
    parts = [f.product() for f in stack]
    if len({(u.shape[0], v.shape[1]) for u, v in parts}) > 1:
        raise LoHaError(f"updates of different shapes: {', '.join(str(f.shape) for f in stack)}")
    u = torch.cat([u * weight for (u, _), weight in zip(parts, weights, strict=True)], 1)
    return LoHaFactors.from_product(u, torch.cat([v for _, v in parts]))


# --- the algebra of products -----------------------------------------------------------------------------------------


def as_product(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as a product, its shorter side beside an identity."""
    eye = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (eye, matrix) if len(matrix) <= matrix.shape[1] else (matrix, eye)


def dense(u: Tensor, v: Tensor) -> Tensor | None:
    """The matrix that `as_product` wrote as U·V, or None where it is another product."""
    for eye, matrix in ((u, v), (v, u)):
        if len(eye) == eye.shape[1] and torch.equal(eye, torch.eye(len(eye), dtype=eye.dtype, device=eye.device)):
            return matrix
    return None


def collapse(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with at most as many columns as its shorter side has elements."""
    short = min(u.shape[0], v.shape[1])
    if u.shape[1] <= short:
        return u, v
    return as_product(u @ v)


def norm(u: Tensor, v: Tensor) -> float:
    """‖UV‖_F = ⟨UᵀU, VVᵀ⟩^½ in float64."""
    if (matrix := dense(u, v)) is not None:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    u, v = u.double(), v.double()
    return float(((u.T @ u) * (v @ v.T)).sum().clamp_min(0).sqrt())


def finite_norm(name: str, u: Tensor, v: Tensor) -> float:
    """‖UV‖_F.

    Raises:
        LoHaError: it is not finite.
    """
    size = norm(u, v)
    if not math.isfinite(size):
        raise LoHaError(f"{name}: the update is not finite; a weight is too large, or the adapter is broken")
    return size


def distance(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> float:
    """‖U₁V₁ − U₂V₂‖_F, without either product; down to about 1e-8 of their size."""
    (u1, v1), (u2, v2) = x, y
    return norm(torch.cat([u1.double(), -u2.double()], 1), torch.cat([v1.double(), v2.double()]))


def check_bound(rank: int | None, energy: float | None, max_error: float | None) -> None:
    """Exactly one of them, in its range.

    Raises:
        LoHaError: none or several are given, or a value is out of range.
    """
    if sum(bound is not None for bound in (rank, energy, max_error)) != 1:
        raise LoHaError("give one of rank, energy and max_error")
    if rank is not None:
        check_number("rank", rank, minimum=1, integer=True)
    if energy is not None:
        check_number("energy", energy, above=0, maximum=1)
    if max_error is not None:
        check_number("max_error", max_error, minimum=0, below=1)


def truncate(
    u: Tensor, v: Tensor, rank: int | None = None, energy: float | None = None, max_error: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best U'·V' of at most ``rank``, or of the least rank that keeps ``energy`` or stays within ``max_error``.

    Args:
        energy: share of ‖UV‖² to keep, in (0, 1].
        max_error: the largest ‖UV − U'V'‖ / ‖UV‖, in [0, 1).

    Returns:
        U' (o, r'), V' (r', n), in the dtype of u, with the singular values shared evenly; and ‖UV − U'V'‖ / ‖UV‖.
    """
    check_bound(rank, energy, max_error)
    left, sigma, right = svd(u, v)
    tails = sigma.square().flip(0).cumsum(0).flip(0)  # tails[r] is lost at rank r
    total = float(tails[0])
    if rank is None:
        allowed = max_error**2 if max_error is not None else 1 - (energy or 0.0)
        # Never below the rounding of float64, which would only keep noise.
        rank = int((tails > max(allowed, 1e-14) * total).sum())
    rank = max(1, min(rank, sigma.numel()))
    root = sigma[:rank].sqrt()
    lost = float(tails[rank]) if rank < sigma.numel() else 0.0
    lower_u, lower_v = left[:, :rank] * root, root[:, None] * right[:rank]
    return lower_u.to(u.dtype), lower_v.to(v.dtype), (lost / total) ** 0.5 if total else 0.0


def svd(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of U·V in float64, from the QR of each side and a small core: (o, R), (R,), (R, n)."""
    u, v = collapse(u.double(), v.double())
    (qu, ru), (qv, rv) = _qr(u), _qr(v.T)
    left, sigma, right = torch.linalg.svd(ru @ rv.T)
    return qu @ left, sigma, right @ qv.T


def _qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR in float64: by Cholesky, twice (Fukaya et al. 2014), which is all products; Householder's where it fails.

    Twice is as orthogonal as Householder's up to a condition of about 1e8; the second factor tells.
    """
    if len(x) < 2 * x.shape[1]:
        return torch.linalg.qr(x)
    q, r = x, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(q.T @ q, upper=True)
        if bool(failed):
            return torch.linalg.qr(x)
        q, r = torch.linalg.solve_triangular(factor, q, upper=True, left=False), factor @ r
    sound = (factor - torch.eye(len(factor), dtype=x.dtype, device=x.device)).abs().max() < 0.1
    return (q, r) if bool(sound) else torch.linalg.qr(x)


def range_of(matrix: Tensor, columns: int, *, seed: int = 0, steps: int = 2) -> tuple[Tensor, Tensor]:
    """Q·(Qᵀ·W): a matrix in its own leading range, by subspace iteration from random vectors (arXiv 0909.4061, 4.4).

    Args:
        matrix: (o, n), in float32 or float64.
        columns: of Q, some more than the approximation's rank. From half the shorter side on, W itself is returned.
        steps: of the iteration; each makes the error of a flat spectrum smaller.
    """
    if 2 * columns >= min(matrix.shape):
        return as_product(matrix)
    random = torch.Generator().manual_seed(seed)
    q = matrix @ torch.randn(matrix.shape[1], columns, generator=random, dtype=matrix.dtype).to(matrix.device)
    for _ in range(steps):
        q = torch.linalg.qr(q)[0]
        q = matrix @ torch.linalg.qr(matrix.T @ q)[0]
    q = torch.linalg.qr(q)[0]
    return q, q.T @ matrix
