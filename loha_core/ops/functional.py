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

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from ..algebra import Factors, compute_dtype, dora_axis, khatri_rao
from ..errors import LoHaError
from ..factors import LoHaFactors
from . import autograd, half
from .autograd import Geometry, LayerSpec
from .cost import Strategy, check_strategy, estimate

__all__ = ["loha_conv", "loha_delta", "loha_linear"]

StrategyChoice = Literal["auto"] | Strategy


def loha_delta(factors: LoHaFactors, strength: float = 1.0, *, shape: Sequence[int] | None = None) -> Tensor:
    """strength·alpha/r·M₁∘M₂, differentiable; the backward recomputes M₁ and M₂ instead of keeping them.

    Args:
        shape: of the weight; by default ``factors.shape`` (a flat convolution's kernel stays flat).

    Returns:
        ΔW in the factors' dtype (where they differ, the one that holds them all), without DoRA.
    """
    shape = tuple(factors.shape if shape is None else shape)
    _check_shape(factors, shape)
    raw = factors.raw
    dtype = reduce(torch.promote_types, (t.dtype for t in raw if t is not None))
    return autograd.Delta.apply(strength * factors.scale, shape, *raw.to(compute_dtype(*raw))).to(dtype)


def loha_linear(
    x: Tensor,
    factors: LoHaFactors,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    strength: float = 1.0,
    strategy: StrategyChoice = "auto",
) -> Tensor:
    """x·(W + ΔW)ᵀ + b, or x·ΔWᵀ when no weight is given.

    Args:
        x: (…, i), any floating dtype; the result has the same (autocast: its dtype).
        factors: flat factors of shape (o, i). Their ``dora_scale`` needs a weight. They, weight and bias may have
            dtypes of their own; what is made of the factors is made in float32 or float64.
        weight: (o, i), the base. Frozen, it is fused with the update and gets no gradient.
        bias: (o,), only with a weight.
        strategy: "khatri-rao", "rebuild", or "auto": the cheaper by `cost.estimate`.

    Raises:
        LoHaError: shapes that do not fit, an unknown strategy, or DoRA by Khatri–Rao or without a weight.
    """
    shape = tuple(factors.shape)
    _check(x, x.shape[-1:], factors, shape, weight, bias, strategy)
    if factors.is_tucker:
        raise LoHaError("Tucker factors belong to a convolution; use loha_conv")
    return _forward(x, factors, LayerSpec(shape, None, strength * factors.scale), weight, bias, strategy)


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
    strategy: StrategyChoice = "auto",
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
    _check(x, x.shape[1:2], factors, shape, weight, bias, strategy, groups)
    if x.dim() != axes + 2:
        raise LoHaError(f"x is {tuple(x.shape)}; expected (batch, {inner * groups}, and {axes} axes)")
    geometry = Geometry(_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
    return _forward(x, factors, LayerSpec(shape, geometry, strength * factors.scale), weight, bias, strategy)


def _forward(
    x: Tensor, factors: LoHaFactors, spec: LayerSpec,
    weight: Tensor | None, bias: Tensor | None, strategy: StrategyChoice,
) -> Tensor:  # fmt: skip
    if weight is None:
        return update_forward(x, factors.raw, spec, strategy=strategy)
    return adapted_forward(x, factors.raw, spec, weight, bias, factors.dora_scale, strategy=strategy)


def adapted_forward(
    x: Tensor, factors: Factors, spec: LayerSpec, weight: Tensor,
    bias: Tensor | None = None, magnitude: Tensor | None = None, *, strategy: StrategyChoice = "auto",
) -> Tensor:  # fmt: skip
    """(W + ΔW) ∗ x + b, or W' ∗ x + b with DoRA's magnitudes. Convolutions take x without a batch, too. Unchecked."""
    if _is_unbatched(x, spec):
        return adapted_forward(x[None], factors, spec, weight, bias, magnitude, strategy=strategy)[0]
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        # A base in training needs gradients of its own, which autograd makes.
        x = _autocast(x)
        update = update_forward(x, factors, spec, magnitude, weight.detach(), strategy=strategy)
        return autograd.apply_weight(x, weight, bias, spec.geometry) + update
    return _applied(x, factors, spec, weight, bias, magnitude, strategy)


def update_forward(
    x: Tensor, factors: Factors, spec: LayerSpec,
    magnitude: Tensor | None = None, weight: Tensor | Callable[[], Tensor] | None = None, *,
    strategy: StrategyChoice = "auto",
) -> Tensor:  # fmt: skip
    """ΔW ∗ x, or (W' − W) ∗ x with DoRA's magnitudes and the weight that they belong to; x as `adapted_forward`'s.

    Args:
        weight: or a function that gives it, which is then called for the forward and again for the backward.
    """
    if _is_unbatched(x, spec):
        return update_forward(x[None], factors, spec, magnitude, weight, strategy=strategy)[0]
    weight = None if magnitude is None else weight
    return _applied(x, factors, spec._replace(apply_base=False), weight, None, magnitude, strategy)


def _is_unbatched(x: Tensor, spec: LayerSpec) -> bool:
    return spec.geometry is not None and x.dim() == len(spec.shape) - 1


def _applied(
    x: Tensor, factors: Factors, spec: LayerSpec,
    weight: Any, bias: Tensor | None, magnitude: Tensor | None, strategy: StrategyChoice,
) -> Tensor:  # fmt: skip
    x = _autocast(x)
    factors = factors.to(compute_dtype(x, *factors))  # their gradients come back in each one's own dtype
    if magnitude is not None:
        strategy = "rebuild"
    elif strategy == "auto":
        strategy = _cheaper(x, factors, spec)
    with _no_autocast(x):
        if strategy == "rebuild":
            return autograd.Rebuilt.apply(x, weight, bias, magnitude, spec, *factors)
        if spec.geometry is None:
            y = _khatri_rao(x.reshape(-1, x.shape[-1]), factors, spec, weight, bias)
            return y.view(*x.shape[:-1], spec.shape[0])
        return _khatri_rao(x, factors, spec, weight, bias)


def _khatri_rao(x: Tensor, factors: Factors, spec: LayerSpec, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float16:
        return half.KhatriRao.apply(x, weight, bias, spec, *factors)
    if spec.geometry is None:
        return autograd.KhatriRaoLinear.apply(x, weight, bias, spec, *factors)
    if factors.t1 is None:
        return autograd.KhatriRaoConv.apply(x, weight, bias, spec, *factors)
    return _tucker(x, factors, spec.scale, spec.geometry, weight, bias)


def _cheaper(x: Tensor, factors: Factors, spec: LayerSpec) -> Strategy:
    """The strategy for this input, by `cost.estimate`."""
    shape, geometry = spec.shape, spec.geometry
    if geometry is None:
        tokens = x.numel() // x.shape[-1]
    else:
        tokens = x.shape[0]
        for size, k, s, p, d in zip(x.shape[2:], spec.kernel, *geometry[:3], strict=True):
            tokens *= (size + 2 * p - d * (k - 1) - 1) // s + 1
    return estimate(
        shape[0], shape[1], factors.rank, tokens, spec.kernel,
        groups=1 if geometry is None else geometry.groups, tucker=factors.t1 is not None,
        training=torch.is_grad_enabled() and factors.w1_a.requires_grad,
        fused=spec.apply_base and x.dtype in (torch.float32, torch.float64),
        itemsize=x.element_size(), device=x.device.type,
    ).best  # fmt: skip


def _tucker(
    x: Tensor, factors: Factors, scale: float, geometry: Geometry, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """1×1 (V), the core's convolution, 1×1 (U). Each is r² wide, so what autograd keeps of them is small."""
    u, v, core = khatri_rao(factors, scale)
    assert core is not None
    groups = geometry.groups
    h = autograd.mix_channels(x, v.repeat(groups, 1), groups)
    h = autograd.apply_weight(h, core.repeat(groups, *[1] * (core.dim() - 1)), None, geometry)
    y = autograd.mix_channels(h, u, groups)
    return y if weight is None else autograd.apply_weight(x, weight, bias, geometry) + y


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype. Cast here, since autocast does not reach the inside of a Function."""
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
    weight: Tensor | None, bias: Tensor | None, strategy: str, groups: int = 1,
) -> None:  # fmt: skip
    check_strategy(strategy)
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
        if strategy == "khatri-rao":
            raise LoHaError("DoRA needs ‖W + ΔW‖, which khatri-rao never makes; use 'auto' or 'rebuild'")
        dora_axis(factors.dora_scale, shape)
