"""LoHa as differentiable functions, for people who bring their own modules.

>>> a, b = torch.randn(6, 2, requires_grad=True), torch.randn(2, 4, requires_grad=True)
>>> factors = LoHaFactors(a, b, torch.randn(6, 2), torch.randn(2, 4), alpha=2.0)
>>> weight, x = torch.randn(6, 4), torch.randn(3, 4)
>>> y = loha_linear(x, factors, weight=weight)
>>> torch.allclose(y, x @ (weight + loha_delta(factors)).T, atol=1e-5)
True

Gradients reach the input, the factors and DoRA's magnitudes. Nothing of the weight's size is kept for the backward,
unless the base weight itself is being trained. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import columnwise, compute_dtype, dora_axis
from ..errors import LoHaError
from ..factors import LoHaFactors
from . import autograd, half
from .autograd import Factors, Geometry
from .paths import Path, check_path, estimate

__all__ = ["loha_conv", "loha_delta", "loha_linear"]

Choice = Literal["auto"] | Path


def loha_delta(factors: LoHaFactors, strength: float = 1.0, *, shape: Sequence[int] | None = None) -> Tensor:
    """strength·alpha/r·M₁∘M₂, differentiable; the backward recomputes M₁ and M₂ instead of keeping them.

    Args:
        shape: of the weight; by default ``factors.shape`` (a flat convolution's kernel stays flat).

    Returns:
        ΔW in the factors' dtype (where they differ, the one that holds them all), without DoRA.
    """
    shape = tuple(factors.shape if shape is None else shape)
    _check_shape(factors, shape)
    tensors = _alike(_tuple(factors), compute_dtype(*factors.tensors().values()))
    return _Delta.apply(strength * factors.scale, shape, *tensors).to(_promoted(_tuple(factors)))


def loha_linear(
    x: Tensor,
    factors: LoHaFactors,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    strength: float = 1.0,
    path: Choice = "auto",
) -> Tensor:
    """x·(W + ΔW)ᵀ + b, or x·ΔWᵀ when no weight is given.

    Args:
        x: (…, i), any floating dtype; the result has the same (autocast: its dtype).
        factors: flat factors of shape (o, i). Their ``dora_scale`` needs a weight. They, weight and bias may have
            dtypes of their own; what is made of the factors is made in float32 or float64.
        weight: (o, i), the base. Frozen, it is fused with the update and gets no gradient.
        bias: (o,), only with a weight.
        path: "khatri-rao", "rebuild", or "auto": the cheaper by `paths.estimate`.

    Raises:
        LoHaError: shapes that do not fit, an unknown path, or DoRA by the Khatri–Rao path or without a weight.
    """
    shape = tuple(factors.shape)
    _check(x, x.shape[-1:], factors, shape, weight, bias, path)
    if factors.is_tucker:
        raise LoHaError("Tucker factors belong to a convolution; use loha_conv")
    return adapted(
        x, _tuple(factors), strength * factors.scale, shape, None, weight, bias, factors.dora_scale, path=path
    )


def loha_conv(
    x: Tensor,
    factors: LoHaFactors,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kernel_size: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    strength: float = 1.0,
    path: Choice = "auto",
) -> Tensor:
    """(W + ΔW) ∗ x + b for a convolution over one, two or three axes, or ΔW ∗ x when no weight is given.

    Args:
        x: (n, groups·i, *size).
        factors: flat, of shape (o, i·∏k), or Tucker, of shape (o, i, *k).
        weight: (o, i, *k), the base; see `loha_linear`.
        kernel_size: k, needed for flat factors without a weight.

    Raises:
        LoHaError: as `loha_linear`, and a kernel that is not known.
    """
    kernel = weight.shape[2:] if weight is not None else factors.shape[2:] if factors.is_tucker else kernel_size
    if not kernel:
        raise LoHaError("flat factors do not tell the kernel's shape; pass weight or kernel_size")
    kernel = tuple(kernel)
    axes = len(kernel)
    inner = factors.shape[1] if factors.is_tucker else factors.shape[1] // torch.Size(kernel).numel()
    shape = (factors.shape[0], inner, *kernel)
    _check(x, x.shape[1:2], factors, shape, weight, bias, path, groups)
    if x.dim() != axes + 2:
        raise LoHaError(f"x is {tuple(x.shape)}; expected (batch, {inner * groups}, and {axes} axes)")
    geometry = Geometry(_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
    return adapted(
        x, _tuple(factors), strength * factors.scale, shape, geometry, weight, bias, factors.dora_scale, path=path
    )


def adapted(
    x: Tensor,
    factors: Factors,
    scale: float,
    shape: tuple[int, ...],
    geometry: Geometry | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    *,
    apply_base: bool | None = None,
    path: Choice = "auto",
) -> Tensor:
    """What both public functions and the layers come down to; nothing is checked.

    Args:
        shape: of the weight, (o, i, *k).
        geometry: None for a linear layer.
        apply_base: whether W∗x + b is part of the result; by default, when there is a weight. DoRA looks at the
            weight either way.
    """
    x = _autocast(x)
    factors = _alike(factors, compute_dtype(x, *(t for t in factors if t is not None)))
    apply_base = weight is not None if apply_base is None else apply_base
    if apply_base and any(t is not None and t.requires_grad for t in (weight, bias)):
        # A base in training needs its own gradients, which autograd knows how to make.
        assert weight is not None
        base = autograd.apply_weight(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry)
        frozen = weight.detach()
        return base + adapted(x, factors, scale, shape, geometry, frozen, None, magnitude, apply_base=False, path=path)
    if magnitude is not None:
        path = "rebuild"
    elif path == "auto":
        path = choose(x, factors, shape, geometry, fused=apply_base)
    base_weight, base_bias = (weight, bias) if apply_base else (None, None)
    with _no_autocast(x):
        if path == "rebuild":
            kept = weight if apply_base or magnitude is not None else None
            return autograd.Rebuilt.apply(x, kept, base_bias, magnitude, apply_base, shape, geometry, scale, *factors)
        return _khatri_rao(x, factors, scale, shape, geometry, base_weight, base_bias)


def _khatri_rao(
    x: Tensor, factors: Factors, scale: float, shape: tuple[int, ...], geometry: Geometry | None,
    weight: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    if geometry is None and x.dim() != 2:
        y = _khatri_rao(x.reshape(-1, x.shape[-1]), factors, scale, shape, None, weight, bias)
        return y.view(*x.shape[:-1], shape[0])
    kernel = tuple(shape[2:])
    if x.dtype == torch.float16:
        return half.KhatriRao.apply(x, scale, weight, bias, kernel, geometry, *factors)
    a1, b1, a2, b2, t1, _ = factors
    if geometry is None:
        return autograd.KhatriRaoLinear.apply(x, a1, b1, a2, b2, scale, weight, bias)
    if t1 is not None:
        return _tucker(x, factors, scale, geometry, weight, bias)
    return autograd.KhatriRaoConv.apply(x, a1, b1, a2, b2, scale, weight, bias, kernel, geometry)


def choose(
    x: Tensor, factors: Factors, shape: tuple[int, ...], geometry: Geometry | None, *, fused: bool = True
) -> Path:
    """The cheaper path for this input, by `paths.estimate`."""
    kernel, groups = tuple(shape[2:]), 1
    if geometry is None:
        tokens = x.numel() // x.shape[-1]
    else:
        groups = geometry.groups
        tokens = x.shape[0]
        for size, k, s, p, d in zip(x.shape[2:], kernel, *geometry[:3], strict=True):
            tokens *= (size + 2 * p - d * (k - 1) - 1) // s + 1
    training = torch.is_grad_enabled() and factors[0].requires_grad
    return estimate(
        shape[0], shape[1], factors[1].shape[0], tokens, kernel,
        groups=groups, tucker=factors[4] is not None, training=training,
        fused=fused and _full_precision(x), itemsize=x.element_size(), device=x.device.type,
    ).best  # fmt: skip


def _full_precision(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _tucker(
    x: Tensor, factors: Factors, scale: float, geometry: Geometry, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """1×1 (V), the core's convolution, 1×1 (U). Everything here is r² wide, so autograd may keep what it likes."""
    a1, b1, a2, b2, t1, t2 = factors
    assert t1 is not None and t2 is not None
    groups, axes = geometry.groups, x.dim() - 2
    v = columnwise(b1, b2).to(x.dtype).repeat(groups, 1)
    core = torch.einsum("pq...,xy...->pxqy...", t1, t2).flatten(0, 1).flatten(1, 2).to(x.dtype)
    u = columnwise(a1 * scale, a2).T.to(x.dtype)
    h = autograd.mix_channels(x, v, groups)
    h = autograd.apply_weight(h, core.repeat(groups, *[1] * (axes + 1)), None, geometry)
    y = autograd.mix_channels(h, u, groups)
    if weight is None:
        return y
    bias = None if bias is None else bias.to(x.dtype)
    return autograd.apply_weight(x, weight.to(x.dtype), bias, geometry) + y


class _Delta(torch.autograd.Function):
    """ΔW from its factors; saves the factors only."""

    @staticmethod
    def forward(ctx: Any, scale: float, shape: tuple[int, ...], *factors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.scale, ctx.shape = scale, shape
        return autograd._update(factors, scale, shape, None, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        m1, m2 = autograd._halves(ctx.saved_tensors, ctx.shape)
        return None, None, *autograd._halves_backward(g * ctx.scale, m1, m2, ctx.saved_tensors)


def _tuple(f: LoHaFactors) -> Factors:
    return f.w1_a, f.w1_b, f.w2_a, f.w2_b, f.t1, f.t2


def _alike(factors: Factors, dtype: torch.dtype) -> Factors:
    """All in one dtype; their gradients come back in each one's own."""
    a1, b1, a2, b2, t1, t2 = (t if t is None else t.to(dtype) for t in factors)
    assert a1 is not None and b1 is not None and a2 is not None and b2 is not None
    return a1, b1, a2, b2, t1, t2


def _promoted(factors: Factors) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in factors if t is not None))


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _autocast(x: Tensor) -> Tensor:
    """x as autocast wants it. Done here, since a Function's inside is out of its reach."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _no_autocast(x: Tensor) -> Any:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _check_shape(factors: LoHaFactors, shape: tuple[int, ...]) -> None:
    if torch.Size(shape).numel() != torch.Size(factors.shape).numel() or shape[0] != factors.shape[0]:
        raise LoHaError(f"the factors make an update of shape {factors.shape}, which does not fit a weight {shape}")


def _check(
    x: Tensor, channels: torch.Size, factors: LoHaFactors, shape: tuple[int, ...],
    weight: Tensor | None, bias: Tensor | None, path: str, groups: int = 1,
) -> None:  # fmt: skip
    check_path(path)
    _check_shape(factors, shape)
    if not x.is_floating_point():
        raise LoHaError(f"x has dtype {x.dtype}; expected a floating one")
    if tuple(channels) != (shape[1] * groups,):
        raise LoHaError(f"x is {tuple(x.shape)}; the factors expect {shape[1] * groups} input channels")
    if weight is not None and tuple(weight.shape) != shape:
        raise LoHaError(f"weight is {tuple(weight.shape)}; the factors make an update of shape {shape}")
    if weight is None and bias is not None:
        raise LoHaError("a bias belongs to a weight; pass both or neither")
    if factors.dora_scale is not None:
        if weight is None:
            raise LoHaError("DoRA normalises W + ΔW; pass weight")
        if path == "khatri-rao":
            raise LoHaError("DoRA needs ‖W + ΔW‖, which the khatri-rao path never makes; use 'auto' or 'rebuild'")
        try:
            dora_axis(factors.dora_scale, shape)
        except ValueError as error:
            raise LoHaError(str(error)) from error
