"""Training in the graph."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import nn

from loha_core import Adapter, LoHaError, save_adapter
from loha_core.training.attach import attached, blocks_of, fingerprint, recomputing
from loha_core.training.data.dataset import Dataset, digest
from loha_core.training.objectives import Objective
from loha_core.training.trainer import (  # fmt: skip
    PRECISIONS,
    STATE,
    Event,
    PreviewDue,
    Saved,
    Stepped,
    Stopped,
    Trainer,
    TrainingConfig,
    own_randomness,
)

from ..host import live
from ..host import modes as bridge
from ..host import training as mutation
from ..host.diffusion import Diffusion, trainable_weights
from ..host.patches import CLIP, MODEL
from ..host.progress import ProgressBar
from ..page import charts, monitor
from .dataset import LOHA_DATASET
from .loader import LOHA
from .network import LOHA_CONFIG, NetworkConfig, build, check_start
from .optimizer import LOHA_OBJECTIVE, LOHA_OPTIMIZER, Optimizing, optimizing

FOLDER = "loha"  # of runs, in ComfyUI's output folder


@dataclass(frozen=True)
class Preview:
    """What to show while training."""

    every: int
    prompt: str
    steps: int
    cfg: float
    vae: Any


@dataclass
class Job:
    """One run: what goes in, in ComfyUI's own types."""

    model: Any
    dataset: Dataset
    network: NetworkConfig
    optimizing: Optimizing
    objective: Objective
    clip: Any
    start: Adapter | None
    steps: int
    epochs: int
    batch_size: int
    accumulation: int
    precision: str
    seed: int
    gradient_checkpointing: bool
    save_every: int
    preview: Preview
    folder: Path
    resume: bool
    workflow: str = ""  # the id of the page's
    losses: list[float] = field(default_factory=list)

    def run(self) -> Adapter:
        """Train; the model and the text encoders are afterwards as they were."""
        self._check()
        patchers = [_resident(self.model)]
        clip = None
        if self.clip is not None:
            clip = self.clip.clone()
            clip.patcher = _resident(self.clip.patcher)
            clip.cond_stage_model = clip.patcher.model
            patchers.append(clip.patcher)
        else:
            for caption in self.dataset.all_captions():  # before the model needs the memory
                self.dataset.encode(caption)
        modules = [patcher.model for patcher in patchers]
        comfy.model_management.load_models_gpu(patchers, memory_required=self._memory())
        base = fingerprint(modules[0].diffusion_model)
        diffusion = Diffusion(patchers[0], self.dataset, self.objective, self.batch_size, self.seed, clip)
        with _seeded(self.seed), trainable_weights(*modules):
            labels = {"model": MODEL, "text": CLIP}
            built = {
                name: build(patcher, label, self.network, self.start)
                for (name, label), patcher in zip(labels.items(), patchers, strict=False)
            }
            layers = [layer for found in built.values() for layer in found.values()]
            trainer = Trainer(
                built,
                diffusion.batch,
                diffusion.loss,
                self._config(diffusion),
                self.optimizing.optimizer,
                init=self.network.loha.init_weights,
                folder=self.folder,
                identity=self._identity(built, base),
            )
            if self.resume:
                trainer.resume()
            watcher = Watcher(self, trainer, patchers[0])
            trainer.callbacks = [watcher]
            again = self.gradient_checkpointing
            blocks = _blocks(modules[0].diffusion_model) + _text_blocks(*modules[1:])
            recomputed = recomputing(blocks if again else ())
            with attached(layers), mutation.allowed(blocks, again=again), recomputed:
                trainer.run()
            self.losses = trainer.losses
            return watcher.adapter()

    def _check(self) -> None:
        if self.preview.every and self.preview.vae is None:
            raise LoHaError("preview_every needs the vae input, to decode what is shown; connect it or set it to 0")
        if self.batch_size < 1:
            raise LoHaError(f"batch_size is {self.batch_size}; expected at least 1")
        if self.start is not None:
            check_start(self.start, self.model.model, None if self.clip is None else self.clip.cond_stage_model)
        if (acting := live.of(self.model)) and any(entry.schedule for entry in acting.entries):
            raise LoHaError(
                "the model carries a LoHa with a schedule, which has no single strength to train on top of; "
                "take the schedule or that LoHa away from the model input"
            )

    def _config(self, diffusion: Diffusion) -> TrainingConfig:
        steps = (
            ceil(self.epochs * diffusion.draws.order.steps_per_epoch / self.accumulation) if self.epochs else self.steps
        )
        o = self.optimizing
        return TrainingConfig(
            steps, self.accumulation, self.seed, self.precision, o.max_grad_norm, o.ema, o.max_norm, self.save_every,
            self.preview.every,
        )  # fmt: skip

    def _identity(self, built: dict[str, dict[str, Any]], base: str) -> dict[str, str]:
        """What a resumed run must have in common with the one before."""
        layers = [f"{name} {layer.weight_shape}" for found in built.values() for name, layer in found.items()]
        return {
            "data": self.dataset.fingerprint(),
            "layers": digest(layers),
            "network": repr(self.network),
            "objective": repr(self.objective),
            "batch size": repr(self.batch_size),
            "base model": base,
        }

    def _memory(self) -> float:
        """What a step needs beside the weights, roughly: sampling's need, for all that the backward keeps."""
        shape = self.dataset.items[0].latent.shape
        kept = 2 if self.gradient_checkpointing else 6
        return float(kept * self.model.memory_required([self.batch_size, *shape]))


