"""Hand-written forward and backward for y = W∗x + ΔW∗x, ∗ a matrix product or a convolution.

Two Functions, one for each way to apply the update. Neither saves anything of the weight's size, and both take the
frozen base weight along, so that the update is accumulated into the base's result instead of being added to it.

Raw tensors throughout: ``functional`` is the public face. Gradients reach x, the factors and DoRA's magnitudes; weight
and bias are frozen. Autograd sees tensors only among a Function's own arguments, so the factors come last, one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import Factors, columnwise, dora_axis, dora_norm, tucker
from . import gemm

Gradients = tuple[Tensor | None, ...]


class Geometry(NamedTuple):
    """A convolution's options, one entry per kernel axis; None stands for a linear layer's."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class LayerSpec(NamedTuple):
    """A layer and how its update acts: what a Function needs to know beside tensors.

    Attributes:
        shape: of the weight, (o, i, *k).
        geometry: None for a linear layer.
        scale: s, of the update.
        apply_base: whether W∗x + b is part of the result.
    """

    shape: tuple[int, ...]
    geometry: Geometry | None
    scale: float
    apply_base: bool = True

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]


def _reshaped(new: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As torch's own products reshape: a Function that gives out a view forbids writing into its result."""
    return torch.ops.aten._unsafe_view(new, shape)  # type: ignore[no-any-return]


def apply_weight(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """weight ∗ x + bias, in x's dtype."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if geometry is None and x.dim() == 2:
        return gemm.linear(x, weight, bias)
    if geometry is None:
        y = gemm.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return _reshaped(y, (*x.shape[:-1], weight.shape[0]))
    if _is_product(x, weight, geometry):
        y = gemm.matmul(weight.flatten(1), x.flatten(2)[0])
        if bias is not None:
            y.add_(bias.unsqueeze(1))
        return _reshaped(y, (1, weight.shape[0], *x.shape[2:]))
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def apply_weight_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `apply_weight` with respect to x and weight, from g = ∂L/∂y, in x's dtype."""
    weight = weight.to(x.dtype)
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


def input_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """∂L/∂x alone."""
    gx, _ = apply_weight_backward(g, x, weight, geometry, True, False)
    assert gx is not None
    return gx


def _is_product(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """A 1×1 convolution of one picture is a matrix product, which torch computes slowly. Not where autograd records."""
    pointwise = x.shape[0] == 1 and weight[0, 0].numel() == 1 and geometry.groups == 1
    plain = all(s == 1 for s in geometry.stride) and not any(geometry.padding)
    return pointwise and plain and x.is_contiguous() and not torch.is_grad_enabled()


def columnwise_backward(gv: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `algebra.columnwise` with respect to b1 and b2, from gv (r², n)."""
    gv = gv.unflatten(0, (b1.shape[0], b2.shape[0]))
    return (gv * b2.unsqueeze(0)).sum(1), (gv * b1.unsqueeze(1)).sum(0)


def _uv(f: Factors, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uᵀ (r², o), which holds the scale, and V (r², n). Uᵀ, since its rows are then contiguous like V's."""
    ut = columnwise((f.w1_a * scale).T.contiguous(), f.w2_a.T.contiguous())
    return ut.to(dtype), columnwise(f.w1_b, f.w2_b).to(dtype)


def _uv_backward(gut: Tensor, gv: Tensor, f: Factors, scale: float) -> Gradients:
    """Gradients of `_uv` with respect to the factors."""
    gut = gut.to(f.w1_a.dtype).mul_(scale)
    ga1, ga2 = columnwise_backward(gut, f.w1_a.T.contiguous(), f.w2_a.T.contiguous())
    gb1, gb2 = columnwise_backward(gv.to(f.w1_b.dtype), f.w1_b, f.w2_b)
    return ga1.T, gb1, ga2.T, gb2, None, None


class KhatriRaoLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + (x·Vᵀ)·Uᵀ with U = s·A₁ ⊙ A₂, V = B₁ ⊙ B₂; U and V are rebuilt in the backward.

    x (n, i); weight (o, i) and bias (o,), or None for the update alone. Saved: the inputs and x·Vᵀ (n, r²).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: LayerSpec, *factors: Tensor
    ) -> Tensor:
        ut, v = _uv(Factors(*factors), spec.scale, x.dtype)
        h = gemm.linear(x, v)
        ctx.save_for_backward(x, h, weight, *factors)
        ctx.scale = spec.scale
        if weight is None:
            return gemm.matmul(h, ut)
        return gemm.addmm_(apply_weight(x, weight, bias, None), h, ut)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Gradients:
        x, h, weight, *tensors = ctx.saved_tensors
        factors = Factors(*tensors)
        ut, v = _uv(factors, ctx.scale, x.dtype)
        gh, gx = gemm.linear(g, ut), None
        if ctx.needs_input_grad[0]:
            if weight is None:
                gx = gemm.matmul(gh, v)
            else:
                gx = gemm.addmm_(gemm.matmul(g, weight.to(x.dtype)), gh, v)
        return gx, None, None, None, *_uv_backward(gemm.matmul(h.T, g), gemm.matmul(gh.T, x), factors, ctx.scale)


class KhatriRaoConv(torch.autograd.Function):
    """y = W∗x + b + U·(V∗x): V is an r²-channel convolution of W's kernel, U a 1×1 one.

    x (n, g·i, *size); flat factors; weight (o, i, *k). With groups, each has its own copy of V's channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: LayerSpec, *factors: Tensor
    ) -> Tensor:
        geometry = spec.geometry
        assert geometry is not None
        ut, v = _uv(Factors(*factors), spec.scale, x.dtype)
        h = apply_weight(x, _filters(v, spec.kernel, geometry), None, geometry)
        ctx.save_for_backward(x, h, weight, *factors)
        ctx.spec = spec
        if weight is None:
            return mix_channels(h, ut.T, geometry.groups)
        return add_mixed_(apply_weight(x, weight, bias, geometry), h, ut.T, geometry.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Gradients:
        x, h, weight, *tensors = ctx.saved_tensors
        factors, spec, geometry, need_x = Factors(*tensors), ctx.spec, ctx.spec.geometry, ctx.needs_input_grad[0]
        ut, v = _uv(factors, spec.scale, x.dtype)
        gh, gut = _mixed_backward(g, h, ut, geometry.groups)
        gx, gv = apply_weight_backward(gh, x, _filters(v, spec.kernel, geometry), geometry, need_x, True)
        if gx is not None and weight is not None:
            gx = input_gradient(g, x, weight, geometry).add_(gx)
        assert gv is not None
        if geometry.groups > 1:
            gv = gv.unflatten(0, (geometry.groups, -1)).sum(0)
        return gx, None, None, None, *_uv_backward(gut, gv.flatten(1), factors, spec.scale)


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

    x (n, i) or (n, g·i, *size); weight (o, i, *k): without ``spec.apply_base`` for DoRA's norm alone, and then
    perhaps a function that gives it, which is called twice so that nothing is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, given: Tensor | Callable[[], Tensor] | None, bias: Tensor | None,
        magnitude: Tensor | None, spec: LayerSpec, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        kept = given if isinstance(given, Tensor) else None
        make = None if given is None or isinstance(given, Tensor) else given
        ctx.save_for_backward(x, kept, magnitude, *factors)
        ctx.make, ctx.spec, geometry = make, spec, spec.geometry
        weight = kept if make is None else make()
        update = _update(Factors(*factors), spec.scale, spec.shape)
        if magnitude is not None:
            assert weight is not None
            update = _dora(weight, update, magnitude).sub_(weight)
        if not spec.apply_base:
            return apply_weight(x, update, None, geometry)
        assert weight is not None
        if _fusable(x, weight):
            return apply_weight(x, update.to(x.dtype).add_(weight), bias, geometry)
        return apply_weight(x, weight, bias, geometry).add_(apply_weight(x, update, None, geometry))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Gradients:
        x, weight, magnitude, *tensors = ctx.saved_tensors
        weight = weight if ctx.make is None else ctx.make()
        factors, spec, geometry, need_x = Factors(*tensors), ctx.spec, ctx.spec.geometry, ctx.needs_input_grad[0]
        m1, m2 = _halves(factors, spec.shape)
        update = (m1 * m2).mul_(spec.scale)
        if magnitude is not None:
            update = _dora(weight, update, magnitude) - weight
        fused = spec.apply_base and _fusable(x, weight)
        applied = update.to(x.dtype)
        if fused:
            applied = applied.add_(weight)
        gx, gw = apply_weight_backward(g, x, applied, geometry, need_x, True)
        del update, applied
        if gx is not None and spec.apply_base and not fused:
            gx = input_gradient(g, x, weight, geometry).add_(gx)
        assert gw is not None
        gw = gw.to(m1.dtype)
        gm = None
        if magnitude is not None:
            gw, gm = _dora_backward(gw, weight.to(gw.dtype) + (m1 * m2).mul_(spec.scale), magnitude)
        return gx, None, None, gm, None, *_halves_backward(gw.mul_(spec.scale), m1, m2, factors)


class Delta(torch.autograd.Function):
    """s·ΔW of a shape from its factors; saves the factors only."""

    @staticmethod
    def forward(ctx: Any, scale: float, shape: tuple[int, ...], *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.scale, ctx.shape = scale, shape
        return _reshaped(_update(Factors(*factors), scale, shape), shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Gradients:
        factors = Factors(*ctx.saved_tensors)
        return None, None, *_halves_backward(g * ctx.scale, *_halves(factors, ctx.shape), factors)


def _fusable(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)


def _update(f: Factors, scale: float, shape: tuple[int, ...]) -> Tensor:
    """s·ΔW in the factors' dtype."""
    m1, m2 = _halves(f, shape)
    return m1.mul_(m2).mul_(scale)


def _halves(f: Factors, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """As `algebra.halves`, in the weight's shape, by `gemm`."""
    if f.t1 is None or f.t2 is None:
        return gemm.matmul(f.w1_a, f.w1_b).view(shape), gemm.matmul(f.w2_a, f.w2_b).view(shape)
    return tucker(f.t1, f.w1_a, f.w1_b).reshape(shape), tucker(f.t2, f.w2_a, f.w2_b).reshape(shape)


def _halves_backward(g: Tensor, m1: Tensor, m2: Tensor, f: Factors) -> Gradients:
    """Gradients of the factors from g = ∂L/∂(M₁∘M₂). Overwrites g, m1 and m2: they are the largest tensors here."""
    g1, g2 = m2.mul_(g), m1.mul_(g)
    if f.t1 is None or f.t2 is None:
        g1, g2 = g1.flatten(1), g2.flatten(1)
        ga1, gb1 = gemm.matmul(g1, f.w1_b.T), gemm.matmul(f.w1_a.T, g1)
        return ga1, gb1, gemm.matmul(g2, f.w2_b.T), gemm.matmul(f.w2_a.T, g2), None, None
    ga1, gb1, gt1 = tucker_backward(g1, f.t1, f.w1_a, f.w1_b)
    ga2, gb2, gt2 = tucker_backward(g2, f.t2, f.w2_a, f.w2_b)
    return ga1, gb1, ga2, gb2, gt1, gt2


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
