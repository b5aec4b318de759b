"""From ComfyUI's lists of images, masks, latents, texts and conditioning to the items of a data set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loha_core import LoHaError
from loha_core.errors import about
from loha_core.training.data.dataset import Item
from loha_core.training.data.pictures import Size, Sizes, at_latent_size, check_picture, fit
from loha_core.training.digest import digest

from ..host.progress import ProgressBar

# Pictures that go to the VAE at once; it makes smaller batches of them where memory is short.
MAX_ENCODED_AT_ONCE = 8


@dataclass(frozen=True)
class Source:
    """A picture or a latent of the native lists, with what belongs to it.

    Args:
        content: a picture (h, w, 3); or a latent (c, h, w) or (c, t, h, w), then ``is_latent``.
        mask: (h, w) in 0…1.
        conditioning: ComfyUI's CONDITIONING, in place of the caption.
    """

    content: Tensor
    name: str
    caption: str = ""
    conditioning: Any = None
    mask: Tensor | None = None
    weight: float = 1.0
    regularisation: bool = False
    repeats: int = 1
    is_latent: bool = False


def pictures(
    images: Sequence[Tensor], texts: Sequence[str] | None, conditioning: Any, masks: Sequence[Tensor] | None, name: str
) -> list[Source]:
    """The pictures of an IMAGE list, each of whose members may be a batch.

    Raises:
        LoHaError: one of them is no picture, or the lists do not fit together.
    """
    singles = [picture[..., :3] for image in images for picture in (image if image.ndim == 4 else [image])]
    entries = _joined(singles, texts, conditioning, masks, name)
    for source in entries:
        check_picture(source.content, source.name)
        if source.mask is not None and source.mask.shape != source.content.shape[:2]:
            (mask_height, mask_width), (height, width) = source.mask.shape, source.content.shape[:2]
            raise LoHaError(
                f"{source.name}: its mask has {mask_width}×{mask_height} pixels, the picture {width}×{height}; "
                "give each picture a mask of its own size, white where it is learned"
            )
    return _merged(entries)


def latents(
    batches: Sequence[dict[str, Tensor]],
    texts: Sequence[str] | None,
    conditioning: Any,
    masks: Sequence[Tensor] | None,
) -> list[Source]:
    """The latents of a LATENT list, each of whose members may be a batch.

    Raises:
        LoHaError: the lists do not fit together.
    """
    singles = [one for batch in batches for one in batch["samples"]]
    return [replace(source, is_latent=True) for source in _joined(singles, texts, conditioning, masks, "latent")]


def _joined(
    contents: Sequence[Tensor],
    texts: Sequence[str] | None,
    conditioning: Any,
    masks: Sequence[Tensor] | None,
    name: str,
) -> list[Source]:
    """Each with its caption or conditioning (one for each, or one for all) and its mask (one for each)."""
    count = len(contents)
    if not count:
        raise LoHaError(f"there is no {name} to train on: the list that is connected is empty")
    if conditioning and len(conditioning) == 1 and len(conditioning[0]) == count > 1:
        conditioning = [[entry] for entry in conditioning[0]]  # a batch's, as Train LoRA takes it
    captions = _one_each(texts, "text", count, name)
    conditions = _one_each(conditioning, "conditioning", count, name)
    planes = [plane for mask in masks or () for plane in (mask if mask.ndim == 3 else [mask])]
    if planes and len(planes) != count:
        raise LoHaError(f"{len(planes)} masks for {count} of {name}: connect one for each, or none")
    return [
        Source(content, f"{name} {number}", captions[number - 1] or "", conditions[number - 1], mask)
        for number, (content, mask) in enumerate(zip(contents, planes or [None] * count, strict=True), 1)
    ]


def _one_each(values: Sequence[Any] | None, kind: str, count: int, name: str) -> Sequence[Any]:
    if not values:
        return [None] * count
    if len(values) not in (1, count):
        raise LoHaError(
            f"{len(values)} of {kind} for {count} of {name}: connect a list with one for each, or a single one for all"
        )
    return values if len(values) == count else [*values] * count


def _merged(sources: Sequence[Source]) -> list[Source]:
    """Equal sources, as ComfyUI's folder nodes load those of '10_name', become one that repeats: encoded once."""
    merged: dict[tuple[str, int], Source] = {}
    for source in sources:
        key = digest(source.content, source.mask, source.caption), id(source.conditioning)
        merged[key] = replace(merged[key], repeats=merged[key].repeats + 1) if key in merged else source
    return list(merged.values())


# --- to items -----------------------------------------------------------------------------------


def size_of(source: Source, sizes: Sizes) -> Size:
    """The height and width at which a source is trained.

    Raises:
        LoHaError: a picture is too small.
    """
    if source.is_latent:
        return source.content.shape[-2], source.content.shape[-1]
    with about(source.name):
        return sizes.of(*source.content.shape[:2])


def cropped(source: Source, sizes: Sizes) -> Source:
    """A picture and its mask at the size at which they are trained."""
    size, enlarge = size_of(source, sizes), sizes.resolution > 0
    mask = None if source.mask is None else fit(source.mask, size, enlarge=enlarge)
    return replace(source, content=fit(source.content, size, enlarge=enlarge), mask=mask)


def encoded(sources: Sequence[Source], sizes: Sizes, vae: Any, flip: bool) -> list[Item]:
    """Items of pictures, in their order; shows ComfyUI's progress bar, and stops at Cancel."""
    by_size: dict[Size, list[int]] = defaultdict(list)
    for index, source in enumerate(sources):
        by_size[size_of(source, sizes)].append(index)
    # A video VAE takes a batch of pictures for the frames of one clip.
    size = MAX_ENCODED_AT_ONCE if getattr(vae, "latent_dim", 2) == 2 else 1
    groups = [same[at : at + size] for same in by_size.values() for at in range(0, len(same), size)]
    items: dict[int, Item] = {}
    bar = ProgressBar(len(sources))
    for group in groups:
        seen = [cropped(sources[index], sizes) for index in group]
        batch = torch.stack([source.content for source in seen])
        plain = vae.encode(batch)
        mirrored = vae.encode(batch.flip(2)) if flip else [None] * len(group)
        for index, source, latent, flipped in zip(group, seen, plain, mirrored, strict=True):
            items[index] = as_item(source, latent, flipped, digest(source.content, *_first_weights(vae)))
        bar.update(len(group))
    return [items[index] for index in range(len(sources))]


def _first_weights(vae: Any) -> Iterable[Tensor]:
    """Two of a VAE's parameters, to tell it from another."""
    return (parameter for parameter, _ in zip(vae.first_stage_model.parameters(), range(2), strict=False))


def as_item(source: Source, latent: Tensor, flipped: Tensor | None = None, origin: str = "") -> Item:
    """An item with its mask at the latent's size."""
    return Item(
        latent=latent,
        caption=source.caption,
        flipped=flipped,
        mask=None if source.mask is None else at_latent_size(source.mask, *latent.shape[-2:]),
        weight=source.weight,
        regularisation=source.regularisation,
        conditioning=source.conditioning,
        repeats=source.repeats,
        name=source.name,
        source=origin,
    )
