"""``loha train``: a folder of pictures, a diffusers model, and the Trainer; one process or many.

`accelerate launch -m loha_core train CONFIG.toml` shares each batch out among its processes.
"""

from __future__ import annotations

import math
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
from ...errors import LoHaError
from ...formats import save_adapter
from ...naming.names import flat
from ...tuner.layer import LoHaLayer
from ..attach import fingerprint
from ..data.dataset import Dataset, Item, digest
from ..data.folder import Entry, read_folder, without_caption
from ..data.pictures import Sizes, at_latent_size, fit
from ..objectives import Objective
from ..trainer import STATE, Event, Saved, Stepped, Stopped, Trainer, own_randomness
from .pipeline import DTYPES, EXTRA, Diffusion, Feed, load_pipeline
from .settings import DataSettings, Settings, read_settings

# Seconds between two lines about how it goes.
EVERY = 10.0


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
    with own_randomness():
        torch.manual_seed(settings.training.seed)  # the first values of the factors
        networks = diffusion.networks(settings.network, settings.run.text_encoders)
    _place(diffusion.model, networks["model"].values(), accelerator)
    if settings.run.gradient_checkpointing:
        diffusion.model.enable_gradient_checkpointing()
    share = settings.run.batch_size // accelerator.num_processes
    places = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    feed = Feed(diffusion, dataset, objective, settings.run.batch_size, settings.training.seed, places)
    output = Output(settings, accelerator.is_main_process)
    for found in entries.values() if not settings.data.captions().trigger else ():
        if note := without_caption(found):
            output.say(f"note: {note}")
    trainer = Trainer(
        networks,
        feed.batch,
        feed.loss,
        _steps(settings, feed),
        settings.optimizer,
        init=settings.network.init_weights,
        folder=output.folder,
        identity=_identity(settings, dataset, objective, base),
        callbacks=[output],
        accelerator=accelerator,
    )
    output.trainer = trainer
    layers = sum(len(found) for found in networks.values())
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
    # Left to itself it takes processes without a GPU for runs of their own. Precision is said in [training].
    accelerator = accelerate.Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    if accelerator.distributed_type == "FSDP":
        if not accelerator.is_fsdp2:
            raise LoHaError("the first version of FSDP cannot shard a frozen model; launch with --fsdp_version 2")
        # Else transformers gives text encoders, which stay whole, to the first process only.
        accelerate.utils.disable_fsdp_ram_efficient_loading()
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    if batch_size % accelerator.num_processes:
        raise LoHaError(
            f"[training] batch_size is {batch_size}, for all {accelerator.num_processes} processes together: "
            f"make it a multiple of {accelerator.num_processes}"
        )
    return accelerator


def _place(model: Any, layers: Iterable[LoHaLayer], accelerator: Any) -> None:
    """On this process's device; under FSDP its share of the frozen weights, and all of the factors."""
    if accelerator.distributed_type != "FSDP":
        model.to(accelerator.device)
        return
    from accelerate.utils import fsdp2_prepare_model

    whole = [part for layer in layers for part in layer.children() if isinstance(part, nn.ParameterDict)]
    for part in whole:
        part.to(accelerator.device)
    accelerator.state.fsdp_plugin.ignored_modules = whole
    fsdp2_prepare_model(accelerator, model)


def _steps(settings: Settings, feed: Feed) -> Any:
    if not settings.run.epochs:
        return settings.training
    batches = settings.run.epochs * feed.draws.order.steps_per_epoch
    return replace(settings.training, steps=math.ceil(batches / settings.training.accumulation))


def _identity(settings: Settings, dataset: Dataset, objective: Objective, base: str) -> dict[str, str]:
    """What a run that goes on must have in common with what it began as."""
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
    found = {False: read_folder(settings.root / data.folder, masks)}
    if data.regularisation:
        found[True] = read_folder(settings.root / data.regularisation)
    return found


