"""Hand-written forward and backward for y = W∗x + ΔW∗x, ∗ a matrix product or a convolution.

Two Functions, one for each way to apply the update. Neither saves anything of the weight's size, and both take the
frozen base weight along, so that the update is accumulated into the base's result instead of being added to it.

Raw tensors throughout: ``functional`` is the public face. ``factors`` are w1_a, w1_b, w2_a, w2_b, t1, t2 in that
order, shaped as in `LoHaFactors`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import columnwise, dora_axis, dora_norm, tucker
from . import gemm

Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Geometry(NamedTuple):
    """How a convolution walks: one entry per kernel axis. A linear layer has none (``None``)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def apply_weight(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """weight ∗ x + bias."""
    if geometry is None:
        return gemm.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if _is_product(x, weight, geometry):
        y = gemm.matmul(weight.flatten(1), x.flatten(2)[0])
        if bias is not None:
            y.add_(bias.unsqueeze(1))
        return y.view(1, -1, *x.shape[2:])
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def apply_weight_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `apply_weight` with respect to x and weight, from g = ∂L/∂y."""
    if geometry is None:
        g2, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        gx = gemm.matmul(g2, weight).view(x.shape) if need_x else None
        return gx, gemm.matmul(g2.T, x2) if need_weight else None
    if not (need_x or need_weight):
        return None, None
    if _is_product(x, weight, geometry) and g.is_contiguous():
        g2, x2 = g.flatten(2)[0], x.flatten(2)[0]
        gx = gemm.matmul(weight.flatten(1).T, g2).view(x.shape) if need_x else None
        return gx, gemm.matmul(g2, x2.T).view(weight.shape) if need_weight else None
    stride, padding, dilation, groups = geometry
    gx, gw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [need_x, need_weight, False]
    )
    return gx, gw


def _is_product(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """A 1×1 convolution of one picture is a matrix product, and torch is slow to see it. Not where autograd looks."""
    pointwise = x.shape[0] == 1 and weight[0, 0].numel() == 1 and geometry.groups == 1
    plain = all(s == 1 for s in geometry.stride) and not any(geometry.padding)
    return pointwise and plain and x.is_contiguous() and not torch.is_grad_enabled()


def columnwise_backward(gv: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `algebra.columnwise` with respect to b1 and b2, from gv (r², n)."""
    gv = gv.unflatten(0, (b1.shape[0], b2.shape[0]))
    return (gv * b2.unsqueeze(0)).sum(1), (gv * b1.unsqueeze(1)).sum(0)


def _uv(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uᵀ (r², o), which holds the scale, and V (r², n). Uᵀ, since its rows are then contiguous like V's."""
    ut = columnwise((a1 * scale).T.contiguous(), a2.T.contiguous())
    return ut.to(dtype), columnwise(b1, b2).to(dtype)


def _uv_backward(
    gut: Tensor, gv: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_uv` with respect to a1, b1, a2, b2."""
    gut = gut.to(a1.dtype).mul_(scale)
    ga1, ga2 = columnwise_backward(gut, a1.T.contiguous(), a2.T.contiguous())
    gb1, gb2 = columnwise_backward(gv.to(b1.dtype), b1, b2)
    return ga1.T, gb1, ga2.T, gb2


class KhatriRaoLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + (x·Vᵀ)·Uᵀ with U = s·A₁ ⊙ A₂, V = B₁ ⊙ B₂; U and V are rebuilt in the backward.

    x (n, i); weight (o, i) and bias (o,), both frozen, or None. Saved: the inputs and x·Vᵀ (n, r²).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float,
        weight: Tensor | None, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ut, v = _uv(a1, b1, a2, b2, scale, x.dtype)
        h = gemm.linear(x, v)
        ctx.save_for_backward(x, h, a1, b1, a2, b2, weight)
        ctx.scale = scale
        if weight is None:
            return gemm.matmul(h, ut)
        y = gemm.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return gemm.addmm_(y, h, ut)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a1, b1, a2, b2, weight = ctx.saved_tensors
        ut, v = _uv(a1, b1, a2, b2, ctx.scale, x.dtype)
        gh, gx = gemm.linear(g, ut), None
        if ctx.needs_input_grad[0]:
            if weight is None:
                gx = gemm.matmul(gh, v)
            else:
                gx = gemm.addmm_(gemm.matmul(g, weight.to(x.dtype)), gh, v)
        grads = _uv_backward(gemm.matmul(h.T, g), gemm.matmul(gh.T, x), a1, b1, a2, b2, ctx.scale)
        return gx, *grads, *[None] * 3


class KhatriRaoConv(torch.autograd.Function):
    """y = W∗x + b + U·(V∗x): V is an r²-channel convolution of W's kernel, U a 1×1 one.

    x (n, g·i, *size); b1, b2 (r, i·∏k); weight (o, i, *k). With groups, each has its own copy of V's channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float,
        weight: Tensor | None, bias: Tensor | None, kernel: tuple[int, ...], geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        ut, v = _uv(a1, b1, a2, b2, scale, x.dtype)
        h = apply_weight(x, _filters(v, kernel, geometry), None, geometry)
        ctx.save_for_backward(x, h, a1, b1, a2, b2, weight)
        ctx.scale, ctx.kernel, ctx.geometry = scale, kernel, geometry
        if weight is None:
            return mix_channels(h, ut.T, geometry.groups)
        y = apply_weight(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry)
        return add_mixed_(y, h, ut.T, geometry.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a1, b1, a2, b2, weight = ctx.saved_tensors
        geometry, need_x = ctx.geometry, ctx.needs_input_grad[0]
        ut, v = _uv(a1, b1, a2, b2, ctx.scale, x.dtype)
        gh, gut = _mixed_backward(g, h, ut, geometry.groups)
        gx, gv = apply_weight_backward(gh, x, _filters(v, ctx.kernel, geometry), geometry, need_x, True)
        if need_x and weight is not None:
            base, _ = apply_weight_backward(g, x, weight.to(x.dtype), geometry, True, False)
            assert base is not None and gx is not None
            gx = base.add_(gx)
        assert gv is not None
        if geometry.groups > 1:
            gv = gv.unflatten(0, (geometry.groups, -1)).sum(0)
        grads = _uv_backward(gut, gv.flatten(1), a1, b1, a2, b2, ctx.scale)
        return gx, *grads, *[None] * 5


def _filters(v: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """V (r², i·∏k) as filters, a copy for each group: (groups·r², i, *k)."""
    filters = v.unflatten(1, (-1, *kernel))
    return filters if geometry.groups == 1 else filters.repeat(geometry.groups, *[1] * (len(kernel) + 1))


def mix_channels(h: Tensor, u: Tensor, groups: int) -> Tensor:
    """U as a 1×1 convolution: h (n, groups·r², *size), u (o, r²)."""
    return apply_weight(h, u.reshape(*u.shape, *[1] * (h.dim() - 2)), None, pointwise(h.dim() - 2, groups))


def add_mixed_(y: Tensor, h: Tensor, u: Tensor, groups: int) -> Tensor:
    """y += U·h."""
    if groups > 1 or not (y.is_contiguous() and h.is_contiguous()):
        return y.add_(mix_channels(h, u, groups))
    n, o = y.shape[:2]
    if n == 1:
        gemm.addmm_(y.view(o, -1), u, h.view(h.shape[1], -1))
    else:
        y.view(n, o, -1).baddbmm_(u.expand(n, *u.shape), h.view(n, h.shape[1], -1))
    return y


def _mixed_backward(g: Tensor, h: Tensor, ut: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of `mix_channels` with respect to h, and to uᵀ."""
    if groups == 1 and g.is_contiguous() and h.is_contiguous():
        g3, h3 = g.flatten(2), h.flatten(2)
        if g.shape[0] == 1:
            return gemm.matmul(ut, g3[0]).view(h.shape), gemm.matmul(h3[0], g3[0].T)
        return (ut @ g3).view(h.shape), torch.einsum("nql,nol->qo", h3, g3)
    weight = ut.T.reshape(ut.shape[1], ut.shape[0], *[1] * (h.dim() - 2))
    gh, gu = apply_weight_backward(g, h, weight, pointwise(h.dim() - 2, groups), True, True)
    assert gh is not None and gu is not None
    return gh, gu.flatten(1).T


def pointwise(axes: int, groups: int) -> Geometry:
    return Geometry((1,) * axes, (0,) * axes, (1,) * axes, groups)


class Rebuilt(torch.autograd.Function):
    """y = W'∗x + b, where W' = W + ΔW or, with magnitudes m, DoRA's m∘(W+ΔW)/‖W+ΔW‖.

    ΔW is built in the forward, dropped, and built again in the backward. In half precision ΔW is not added to W,
    where it would drown in the rounding, but applied beside it.

    x (n, i) or (n, g·i, *size); weight (o, i, *k), frozen; None gives ΔW∗x alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, magnitude: Tensor | None,
        apply_base: bool, shape: tuple[int, ...], geometry: Geometry | None, scale: float, *factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, magnitude, *factors)
        ctx.apply_base, ctx.shape, ctx.geometry, ctx.scale = apply_base, shape, geometry, scale
        update = _update(factors, scale, shape, weight, magnitude)
        if not apply_base:
            return apply_weight(x, update.to(x.dtype), None, geometry)
        assert weight is not None
        bias = None if bias is None else bias.to(x.dtype)
        if _fusable(x, weight):
            return apply_weight(x, update.to(x.dtype).add_(weight), bias, geometry)
        y = apply_weight(x, weight.to(x.dtype), bias, geometry)
        return y.add_(apply_weight(x, update.to(x.dtype), None, geometry))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, magnitude, *factors = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        m1, m2 = _halves(factors, ctx.shape)
        update = (m1 * m2).mul_(ctx.scale)
        if magnitude is not None:
            update = _dora(weight, update, magnitude) - weight
        fused = ctx.apply_base and _fusable(x, weight)
        applied = update.to(x.dtype)
        if fused:
            applied = applied.add_(weight)
        gx, gw = apply_weight_backward(g, x, applied, ctx.geometry, need_x, True)
        del update, applied
        if need_x and ctx.apply_base and not fused:
            base, _ = apply_weight_backward(g, x, weight.to(x.dtype), ctx.geometry, True, False)
            gx = base.add_(gx)  # type: ignore[union-attr,arg-type]
        assert gw is not None
        gw = gw.to(m1.dtype)
        gm = None
        if magnitude is not None:
            gw, gm = _dora_backward(gw, weight.to(gw.dtype) + (m1 * m2).mul_(ctx.scale), magnitude)
        grads = _halves_backward(gw.mul_(ctx.scale), m1, m2, factors)
        return gx, None, None, gm, None, None, None, None, *grads


def _fusable(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)


def _update(
    factors: tuple[Tensor | None, ...], scale: float, shape: tuple[int, ...],
    weight: Tensor | None, magnitude: Tensor | None,
) -> Tensor:  # fmt: skip
    """ΔW, or what DoRA adds to W, in the factors' dtype."""
    m1, m2 = _halves(factors, shape)
    update = m1.mul_(m2).mul_(scale)
    if magnitude is None:
        return update
    assert weight is not None
    return _dora(weight, update, magnitude).sub_(weight)


def _halves(factors: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    a1, b1, a2, b2, t1, t2 = factors
    if t1 is None:
        return gemm.matmul(a1, b1).view(shape), gemm.matmul(a2, b2).view(shape)
    return tucker(t1, a1, b1).reshape(shape), tucker(t2, a2, b2).reshape(shape)


def _halves_backward(g: Tensor, m1: Tensor, m2: Tensor, factors: Any) -> list[Tensor | None]:
    """Gradients of the factors from g = ∂L/∂(M₁∘M₂). Overwrites g, m1 and m2: they are the largest tensors here."""
    a1, b1, a2, b2, t1, t2 = factors
    g1, g2 = m2.mul_(g), m1.mul_(g)
    if t1 is None:
        g1, g2 = g1.flatten(1), g2.flatten(1)
        sides = gemm.matmul(g1, b1.T), gemm.matmul(a1.T, g1), gemm.matmul(g2, b2.T), gemm.matmul(a2.T, g2)
        return [*sides, None, None]
    ga1, gb1, gt1 = tucker_backward(g1, t1, a1, b1)
    ga2, gb2, gt2 = tucker_backward(g2, t2, a2, b2)
    return [ga1, gb1, ga2, gb2, gt1, gt2]


def tucker_backward(g: Tensor, t: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `algebra.tucker` with respect to a, b and t, from g (o, i, *k).

    PEFT, kohya and ComfyUI contract g with the other half's core for ∂a, which is wrong; see DESIGN §11.
    """
    inner = torch.einsum("oi...,po->pi...", g, a)
    gt = torch.einsum("pi...,qi->pq...", inner, b)
    gb = torch.einsum("pi...,pq...->qi", inner, t)
    ga = torch.einsum("oi...,pi...->po", g, torch.einsum("pq...,qi->pi...", t, b))
    return ga, gb, gt


def _dora(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    adapted = update + weight
    axis = dora_axis(magnitude, tuple(weight.shape))
    return adapted.mul_(_along(magnitude, adapted, axis) / _safe_norm(adapted, axis))


def _dora_backward(g: Tensor, adapted: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Through W' = m∘A/‖A‖, A = W + ΔW: ∂A = m/‖A‖·(g − A·⟨g, A⟩/‖A‖²), ∂m = ⟨g, A⟩/‖A‖, sums over a slice."""
    axis = dora_axis(magnitude, tuple(adapted.shape))
    norm = _safe_norm(adapted, axis)
    others = [d for d in range(adapted.dim()) if d != axis]
    inner = (g * adapted).sum(others, keepdim=True)
    gm = (inner / norm).reshape(magnitude.shape).to(magnitude.dtype)
    ga = (g - adapted * (inner / norm**2)) * (_along(magnitude, adapted, axis) / norm)
    return ga, gm


def _along(magnitude: Tensor, weight: Tensor, axis: int) -> Tensor:
    return magnitude.to(weight.dtype).reshape([-1 if d == axis else 1 for d in range(weight.dim())])


def _safe_norm(weight: Tensor, axis: int) -> Tensor:
    """A slice of zeros has no direction; it stays zero."""
    return dora_norm(weight, axis).clamp_min(torch.finfo(weight.dtype).tiny)
