"""A training run on ComfyUI's models, which are afterwards as they were."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import nn

from loha_core import Adapter, LoHaError, save_adapter
from loha_core.formats import metadata
from loha_core.naming.patterns import get_pattern_key
from loha_core.training.attach import attached, blocks_of, fingerprint, recomputing
from loha_core.training.config import TrainingConfig
from loha_core.training.data.batches import BatchSampler, prompts
from loha_core.training.data.dataset import Dataset
from loha_core.training.data.validation import Validation
from loha_core.training.digest import digest
from loha_core.training.events import Callback, Event, Saved, Validated
from loha_core.training.losses.strength import Strength
from loha_core.training.optimizers import OptimizerConfig, refuse_unmatched
from loha_core.training.randomness import fork_rng
from loha_core.training.trainer import Trainer

from .autograd import in_place_allowed, quantised_weights_movable, trainable_weights
from .diffusion import Diffusion
from .frozen import weights_made_twice
from .injection import live_of
from .layers import NetworkConfig, build, check_start, names_of
from .patches import CLIP, MODEL
from .placement import Placement, check_swap

BEST = "best.safetensors"


@dataclass
class TrainingRun:
    """One run.

    Attributes:
        model: a patcher of the diffusion model.
        clip: text encoders, if they are trained too.
        sampler: the batches, and with them the dataset and the objective.
        network: which layers are trained.
        optimizer, config: see there.
        folder: for the state and the adapters; its name is the run's.
        start: an adapter to go on from, instead of beginning at zero.
        gradient_checkpointing: run the model's blocks again in the backward instead of keeping their activations.
        blocks_to_swap: so many of the diffusion model's blocks fewer on the device; see `Placement`.
        validation: held-out pictures, if there are any.
        memory_report: after the run, what it took.
        validation_losses: after the run, as the trainer has them.
    """

    model: Any
    clip: Any
    sampler: BatchSampler
    network: NetworkConfig
    optimizer: OptimizerConfig
    config: TrainingConfig
    folder: Path
    start: Adapter | None = None
    gradient_checkpointing: bool = False
    blocks_to_swap: int = 0
    validation: Validation | None = None
    memory_report: str = field(init=False, default="")
    validation_losses: list[tuple[int, float]] = field(init=False, default_factory=list)

    def run(self, watch: Callable[[Trainer, Any], Callback], *, resume: bool) -> tuple[Adapter, list[float]]:
        """Train; the adapter, and the loss of each step.

        Args:
            watch: (trainer, loaded model's patcher) -> what gets the trainer's events.
            resume: go on from the state in ``folder``, if there is one.

        Raises:
            LoHaError: the model, the dataset, the adapter or the state do not fit together, or the loss diverges.
        """
        self._check()
        patchers, clip = self._resident()
        if clip is None:  # encode before the model needs the memory
            held_prompts = self.validation.prompts() if self.validation else []
            for prompt in [*prompts(self.sampler.dataset, self.sampler.objective), *held_prompts]:
                self.sampler.dataset.encode(prompt)
        with quantised_weights_movable(*(patcher.model for patcher in patchers)):
            return self._trained(patchers, clip, watch, resume)

    def _trained(
        self, patchers: list[Any], clip: Any, watch: Callable[[Trainer, Any], Callback], resume: bool
    ) -> tuple[Adapter, list[float]]:
        with torch.no_grad():  # merging what is on the model already
            comfy.model_management.load_models_gpu(patchers, memory_required=self.memory())
        modules = [patcher.model for patcher in patchers]
        base, inner = fingerprint(modules[0].diffusion_model), inner_blocks(modules[0].diffusion_model)
        with _seeded(self.config.seed), trainable_weights(*modules):
            placement = Placement(patchers[0], inner, self.blocks_to_swap)
            networks = {
                name: build(patcher, label, self.network, self.start)
                for name, label, patcher in zip(("model", "text"), (MODEL, CLIP), patchers, strict=False)
            }
            strength = Strength(layer for layers in networks.values() for layer in layers.values())
            diffusion = Diffusion(patchers[0], self.sampler, clip, strength)
            trainer = Trainer(
                networks, diffusion.batch, diffusion.loss, self.config, self._optimizer(patchers),
                init=self.network.loha.init_weights, folder=self.folder, identity=self._identity(networks, base),
                validate=partial(self.validation.loss, diffusion) if self.validation else None,
            )  # fmt: skip
            if resume:
                trainer.resume()
            trainer.callbacks = [placement.around_previews(watch(trainer, patchers[0])), self._saver(trainer)]
            recomputed, blocks = self.gradient_checkpointing, inner + _text_blocks(*modules[1:])
            with (
                attached(strength.layers),
                weights_made_twice(modules, strength.layers),
                in_place_allowed(blocks, recomputed=recomputed),
                placement.swapping(),
                recomputing(blocks if recomputed else (), strength),
            ):
                trainer.run()
            self.validation_losses = trainer.validation
            self.memory_report = placement.memory_report(modules, trainer)
            return self._adapter(trainer), trainer.losses

    def memory(self) -> float:
        """Bytes that a step needs beside the weights, roughly: sampling's need, for all activations that are kept."""
        shape = self.sampler.dataset.items[0].latent.shape
        kept = 2 if self.gradient_checkpointing else 6
        return float(kept * self.model.memory_required([self.sampler.order.batch_size, *shape]))

    def _check(self) -> None:
        if self.start is not None:
            check_start(self.start, self.model.model, None if self.clip is None else self.clip.cond_stage_model)
        blocks = inner_blocks(self.model.model.diffusion_model)
        check_swap(self.blocks_to_swap, blocks, recomputed=self.gradient_checkpointing)
        updates = live.updates if (live := live_of(self.model)) else ()
        if any(update.schedule or update.varies for update in updates):
            raise LoHaError(
                "the model carries a LoHa with a schedule, a region or a strength for each picture, which has no "
                "single strength to train on top of; take that, or the LoHa, away from the model input"
            )

    def _resident(self) -> tuple[list[Any], Any]:
        """Clones to train on: the patchers, and the text encoders with the second of them."""
        if self.clip is None:
            return [resident(self.model)], None
        clip = self.clip.clone()
        clip.patcher = resident(self.clip.patcher)
        clip.cond_stage_model = clip.patcher.model
        return [resident(self.model), clip.patcher], clip

    def _optimizer(self, patchers: list[Any]) -> OptimizerConfig:
        """With the learning rates of the network's patterns, by the layers' names in files.

        Raises:
            LoHaError: a pattern that has no effect on any layer.
        """
        named = {
            path: name
            for label, patcher in zip((MODEL, CLIP), patchers, strict=False)
            for path, name in names_of(patcher, label, self.network).items()
        }
        rates, loha = self.network.lr_pattern, self.network.loha
        for patterns in (loha.rank_pattern, loha.alpha_pattern, rates):
            refuse_unmatched("the network's patterns", patterns, list(named))
        keys = {name: get_pattern_key(rates, path) for path, name in named.items()} if rates else {}
        by_name = {re.escape(name): rates[key] for name, key in keys.items() if key in rates}
        return replace(self.optimizer, lr_pattern=by_name)

    def _identity(self, networks: dict[str, dict[str, Any]], base: str) -> dict[str, str]:
        """Settings that a resumed run must have in common with the run before, beside the trainer's."""
        layers = [f"{name} {layer.weight_shape}" for network in networks.values() for name, layer in network.items()]
        return {
            "data": self.sampler.dataset.fingerprint(),
            "layers": digest(layers),
            "network": repr(self.network),
            "objective": repr(self.sampler.objective),
            "batch size": repr(self.sampler.order.batch_size),
            "base model": base,
        } | ({"validation": self.validation.fingerprint()} if self.validation else {})

    def _saver(self, trainer: Trainer) -> Callback:
        """Writes an adapter beside each state, and the one that did best on held-out pictures."""

        def save(event: Event) -> None:
            if isinstance(event, Saved):
                done = event.step == self.config.steps
                name = self.folder.name if done else f"step_{event.step:06d}"
                save_adapter(self._adapter(trainer), self.folder / f"{name}.safetensors")
            elif isinstance(event, Validated) and event.best:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_adapter(self._adapter(trainer), self.folder / BEST)

        return save

    def _adapter(self, trainer: Trainer) -> Adapter:
        layers = {name: factors for network in trainer.factors().values() for name, factors in network.items()}
        entries = {
            **metadata.network(layers.values(), conv_dim=self.network.conv_rank),
            **trainer.metadata(self.sampler.order.batch_size),
            "ss_num_train_images": str(len(self.sampler.dataset)),
            "ss_output_name": self.folder.name,
            "ss_tag_frequency": json.dumps({"loha": _tag_counts(self.sampler.dataset)}),
        }
        return Adapter(layers, metadata=entries, source=self.folder.name)


def resident(patcher: Any) -> Any:
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


def inner_blocks(model: nn.Module) -> list[nn.Module]:
    """A diffusion model's blocks; of a U-Net's sequences their members, which ComfyUI runs one by one."""
    blocks = blocks_of(model)
    parts = (part for block in blocks for part in (block if isinstance(block, nn.Sequential) else [block]))
    return [part for part in parts if any(True for _ in part.children())]


def _text_blocks(*encoders: nn.Module) -> list[nn.Module]:
    """Text encoders have theirs deeper within."""
    lists = [part for encoder in encoders for part in encoder.modules() if isinstance(part, nn.ModuleList)]
    return [block for entries in lists for block in entries]


def _tag_counts(dataset: Dataset) -> Counter[str]:
    counts: Counter[str] = Counter()
    for item in dataset.items:
        for tag in filter(None, map(str.strip, item.caption.split(","))):
            counts[tag] += item.repeats
    return counts


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The factors' first values follow from the seed; random states outside stay as they are."""
    with fork_rng():
        torch.manual_seed(seed & 0xFFFFFFFFFFFFFFFF)
        yield