class Watcher:
    """Shows how a run goes, keeps what it has learnt, and ends it when the user does."""

    def __init__(self, job: Job, trainer: Trainer, patcher: Any) -> None:
        self.job, self.trainer, self.patcher = job, trainer, patcher
        self.bar = ProgressBar(trainer.config.steps)
        self.record = monitor.begin(job.folder.name, job.workflow, trainer)

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped():
                self.record.stepped(event)
                self.bar.update_absolute(event.step)
            case PreviewDue():
                self._show(event.step)
            case Saved():
                done = event.step == self.trainer.config.steps
                name = f"{self.job.folder.name}.safetensors" if done else f"step_{event.step:06d}.safetensors"
                save_adapter(self.adapter(), self.job.folder / name)
            case Stopped():
                self.record.ended(type(event.reason).__name__)

    def adapter(self) -> Adapter:
        """What has been learnt by now."""
        layers = {name: f for found in self.trainer.factors().values() for name, f in found.items()}
        return Adapter(layers, metadata=self._metadata(), source=self.job.folder.name)

    def _metadata(self) -> dict[str, str]:
        job, trainer = self.job, self.trainer
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": json.dumps({"algo": "loha", "conv_dim": job.network.conv_rank}),
            "ss_learning_rate": f"{job.optimizing.optimizer.lr:g}",
            "ss_optimizer": job.optimizing.optimizer.name,
            "ss_lr_scheduler": job.optimizing.optimizer.schedule,
            "ss_max_train_steps": str(trainer.config.steps),
            "ss_steps": str(trainer.step),
            "ss_total_batch_size": str(job.batch_size * job.accumulation),
            "ss_num_train_images": str(len(job.dataset)),
            "ss_seed": str(job.seed),
            "ss_output_name": job.folder.name,
            "ss_tag_frequency": json.dumps({"loha": _frequency(job.dataset)}),
        }

    def _show(self, step: int) -> None:
        """A picture of what has been learnt, by ComfyUI's own sampler."""
        job, preview = self.job, self.job.preview
        item = job.dataset.items[0]
        positive, negative = _preview_conditioning(job, preview.prompt, item), _preview_conditioning(job, "", item)
        with torch.no_grad():
            shape = (1, *item.latent.shape)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
            latent = comfy.sample.sample(
                self.patcher, noise, preview.steps, preview.cfg, "euler", "normal", positive, negative,
                torch.zeros(shape), seed=job.seed, disable_pbar=True,
            )  # fmt: skip
            pictures = preview.vae.decode(latent)
        picture = pictures.reshape(-1, *pictures.shape[-3:])[0].clamp(0, 1)
        image = Image.fromarray((picture.float().cpu().numpy() * 255).round().astype(np.uint8))
        job.folder.mkdir(parents=True, exist_ok=True)
        image.save(job.folder / f"preview_{step:06d}.png")
        self.record.previewed(step)
        self.bar.update_absolute(step, preview=("JPEG", image.convert("RGB"), 512))
        comfy.model_management.load_models_gpu([self.patcher], memory_required=job._memory())


