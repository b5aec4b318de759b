"""The node that trains a LoHa."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from loha_core import Adapter, LoHaError
from loha_core.training.config import TrainingConfig
from loha_core.training.data.batches import BatchSampler
from loha_core.training.data.dataset import Dataset
from loha_core.training.data.validation import Validation, held_out
from loha_core.training.events import Event, PreviewDue, Stepped, Stopped, Validated
from loha_core.training.objectives import Objective
from loha_core.training.state import STATE
from loha_core.training.trainer import Trainer

from ..host import modes
from ..host.layers import NetworkConfig
from ..host.preview import Preview
from ..host.progress import ProgressBar
from ..host.training import BEST, TrainingRun
from ..page import charts, monitor
from .inputs import choice, number, one_of, problems, schema, switch
from .optimizer import OptimizerSettings, optimizer_settings
from .types import LOHA, LOHA_CONFIG, LOHA_DATASET, LOHA_OBJECTIVE, LOHA_OPTIMIZER

FOLDER = "loha"  # of runs, in ComfyUI's output folder
# The dtype that the node names -> Accelerate's name, which `TrainingConfig` takes.
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Watcher:
    """Shows how a run goes, and ends it when the user cancels: ComfyUI's progress bar then raises."""

    def __init__(self, run: TrainingRun, preview: Preview, workflow: str, trainer: Trainer, patcher: Any) -> None:
        self.run, self.preview, self.patcher = run, preview, patcher
        self.bar = ProgressBar(trainer.config.steps)
        self.record = monitor.begin(run.folder.name, workflow, trainer)

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped():
                self.record.stepped(event)
                self.bar.update_absolute(event.step)
            case Validated():
                self.record.validated(event)
                self.bar.update_absolute(event.step)
            case PreviewDue():
                pictures = self.preview.pictures(self.run, self.patcher)
                self.run.folder.mkdir(parents=True, exist_ok=True)
                marks = ["", *(f"_{number}" for number in range(2, len(pictures) + 1))]
                files = [f"preview_{event.step:06d}{mark}.png" for mark in marks]
                for picture, file in zip(pictures, files, strict=True):
                    picture.save(self.run.folder / file)
                self.record.previewed(event.step, files)
                self.bar.update_absolute(event.step)  # the node shows the picture already
            case Stopped():
                self.record.ended(type(event.reason).__name__)


def run_folder(name: str, resume: bool) -> Path:
    """A run's folder in ComfyUI's output folder: the latest of that name to go on, or a new one.

    Raises:
        LoHaError: a name that is not one.
    """
    if not re.fullmatch(r"[\w][\w .()+-]{0,99}", name) or name.endswith((".", " ")):
        raise LoHaError(f"name is {name!r}; expected letters, digits, spaces and any of _ - + . ( ), and no folder")
    if name in (Path(STATE).stem, Path(BEST).stem):
        raise LoHaError(f"name is {name!r}, as a run calls a file of its own; choose another name")
    root = Path(folder_paths.get_output_directory()) / FOLDER
    number, latest = 1, root / name
    while (latest / STATE).exists() and (root / f"{name}-{number + 1}" / STATE).exists():
        number += 1
        latest = root / f"{name}-{number}"
    if resume or not (latest / STATE).exists():
        return latest
    return root / f"{name}-{number + 1}"


