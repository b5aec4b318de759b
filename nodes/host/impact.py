"""What each part of an adapter does to a picture: how large its update is, and what the picture loses without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from loha_core import Adapter, LoHaError
from loha_core.adapter import split_key, split_layers
from loha_core.bind import weight_key
from loha_core.blocks import BlockStrength
from loha_core.factors import Layer, LoHaFactors
from loha_core.formats import metadata
from loha_core.transform import lowrank

from . import modes, patches, weights
from .patches import MODEL, part_of
from .pictures import Latent, fitting, repeated, shared_noise
from .progress import ProgressBar

# ComfyUI 0.33's empty latents say for which size they were made.
_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


@dataclass(frozen=True)
class LayerNorm:
    """One layer of an adapter: its name in the file, the weight's key, ‖ΔW‖ and ‖W‖ (Frobenius).

    ``update`` is None for kinds of adapters whose update has no factors to tell it from.
    """

    name: str
    key: str
    update: float | None
    weight: float


def layer_norms(model: Any, adapter: Adapter) -> list[LayerNorm]:
    """Of all layers that act on the diffusion model, in the adapter's order; no ΔW is built, and W is the model's own.

    DoRA's magnitudes are left out: the update is that of the factors.

    Raises:
        LoHaError: nothing matches the model, or a weight cannot be read.
    """
    names: list[str] = []

    def noted(key: str, name: str) -> float:
        names.append(name)
        return 1.0

    bound = patches.find(adapter, model, None, noted)
    layers, _ = split_layers(adapter)
    norms = []
    for name, patch in zip(names, bound.patches[MODEL], strict=True):
        key, part = weight_key(patch.target), part_of(patch.target)
        backup = model.hook_backup.get(key) or model.backup.get(key)  # while another adapter is merged into it
        stored = None if backup is None else backup[0]
        weight = weights.dense(*weights.place(model.model, key), stored=stored, patched=False)
        weight = weight if part is None else weight.narrow(*part)
        norms.append(LayerNorm(name, key, _update_norm(patch.update, layers.get(name)), _frobenius(weight)))
    return norms


def _update_norm(update: Any, layer: Layer | None) -> float | None:
    if isinstance(update, tuple):  # ComfyUI's difference of a whole tensor
        return _frobenius(update[1][0]) if update[0] == "diff" else None
    if layer is None:
        return None
    return layer.norm() if isinstance(layer, LoHaFactors) else lowrank.norm(*layer.product())


def _frobenius(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def relative(layers: Sequence[LayerNorm]) -> float:
    """‖ΔW‖/‖W‖ of several layers together, as far as it is known."""
    known = [(layer.update, layer.weight) for layer in layers if layer.update is not None]
    updates, bases = (math.hypot(*values) for values in zip(*known, strict=True)) if known else (0.0, 0.0)
    return updates / bases if bases else 0.0


@dataclass(frozen=True)
class Sampling:
    """One run of ComfyUI's sampler, as KSampler does it."""

    positive: Any
    negative: Any
    latent: Latent
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str

    def run(self, model: Any, pictures: int, seed: int, stepped: Callable[[], None]) -> Tensor:
        """The latent's first picture, as often as asked for, all with the same noise: (pictures, …)."""
        batch = repeated(self.latent, [0] * pictures)
        model = shared_noise(model, [0] * pictures, 1)
        sizes = {name: batch[name] for name in _RATIOS if name in batch}
        samples = comfy.sample.fix_empty_latent_channels(model, batch["samples"], **sizes)
        noise = comfy.sample.prepare_noise(samples, seed, batch["batch_index"])
        return comfy.sample.sample(  # type: ignore[no-any-return]
            model, noise, self.steps, self.cfg, self.sampler_name, self.scheduler, self.positive, self.negative,
            samples, noise_mask=batch.get("noise_mask"), callback=lambda *_: stepped(), disable_pbar=True, seed=seed,
        )  # fmt: skip


Off = Callable[[str], bool]  # weight key -> whether its layers are off


class Knockouts:
    """What a picture loses without parts of an adapter, by many pictures in one run of the sampler.

    The measure is ‖x₋ − x‖ / ‖x₀ − x‖ over all seeds: x is the latent with the adapter, x₋ without the part, x₀ without
    any of it. 0 is no change, 1 as much as by leaving all out.
    """

    def __init__(self, model: Any, adapter: Adapter, strength: float, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.model, self.adapter, self.strength, self.sampling = model, adapter, strength, sampling
        self.results: dict[int, tuple[Tensor, Tensor]] = {}  # seed -> with all and with nothing
        self.seeds = seeds

    def impacts(self, parts: Sequence[Off]) -> list[float]:
        """Of each part.

        Raises:
            LoHaError: the adapter cannot act live, or changes nothing.
        """
        size = fitting(self.model, self.sampling.latent["samples"].shape)
        first = not self.results
        everything: list[Off] = [lambda key: False, lambda key: True] if first else []
        cases = [*everything, *parts]
        chunks = [cases[start : start + size] for start in range(0, len(cases), size)]
        models = [self._model(chunk) for chunk in chunks]
        bar, done = ProgressBar(len(self.seeds) * len(chunks) * self.sampling.steps), 0

        def stepped() -> None:
            nonlocal done
            bar.update_absolute(done := done + 1)

        changes, whole = [0.0] * len(parts), 0.0
        for seed in self.seeds:
            runs = zip(models, chunks, strict=True)
            found = torch.cat([self.sampling.run(model, len(chunk), seed, stepped).double() for model, chunk in runs])
            if first:
                self.results[seed] = found[0], found[1]
            full, nothing = self.results[seed]
            whole += float((nothing - full).square().sum())
            for number, picture in enumerate(found[len(everything) :]):
                changes[number] += float((picture - full).square().sum())
        if not 0 < whole < math.inf:
            what = "changes nothing" if whole == 0 else "makes pictures that are not finite"
            raise LoHaError(f"{self.adapter.source}: at strength {self.strength:g} it {what}; try another strength")
        return [math.sqrt(change / whole) for change in changes]

    def _model(self, chunk: Sequence[Off]) -> Any:
        def blocks(key: str, name: str) -> float | tuple[float, ...]:
            each = tuple(0.0 if off(key) else 1.0 for off in chunk)
            return each if len(set(each)) > 1 else each[0]

        strength = [self.strength] * len(chunk) if len(chunk) > 1 else self.strength
        return modes.apply(self.model, None, self.adapter, strength, 0.0, mode="live", blocks=blocks)[0]


def pruned(adapter: Adapter, layers: Sequence[LayerNorm], blocks: BlockStrength, **details: Any) -> Adapter:
    """The adapter without those of the layers that are off; text encoders' and unmatched ones stay.

    Raises:
        LoHaError: nothing would be left.
    """
    acting = {layer.name for layer in layers if blocks(layer.key, layer.name) != 0}
    off = {layer.name for layer in layers} - acting
    kept = {name: factors for name, factors in adapter.layers.items() if name not in off}
    extras = {key: t for key, t in adapter.extras.items() if (split_key(key) or (key,))[0] not in off}
    if not kept and not extras:
        raise LoHaError(f"{adapter.source}: nothing would be left; set keep higher")
    entries = metadata.derived([adapter], "prune", **details) | metadata.network(kept.values())
    return replace(adapter, layers=kept, extras=extras, metadata=entries)