def _resident(patcher: Any) -> Any:
    """A clone whose weights stay where autograd keeps them: newer ComfyUI's dynamic VRAM gives their pages to others.

    Raises:
        LoHaError: the model's loader cannot give it without.
    """
    if not getattr(patcher, "is_dynamic", bool)():
        return patcher.clone()
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise LoHaError(
            f"this model cannot be trained in dynamic VRAM, and its loader cannot give it otherwise ({error}); "
            "load it by one of ComfyUI's own loaders, or start ComfyUI with --disable-dynamic-vram"
        ) from error


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is recomputed: a model's blocks; of a U-Net's sequences their members, which ComfyUI runs one by one."""
    found = blocks_of(model)
    parts = (part for block in found for part in (block if isinstance(block, nn.Sequential) else [block]))
    return [part for part in parts if any(True for _ in part.children())]


def _text_blocks(*encoders: nn.Module) -> list[nn.Module]:
    """Text encoders have theirs deeper within."""
    lists = [part for encoder in encoders for part in encoder.modules() if isinstance(part, nn.ModuleList)]
    return [block for entries in lists for block in entries]


def _preview_conditioning(job: Job, prompt: str, item: Any) -> Any:
    with torch.no_grad():
        if job.clip is not None:
            return job.clip.encode_from_tokens_scheduled(job.clip.tokenize(prompt))
        if item.conditioning is not None:
            return item.conditioning if prompt or not isinstance(item.conditioning, list) else _blank(item.conditioning)
        return job.dataset.encode(prompt)


def _blank(conditioning: Any) -> Any:
    """As ComfyUI's ConditioningZeroOut does."""
    return [
        [torch.zeros_like(t), {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in o.items()}]
        for t, o in conditioning
    ]


def _frequency(dataset: Dataset) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in dataset.items:
        for tag in filter(None, map(str.strip, item.caption.split(","))):
            found[tag] = found.get(tag, 0) + item.repeats
    return found


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The factors' first values follow from the seed; randomness outside is left alone."""
    with own_randomness():
        torch.manual_seed(seed & 0xFFFFFFFFFFFFFFFF)
        yield


