"""``loha train``: a folder of pictures, a diffusers model, and the Trainer; one process or many.

`accelerate launch -m loha_core train CONFIG.toml` shares each batch out among its processes.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...adapter import Adapter
from ...errors import LoHaError, about
from ...formats import metadata, save_adapter
from ...naming.names import flat
from ...tuner.layer import LoHaLayer
from ..attach import fingerprint
from ..config import TrainingConfig
from ..data.dataset import Dataset, Item
from ..data.folder import Entry, read_folder, without_caption
from ..data.pictures import Sizes, at_latent_size, fit
from ..digest import digest
from ..events import Event, Saved, Stepped, Stopped
from ..objectives import Objective
from ..randomness import fork_rng
from ..state import STATE
from ..trainer import Trainer
from .pipeline import DTYPES, EXTRA, Diffusion, Feed, load_pipeline
from .settings import DataSettings, Settings, read_settings

PRINT_INTERVAL = 10.0  # seconds between two lines of progress


def train(path: Path) -> Path:
    """Train what a configuration file says; go on if a run of it was cut off.

    Returns:
        The adapter's file or folder.

    Raises:
        LoHaError: something in the file, the data or the model is not as it must be, or the run diverged.
        KeyboardInterrupt: the state is saved; the same command goes on.
    """
    settings = read_settings(path)
    accelerator = _accelerator(settings.run.batch_size)
    entries = _entries(settings)
    diffusion = Diffusion(load_pipeline(settings.model, settings.root), accelerator.device)
    base = fingerprint(diffusion.model)
    objective = settings.objective or Objective(
        timesteps="logit-normal" if diffusion.noising.prediction == "flow" else "uniform"
    )
    dataset = _dataset(settings, entries, diffusion)
    with fork_rng():
        torch.manual_seed(settings.training.seed)  # the first values of the factors
        networks = diffusion.networks(settings.network, settings.run.text_encoders)
    _place(diffusion.model, networks["model"].values(), accelerator)
    if settings.run.gradient_checkpointing:
        diffusion.model.enable_gradient_checkpointing()
    size = settings.run.batch_size // accelerator.num_processes
    places = range(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    feed = Feed(diffusion, dataset, objective, settings.run.batch_size, settings.training.seed, places)
    output = OutputWriter(settings, accelerator.is_main_process)
    for pictures in entries.values() if not settings.captions.trigger else ():
        if note := without_caption(pictures):
            output.say(f"note: {note}")
    trainer = Trainer(
        networks,
        feed.batch,
        feed.loss,
        _with_epochs(settings, feed),
        settings.optimizer,
        init=settings.network.init_weights,
        folder=output.folder,
        identity=_identity(settings, dataset, objective, base),
        callbacks=[output],
        accelerator=accelerator,
    )
    output.trainer = trainer
    layers = sum(map(len, networks.values()))
    where = "one process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    output.say(f"{len(dataset)} pictures, {layers} layers, {trainer.config.steps} steps on {where}")
    if settings.output.resume and trainer.resume():
        output.say(f"going on from step {trainer.step}")
    trainer.run()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output.path()


def _accelerator(batch_size: int) -> Any:
    try:
        import accelerate
    except ImportError:
        raise LoHaError(f"training on the command line needs accelerate: {EXTRA}") from None
    # By default it takes processes without a GPU for independent runs. `TrainingConfig` has the mixed precision.
    accelerator = accelerate.Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    if accelerator.distributed_type == "FSDP":
        if not accelerator.is_fsdp2:
            raise LoHaError("the first version of FSDP cannot shard a frozen model; launch with --fsdp_version 2")
        # Else transformers loads text encoders, which are not sharded, in the first process only.
        accelerate.utils.disable_fsdp_ram_efficient_loading()
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    if batch_size % accelerator.num_processes:
        raise LoHaError(
            f"[training] batch_size is {batch_size}, for all {accelerator.num_processes} processes together: "
            f"make it a multiple of {accelerator.num_processes}"
        )
    return accelerator


def _place(model: Any, layers: Iterable[LoHaLayer], accelerator: Any) -> None:
    """Move to this process's device; under FSDP its part of the frozen weights, and all of the factors."""
    if accelerator.distributed_type != "FSDP":
        model.to(accelerator.device)
        return
    from accelerate.utils import fsdp2_prepare_model

    factors = [part for layer in layers for part in layer.children() if isinstance(part, nn.ParameterDict)]
    for part in factors:
        part.to(accelerator.device)
    accelerator.state.fsdp_plugin.ignored_modules = factors
    fsdp2_prepare_model(accelerator, model)


def _with_epochs(settings: Settings, feed: Feed) -> TrainingConfig:
    config, epochs = settings.training, settings.run.epochs
    return replace(config, steps=feed.sampler.steps(epochs, config.gradient_accumulation_steps)) if epochs else config


def _identity(settings: Settings, dataset: Dataset, objective: Objective, base: str) -> dict[str, str]:
    """What a resumed run must have in common with the run before."""
    described = {
        "network": settings.network.to_dict(),
        "objective": asdict(objective),
        "model": asdict(settings.model),
        "run": asdict(replace(settings.run, epochs=0)),
    }
    hashes = {"data": dataset.fingerprint(), "base model": base}
    return hashes | {name: repr(value) for name, value in described.items()}