def _dataset(settings: Settings, entries: Mapping[bool, list[Entry]], diffusion: Diffusion) -> Dataset:
    """Pictures as latents, and captions encoded, unless text encoders are trained or there are too many."""
    data = settings.data
    sizes = _sizes(data, diffusion.multiple)
    items = [
        _item(entry, regularisation, data, sizes, diffusion)
        for regularisation, found in entries.items()
        for entry in found
    ]
    dataset = Dataset(items, data.captions(), diffusion.encode)
    captions = [] if settings.run.text_encoders else dataset.all_captions()
    for caption in captions:
        dataset.encode(caption)
    diffusion.put_away(text_encoders=bool(captions))
    return dataset


def _sizes(data: DataSettings, multiple: int) -> Sizes:
    if not data.resolution:
        return Sizes(0, multiple)
    if data.step % multiple:
        raise LoHaError(f"[data] step is {data.step}; for this model, use a multiple of {multiple}")
    return Sizes(data.resolution, data.step, data.aspect_buckets)


def _item(entry: Entry, regularisation: bool, data: DataSettings, sizes: Sizes, diffusion: Diffusion) -> Item:
    picture, mask = entry.load()
    try:
        size = sizes.of(*picture.shape[:2])
    except LoHaError as error:
        raise LoHaError(f"{entry.path}: {error}; take it out, or set a resolution to enlarge it") from None
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


# --- what comes out -----------------------------------------------------------------------------


class Output:
    """Says how it goes, and writes the adapter whenever the state is saved."""

    trainer: Trainer

    def __init__(self, settings: Settings, is_main: bool) -> None:
        self.settings, self.is_main = settings, is_main
        self.folder = settings.root / settings.output.folder
        self.said, self.began, self.first = 0.0, time.monotonic(), 0
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
                self._tell(event)
            case Saved():
                path = self.path(None if event.step == self.trainer.config.steps else event.step)
                o = self.settings.output
                save_adapter(self._adapter(), path, format=o.format, dtype=DTYPES[o.dtype])
                self.say(f"saved {path}")
            case Stopped(reason=KeyboardInterrupt()):
                self.say(f"stopped at step {event.step}; the same command goes on from the state in {self.folder}")

    def _tell(self, event: Stepped) -> None:
        now = time.monotonic()
        self.first = self.first or event.step
        if now - self.said < EVERY and event.step != event.steps:
            return
        left = (event.steps - event.step) * (now - self.began) / (event.step - self.first + 1)
        self.said = now
        self.say(f"step {event.step}/{event.steps}  loss {event.loss:.4f}  lr {event.lr:.3g}  {left:.0f} s left")

    def _adapter(self) -> Adapter:
        found = {name: f for layers in self.trainer.factors().values() for name, f in layers.items()}
        if self.settings.output.format == "lycoris":
            found = {_spelled(name): f for name, f in found.items()}
        # Modules' own names, as in PEFT's folders: they get those of a file when one is written.
        return Adapter(found, metadata=self._metadata(), dialect="peft")

    def _metadata(self) -> dict[str, str]:
        s = self.settings
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": '{"algo": "loha"}',
            "ss_learning_rate": f"{s.optimizer.lr:g}",
            "ss_optimizer": s.optimizer.name,
            "ss_lr_scheduler": s.optimizer.schedule,
            "ss_max_train_steps": str(self.trainer.config.steps),
            "ss_steps": str(self.trainer.step),
            "ss_total_batch_size": str(s.run.batch_size * s.training.accumulation),
            "ss_seed": str(s.training.seed),
            "ss_output_name": s.output.name,
        }


def _spelled(name: str) -> str:
    """A module's path in a pipeline, as readers of single files know it."""
    if name.startswith("transformer."):
        # Under lora_unet_ they expect the names of a transformer's original code.
        return "lora_transformer_" + flat(name.removeprefix("transformer."))
    # Newer versions of transformers have left out a step of CLIP's paths.
    return re.sub(r"^(text_encoder\w*\.)(encoder\.layers\.)", r"\1text_model.\2", name)
