"""From pictures of any size to the few sizes that are trained: aspect buckets, resizing, cropping.

Pictures are (h, w, channels) float tensors in 0…1, masks (h, w), sizes (height, width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LoHaError, check_number

# Of a side, as multiples of the resolution: pictures to 4:1 keep their shape.
MAX_SIDE, MIN_SIDE = 2.0, 0.5

Size = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Which size a picture is trained at.

    Args:
        resolution: side of a square with as many pixels as a picture will have, rounded down to a multiple of
            ``step``. 0: as the picture is, cropped to such a multiple.
        step: what sides are multiples of; itself a multiple of how much the VAE makes a picture smaller.
        aspect_buckets: pictures keep about their shape. False: every picture becomes a square.

    Raises:
        LoHaError: a step below 1, or a resolution smaller than the step.

    >>> Sizes(512, 64).of(1080, 1920)
    (384, 640)
    """

    resolution: int = 1024
    step: int = 64
    aspect_buckets: bool = True

    def __post_init__(self) -> None:
        check_number("step", self.step, minimum=1, integer=True)
        check_number("resolution", self.resolution, minimum=0, integer=True)
        if self.resolution and self.resolution < self.step:
            raise LoHaError(f"a resolution of {self.resolution} is less than the step between sizes, {self.step}")

    def all(self) -> list[Size]:
        """Every size: each with as many pixels as fit into the square. Empty for resolution 0."""
        side = self.resolution // self.step
        if not self.aspect_buckets or not side:
            return [(side * self.step, side * self.step)] if side else []
        shortest, longest = max(1, math.ceil(side * MIN_SIDE)), int(side * MAX_SIDE)
        sizes = {(tall, min(longest, side**2 // tall)) for tall in range(shortest, longest + 1)}
        sizes = {size for size in sizes if min(size) >= shortest}
        sizes |= {(wide, tall) for tall, wide in sizes}
        return sorted((tall * self.step, wide * self.step) for tall, wide in sizes)

    def of(self, height: int, width: int) -> Size:
        """The size of the most similar shape; of two such, the larger.

        Raises:
            LoHaError: the picture is smaller than one step, and sizes stay as they are.
        """
        if not self.resolution:
            size = height // self.step * self.step, width // self.step * self.step
            if 0 in size:
                raise LoHaError(
                    f"a picture of {width}×{height} pixels is smaller than {self.step}×{self.step}; "
                    "take it out, or set a resolution to enlarge it"
                )
            return size
        shape = math.log(height / width)
        return min(self.all(), key=lambda size: (abs(math.log(size[0] / size[1]) - shape), -size[0] * size[1]))


def fit(picture: Tensor, size: Size, *, enlarge: bool = True) -> Tensor:
    """Resize so that ``size`` is just covered, and keep the middle.

    Args:
        picture: (h, w, c), or a mask (h, w); in 0…1.
        size: height and width of the result.
        enlarge: False: only crop; ``size`` must not be larger than the picture.

    Returns:
        (height, width, c) or (height, width), float32 in 0…1.
    """
    planes = picture.float()[None, None] if picture.ndim == 2 else picture.float().movedim(-1, 0)[None]
    height, width = planes.shape[-2:]
    scale = max(size[0] / height, size[1] / width) if enlarge else 1.0
    if scale != 1:
        covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        planes = F.interpolate(planes, covering, mode="bicubic", antialias=True, align_corners=False)
    top, left = (planes.shape[-2] - size[0]) // 2, (planes.shape[-1] - size[1]) // 2
    planes = planes[0, :, top : top + size[0], left : left + size[1]].clamp(0, 1)  # bicubic overshoots
    return (planes[0] if picture.ndim == 2 else planes.movedim(0, -1)).contiguous()


def at_latent_size(mask: Tensor, height: int, width: int) -> Tensor:
    """(h, w) in pixels -> (1, height, width): the fraction of each latent's area that is masked, float32."""
    return F.interpolate(mask.float()[None, None], (height, width), mode="area")[0].clamp(0, 1)


def check_picture(picture: Tensor, name: str) -> None:
    """Refuse a tensor that is not a picture, such as one that is empty or not finite.

    Raises:
        LoHaError: not (h, w, 3 or more), of zero size, or values that are not finite or far outside 0…1.
    """
    shape = tuple(picture.shape)
    if picture.ndim != 3 or 0 in shape or shape[-1] < 3:
        raise LoHaError(f"{name}: expected a picture (height, width, 3), found {shape}; take it out")
    if not torch.isfinite(picture).all():
        raise LoHaError(f"{name}: holds NaN or infinity; take it out, or look at what made it")
    # A little beyond is what resizing leaves behind.
    low, high = picture.min().item(), picture.max().item()
    if low < -0.5 or high > 1.5:
        raise LoHaError(
            f"{name}: has values from {low:.3g} to {high:.3g}; pictures go from 0 to 1, do not normalise them"
        )
