"""Linear layers and convolutions with LoHa adapters around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.autograd import Geometry
from .layer import LoHaLayer
from .targets import is_transformers_conv1d

__all__ = ["LoHaConv1d", "LoHaConv2d", "LoHaConv3d", "LoHaLayer", "LoHaLinear"]


class LoHaLinear(LoHaLayer):
    """Around nn.Linear, its descendants, and transformers' Conv1D (a linear layer with its weight transposed)."""

    base_class = nn.Linear

    @property
    def _transposed(self) -> bool:  # type: ignore[override]
        return is_transformers_conv1d(self.base_layer)

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self._transposed:
            return tuple(reversed(self.weight.shape))
        return (self.base_layer.out_features, self.base_layer.in_features)  # type: ignore[return-value]

    def _base_weight(self) -> Tensor:
        return self.weight.T if self._transposed else self.weight

    def _can_fuse(self) -> bool:
        return not self._transposed and super()._can_fuse()


class _LoHaConv(LoHaLayer):
    """Around a convolution with any stride, padding, dilation, groups and padding mode."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._pads, self._walk = padding_of(base_layer)
        self.is_grouped = self._walk.groups > 1

    @property
    def in_features(self) -> int:
        """Of channels, under PEFT's name for them."""
        return self.base_layer.in_channels  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base_layer.out_channels  # type: ignore[return-value]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        base: Any = self.base_layer
        return (base.out_channels, base.in_channels // base.groups, *base.kernel_size)

    def _geometry(self) -> Geometry:
        return self._walk

    def _prepare(self, x: Tensor) -> Tensor:
        return padded(x, self._pads)


Pads = tuple[list[int], str] | None
"""Widths and mode for `F.pad`, or None where the convolution pads by itself."""


def padded(x: Tensor, pads: Pads) -> Tensor:
    return x if pads is None else F.pad(x, pads[0], mode=pads[1])


def padding_of(base: Any) -> tuple[Pads, Geometry]:
    """Padding to do beforehand, if the convolution cannot do it itself, and how it walks then."""
    widths = list(base._reversed_padding_repeated_twice)
    axes = len(base.kernel_size)
    # From the last axis to the first, before and after.
    before, after = widths[::2][::-1], widths[1::2][::-1]
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    beforehand = mode != "constant" or before != after
    pads = (0,) * axes if beforehand else tuple(before)
    return (widths, mode) if beforehand else None, Geometry(base.stride, pads, base.dilation, base.groups)


class LoHaConv1d(_LoHaConv):
    base_class = nn.Conv1d


class LoHaConv2d(_LoHaConv):
    base_class = nn.Conv2d


class LoHaConv3d(_LoHaConv):
    base_class = nn.Conv3d
