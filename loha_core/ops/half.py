"""Khatri–Rao in float16, whose range is narrow: 6·10⁻⁵ to 65504 at full precision.

y = W∗x + b + U·(V∗x), with Tucker factors U·(core∗(V·x)): the update is a chain of layers. W∗x and ΔW∗x may well be
within float16's range while V∗x, or an entry of U, is not. So each layer's weight gives a power of two per channel to
the one before it, which is exact, such that

- what lies between two layers is as large as it can be and still never overflows: |w|₁·max|x| bounds w·x;
- before the last layer it is as large as what it adds to the result, so that it is in range if the result is.

The backward is the same chain from its other end. Gradients of U, V and core are sums over all tokens of products of
such numbers; they are made in float32. Nothing waits for a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import Factors, khatri_rao
from . import gemm
from .autograd import (
    Geometry,
    Gradients,
    LayerSpec,
    add_mixed_,
    apply_weight,
    apply_weight_backward,
    columnwise_backward,
    input_gradient,
    pointwise,
)

_MAX_BETWEEN = 2.0**14  # half of what lies between two layers at most
_MAX_FLOAT16 = torch.finfo(torch.float16).max


class _Stage(NamedTuple):
    """One layer of the chain: weight (out, in, *k); with groups, all but the last have a copy of it for each."""

    weight: Tensor
    geometry: Geometry | None
    copies: int


class KhatriRao(torch.autograd.Function):
    """y = W∗x + b + U·(V∗x), or U·(core∗(V·x)) with Tucker factors.

    x (n, i) or (n, g·i, *size), float16; factors float32; weight (o, i, *k) and bias (o,), both frozen, or None.
    Saved: the inputs, and what lies between the chain's layers: (n, r²) each.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: LayerSpec, *factors: Tensor
    ) -> Tensor:
        h, inputs, carried = x, [x], torch.ones((), device=x.device)
        *inner, last = _stages(Factors(*factors), spec)
        powers = []
        for stage in inner:
            w = stage.weight * carried
            size = _size(w, h, 0)
            h = apply_weight(h, _cast(w / size, stage, x.dtype), None, stage.geometry)
            carried = size.transpose(0, 1)  # by output channel; the next layer's weight takes it up by input channel
            inputs.append(h)
            powers.append(carried)
        ctx.save_for_backward(*inputs, *powers, weight, *factors)
        ctx.spec, ctx.layers, geometry = spec, len(inner) + 1, spec.geometry
        w = last.weight * carried
        size = _largest(w, 1)
        h, u = _by_channel(h, size, geometry), (w / size).to(x.dtype)
        if weight is None:
            return apply_weight(h, u, None, last.geometry)
        y = apply_weight(x, weight, bias, geometry)
        return gemm.addmm_(y, h, u.T) if geometry is None else add_mixed_(y, h, u.flatten(1), geometry.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Gradients:
        n, geometry = ctx.layers, ctx.spec.geometry
        inputs, powers = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n - 1]
        weight, *tensors = ctx.saved_tensors[2 * n - 1 :]
        factors, x = Factors(*tensors), inputs[0]
        stages = _stages(factors, ctx.spec)
        grads: list[Tensor] = []
        gx, gh, carried = None, g, torch.ones((), device=x.device)
        for number in reversed(range(n)):
            stage = stages[number]
            gw = _weight_gradient(gh, inputs[number], stage) * carried
            grads.insert(0, gw * powers[number - 1] if number else gw)
            w = stage.weight * carried
            if number:
                size = _size(w, gh, 1)
                gh = input_gradient(gh, inputs[number], _cast(w / size, stage, x.dtype), stage.geometry)
                carried = size.transpose(0, 1)
            elif ctx.needs_input_grad[0]:
                size = _largest(w, 0)
                gh = _by_channel(gh, size, geometry)
                gx = input_gradient(gh, x, _cast(w / size, stage, x.dtype), stage.geometry)
        if gx is not None and weight is not None:
            gx = input_gradient(g, x, weight, geometry).add_(gx)
        return gx, None, None, None, *_stages_backward(grads, factors, ctx.spec.scale)


