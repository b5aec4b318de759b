"""``loha train``: a folder of pictures, a diffusers model, and the Trainer; one process or many.

`accelerate launch -m loha_core train CONFIG.toml` shares each batch out among its processes.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...adapter import Adapter
from ...errors import LoHaError, about
from ...formats import metadata, save_adapter
from ...naming.names import flat
from ...naming.respell import respelled
from ..attach import fingerprint
from ..callbacks.tensorboard import TensorBoard
from ..config import TrainingConfig
from ..data.batches import prompts
from ..data.dataset import Dataset, Item
from ..data.folder import Entry, read_folder, without_caption
from ..data.pictures import Sizes, at_latent_size, fit
from ..data.validation import Validation, held_out
from ..digest import digest
from ..events import Event, Saved, Stepped, Stopped, Validated
from ..objectives import Objective
from ..optimizers import refuse_unmatched
from ..randomness import fork_rng
from ..state import STATE
from ..swap import waiting
from ..trainer import Trainer
from .pipeline import DTYPES, EXTRA, Diffusion, Feed, load_pipeline
from .placement import blocks_in, place, swapped, to_nf4_
from .preview import Previews
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
    entries, lows = _entries(settings), _lows(settings)
    held = read_folder(settings.root / settings.data.validation) if settings.data.validation else []
    board = TensorBoard(settings.root / settings.output.folder / "tensorboard") if settings.output.tensorboard else None
    diffusion = Diffusion(load_pipeline(settings.model, settings.root), accelerator.device, settings.model.stage)
    base = fingerprint(diffusion.model)
    if settings.model.quantisation:
        to_nf4_(diffusion.model, accelerator.device, DTYPES[settings.model.dtype])
    objective = diffusion.objective(settings.objective)
    objective = replace(objective, preservation=settings.preservation)
    dataset, validation = _data(settings, entries, lows, held, objective, diffusion)
    with fork_rng():
        torch.manual_seed(settings.training.seed)  # the first values of the factors
        networks = diffusion.networks(settings.network, settings.run.text_encoders)
    paths = [path for layers in networks.values() for path in layers]
    for name in ("rank_pattern", "alpha_pattern"):
        with about("[network]"):
            refuse_unmatched(name, getattr(settings.network, name), paths)
    blocks = blocks_in(diffusion.model, diffusion.family.checkpointed)
    wait = waiting(blocks, settings.run.blocks_to_swap) if settings.run.blocks_to_swap else []
    place(diffusion.model, networks["model"].values(), accelerator, wait)
    if settings.run.gradient_checkpointing and not wait:
        diffusion.enable_gradient_checkpointing()
    size = settings.run.batch_size // accelerator.num_processes
    places = range(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    feed = Feed(diffusion, dataset, objective, settings.run.batch_size, settings.training.seed, places)
    output = OutputWriter(settings, accelerator.is_main_process, diffusion.family.names)
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
        identity=_identity(settings, dataset, validation, objective, base),
        callbacks=[output],
        accelerator=accelerator,
        validate=partial(validation.loss, feed) if validation else None,
    )
    output.trainer = trainer
    output.check_names()
    layers = sum(map(len, networks.values()))
    where = "one process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    if settings.preview:
        shape = dataset.items[0].latent.shape[-2:]
        previews = Previews(diffusion, settings.preview, shape, output.folder, settings.output.name,
                            accelerator.is_main_process)  # fmt: skip
        # A sharded model runs in all processes or none.
        if accelerator.is_main_process or accelerator.distributed_type == "FSDP":
            trainer.callbacks = [*trainer.callbacks, previews]
    also = f" and {len(validation.dataset)} to validate with" if validation else ""
    output.say(f"{len(dataset)} pictures{also}, {layers} layers, {trainer.config.steps} steps on {where}")
    if settings.output.resume and trainer.resume():
        output.say(f"going on from step {trainer.step}")
    if board is not None and accelerator.is_main_process:
        board.going_on_from(trainer.step)
        trainer.callbacks = [*trainer.callbacks, board]
    with swapped(blocks, wait, accelerator.device, diffusion.strength) as swap:
        trainer.run()
    if swap is not None:
        output.say(f"block swap: {swap.counts.summary()}")
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


def _with_epochs(settings: Settings, feed: Feed) -> TrainingConfig:
    config, epochs = settings.training, settings.run.epochs
    config = replace(config, preview_every=settings.preview.every) if settings.preview else config
    return replace(config, steps=feed.sampler.steps(epochs, config.gradient_accumulation_steps)) if epochs else config


def _identity(
    settings: Settings, dataset: Dataset, validation: Validation | None, objective: Objective, base: str
) -> dict[str, str]:
    """What a resumed run must have in common with the run before."""
    described = {
        "network": settings.network.to_dict(),
        "objective": asdict(objective),
        "model": asdict(settings.model),
        # Where blocks wait changes nothing that is learned.
        "run": {k: v for k, v in asdict(replace(settings.run, epochs=0)).items() if k != "blocks_to_swap"},
    }
    hashes = {"data": dataset.fingerprint(), "base model": base}
    hashes |= {"validation": validation.fingerprint()} if validation else {}
    return hashes | {name: repr(value) for name, value in described.items()}


# --- data ---------------------------------------------------------------------------------------


def _entries(settings: Settings) -> dict[bool, list[Entry]]:
    """Pictures to learn (False) and for regularisation (True), looked at before anything large is loaded."""
    data, entries = settings.data, dict[bool, list[Entry]]()
    masks = settings.root / data.masks if data.masks else None
    if data.folder:
        entries[False] = read_folder(settings.root / data.folder, masks)
    if data.regularisation:
        entries[True] = read_folder(settings.root / data.regularisation)
    return entries


def _lows(settings: Settings) -> list[Entry]:
    """A picture slider's other ends."""
    return read_folder(settings.root / settings.slider.low) if settings.slider and settings.slider.low else []


