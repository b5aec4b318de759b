"""Updates as products U·V: sums of LoHas written as one, and their best approximation at a lower rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import LoHaError
from .factors import LoHaFactors


def product(factors: LoHaFactors) -> tuple[Tensor, Tensor]:
    """ΔW·scale = U·V exactly: U (o, r²), V (r², i·∏k); a Tucker core is folded into V. In float32 or float64."""
    u, v, core = factors.khatri_rao()
    if core is not None:
        v = torch.einsum("PQ...,Qi->Pi...", core, v).flatten(1)
    return u, v


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
    parts = [product(f) for f in stack]
    if len({(u.shape[0], v.shape[1]) for u, v in parts}) > 1:
        raise LoHaError(f"updates of different shapes: {', '.join(str(f.shape) for f in stack)}")
    u = torch.cat([u * weight for (u, _), weight in zip(parts, weights, strict=True)], 1)
    return as_loha(u, torch.cat([v for _, v in parts]))


def as_loha(u: Tensor, v: Tensor) -> LoHaFactors:
    """U·V as a LoHa of U's rank: alpha is the rank, and the second half's product is exactly one everywhere."""
    ones = torch.zeros_like(v)
    ones[0] = 1
    return LoHaFactors(u, v, torch.ones_like(u), ones, alpha=u.shape[1])


def truncate(
    u: Tensor, v: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best U'·V' of at most ``rank``, or of the least rank that keeps ``energy``, by QR and a small SVD.

    Args:
        energy: share of ‖UV‖² to keep, in (0, 1].

    Returns:
        U' (o, r'), V' (r', n), in the dtype of u, with the singular values shared evenly; and ‖UV − U'V'‖ / ‖UV‖.
    """
    if (rank is None) == (energy is None):
        raise LoHaError("give either rank or energy")
    if rank is not None and rank < 1:
        raise LoHaError(f"rank is {rank}; expected a whole number from 1")
    if energy is not None and not 0 < energy <= 1:
        raise LoHaError(f"energy is {energy}; expected a share above 0 and at most 1")
    qu, ru = torch.linalg.qr(u.double())
    qv, rv = torch.linalg.qr(v.double().T)
    left, sigma, right = torch.linalg.svd(ru @ rv.T)
    total = float(sigma.square().sum())
    if energy is not None:
        kept = sigma.square().cumsum(0)
        rank = int((kept < energy * total * (1 - 1e-12)).sum()) + 1
    assert rank is not None
    rank = min(rank, sigma.numel())
    lost = float(sigma[rank:].square().sum())
    root = sigma[:rank].sqrt()
    lower_u, lower_v = (qu @ left[:, :rank]) * root, root[:, None] * (right[:rank] @ qv.T)
    return lower_u.to(u.dtype), lower_v.to(v.dtype), (lost / total) ** 0.5 if total else 0.0
