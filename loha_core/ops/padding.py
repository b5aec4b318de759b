"""What a convolution does before it walks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .autograd import Geometry

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
