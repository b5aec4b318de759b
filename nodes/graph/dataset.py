"""What a LoHa is trained on: pictures and captions, or latents and conditioning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from loha_core import LoHaError
from loha_core.training.data.captions import Captions
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.data.pictures import Sizes

from ..host.progress import ProgressBar
from ..page.contact_sheet import MAX_SHOWN, Shown, contact_sheet, latent_picture
from . import sources
from .inputs import number, schema, switch
from .sources import Source
from .types import LOHA_DATASET

# Sizes that the contact sheet's second line names; the others are counted.
MAX_SIZES_NAMED = 4


class ClipDataset(Dataset):
    """A data set with the text encoders of ComfyUI that its captions go through; ``clip`` is None without."""

    def __init__(self, items: Sequence[Item], captions: Captions, clip: Any) -> None:
        super().__init__(items, captions, None if clip is None else self._by_clip)
        self.clip = clip

    def _by_clip(self, caption: str) -> Any:
        with torch.inference_mode():
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))


class LoHaDataset(io.ComfyNode):
    """Native lists -> LOHA_DATASET, and a contact sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaDataset",
            display_name="LoHa Dataset",
            search_aliases=["training images", "captions", "lora dataset"],
            category="LoHa/train",
            description="Prepares pictures and captions, or latents and conditioning, for training, and shows them.",
            is_input_list=True,
            inputs=[*_lists(), *_picture_settings(), *_caption_settings()],
            outputs=[
                LOHA_DATASET.Output(display_name="dataset", tooltip="For the dataset input of Train LoHa."),
                io.Image.Output(
                    display_name="image", tooltip="The contact sheet that the node shows: what training will see."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        lists = {name: inputs.pop(name, None) for name in LISTS}
        # With is_input_list, ComfyUI hands over everything as a list, single values too.
        settings = {name: values[0] for name, values in inputs.items()}
        captions = Captions(**{name: settings[option] for name, option in CAPTION_OPTIONS.items()})
        _check_inputs(lists, settings, captions)
        entries, sizes = _sources(lists, settings), _sizes(settings)
        dataset = ClipDataset(_items(entries, sizes, settings), captions, settings.get("clip"))
        encode_captions(dataset)
        image = _sheet(dataset, entries, sizes)
        return io.NodeOutput(dataset, image, ui=ui.PreviewImage(image, cls=cls))


LISTS = ("images", "texts", "latents", "conditioning", "masks", "reg_images", "reg_texts")
CAPTION_OPTIONS = {
    "trigger": "trigger_word",
    "shuffle": "shuffle_tags",
    "keep_tokens": "keep_tokens",
    "caption_dropout": "caption_dropout",
    "tag_dropout": "tag_dropout",
}


# --- inputs -------------------------------------------------------------------------------------


def _lists() -> list[Any]:
    def given(kind: Any, name: str, tooltip: str, **options: Any) -> Any:
        return kind.Input(name, optional=True, tooltip=tooltip, **options)

    return [
        given(io.Image, "images",
              "The pictures, as a list of any sizes or as a batch, such as from Load Image and Text Dataset from "
              "Folder. Needs vae. Leave empty to use latents."),
        given(io.String, "texts",
              "Their captions: one for each picture, or one for all. Empty: no captions. Needs clip.",
              force_input=True),
        given(io.Vae, "vae", "Encodes the pictures, once. Use the trained model's own."),
        given(io.Clip, "clip", "Encodes the captions, each once while there is room. Use the trained model's own."),
        given(io.Latent, "latents", "In place of images: latents, as a list or a batch, of any shapes."),
        given(io.Conditioning, "conditioning",
              "In place of texts: a list with one for each picture or latent, or one for all."),
        given(io.Mask, "masks", "One for each picture or latent, of its size: white is learned, black is ignored."),
        given(io.Image, "reg_images",
              "Regularisation (prior preservation): pictures of the same class without what is learned, best made by "
              "the model itself, so that it does not forget how they look. Each is seen once in an epoch."),
        given(io.String, "reg_texts",
              "Captions of reg_images, one for each or one for all; no trigger word is put in front of them.",
              force_input=True),
    ]  # fmt: skip


def _picture_settings() -> list[Any]:
    return [
        number("reg_weight", 1.0, "How much regularisation pictures count in the loss, against 1 for the others.",
               0, 100, step=0.01),
        number("resolution", 1024,
               "Side of a square with as many pixels as each picture gets: 512 for SD1.5, 1024 for SDXL, SD3 and Flux. "
               "Pictures are resized to it, and cropped in the middle. 0: as they are, cropped only to what the VAE "
               "takes. Latents are always as they are.", 0, 16384, step=8),
        switch("aspect_buckets",
               "On: each picture keeps about its shape, and those of one size are trained together. Off: all become "
               "squares. Without effect at resolution 0.", default=True),
        number("bucket_step", 64,
               "Sides of pictures are multiples of this. Smaller: less is cropped, but fewer pictures share a size and "
               "thus a batch.", 8, 1024, step=8),
        switch("flip",
               "Mirrors a picture half of the time. Not for faces, writing and what else has a left and a right."),
        number("repeats", 1, "How often each picture is seen in an epoch, regularisation pictures aside.", 1, 100_000),
    ]  # fmt: skip


def _caption_settings() -> list[Any]:
    return [
        io.String.Input(
            "trigger_word", default="", tooltip="Put in front of each caption that does not have it. Empty: none."
        ),
        switch("shuffle_tags",
               "Puts the comma-separated tags of a caption in another order each time. The text encoder then runs "
               "during training."),
        number("keep_tokens", 0,
               "So many tags from the start of a caption are neither shuffled nor dropped; the trigger word that is "
               "put in front never is and does not count.", 0, 255),
        number("caption_dropout", 0.0,
               "How often a picture is seen with an empty caption, 0 to 1. With 0.05 to 0.1 the model also learns what "
               "it does without a prompt, which CFG needs.", 0, 1, step=0.01),
        number("tag_dropout", 0.0,
               "How often each comma-separated tag is left out, in 0 to 1; not the trigger word.", 0, 1, step=0.01),
    ]  # fmt: skip


# --- items --------------------------------------------------------------------------------------


def _sources(lists: dict[str, Any], settings: dict[str, Any]) -> list[Source]:
    """What is trained on: pictures as they were given, or latents; regularisation pictures last."""
    texts, conditioning, masks = (lists[name] for name in ("texts", "conditioning", "masks"))
    if lists["images"] is not None:
        entries = sources.pictures(lists["images"], texts, conditioning, masks, "image")
    else:
        entries = sources.latents(lists["latents"], texts, conditioning, masks)
    entries = [replace(source, repeats=source.repeats * settings["repeats"]) for source in entries]
    if lists["reg_images"] is not None:
        regular = sources.pictures(lists["reg_images"], lists["reg_texts"], None, None, "reg_image")
        entries += [replace(source, weight=settings["reg_weight"], regularisation=True) for source in regular]
    return entries


def _items(entries: Sequence[Source], sizes: Sizes, settings: dict[str, Any]) -> list[Item]:
    latents = [sources.as_item(source, source.content) for source in entries if source.is_latent]
    pictures = [source for source in entries if not source.is_latent]
    return latents + (sources.encoded(pictures, sizes, settings["vae"], settings["flip"]) if pictures else [])


def _check_inputs(lists: dict[str, Any], settings: dict[str, Any], captions: Captions) -> None:
    given = {name for name, values in lists.items() if values is not None}
    clip, vae = settings.get("clip"), settings.get("vae")
    changes = [option for name, option in CAPTION_OPTIONS.items() if getattr(captions, name)]
    wrong = {
        "there is nothing to train on: connect images (and vae), or latents": not given & {"images", "latents"},
        "both images and latents are connected: choose one": given >= {"images", "latents"},
        "pictures need a VAE: connect vae": given & {"images", "reg_images"} and vae is None,
        "both texts and conditioning are connected: choose one": given >= {"texts", "conditioning"},
        "nothing says what the pictures show: connect clip (with texts), or conditioning": (
            clip is None and "conditioning" not in given
        ),
        "reg_images need clip for their captions: connect clip": "reg_images" in given and clip is None,
        "reg_texts are connected without reg_images: connect both": "reg_texts" in given and "reg_images" not in given,
        "latents cannot be mirrored: connect images and vae in their place, or turn flip off": (
            "latents" in given and settings["flip"]
        ),
        f"{', '.join(changes)} would change captions, and with conditioning there are none: connect texts and clip in "
        "its place": "conditioning" in given and changes,
    }
    for message, is_so in wrong.items():
        if is_so:
            raise LoHaError(message)


def _sizes(settings: dict[str, Any]) -> Sizes:
    vae = settings.get("vae")
    multiple = int(vae.spacial_compression_encode()) if vae is not None else 1  # latents only
    if not settings["resolution"]:
        return Sizes(0, multiple)
    if settings["bucket_step"] % multiple:
        raise LoHaError(
            f"bucket_step is {settings['bucket_step']}, but this VAE makes pictures {multiple} times smaller: "
            f"use a multiple of {multiple}"
        )
    return Sizes(settings["resolution"], settings["bucket_step"], settings["aspect_buckets"])


def encode_captions(dataset: Dataset) -> None:
    """Now rather than amid training, where the text encoder would take the model's place in memory."""
    captions = dataset.all_captions()
    bar = ProgressBar(len(captions))
    for caption in captions:
        dataset.encode(caption)
        bar.update(1)


# --- what is shown ------------------------------------------------------------------------------


def _sheet(dataset: Dataset, entries: Sequence[Source], sizes: Sizes) -> Tensor:
    # Shuffled and dropped tags would show one of many; what stays is the trigger word.
    plain = Captions(dataset.captions.trigger)
    shown = []
    for source, item in zip(entries[:MAX_SHOWN], dataset.items, strict=False):
        caption = plain.draw(item.caption, torch.Generator(), trigger=not item.regularisation)
        marks = {
            _size(source, sizes): True,
            f"{item.repeats} times": item.repeats > 1,
            "flip": item.flipped is not None,
            "mask": item.mask is not None,
            f"reg {item.weight:g}": item.regularisation,
        }
        if source.is_latent:
            picture, mask = latent_picture(item.latent), None if item.mask is None else item.mask[0]
        else:
            seen = sources.cropped(source, sizes)
            picture, mask = seen.content, seen.mask
        text = caption if item.conditioning is None else "(conditioning)"
        shown.append(Shown(picture, text, [mark for mark, on in marks.items() if on], mask, item.regularisation))
    return contact_sheet(*_heading(dataset, entries, sizes), shown, len(entries) - len(shown))


def _size(source: Source, sizes: Sizes) -> str:
    height, width = sources.size_of(source, sizes)
    return f"{width}x{height}" + " latent" * source.is_latent  # the font has no ×


def _heading(dataset: Dataset, entries: Sequence[Source], sizes: Sizes) -> tuple[str, str]:
    seen = sum(item.repeats for item in dataset.items)
    regular = sum(item.regularisation for item in dataset.items)
    title = f"{len(entries) - regular} to learn"
    title += f", {regular} for regularisation" if regular else ""
    title += f"; {seen} seen in an epoch"
    silent = sum(not item.caption and item.conditioning is None for item in dataset.items)
    title += f"; {silent} without a caption" if silent and not dataset.captions.trigger else ""
    counts = Counter(_size(source, sizes) for source in entries).most_common()
    named = [f"{count} of {size}" for size, count in counts[:MAX_SIZES_NAMED]]
    if len(counts) > MAX_SIZES_NAMED:
        named.append(f"{len(counts) - MAX_SIZES_NAMED} more sizes")
    return title, ", ".join(named)