def run_folder(name: str, resume: bool) -> Path:
    """A run's folder in ComfyUI's output folder: the latest of that name to go on, or a new one.

    Raises:
        LoHaError: a name that is not one.
    """
    if not re.fullmatch(r"[\w][\w .()+-]{0,99}", name) or name.endswith((".", " ")):
        raise LoHaError(f"name is {name!r}; expected letters, digits, spaces and any of _ - + . ( ), and no folder")
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
        return io.Schema(
            node_id="LoHaTrainer",
            display_name="Train LoHa",
            category="LoHa/train",
            description="Trains a LoHa on the connected model. Cancel keeps the state; resume goes on from there.",
            inputs=_inputs(),
            hidden=[io.Hidden.extra_pnginfo],
            outputs=[
                LOHA.Output(display_name="loha", tooltip="What was learnt, for Save LoHa, Apply LoHa or LoHa Info."),
                io.Model.Output(tooltip="The model with the LoHa at strength 1."),
                io.Clip.Output(tooltip="The text encoders with the LoHa at strength 1; empty if none were trained."),
                io.LossMap.Output(display_name="loss_map", tooltip="The loss of each step, for ComfyUI's Plot Loss."),
                io.Image.Output(display_name="loss_curve", tooltip="The picture of the loss that the node shows."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any = None, name: str = "my_loha", resume: bool = True, **values: Any
    ) -> io.NodeOutput:
        with torch.inference_mode(False):
            folder, workflow = run_folder(name, resume), _workflow(cls.hidden)
            job = _job(model, clip, folder, resume, workflow=workflow, **values)
            adapter = job.run()
            trained = bridge.apply(model, clip, adapter, 1.0, 1.0)
        curve = charts.losses(f"Loss of {job.folder.name}", f"{len(job.losses)} steps", job.losses)
        return io.NodeOutput(
            adapter, trained[0], trained[1], {"loss": job.losses}, curve, ui=ui.PreviewImage(curve, cls=cls)
        )


def _workflow(hidden: Any) -> str:
    """The id of the workflow that the page sent along; a prompt by the API may have none, or anything."""
    sent = getattr(hidden, "extra_pnginfo", None)
    workflow = sent.get("workflow") if isinstance(sent, dict) else None
    return str(workflow.get("id", "")) if isinstance(workflow, dict) else ""


def _job(
    model: Any,
    clip: Any,
    folder: Path,
    resume: bool,
    dataset: Dataset,
    network: NetworkConfig,
    optimizer: Optimizing | None = None,
    objective: Objective | None = None,
    loha: Adapter | None = None,
    preview_every: int = 0,
    preview_prompt: str = "",
    preview_steps: int = 20,
    preview_cfg: float = 5.0,
    vae: Any = None,
    training_seed: int = 0,
    **values: Any,
) -> Job:
    preview = Preview(preview_every, preview_prompt, preview_steps, preview_cfg, vae)
    return Job(
        model=model, clip=clip, dataset=dataset, network=network, optimizing=optimizer or optimizing(),
        objective=objective or Objective(), start=loha, preview=preview, folder=folder, resume=resume,
        seed=training_seed, **values,
    )  # fmt: skip


def _whole(name: str, default: int, least: int, tooltip: str, **options: Any) -> Any:
    return io.Int.Input(name, default=default, min=least, max=options.pop("max", 1_000_000), tooltip=tooltip, **options)


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
        _whole("steps", 500, 1, "Optimizer steps."),
        _whole("epochs", 0, 0, "Passes over the data, instead of steps; 0: as many steps as given."),
        _whole("batch_size", 1, 1, "Pictures at once.", max=4096),
        _whole("accumulation", 1, 1, "Batches per step: a larger batch in the same memory.", max=4096),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="bf16",
            tooltip="Of the computation; factors and optimizer are in fp32. On a CPU take fp32.",
        ),
        _whole("training_seed", 0, 0, "Of everything random: the same seed, the same LoHa.", max=0xFFFFFFFFFFFFFFFF),
        io.Boolean.Input(
            "gradient_checkpointing", default=False, tooltip="Much less memory for about a third more time."
        ),
        _whole("save_every", 100, 0, "Steps between saved states and files; 0: at the end and at Cancel only."),
        io.Boolean.Input(
            "resume", default=True, tooltip="Go on from the state that the run of this name left, if there is one."
        ),
        _whole("preview_every", 0, 0, "Steps between preview pictures; 0: none. Needs vae."),
        io.String.Input("preview_prompt", default="", multiline=True, optional=True, tooltip="What previews show."),
        _whole("preview_steps", 20, 1, "Sampling steps of a preview.", max=1000, optional=True),
        io.Float.Input(
            "preview_cfg", default=5.0, min=0.0, max=100.0, step=0.1, optional=True, tooltip="Guidance of a preview."
        ),
    ]  # fmt: skip
