"""Linear layers and convolutions with LoHa adapters around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.autograd import Geometry
from ..ops.padding import padded, padding_of
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


class LoHaConv1d(_LoHaConv):
    base_class = nn.Conv1d


class LoHaConv2d(_LoHaConv):
    base_class = nn.Conv2d


class LoHaConv3d(_LoHaConv):
    base_class = nn.Conv3d
