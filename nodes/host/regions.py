"""Where in the picture an adapter acts: a mask, and what it is on the grids that a model's layers work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from loha_core import LoHaError
from loha_core.errors import check_choice, check_number

Placeless = Literal["off", "share", "full"]
"""How much layers that see text or the time alone act: not at all, by the masked share of the area, in full."""
PLACELESS: tuple[str, ...] = get_args(Placeless)

# By how much the proportions of a mask may differ from the picture's, beside the rounding of sizes.
_PROPORTIONS = 0.03
# Gains of more sizes than this are not kept.
_MAX_KEPT = 64


@dataclass(eq=False)
class Region:
    """A masked area.

    Attributes:
        masks: (n, height, width) float32, 0 (outside) … 1; one for all pictures of a batch (n = 1) or one for each.
        placeless: see `Placeless`.
        kept: what was made of the masks, by what it was made for.
    """

    masks: Tensor
    placeless: str = "off"
    kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("placeless", self.placeless, PLACELESS)
        mask = self.masks
        if mask.dim() == 4 and mask.shape[1] == 1:
            mask = mask[:, 0]
        if mask.dim() == 2:
            mask = mask[None]
        if mask.dim() != 3 or mask.numel() == 0 or not bool(mask.isfinite().all()):
            raise LoHaError(f"the mask is {tuple(mask.shape)}; expected finite values, (pictures, height, width)")
        self.masks = mask.detach().to("cpu", torch.float32).clamp(0, 1)
        self.shares = tuple(float(share) for share in self.masks.mean(dim=(1, 2)))
        self.is_everywhere = bool((self.masks == 1).all())
        self.is_nowhere = bool((self.masks == 0).all())

    @property
    def pictures(self) -> int | None:
        """For how many pictures the masks are; None if for any number."""
        return len(self.masks) if len(self.masks) > 1 else None

    def placeless_gain(self, picture: int) -> float:
        """What multiplies the strength of layers that see no place."""
        return {"off": 0.0, "full": 1.0, "share": self.shares[picture % len(self.shares)]}[self.placeless]

    @property
    def text_gain(self) -> float:
        """What multiplies the strength on text encoders, which see one text for all pictures."""
        return sum(map(self.placeless_gain, range(len(self.shares)))) / len(self.shares)

    def cells(self, latent: tuple[int, int], steps: Sequence[tuple[int, int]]) -> Tensor:
        """The masks on a grid, as means over its cells.

        Args:
            latent: height and width of the latents.
            steps: how many rows and columns become one, again and again; a rest at the border is a cell, too.

        Returns:
            (n, h, w) float32 on the CPU.

        Raises:
            LoHaError: the mask is of other proportions than the latents.
        """
        size = tuple(self.masks.shape[1:])
        if not _alike(size, latent):
            raise LoHaError(
                f"the region's mask is {size[1]}×{size[0]} (width × height), but latents of {latent[1]}×{latent[0]} "
                "are sampled, of other proportions; it must be of the whole picture, and tiles cannot have regions"
            )
        smaller = latent[0] <= size[0] and latent[1] <= size[1]
        grid = F.interpolate(self.masks[:, None], latent, mode="area" if smaller else "bilinear")
        for step in steps:
            grid = F.avg_pool2d(grid, step, ceil_mode=True)
        return grid[:, 0]

    def keep(self, key: Any, made: Any) -> None:
        if len(self.kept) >= _MAX_KEPT:
            self.kept.clear()
        self.kept[key] = made


def _alike(mask: tuple[int, ...], latent: tuple[int, int]) -> bool:
    """Whether the proportions are the same, but for a latent's row or column more or less."""
    height, width = latent
    exact = mask[0] / mask[1] * width  # the height that the mask says
    slack = 1 + max(1, exact / width) + _PROPORTIONS * exact
    return abs(exact - height) <= slack


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """Edges that fade over this many pixels, as many within as without.

    Args:
        mask: (n, height, width), any floating dtype.

    Raises:
        LoHaError: ``pixels`` is no whole number from 0.
    """
    check_number("feather", pixels, minimum=0, integer=True)
    for axis, length in ((1, mask.shape[1]), (2, mask.shape[2])):
        reach = min(pixels // 2, length - 1)
        if reach:
            turned = mask.transpose(axis, 2)
            padded = F.pad(turned, (reach, reach), mode="replicate")
            sums = F.pad(padded.double().cumsum(2), (1, 0))
            width = 2 * reach + 1
            mask = ((sums[..., width:] - sums[..., :-width]) / width).to(mask.dtype).transpose(axis, 2)
    return mask