def _stages(factors: Factors, spec: LayerSpec) -> list[_Stage]:
    u, v, core = khatri_rao(factors, spec.scale)
    geometry, axes = spec.geometry, len(spec.kernel)
    if geometry is None:
        return [_Stage(v, None, 1), _Stage(u, None, 1)]
    groups = geometry.groups
    last = _pointwise_stage(u, axes, groups, 1)
    if core is None:
        return [_Stage(v.unflatten(1, (-1, *spec.kernel)), geometry, groups), last]
    return [_pointwise_stage(v, axes, groups, groups), _Stage(core, geometry, groups), last]


def _pointwise_stage(weight: Tensor, axes: int, groups: int, copies: int) -> _Stage:
    return _Stage(weight.reshape(*weight.shape, *[1] * axes), pointwise(axes, groups), copies)


def _stages_backward(grads: list[Tensor], f: Factors, scale: float) -> Gradients:
    """Gradients of `_stages` with respect to the factors."""
    gb1, gb2 = columnwise_backward(grads[0].flatten(1), f.w1_b, f.w2_b)
    gut = grads[-1].flatten(1).T * scale
    if f.t1 is None or f.t2 is None:
        ga1, ga2 = columnwise_backward(gut, f.w1_a.T, f.w2_a.T)
        return ga1.T, gb1, ga2.T, gb2, None, None
    ga1, ga2 = columnwise_backward(gut, f.w1_a, f.w2_a)
    ranks = f.w1_b.shape[0], f.w2_b.shape[0]  # a half may have one more, see `fedpara`
    core = grads[1].unflatten(1, ranks).unflatten(0, ranks)  # p, x, q, y, *k
    gt1 = torch.einsum("pxqy...,xy...->pq...", core, f.t2)
    gt2 = torch.einsum("pxqy...,pq...->xy...", core, f.t1)
    return ga1, gb1, ga2, gb2, gt1, gt2


def _size(weight: Tensor, argument: Tensor, channel: int) -> Tensor:
    """By channel of the result: dividing the weight by it keeps weight ∗ argument below 2·`_MAX_BETWEEN`."""
    others = [d for d in range(weight.dim()) if d != channel]
    # What is not finite already must not reach the other samples by way of the maximum.
    largest = torch.linalg.vector_norm(argument, torch.inf).float()
    largest = largest.nan_to_num(_MAX_FLOAT16, _MAX_FLOAT16).clamp(1.0, _MAX_FLOAT16)
    return _power_of_two(torch.linalg.vector_norm(weight, 1, others, keepdim=True) * (largest / _MAX_BETWEEN))


def _largest(weight: Tensor, channel: int) -> Tensor:
    """By channel of the argument: dividing the weight by it leaves entries below 2."""
    others = [d for d in range(weight.dim()) if d != channel]
    return _power_of_two(torch.linalg.vector_norm(weight, torch.inf, others, keepdim=True))


def _power_of_two(t: Tensor) -> Tensor:
    """2^⌊log₂ t⌋, by leaving the exponent's bits; a small one for zeros."""
    return (t.float().clamp_min(1e-30).view(torch.int32) & 0x7F800000).view(torch.float32)


def _cast(weight: Tensor, stage: _Stage, dtype: torch.dtype) -> Tensor:
    weight = weight.to(dtype)
    return weight if stage.copies == 1 else weight.repeat(stage.copies, *[1] * (weight.dim() - 1))


def _by_channel(h: Tensor, size: Tensor, geometry: Geometry | None) -> Tensor:
    """h, its channels (of each group) times ``size``."""
    size = size.flatten()
    if geometry is None:
        return (h * size).to(h.dtype)
    groups = h.shape[1] // size.numel()
    return (h * size.repeat(groups).view(-1, *[1] * (h.dim() - 2))).to(h.dtype)


def _weight_gradient(g: Tensor, x: Tensor, stage: _Stage) -> Tensor:
    """∂L/∂weight in float32: a sum over all tokens, which float16 may not hold."""
    weight = _cast(stage.weight, stage, stage.weight.dtype)
    _, gw = apply_weight_backward(g.to(weight), x.to(weight), weight, stage.geometry, False, True)
    assert gw is not None
    return gw if stage.copies == 1 else gw.unflatten(0, (stage.copies, -1)).sum(0)
