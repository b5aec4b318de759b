"""The equations as code. Symbols: o outputs, i inputs, k kernel, r rank, s = alpha/r."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import LoHaError


class Factors(NamedTuple):
    """The tensors of one LoHa, shaped as in `factors.LoHaFactors`, without alpha and DoRA's magnitudes."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors._make(None if t is None else t.to(dtype) for t in self)


class KhatriRao(NamedTuple):
    """ΔW·scale as an ordinary low-rank update of rank r².

    Flat: ``u @ v`` with u (o, r²), v (r², n). Tucker: ``core`` (r², r², *k) sits between them,
    ΔW[o, i, k] = Σ_PQ u[o, P] · core[P, Q, k] · v[Q, i].
    """

    u: Tensor
    v: Tensor
    core: Tensor | None = None


def compute_dtype(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> torch.dtype:
    """float64 if ``dtype`` or any tensor is, else float32: half precision is storage, not arithmetic."""
    dtypes = [dtype, *(t.dtype for t in tensors if t is not None)]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def factor_shapes(weight: tuple[int, ...], rank: int, tucker: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the factors of a weight (o, i, *k), by name in the order of `Factors`; kernels without a core lie flat.

    >>> factor_shapes((8, 4, 3), 2, tucker=False)
    {'w1_a': (8, 2), 'w1_b': (2, 12), 'w2_a': (8, 2), 'w2_b': (2, 12)}
    """
    out, inner, *kernel = weight
    a, b = ((rank, out), (rank, inner)) if tucker else ((out, rank), (rank, math.prod(weight[1:])))
    shapes: dict[str, tuple[int, ...]] = {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
    return shapes | dict.fromkeys(("t1", "t2"), (rank, rank, *kernel)) if tucker else shapes


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """M[o,i,k] = Σ_pq t[p,q,k]·a[p,o]·b[q,i] for t (r, r, *k), a (r, o), b (r, i); any number of kernel axes."""
    return torch.einsum("pq...,po,qi->oi...", t, a, b)


def halves(f: Factors) -> tuple[Tensor, Tensor]:
    """M₁ and M₂, (o, n) each or, of Tucker factors, (o, i, *k); in the factors' dtype."""
    if f.t1 is None or f.t2 is None:
        return f.w1_a @ f.w1_b, f.w2_a @ f.w2_b
    return tucker(f.t1, f.w1_a, f.w1_b), tucker(f.t2, f.w2_a, f.w2_b)


def delta(f: Factors, scale: float) -> Tensor:
    """s·M₁∘M₂ (FedPara eq. 2), shape and dtype as of `halves`."""
    m1, m2 = halves(f)
    return m1.mul_(m2).mul_(scale)


def columnwise(x: Tensor, y: Tensor) -> Tensor:
    """Khatri–Rao product of x (r, n) and y (q, n): row (p·q') of the result is x[p]∘y[q'], shape (r·q, n)."""
    return (x.unsqueeze(1) * y.unsqueeze(0)).flatten(0, 1)


def khatri_rao(f: Factors, scale: float) -> KhatriRao:
    """s·ΔW = U·V exactly (DESIGN §4), in the factors' dtype.

    (A₁B₁)∘(A₂B₂) = (A₁ ⊙_row A₂)(B₁ ⊙_col B₂): U[o,(p,q)] = s·A₁[o,p]A₂[o,q], V[(p,q),n] = B₁[p,n]B₂[q,n].
    """
    a1, v = f.w1_a * scale, columnwise(f.w1_b, f.w2_b)
    if f.t1 is None or f.t2 is None:
        return KhatriRao(columnwise(a1.T, f.w2_a.T).T, v)
    core = torch.einsum("pq...,xy...->pxqy...", f.t1, f.t2).flatten(0, 1).flatten(1, 2)
    return KhatriRao(columnwise(a1, f.w2_a).T, v, core)


# Elements of ΔW that are built at once where its norm has no shorter way.
STRIPE = 1 << 22


def norm(f: Factors, scale: float) -> float:
    """‖s·ΔW‖_F, without ΔW; sums in float64.

    Where r² is the short side, by Gram matrices of the Khatri–Rao form: ‖UV‖² = ⟨UᵀU, VVᵀ⟩, and with a Tucker core C
    Σ_k ⟨UᵀU·C_k, C_k·VVᵀ⟩. Else by stripes of outputs.
    """
    outputs, inputs = f.w1_a.shape[0 if f.t1 is None else 1], f.w1_b.shape[1]
    if f.rank**2 <= min(outputs, inputs) // 2:
        u, v, core = khatri_rao(f.to(torch.float64), scale)
        left, right = u.T @ u, v @ v.T
        if core is not None:
            left, right = torch.tensordot(left, core, 1), torch.einsum("PYk,YQ->PQk", core.flatten(2), right)
        return float((left.flatten() * right.flatten()).sum().clamp_min(0).sqrt())
    f = f.to(compute_dtype(*f))
    height = max(1, STRIPE // (inputs * (1 if f.t1 is None else f.t1[0, 0].numel())))
    axis = 0 if f.t1 is None else 1
    stripes = zip(f.w1_a.split(height, axis), f.w2_a.split(height, axis), strict=True)
    updates = (delta(f._replace(w1_a=a1, w2_a=a2), scale) for a1, a2 in stripes)
    return math.hypot(*(float(torch.linalg.vector_norm(update, dtype=torch.float64)) for update in updates))


def dora_axis(dora_scale: Tensor, weight_shape: tuple[int, ...]) -> int:
    """The axis that DoRA's magnitudes run along: 0 for outputs, 1 for inputs.

    The shape tells: (o, 1, …) or (o,) is outputs, (1, i, …) is inputs. Equal counts are settled by position.

    Raises:
        LoHaError: as many magnitudes as neither axis is long.
    """
    shape = tuple(dora_scale.shape)
    if shape and shape[0] == dora_scale.numel() == weight_shape[0]:
        return 0
    if len(weight_shape) > 1 and dora_scale.numel() == weight_shape[1]:
        return 1
    if dora_scale.numel() == weight_shape[0]:
        return 0
    raise LoHaError(f"dora_scale {shape} fits neither axis of a weight {weight_shape}")


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
