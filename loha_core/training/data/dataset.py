"""The items that a run is trained on, and how one is varied each time it is seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import LoHaError, about, check_number
from ..digest import digest
from .captions import Captions

# Encoded captions that are kept, in bytes. A prompt is 0.2 MB in SD1.5 and 4 to 8 MB in models with a T5.
CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Item:
    """A picture (or a clip of a video) as it is stored.

    Args:
        latent: (c, h, w) or (c, t, h, w), as a VAE gives it; kept as float32.
        caption: as it was given, before anything is varied.
        flipped: the latent of the mirrored picture, of the same shape; None: it is never mirrored. Latents themselves
            cannot be mirrored, because some VAEs give channels a place.
        mask: (1, h, w) in 0…1, how much each place counts in the loss; None: all the same.
        weight: how much the item counts in the loss.
        regularisation: a picture of the class (prior preservation): no trigger word is put in front of its caption.
        conditioning: what the text encoder would give, if it came with the data; the caption is then not used.
        repeats: how often it is seen in an epoch.
        name: what error messages call it.
        source: a hash of what the latent was made from. It stands for the values in the fingerprint, because a GPU
            does not encode a picture twice to the same last bit.
    """

    latent: Tensor
    caption: str = ""
    flipped: Tensor | None = None
    mask: Tensor | None = None
    weight: float = 1.0
    regularisation: bool = False
    conditioning: Any = None
    repeats: int = 1
    name: str = ""
    source: str = ""


@dataclass(frozen=True)
class Sample:
    """An item as it is seen once; see `Item` for shapes. The caption is as drawn: shuffled, dropped, …"""

    latent: Tensor
    caption: str
    mask: Tensor | None
    weight: float
    conditioning: Any


class Dataset:
    """Items to train on.

    Args:
        items: at least one; all with the same number of channels.
        captions: how captions vary.
        encode: caption -> conditioning, whatever the model takes; called without gradients.
        cache_bytes: how much of what ``encode`` gave is kept, the latest used first.

    Raises:
        LoHaError: no items, or one that cannot be trained on; the message says which and why.
    """

    def __init__(
        self,
        items: Sequence[Item],
        captions: Captions | None = None,
        encode: Callable[[str], Any] | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if not items:
            raise LoHaError("there is nothing to train on: give at least one picture")
        self.items = tuple(_checked(item, number) for number, item in enumerate(items, 1))
        self.captions = captions or Captions()
        _check_alike(self.items)
        self._encode = encode
        self._cache_bytes = cache_bytes
        self._encoded: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._fingerprint = ""

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: Sequence[int]) -> Dataset:
        """The same with some of the items; what was encoded is shared.

        Raises:
            LoHaError: no indices.
        """
        if not indices:
            raise LoHaError("there is nothing to train on: give at least one picture")
        other = copy(self)
        other.items, other._fingerprint = tuple(self.items[index] for index in indices), ""
        return other

    def buckets(self) -> list[list[int]]:
        """Indices of items by shape of latent, each as often as it repeats; only these can share a batch."""
        buckets: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(self.items):
            buckets.setdefault(tuple(item.latent.shape), []).extend([index] * item.repeats)
        return list(buckets.values())

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """The item as it is seen this time: mirrored or not, its caption varied; random by ``generator`` alone."""
        item = self.items[index]
        latent, mask = item.latent, item.mask
        if item.flipped is not None and torch.rand((), generator=generator).item() < 0.5:
            latent, mask = item.flipped, None if mask is None else mask.flip(-1)
        caption = self.captions.draw(item.caption, generator, trigger=not item.regularisation)
        return Sample(latent, caption, mask, item.weight, item.conditioning)

    def encode(self, caption: str) -> Any:
        """What the text encoder makes of a caption.

        Raises:
            LoHaError: the data came without a text encoder.
        """
        if caption in self._encoded:
            self._encoded.move_to_end(caption)
            return self._encoded[caption][0]
        if self._encode is None:
            raise LoHaError(
                f"caption {caption!r:.80} cannot be encoded: the dataset has neither a text encoder nor conditioning; "
                "give it one of them"
            )
        with torch.no_grad():
            conditioning = _trainable(self._encode(caption))
        self._encoded[caption] = (conditioning, sum(t.numel() * t.element_size() for t in _tensors(conditioning)))
        while len(self._encoded) > 1 and sum(size for _, size in self._encoded.values()) > self._cache_bytes:
            self._encoded.popitem(last=False)
        return conditioning

    def all_captions(self) -> list[str]:
        """Every caption that can be drawn and will be encoded, to do so beforehand.

        Those whose tags are shuffled or dropped are left out: there are too many.
        """
        needed = (item for item in self.items if item.conditioning is None)
        forms = (self.captions.all(item.caption, trigger=not item.regularisation) for item in needed)
        return list(dict.fromkeys(form for of_item in forms for form in of_item or ()))

    def fingerprint(self) -> str:
        """A hash of everything that decides what is drawn: 32 hexadecimal digits, the same in every process.

        Names do not count: they are for people, and two copies of a folder are one dataset.
        """
        if not self._fingerprint:
            stored = [{each.name: getattr(item, each.name) for each in fields(item)} for item in self.items]
            for values in stored:
                del values["name"]
                if values["source"]:
                    values |= {"latent": values["latent"].shape, "flipped": values["flipped"] is None}
            self._fingerprint = digest(asdict(self.captions), stored)
        return self._fingerprint


def _checked(item: Item, number: int) -> Item:
    """The item in float32 on the CPU, or an error that names it."""
    label = f"item {number}" + (f" ({item.name})" if item.name else f" ({item.caption:.40})" if item.caption else "")
    with about(label):
        _check(item)
    return replace(
        item,
        latent=_kept(item.latent),
        flipped=None if item.flipped is None else _kept(item.flipped),
        mask=None if item.mask is None else _kept(item.mask),
        conditioning=_trainable(item.conditioning),
    )


def _check(item: Item) -> None:
    shape = tuple(item.latent.shape)
    if len(shape) not in (3, 4) or 0 in shape:
        raise LoHaError(f"expected a latent (channels, height, width) or with frames, found {shape}")
    if item.flipped is not None and tuple(item.flipped.shape) != shape:
        raise LoHaError(f"the mirrored latent is {tuple(item.flipped.shape)}, the latent {shape}")
    if item.mask is not None and tuple(item.mask.shape) != (1, *shape[-2:]):
        raise LoHaError(f"the mask is {tuple(item.mask.shape)}, but must be {(1, *shape[-2:])} for its latent")
    for name, tensor in (("latent", item.latent), ("mirrored latent", item.flipped), ("mask", item.mask)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise LoHaError(f"its {name} holds NaN or infinity; a VAE in float16 may do this, try bfloat16")
    if item.mask is not None and not (item.mask.min() >= 0 and 0 < item.mask.max() <= 1):
        raise LoHaError("a mask has values from 0 (not learned) to 1, and not 0 throughout")
    check_number("weight", item.weight, minimum=0)
    check_number("repeats", item.repeats, minimum=1, integer=True)


def _check_alike(items: Sequence[Item]) -> None:
    first = items[0].latent
    for number, item in enumerate(items[1:], 2):
        if item.latent.ndim != first.ndim or len(item.latent) != len(first):
            raise LoHaError(
                f"item {number} has a latent {tuple(item.latent.shape)}, the first one {tuple(first.shape)}: "
                "all must have the same number of channels; encode them with one VAE"
            )


def _kept(tensor: Tensor) -> Tensor:
    return _trainable(tensor.detach().to("cpu", torch.float32))


def _trainable(value: Any) -> Any:
    """The same, with copies of tensors that were made in inference mode: autograd refuses those."""
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.clone() if value.is_inference() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_trainable(child) for child in value)
    if isinstance(value, dict):
        return {key: _trainable(child) for key, child in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _tensors(child)
