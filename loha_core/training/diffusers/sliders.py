"""Concept sliders of `loha train`: the table ``[slider]``, and the data set that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import LoHaError, check_number
from ..data.captions import Captions
from ..data.dataset import Dataset, Item
from ..losses.slider import PictureSlider, PromptSlider, concepts, texts

Prompts = str | Sequence[str]


@dataclass(frozen=True)
class SliderSettings:
    """``[slider]``

    From prompts, on pictures of ``[data]`` if it has a folder, else on what the model makes of the target; or from
    pairs of pictures, of which ``[data]`` has those of strength 1.

    Attributes:
        positive, negative: what strength 1 shows, and −1; a list for several concepts.
        target: whose pictures change; "" those without a prompt.
        preserve: what must not change along.
        guidance: how far strength 1 goes.
        denoising_steps: steps in which the model makes what is learned on, without pictures.
        width, height: of that, in pixels.
        low: a folder of pictures of strength −1, in the order of the others.

    Raises:
        LoHaError: neither prompts nor ``low``, or both; a value of another type or out of its range.
    """

    positive: Prompts = field(default_factory=tuple)
    negative: Prompts = field(default_factory=tuple)
    target: Prompts = field(default_factory=tuple)
    preserve: Prompts = field(default_factory=tuple)
    guidance: float = 3.0
    denoising_steps: int = 10
    width: int = 512
    height: int = 512
    low: str = ""

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "target", "preserve"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if self.low and (self.positive or self.negative or self.target or self.preserve):
            raise LoHaError("low is for pairs of pictures, and there are prompts too; choose one")
        if not self.low:
            concepts(self.positive, self.negative, self.target)
        check_number("guidance", self.guidance, above=0)
        for name in ("denoising_steps", "width", "height"):
            check_number(name, getattr(self, name), minimum=1, integer=True)

    def dataset(
        self,
        items: Sequence[Item],
        lows: Sequence[Item],
        captions: Captions,
        encode: Callable[[str], Any],
        latent: Callable[[Tensor], Tensor],
    ) -> Dataset:
        """The data set of a run.

        Args:
            items, lows: pictures of ``[data]`` and of ``low``; there may be none of either.
            latent: a picture (h, w, 3) -> its latent.
        """
        if self.low:
            return PictureSlider(Dataset(items, captions, encode), Dataset(lows, captions, encode))
        size = [] if items else [Item(torch.zeros_like(latent(torch.zeros(self.height, self.width, 3))))]
        return PromptSlider(
            concepts(self.positive, self.negative, self.target),
            items or size,
            encode,
            preserve=self.preserve,
            guidance=self.guidance,
            denoising_steps=0 if items else self.denoising_steps,
        )