# --- data ---------------------------------------------------------------------------------------


def _entries(settings: Settings) -> dict[bool, list[Entry]]:
    """Pictures to learn (False) and for regularisation (True), looked at before anything large is loaded."""
    data = settings.data
    masks = settings.root / data.masks if data.masks else None
    entries = {False: read_folder(settings.root / data.folder, masks)}
    if data.regularisation:
        entries[True] = read_folder(settings.root / data.regularisation)
    return entries


def _dataset(settings: Settings, entries: Mapping[bool, list[Entry]], diffusion: Diffusion) -> Dataset:
    """Pictures as latents, and captions encoded, unless text encoders are trained or there are too many."""
    sizes = _sizes(settings.sizes, diffusion.multiple)
    items = [
        _item(entry, regularisation, settings.data, sizes, diffusion)
        for regularisation, of_kind in entries.items()
        for entry in of_kind
    ]
    dataset = Dataset(items, settings.captions, diffusion.encode)
    captions = [] if settings.run.text_encoders else dataset.all_captions()
    for caption in captions:
        dataset.encode(caption)
    diffusion.put_away(text_encoders=bool(captions))
    return dataset


def _sizes(sizes: Sizes, multiple: int) -> Sizes:
    if not sizes.resolution:
        return Sizes(0, multiple)
    if sizes.step % multiple:
        raise LoHaError(f"[data]: step is {sizes.step}; for this model, use a multiple of {multiple}")
    return sizes


def _item(entry: Entry, regularisation: bool, data: DataSettings, sizes: Sizes, diffusion: Diffusion) -> Item:
    picture, mask = entry.load()
    with about(entry.path):
        size = sizes.of(*picture.shape[:2])
    enlarge = sizes.resolution > 0
    picture = fit(picture, size, enlarge=enlarge)
    latent = diffusion.latent(picture)
    if mask is not None:
        mask = at_latent_size(fit(mask, size, enlarge=enlarge), *latent.shape[-2:])
    return Item(
        latent=latent,
        caption=entry.caption,
        flipped=diffusion.latent(picture.flip(1)) if data.flip else None,
        mask=mask,
        weight=data.regularisation_weight if regularisation else 1.0,
        regularisation=regularisation,
        repeats=entry.repeats * (1 if regularisation else data.repeats),
        name=entry.name,
        source=digest(picture),
    )


# --- output -------------------------------------------------------------------------------------


class OutputWriter:
    """Prints progress, and writes the adapter whenever the state is saved."""

    trainer: Trainer

    def __init__(self, settings: Settings, is_main: bool) -> None:
        self.settings, self.is_main = settings, is_main
        self.folder = settings.root / settings.output.folder
        self.printed, self.started, self.first_step = 0.0, time.monotonic(), 0
        if is_main and not settings.output.resume:
            (self.folder / STATE).unlink(missing_ok=True)

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def path(self, step: int | None = None) -> Path:
        """Where the adapter is written: at the end, or at a step on the way."""
        o = self.settings.output
        name = o.name if step is None else f"{o.name}-{step:06d}"
        return self.folder / (f"{name}.safetensors" if o.format == "lycoris" else name)

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped():
                self._print_progress(event)
            case Saved():
                path = self.path(None if event.step == self.trainer.config.steps else event.step)
                o = self.settings.output
                save_adapter(self._adapter(), path, format=o.format, dtype=DTYPES[o.dtype])
                self.say(f"saved {path}")
            case Stopped(reason=KeyboardInterrupt()):
                self.say(f"stopped at step {event.step}; the same command goes on from the state in {self.folder}")

    def _print_progress(self, event: Stepped) -> None:
        now = time.monotonic()
        self.first_step = self.first_step or event.step
        if now - self.printed < PRINT_INTERVAL and event.step != event.steps:
            return
        left = (event.steps - event.step) * (now - self.started) / (event.step - self.first_step + 1)
        self.printed = now
        self.say(f"step {event.step}/{event.steps}  loss {event.loss:.4f}  lr {event.lr:.3g}  {left:.0f} s left")

    def _adapter(self) -> Adapter:
        layers = {name: f for network in self.trainer.factors().values() for name, f in network.items()}
        if self.settings.output.format == "lycoris":
            layers = {_name_in_file(name): f for name, f in layers.items()}
        # Paths of modules, as in PEFT's folders: `save_adapter` turns them into the names of a file.
        entries = metadata.network(layers.values()) | self.trainer.metadata(self.settings.run.batch_size)
        return Adapter(layers, metadata=entries | {"ss_output_name": self.settings.output.name}, dialect="peft")


def _name_in_file(name: str) -> str:
    """The name in a single file of the module at a path in a pipeline."""
    if name.startswith("transformer."):
        # Under lora_unet_ they expect the names of a transformer's original code.
        return "lora_transformer_" + flat(name.removeprefix("transformer."))
    # Newer versions of transformers have left out a step of CLIP's paths.
    return re.sub(r"^(text_encoder\w*\.)(encoder\.layers\.)", r"\1text_model.\2", name)