def _data(
    settings: Settings,
    entries: Mapping[bool, list[Entry]],
    lows: list[Entry],
    held: list[Entry],
    objective: Objective,
    diffusion: Diffusion,
) -> tuple[Dataset, Validation | None]:
    """Pictures as latents, to train on and to validate with.

    Captions are encoded, unless text encoders are trained or there are too many.
    """
    sizes = _sizes(settings.sizes, diffusion.multiple)
    items = [
        _item(entry, regularisation, settings.data, sizes, diffusion)
        for regularisation, of_kind in entries.items()
        for entry in of_kind
    ]
    if settings.slider is None:
        dataset = Dataset(items, settings.captions, diffusion.encode)
    else:
        opposite = [_item(entry, False, settings.data, sizes, diffusion) for entry in lows]
        dataset = settings.slider.dataset(items, opposite, settings.captions, diffusion.encode, diffusion.latent)
    seed, validation, without_flip = settings.training.seed, None, replace(settings.data, flip=False)
    if held:
        items = [_item(entry, False, without_flip, sizes, diffusion) for entry in held]
        with about(f"[data]: validation {settings.data.validation!r}"):
            validation = Validation(Dataset(items, settings.captions), objective, settings.run.batch_size, seed)
    elif settings.data.validation_share:
        with about("[data]"):
            dataset, others = held_out(dataset, settings.data.validation_share, seed)
        validation = Validation(others, objective, settings.run.batch_size, seed)
    held_prompts = validation.prompts() if validation else []
    asked = [] if settings.run.text_encoders else [*prompts(dataset, objective), *held_prompts]
    for prompt in asked:
        dataset.encode(prompt)
    diffusion.put_away(text_encoders=bool(asked))
    return dataset, validation


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
    """Prints progress, and writes the adapter whenever the state is saved.

    Args:
        names: of the family's modules in a file, see `Family`.
    """

    trainer: Trainer

    def __init__(self, settings: Settings, is_main: bool, names: str) -> None:
        self.settings, self.is_main = settings, is_main
        self.names = names if settings.output.format == "lycoris" else "keep"
        self.folder = settings.root / settings.output.folder
        self.printed, self.started, self.first_step = 0.0, time.monotonic(), 0
        if is_main and not settings.output.resume:
            (self.folder / STATE).unlink(missing_ok=True)

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def path(self, mark: str = "") -> Path:
        """Where the adapter is written: at the end, or with a mark on the way."""
        o = self.settings.output
        name = o.name + mark
        return self.folder / (f"{name}.safetensors" if o.format == "lycoris" else name)

    def check_names(self) -> None:
        """Before anything is learned.

        Raises:
            LoHaError: layers that have no name in a file for this family's readers.
        """
        respelled(self._adapter(), self.names)

    def __call__(self, event: Event) -> None:
        match event:
            case Stepped():
                self._print_progress(event)
            case Saved():
                self._save("" if event.step == self.trainer.config.steps else f"-{event.step:06d}")
            case Validated():
                best = ", the lowest so far" if event.best else ""
                self.say(f"step {event.step}/{self.trainer.config.steps}  validation loss {event.loss:.4f}{best}")
                if event.best:
                    self._save("-best")
            case Stopped(reason=KeyboardInterrupt()):
                self.say(f"stopped at step {event.step}; the same command goes on from the state in {self.folder}")

    def _save(self, mark: str) -> None:
        if not self.is_main:
            return
        path, o = self.path(mark), self.settings.output
        save_adapter(self._adapter(), path, format=o.format, names=self.names, dtype=DTYPES[o.dtype])
        self.say(f"saved {path}")

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
        if self.settings.output.format == "lycoris" and self.names == "keep":
            layers = {_name_in_file(name): f for name, f in layers.items()}
        # Paths of modules, as in PEFT's folders: `save_adapter` turns them into the names of a file.
        entries = metadata.network(layers.values()) | self.trainer.metadata(self.settings.run.batch_size)
        return Adapter(layers, metadata=entries | {"ss_output_name": self.settings.output.name}, dialect="peft")


def _name_in_file(name: str) -> str:
    """The name in a single file of the module at a path in a pipeline, for families whose readers know diffusers'."""
    if name.startswith("transformer."):
        # Under lora_unet_ they expect the names of a transformer's original code.
        return "lora_transformer_" + flat(name.removeprefix("transformer."))
    # Newer versions of transformers have left out a step of CLIP's paths.
    return re.sub(r"^(text_encoder\w*\.)(encoder\.layers\.)", r"\1text_model.\2", name)
