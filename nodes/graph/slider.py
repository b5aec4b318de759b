"""The nodes that make a concept the thing to learn: strength 1 shows it, −1 its opposite."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from loha_core import LoHaError
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.losses.slider import SLIDERS, PictureSlider, PromptSlider, concepts

from .dataset import encode_captions
from .inputs import number, schema
from .types import LOHA_DATASET


class LoHaSlider(io.ComfyNode):
    """CLIP and prompts -> LOHA_DATASET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaSlider",
            display_name="LoHa Slider",
            search_aliases=["concept slider", "sliders", "slider lora", "ultimate slider"],
            category="LoHa/train",
            description="Lets Train LoHa learn a concept from prompts alone: the strength of the LoHa is then a slider "
            "between both ends of it.",
            inputs=[
                io.Clip.Input("clip", tooltip="Encodes the prompts. Use the trained model's own."),
                io.Latent.Input(
                    "latent",
                    tooltip="From Empty Latent Image, or the empty latent of the model's family: the size to train at.",
                ),
                _prompts("positive", "What strength 1 shows: 'a person, smiling, cheerful'. A line for each concept."),
                _prompts("negative", "What strength -1 shows: 'a person, frowning, sad'. A line for each concept."),
                _prompts("target",
                         "Whose pictures change: 'a person'. A line for each concept, or one for all. Empty: those "
                         "without a prompt."),
                _prompts("preserve",
                         "What must not change along, a line each: 'man', 'woman'. They are added to both ends, so "
                         "that the way from one to the other has nothing of them.", optional=True),
                number("guidance", 3.0, "How far strength 1 goes: a multiple of the way from target to positive less "
                       "negative.", 0.01, 100, step=0.01, optional=True),
                number("denoising_steps", 10,
                       "Steps in which the model makes pictures of the target to learn on, as far as the noise level "
                       "that is trained. More is closer to sampling, and slower.", 1, 1000, optional=True),
                LOHA_DATASET.Input(
                    "dataset",
                    optional=True,
                    tooltip="From LoHa Dataset: pictures to learn on in place of the model's own; their captions are "
                    "not used, and latent and denoising_steps are not either.",
                ),
            ],
            outputs=[LOHA_DATASET.Output(display_name="dataset", tooltip="For the dataset input of Train LoHa.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        clip: Any,
        latent: dict[str, Any],
        positive: str,
        negative: str,
        target: str = "",
        preserve: str = "",
        guidance: float = 3.0,
        denoising_steps: int = 10,
        dataset: Dataset | None = None,
    ) -> io.NodeOutput:
        if clip is None:
            raise LoHaError("a slider is learned from prompts, and there are no text encoders; connect clip")
        if isinstance(dataset, SLIDERS):
            raise LoHaError("dataset is a slider already; connect pictures, by LoHa Dataset")
        slider = PromptSlider(
            concepts(*(_lines(prompts) for prompts in (positive, negative, target))),
            [_empty(latent)] if dataset is None else dataset.items,
            lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt)),
            preserve=_lines(preserve),
            guidance=guidance,
            denoising_steps=denoising_steps if dataset is None else 0,
        )
        encode_captions(slider)
        return io.NodeOutput(slider)


class LoHaPictureSlider(io.ComfyNode):
    """Two LOHA_DATASETs -> one of their pairs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaPictureSlider",
            display_name="LoHa Picture Slider",
            search_aliases=["visual slider", "image pairs", "slider lora"],
            category="LoHa/train",
            description="Lets Train LoHa learn the difference between the pictures of pairs: the strength of the LoHa "
            "is then a slider between them.",
            inputs=[
                LOHA_DATASET.Input("high", tooltip="From LoHa Dataset: pictures of what strength 1 shows."),
                LOHA_DATASET.Input(
                    "low",
                    tooltip="From LoHa Dataset: pictures of what strength -1 shows, as many, in the same order and of "
                    "the same sizes.",
                ),
            ],
            outputs=[LOHA_DATASET.Output(display_name="dataset", tooltip="For the dataset input of Train LoHa.")],
        )

    @classmethod
    def execute(cls, high: Dataset, low: Dataset) -> io.NodeOutput:
        return io.NodeOutput(PictureSlider(high, low))


def _prompts(name: str, tooltip: str, *, optional: bool = False) -> Any:
    return io.String.Input(name, default="", multiline=True, tooltip=tooltip, optional=optional)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _empty(latent: dict[str, Any]) -> Item:
    """An item of zeros of a latent's size.

    Raises:
        LoHaError: there is a picture in the latent.
    """
    samples = latent["samples"]
    if samples.min() != samples.max():
        raise LoHaError(
            "the latent holds a picture, and only its size would count; connect an empty one, and pictures to learn on "
            "by LoHa Dataset to the dataset input"
        )
    return Item(torch.zeros(samples.shape[1:]))
