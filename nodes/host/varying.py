"""What live adapters do to one layer where their strength varies: over the pictures of a batch, or within the picture.

A plain operator's update is multiplied as it is added, m∘U(V·x), with m the strength of each row and what the region's
mask is at each token. Anything else, DoRA or another kind of adapter for instance, is y₀ + m∘(y₁ − y₀) in a region, y₀
being the layer without the update and y₁ with it, and takes the rows of each strength through the layer by themselves.
Regions do not see each other: each is added to the layer with those updates that act everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loha_core import LoHaError
from loha_core.tuner import forwards

from .acting import ActingLayer, is_operator
from .cuts import Cut, Part, cut_of
from .regions import Region
from .tokens import Layout, Stream, path_of
from .updates import ActingUpdate, LiveUpdate, SamplingCall, agreed

# How much of a layer's output may be made twice, with and without the adapter, before adding to it is preferred.
_MAX_TWICE = 1.3


class VaryingLayer(ActingLayer):
    """All live updates of one module, of which at least one varies.

    Args:
        layout: where the model's tokens are; needed if an update has a region.
    """

    _strategy: Any = "auto"
    _picture: int | None = None  # whose strengths act, while the layer runs
    _region: Region | None = None  # that acts besides those updates that have none

    def __init__(
        self, module: nn.Module, path: str, updates: dict[str, list[LiveUpdate]], layout: Layout | None = None
    ) -> None:
        super().__init__(module, path, updates)
        self._all = [update for each in self.updates.values() for update in each]
        self._layout = layout
        self._stream = layout.stream(path_of(path)) if layout else Stream.IMAGE
        if self._stream is Stream.PLACELESS:
            self._regions: list[Region] = []
        else:
            found = (update.live.region for update in self._all if update.live.region is not None)
            self._regions = [
                region for region in dict.fromkeys(found) if not region.is_nowhere or self._acts_on_text(region)
            ]
        self._is_sum = set(updates) == {"weight"} and all(
            is_operator(module, update) and not update.is_dora for update in self._all
        )

    def _acts_on_text(self, region: Region) -> bool:
        return region.placeless == "full" and self._stream is not Stream.IMAGE

    @property
    def call(self) -> SamplingCall:
        return self._all[0].live.call

    def _strength_of(self, update: ActingUpdate, picture: int) -> float:
        """Of a picture; in a layer that sees no place a region is a factor of the strength."""
        strength, region = update.live.strength_now(picture), update.live.region
        if region is None or self._stream is not Stream.PLACELESS:
            return strength
        return strength * region.placeless_gain(picture)

    def _strength(self, update: ActingUpdate) -> float:
        if self._picture is None:
            raise LoHaError(
                f"{self.path}: its weight is read outside of its forward, where a strength that varies cannot act; "
                "give the LoHa node one strength and no region"
            )
        region = update.live.region
        if region is not None and self._stream is not Stream.PLACELESS and region is not self._region:
            return 0.0
        return self._strength_of(update, self._picture)

    def __call__(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.ran = True
        x = forwards.first(args, kwargs)
        alike = self._alike()
        try:
            if len(alike) == 1 and not self._regions:
                self._picture = 0
                return self._act(forward, *args, **kwargs)
            self._check_rows(x)
            is_single = len(args) + len(kwargs) == 1
            if is_single and len(alike) == 1 and (y := self._apart(forward, x)) is not None:
                return y
            if is_single and self._is_sum:
                return self._summed(forward, x)
            if len(alike) == 1:
                self._picture = 0
                return self._in_regions(None, forward, *args, **kwargs)
            return self._by_picture(list(alike.values()), forward, *args, **kwargs)
        finally:
            self._picture = None

    def _alike(self) -> dict[tuple[float, ...], list[int]]:
        """The pictures of the batch, by all strengths that they have."""
        pictures = agreed(update.live.pictures for update in self._all)
        found, alike = self.call.pictures, defaultdict(list)
        if pictures is not None and found == 0:
            raise LoHaError(
                f"{self.path}: it runs outside of a call of the diffusion model by ComfyUI, where nothing says which "
                "picture of the batch a row is; give the LoHa node one strength and one mask"
            )
        if pictures is not None and found != pictures:
            raise LoHaError(
                f"there are {pictures} strengths or masks, one per picture, but a batch of {found} is sampled; "
                "make the batch of the latent as long as their list"
            )
        for picture in range(pictures or 1):
            alike[tuple(self._strength_of(update, picture) for update in self._all)].append(picture)
        return alike

    def _check_rows(self, x: Tensor) -> None:
        """x has a row for each picture, for each conditioning."""
        rows = self.call.shape[0] if self.call.shape else 0
        if x.dim() < 2 or x.shape[0] != rows:
            raise LoHaError(
                f"{self.path}: its input is {tuple(x.shape)}, but the model is called for {rows} rows, and nothing "
                "says which picture each is of; give the LoHa node one strength and no region"
            )

    def _gain(self, region: Region, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Of an output of this shape, which it broadcasts to; (1 or rows, …), the same tensor for the same question."""
        assert self._layout is not None
        first = self.is_conv or isinstance(self.module, nn.GroupNorm)
        path = path_of(self.path)
        return self._layout.gain(path, self._stream, region, self.call, shape, device, channels_first=first)

    def _apart(self, forward: Callable[..., Tensor], x: Tensor) -> Tensor | None:
        """The outputs outside by the layer without the region's updates, those inside with them.

        None where another way costs less, or rounds less: a quantised layer's scale may be of all of its input.
        """
        weight: Any = self.module.weight
        if len(self._regions) != 1 or not self.castable or torch.is_grad_enabled() or weight.device != x.device:
            return None
        if self._is_sum and self._adding_is_cheaper(x):
            return None
        cut = cut_of(self.module, x)
        if cut is None:
            return None
        [region] = self._regions
        gain = self._gain(region, cut.shape, x.device)
        outside, inside = self._part(region, cut, gain, inside=False), self._part(region, cut, gain, inside=True)
        if len(outside) + len(inside) > _MAX_TWICE * cut.count:
            return None
        self._picture, y = 0, x.new_zeros(cut.shape)
        try:
            for where, part, share in ((None, outside, 1 - gain), (region, inside, gain)):
                self._region = where
                if len(part) == 0:
                    continue
                output = self._act(forward, part.of_input(x))
                if outside.is_whole and inside.is_whole:
                    part.put_(y, output)
                else:
                    part.add_(y, output, share)
        finally:
            self._region = None
        return y

    @staticmethod
    def _part(region: Region, cut: Cut, gain: Tensor, *, inside: bool) -> Part:
        key = ("part", id(gain), cut.reach, inside)
        if key not in region.kept:
            region.keep(key, (gain, cut.part(gain if inside else 1 - gain)))  # with the gain, whose id none else has
        part: Part = region.kept[key][1]
        return part

    def _summed(self, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = forward(x)
        plain = x.dequantize() if hasattr(x, "_qdata") else x
        pictures = self.call.pictures
        for update in self._all:
            region = update.live.region if self._stream is not Stream.PLACELESS else None
            strengths = [self._strength_of(update, picture) for picture in range(pictures)]
            if not any(strengths) or (region is not None and region not in self._regions):
                continue
            if region is not None and len(set(strengths)) == 1 and not torch.is_grad_enabled():
                self._add_inside(region, y, plain, update, strengths[0])
                continue
            if len(set(strengths)) == 1:
                added = self._product(plain, update.factors(plain.device), update.part, strengths[0])
            else:
                added = self._product(plain, update.factors(plain.device), update.part, 1.0)
                rows = torch.tensor(strengths, device=added.device).repeat(len(x) // pictures)
                added = (added * rows.reshape(-1, *[1] * (added.dim() - 1))).to(y.dtype)
            if region is not None:
                added = added * self._gain(region, tuple(y.shape), y.device)
            y = self._added(y, added, update.part)
        return y

    def _add_inside(self, region: Region, y: Tensor, x: Tensor, update: ActingUpdate, strength: float) -> None:
        """Add the update to y, made of no more than what lies inside."""
        gain, cut = self._gain(region, tuple(y.shape), y.device), cut_of(self.module, x)
        rows = None if update.part is None or update.part[0] == 1 else update.part[1:]
        y = y if rows is None else y.narrow(self._channels(y), *rows)
        if cut is None:
            y.add_((self._product(x, update.factors(x.device), update.part, strength) * gain).to(y.dtype))
        elif len(inside := self._part(region, cut, gain, inside=True)):
            product = self._product(inside.of_input(x), update.factors(x.device), update.part, strength)
            inside.add_(y, product, gain)

    def _in_regions(self, rows: Tensor | None, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """y₀ + Σ m∘(y₁ − y₀), for these rows of the batch, which have the same strengths."""
        self._region = None
        y = plain = self._act(forward, *args, **kwargs)
        try:
            for region in self._regions:
                self._region = region
                if any(update.live.region is region and self._strength(update) for update in self._all):
                    gain = self._gain(region, tuple(plain.shape), plain.device)
                    gain = gain if rows is None or len(gain) == 1 else gain.index_select(0, rows)
                    y = y + (gain * (self._act(forward, *args, **kwargs) - plain)).to(y.dtype)
        finally:
            self._region = None
        return y

    def _by_picture(self, alike: list[list[int]], forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The rows of each strength by themselves."""
        count, pictures = self.call.shape[0], self.call.pictures
        result: Tensor | None = None
        for chosen in alike:
            self._picture = chosen[0]
            device = forwards.first(args, kwargs).device
            rows = torch.tensor([row for row in range(count) if row % pictures in chosen], device=device)
            of_rows = [_rows(each, rows, count) for each in args]
            y = self._in_regions(rows, forward, *of_rows, **{k: _rows(v, rows, count) for k, v in kwargs.items()})
            if result is None:
                result = y.new_empty(count, *y.shape[1:])
            result = result.index_copy(0, rows, y)
        assert result is not None
        return result


def _rows(value: Any, rows: Tensor, count: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != count:
        return value
    return (value.dequantize() if hasattr(value, "_qdata") else value).index_select(0, rows)
