"""Training in one node: LoHa Dataset, Network, Optimizer, Train LoHa and Save LoHa by their own code, with defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.supported_models
import folder_paths
import torch
from comfy_api.latest import io

from loha_core import LoHaError
from loha_core.errors import about
from loha_core.training.data.captions import Captions
from loha_core.training.data.folder import Entry, read_folder
from loha_core.training.data.pictures import Sizes

from . import sources
from .dataset import ClipDataset, encode_captions
from .inputs import number, problems, schema
from .network import network_config
from .optimizer import optimizer_settings
from .save import LoHaSave, free_path
from .sources import Source
from .trainer import run_folder, train
from .types import LOHA

# Sides of the square that models were trained at, and the multiples that sides have.
SMALL, LARGE, STEP = 512, 1024, 64
MAX_BATCH = 16
# States, files and previews of a run.
SAVES = 4
NOTHING = "(no folder in input yet)"


class LoHaTrainFolder(io.ComfyNode):
    """MODEL, CLIP, VAE and a folder of pictures -> a LoHa among the adapters."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaTrainFolder",
            display_name="Train LoHa on a folder",
            search_aliases=["train lora", "lora training", "train on my pictures", "dreambooth"],
            category="LoHa/train",
            description="Trains a LoHa on a folder of pictures and saves it. LoHa Dataset, LoHa Network, LoHa "
            "Optimizer and Train LoHa have the settings that this node chooses by itself.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to train on. Its weights stay as they are."),
                io.Clip.Input("clip", tooltip="Its text encoders, for the captions. They are not trained."),
                io.Vae.Input("vae", tooltip="Its VAE, for the pictures and for previews."),
                io.Combo.Input(
                    "folder",
                    options=folder_paths.get_input_subfolders() or [NOTHING],
                    tooltip="A folder in ComfyUI's input folder. A picture's caption lies beside it: cat.txt for "
                    "cat.png. Pictures in a folder 10_name inside are seen ten times as often.",
                ),
                io.String.Input(
                    "trigger_word",
                    default="",
                    tooltip="Put in front of each caption that does not have it, shown by previews, and kept in the "
                    "file. Empty: none.",
                ),
                io.String.Input(
                    "name",
                    default="my_loha",
                    tooltip="Names the file in models/loras, and the run and its folder in output/loha. A run of this "
                    "name that was cancelled goes on.",
                ),
                number("steps", 1000, "Optimizer steps: how long.", 1),
                number("rank", 8, "Rank of each half of the LoHa: how much it can learn, and how large its file is.",
                       1, 256),
                number("learning_rate", 1e-3, "How fast. Lower it if previews fall apart.", step=0.000001, round=False),
                number("training_seed", 0, "Of everything random: the same seed, the same LoHa.", 0,
                       0xFFFFFFFFFFFFFFFF),
            ],
            hidden=[io.Hidden.extra_pnginfo],
            outputs=[
                LOHA.Output(display_name="loha", tooltip="What was learnt, for Apply LoHa or LoHa Info."),
                io.Model.Output(tooltip="The model with the LoHa at strength 1, to try it at once."),
                io.String.Output(display_name="path", tooltip="The name to load it by."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, folder: str | None = None, name: str | None = None) -> bool | str:
        return problems(
            lambda: folder is None or read_folder(input_folder(folder)),
            lambda: name is None or (run_folder(name, True), free_path(name, "", True)),
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> str:
        stats = [(path, path.stat()) for path in sorted(input_folder(folder).rglob("*"))]
        return ";".join(f"{path.name}:{stat.st_mtime_ns}:{stat.st_size}" for path, stat in stats)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        folder: str,
        trigger_word: str,
        name: str,
        steps: int,
        rank: int,
        learning_rate: float,
        training_seed: int,
    ) -> io.NodeOutput:
        place = input_folder(folder)
        with torch.inference_mode():
            entries = read_folder(place)
            pictures = [_source(entry) for entry in entries]
            sizes, batch_size = chosen_sizes(pictures, native_side(model), int(vae.spacial_compression_encode()))
            items = sources.encoded(pictures, sizes, vae, flip=False)
            dataset = ClipDataset(items, Captions(trigger_word), clip)
            encode_captions(dataset)
        every = -(-steps // SAVES)
        adapter, trained, *_ = train(
            cls.hidden,
            model,
            None,
            name,
            resume=True,
            dataset=dataset,
            network=network_config(rank=rank, alpha=rank, conv_rank=rank, conv_alpha=rank),
            optimizer=optimizer_settings(learning_rate=learning_rate),
            vae=vae,
            steps=steps,
            batch_size=batch_size,
            mixed_precision=precision(),
            training_seed=training_seed,
            gradient_checkpointing=True,
            save_every=every,
            preview_every=every,
            preview_prompt=trigger_word or " ".join(pictures[0].caption.splitlines()),
            preview_cfg=1.0 if _is_distilled(model) else 5.0,
        )
        saved = LoHaSave.execute(adapter, name, "LyCORIS (one file)", "fp16", trigger_words=trigger_word)
        return io.NodeOutput(adapter, trained, saved[0], ui=saved.ui)


def input_folder(name: str) -> Path:
    """A folder inside ComfyUI's input folder.

    Raises:
        LoHaError: no such folder, or one that lies elsewhere.
    """
    root = os.path.realpath(folder_paths.get_input_directory())
    path = Path(root, "" if "\0" in name else name)
    if name == NOTHING or not Path(os.path.realpath(path)).is_relative_to(root) or path == Path(root):
        raise LoHaError(
            f"folder is {name!r}; expected the name of a folder in ComfyUI's input folder: put your pictures into one "
            "there, press R, and choose it"
        )
    if not path.is_dir():
        raise LoHaError(f"folder is {name!r}, which is not in ComfyUI's input folder; press R and choose again")
    return path


def _source(entry: Entry) -> Source:
    picture, _ = entry.load()
    return Source(picture, entry.name, entry.caption, repeats=entry.repeats)


def native_side(model: Any) -> int:
    """The side of the square that models of this kind were trained at."""
    small = comfy.supported_models.SD15, comfy.supported_models.SD20
    return SMALL if isinstance(model.model.model_config, small) else LARGE


def chosen_sizes(pictures: list[Source], side: int, multiple: int) -> tuple[Sizes, int]:
    """The sizes to train at, and how many pictures at once.

    Pictures get the model's own number of pixels. Where all have fewer they stay as they are, and as many as make up
    for it are trained together.

    Args:
        side: see `native_side`.
        multiple: how much smaller the VAE makes a picture.
    """
    areas = [source.content.shape[0] * source.content.shape[1] for source in pictures]
    if max(areas) >= side**2:
        return Sizes(side, max(STEP, multiple)), 1
    sizes = Sizes(0, multiple)
    for source in pictures:
        with about(source.name):
            sizes.of(*source.content.shape[:2])
    return sizes, min(MAX_BATCH, len(pictures), side**2 // max(areas))


def precision() -> str:
    """What the device computes fast in."""
    device = comfy.model_management.get_torch_device()
    if device.type in ("cpu", "mps"):
        return "fp32"
    return "bf16" if comfy.model_management.should_use_bf16(device) else "fp16"


def _is_distilled(model: Any) -> bool:
    """Whether the model takes its guidance as an input, as Flux does, and no classifier-free guidance."""
    return bool(model.model.model_config.unet_config.get("guidance_embed"))
