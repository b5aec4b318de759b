"""Frozen layers that make their weight anew for the backward, however and wherever it is kept.

ComfyUI's layers unpack, cast or fetch their weight for each call. Autograd would keep every one of those copies until
the backward, and a quantised or an offloaded model would be in memory whole and wide again; so they are made twice.
Both products are those of the held values, also where the layer would round its input to the weight's format when
sampling, which moves the gradients by as much as the weight's own rounding, or has no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loha_core import LoHaLayer
from loha_core.ops.autograd import Geometry, apply_weight, input_gradient
from loha_core.tuner import forwards

from . import weights
from .layers import layer_class

# Where torch's and ComfyUI's layers multiply, and nothing else.
_PRODUCTS = ("torch.nn.modules.linear", "torch.nn.modules.conv", comfy.ops.__name__)


@contextmanager
def weights_made_twice(modules: Iterable[nn.Module], layers: Iterable[LoHaLayer]) -> Iterator[None]:
    """While this lasts, no frozen weight of a linear layer or convolution is kept for the backward.

    Args:
        modules: models whose weights are frozen.
        layers: that are trained in them, attached already. What they fuse with their base keeps nothing anyway.
    """
    fused = {layer.base_layer for layer in layers if layer._can_fuse()}
    with ExitStack() as stack:
        for base in dict.fromkeys(layer for module in modules for _, layer in weights.layers(module)):
            if base in fused or not _is_product(base):
                continue
            link = forwards.push(base, partial(_forward, layer_class(base)(base)), innermost=True)
            stack.callback(forwards.remove, link)
            if not forwards.is_own(base, link):  # another pack's forward, which may do more
                forwards.remove(link)
        yield


def _is_product(base: nn.Module) -> bool:
    """Whether the layer is known to multiply by the values that `dense` reads, and to do nothing else."""
    weight = base.weight
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes' own backward unpacks again
        return False
    packed = weights.is_packed(base)
    plain = type(base).forward.__module__ in _PRODUCTS and (
        weights.is_castable(base) or type(base).__module__ in _PRODUCTS
    )
    return (packed or plain) and weights.why_not_dense(base) is None


def _held(base: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias, where x is and in its dtype."""
    if weights.is_castable(base):
        weight, bias = comfy.ops.cast_bias_weight(base, x)
        return weight, bias
    bias = None if base.bias is None else weights.dense(base, "bias", device=x.device).to(x.dtype)
    if weights.acts_as_stored(base):
        return base.weight.to(x), bias
    return weights.dense(base, device=x.device).to(x.dtype), bias


def _forward(layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's product. ``layer`` knows the layer's kind: its padding, and how its kernel walks."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    base, x = layer.base_layer, forwards.first(args, kwargs)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if (smoothing := getattr(base, "pre_quant_scale", None)) is not None:
        x = x * smoothing.to(x)
    with torch.autocast(kind, enabled=False):
        return _Product.apply(layer._prepare(x), partial(_held, base), layer._geometry())


class _Product(torch.autograd.Function):
    """y = W∗x + b with a frozen W that is asked for twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Callable[[Tensor], Any], geometry: Geometry | None) -> Tensor:
        ctx.held, ctx.geometry, ctx.shape = held, geometry, x.shape
        weight, bias = held(x)
        return apply_weight(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x = g.new_empty(ctx.shape)  # its values have no part
        weight, _ = ctx.held(g)
        return input_gradient(g, x, weight, ctx.geometry), None, None
