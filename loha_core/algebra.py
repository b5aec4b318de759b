"""The equations as code. Symbols: o outputs, i inputs, k kernel, r rank, s = alpha/r."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .factors import LoHaFactors


def compute_dtype(*tensors: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """float64 if any tensor or the wanted dtype is, else float32: half precision is storage, not arithmetic."""
    return torch.float64 if torch.float64 in (dtype, *(t.dtype for t in tensors)) else torch.float32


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """M[o,i,k] = Σ_pq t[p,q,k]·a[p,o]·b[q,i] for t (r, r, *k), a (r, o), b (r, i); any number of kernel axes."""
    return torch.einsum("pq...,po,qi->oi...", t, a, b)


def halves(f: LoHaFactors) -> tuple[Tensor, Tensor]:
    """M₁ and M₂, each of shape ``f.shape``, in the factors' dtype."""
    if f.t1 is None or f.t2 is None:
        return f.w1_a @ f.w1_b, f.w2_a @ f.w2_b
    return tucker(f.t1, f.w1_a, f.w1_b), tucker(f.t2, f.w2_a, f.w2_b)


def delta(f: LoHaFactors) -> Tensor:
    """s·M₁∘M₂ (FedPara eq. 2), in the factors' dtype, of shape ``f.shape``."""
    m1, m2 = halves(f)
    return m1.mul_(m2).mul_(f.scale)


def columnwise(x: Tensor, y: Tensor) -> Tensor:
    """Khatri–Rao product of x (r, n) and y (q, n): row (p·q') of the result is x[p]∘y[q'], shape (r·q, n)."""
    return (x.unsqueeze(1) * y.unsqueeze(0)).flatten(0, 1)


def khatri_rao(f: LoHaFactors) -> tuple[Tensor, Tensor, Tensor | None]:
    """(U, V, core) with s·ΔW = U·V exactly; see DESIGN §4 and ``factors.KhatriRao``.

    (A₁B₁)∘(A₂B₂) = (A₁ ⊙_row A₂)(B₁ ⊙_col B₂): U[o,(p,q)] = s·A₁[o,p]A₂[o,q], V[(p,q),n] = B₁[p,n]B₂[q,n].
    """
    v = columnwise(f.w1_b, f.w2_b)
    if f.t1 is None or f.t2 is None:
        return columnwise(f.w1_a.T, f.w2_a.T).T * f.scale, v, None
    u = columnwise(f.w1_a, f.w2_a).T * f.scale
    core = torch.einsum("pq...,xy...->pxqy...", f.t1, f.t2).flatten(0, 1).flatten(1, 2)
    return u, v, core


def norm(f: LoHaFactors) -> float:
    """‖s·ΔW‖_F. By ‖UV‖² = ⟨UᵀU, VVᵀ⟩ where r² is the short side, so that no o×i is built; float64 sums."""
    if not f.is_tucker and f.rank**2 <= min(f.shape) // 2:
        u, v, _ = khatri_rao(f.to(dtype=torch.float64))
        return float(((u.T @ u) * (v @ v.T)).sum().clamp_min(0).sqrt())
    return float(torch.linalg.vector_norm(f.delta(), dtype=torch.float64))


def dora_axis(dora_scale: Tensor, weight_shape: tuple[int, ...]) -> int:
    """The axis that DoRA's magnitudes run along: 0 for outputs, 1 for inputs.

    The shape tells: (o, 1, …) or (o,) is outputs, (1, i, …) is inputs. Equal counts are settled by position.
    """
    shape = tuple(dora_scale.shape)
    if shape and shape[0] == dora_scale.numel() == weight_shape[0]:
        return 0
    if len(weight_shape) > 1 and dora_scale.numel() == weight_shape[1]:
        return 1
    if dora_scale.numel() == weight_shape[0]:
        return 0
    raise ValueError(f"dora_scale {shape} fits neither axis of a weight {weight_shape}")


def dora_norm(weight: Tensor, axis: int) -> Tensor:
    """‖weight‖ over all axes but ``axis``, kept broadcastable: the denominator of DoRA (arXiv 2402.09353, eq. 5)."""
    others = [d for d in range(weight.dim()) if d != axis]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True)


def dora(weight: Tensor, update: Tensor, dora_scale: Tensor) -> Tensor:
    """W' = m ∘ (W+ΔW)/‖W+ΔW‖ for weight and update of one shape; an all-zero slice stays zero."""
    axis = dora_axis(dora_scale, tuple(weight.shape))
    adapted = weight + update
    magnitude = dora_scale.to(adapted).reshape([-1 if d == axis else 1 for d in range(weight.dim())])
    return adapted * (magnitude / dora_norm(adapted, axis).clamp_min(torch.finfo(adapted.dtype).tiny))