class LoHaTrainer(io.ComfyNode):
    """MODEL, data, network, optimizer -> LOHA, and the model with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaTrainer",
            display_name="Train LoHa",
            search_aliases=["train lora", "lora training", "trainer", "fine-tune"],
            category="LoHa/train",
            description="Trains a LoHa on the connected model. Cancel keeps the state; resume goes on from there.",
            inputs=_inputs(),
            hidden=[io.Hidden.extra_pnginfo],
            outputs=[
                LOHA.Output(display_name="loha", tooltip="What was learnt, for Save LoHa, Apply LoHa or LoHa Info."),
                io.Model.Output(tooltip="The model with the LoHa at strength 1."),
                io.Clip.Output(tooltip="The text encoders with the LoHa at strength 1; empty if none were trained."),
                io.LossMap.Output(display_name="loss_map", tooltip="The loss of each step, for ComfyUI's Plot Loss."),
                io.Image.Output(display_name="loss_curve", tooltip="A picture of the loss, as the node shows it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return True if name is None else problems(lambda: run_folder(name, True))

    @classmethod
    def execute(
        cls, model: Any, clip: Any = None, name: str = "my_loha", resume: bool = True, **values: Any
    ) -> io.NodeOutput:
        *outputs, memory = train(cls.hidden, model, clip, name, resume, **values)
        return io.NodeOutput(*outputs, ui=ui.PreviewText(memory))


def train(
    hidden: Any, model: Any, clip: Any, name: str, resume: bool, **values: Any
) -> tuple[Adapter, Any, Any, dict[str, list[float]], torch.Tensor, str]:
    """A run of the node that is executed now, as the page is told of it.

    Args:
        hidden: the node's hidden inputs.
        values: the inputs of `training_run`.

    Returns:
        The adapter; the model and the text encoders with it; the losses as ComfyUI's LOSS_MAP, and their picture;
        what memory it took.
    """
    with torch.inference_mode(False):
        run, preview = training_run(model, clip, run_folder(name, resume), **values)
        workflow = monitor.workflow_id(getattr(hidden, "extra_pnginfo", None))
        adapter, losses = run.run(partial(Watcher, run, preview, workflow), resume=resume)
        model, clip, _ = modes.apply(model, clip, adapter, 1.0, 1.0)
    curve = charts.losses(f"Loss of {run.folder.name}", f"{len(losses)} steps", losses, run.validation_losses)
    logging.info("LoHa: %s\n%s", run.folder.name, run.memory_report)
    return adapter, model, clip, {"loss": losses}, curve, run.memory_report


def training_run(
    model: Any,
    clip: Any,
    folder: Path,
    dataset: Dataset,
    network: NetworkConfig,
    optimizer: OptimizerSettings | None = None,
    objective: Objective | None = None,
    loha: Adapter | None = None,
    vae: Any = None,
    steps: int = 500,
    epochs: int = 0,
    batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    mixed_precision: str = "bf16",
    training_seed: int = 0,
    gradient_checkpointing: bool = False,
    save_every: int = 100,
    preview_every: int = 0,
    preview_prompt: str = "",
    preview_steps: int = 20,
    preview_cfg: float = 5.0,
    blocks_to_swap: int = 0,
    validation_share: float = 0.0,
    validate_every: int = 50,
) -> tuple[TrainingRun, Preview]:
    """A run, and how to show it, from the node's inputs.

    Raises:
        LoHaError: a value out of its range, or previews without a VAE.
    """
    if preview_every and vae is None:
        raise LoHaError("preview_every needs the vae input, to decode what is shown; connect it or set it to 0")
    objective, validation = objective or Objective(), None
    if validation_share:
        dataset, held = held_out(dataset, validation_share, training_seed)
        validation = Validation(held, objective, batch_size, training_seed)
    sampler = BatchSampler(dataset, objective, batch_size, training_seed)
    settings = optimizer or optimizer_settings()
    config = TrainingConfig(
        steps=sampler.steps(epochs, gradient_accumulation_steps) if epochs else steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=training_seed,
        mixed_precision=choice("mixed_precision", mixed_precision, MIXED_PRECISION),
        save_every=save_every,
        preview_every=preview_every,
        validate_every=validate_every,
        **settings.training,
    )
    run = TrainingRun(
        model, clip, sampler, network, settings.optimizer, config, folder, loha, gradient_checkpointing, blocks_to_swap,
        validation,
    )  # fmt: skip
    prompts = [line.strip() for line in preview_prompt.splitlines() if line.strip()] or [""]
    return run, Preview(prompts, preview_steps, preview_cfg, vae)


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The diffusion model to train on. Its weights stay as they are."),
        LOHA_DATASET.Input("dataset", tooltip="From LoHa Dataset."),
        LOHA_CONFIG.Input("network", tooltip="From LoHa Network."),
        LOHA_OPTIMIZER.Input("optimizer", optional=True, tooltip="From LoHa Optimizer. Empty: AdamW at 0.001, cosine."),
        LOHA_OBJECTIVE.Input("objective", optional=True, tooltip="From LoHa Objective. Empty: uniform noise, MSE."),
        io.Clip.Input("clip", optional=True, tooltip="Connect the text encoders to train them, too."),
        io.Vae.Input("vae", optional=True, tooltip="To decode previews."),
        LOHA.Input("loha", optional=True, tooltip="An adapter to go on from, instead of beginning at zero."),
        io.String.Input("name", default="my_loha", tooltip="Names the run, its folder in output/loha, and its files."),
        number("steps", 500, "Optimizer steps.", 1),
        number("epochs", 0, "Passes over the data, instead of steps; 0: as many steps as given."),
        number("batch_size", 1, "Pictures at once.", 1, 4096),
        number("gradient_accumulation_steps", 1, "Batches per step: a larger batch in the same memory.", 1, 4096),
        one_of("mixed_precision", MIXED_PRECISION,
               "Of the computation; factors and optimizer are in fp32. On a CPU take fp32.", default="bf16"),
        number("training_seed", 0, "Of everything random: the same seed, the same LoHa.", 0, 0xFFFFFFFFFFFFFFFF),
        switch("gradient_checkpointing", "Much less memory for about a third more time."),
        number("save_every", 100, "Steps between saved states and files; 0: at the end and at Cancel only."),
        switch("resume", "Go on from the state that the run of this name left, if there is one.", default=True),
        number("preview_every", 0, "Steps between preview pictures; 0: none. Needs vae."),
        io.String.Input("preview_prompt", default="", multiline=True, optional=True,
                        tooltip="What previews show: a picture for each line."),
        number("preview_steps", 20, "Sampling steps of a preview.", 1, 1000, optional=True),
        number("preview_cfg", 5.0, "Guidance of a preview.", 0, 100, step=0.1, optional=True),
        number("blocks_to_swap", 0, "So many of the model's blocks fewer on the GPU: they wait in main memory "
               "and come one ahead. For models that do not fit. Needs gradient_checkpointing.", 0, 1000, optional=True),
        number("validation_share", 0.0, "Holds back this share of the pictures from training: the loss on them says "
               "when learning turns into memorising. The LoHa with the lowest is kept as best.safetensors. 0 is off.",
               0, 0.9, step=0.01, optional=True),
        number("validate_every", 50, "Steps between validations.", 1, optional=True),
    ]  # fmt: skip
