"""Batches of a run and their noise, for every model.

What batch 1,234 holds is a function of the seed and that number alone, so a run that was interrupted goes on bit for
bit from the number it stopped at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import LoHaError, check_number
from ..losses.slider import SLIDERS, PictureSample
from ..objectives import Objective
from ..randomness import generator
from .dataset import Dataset, Sample


class BatchOrder:
    """Which items are in which batch.

    Every epoch has a permutation of its own. A batch never mixes buckets. All batches have ``batch_size`` items: the
    last one of a bucket is filled up with others of the bucket, different ones each epoch. A smaller one would be as
    long a step with a noisier gradient, would give its few pictures more weight, and could not be split among
    processes.

    Args:
        buckets: indices by shape of latent, each as often as it is to be seen in an epoch; `Dataset.buckets`.
        batch_size: items in a batch, of all processes together.
        seed: the run's.

    Attributes:
        batches_per_epoch: batches in which every item has been seen as often as it repeats.

    Raises:
        LoHaError: nothing in the buckets, or a batch size below 1.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        check_number("batch_size", batch_size, minimum=1, integer=True)
        self.buckets, self.batch_size, self.seed = [bucket for bucket in buckets if bucket], batch_size, seed
        if not self.buckets:
            raise LoHaError("there is nothing to train on: give at least one picture")
        self.batches_per_epoch = sum(math.ceil(len(bucket) / batch_size) for bucket in self.buckets)
        self._epoch = lru_cache(1)(self._shuffled_epoch)

    def indices(self, number: int) -> list[int]:
        """The items of batch ``number``, counted from 0 at the start of training."""
        epoch, place = divmod(number, self.batches_per_epoch)
        return list(self._epoch(epoch)[place])

    def _shuffled_epoch(self, epoch: int) -> list[list[int]]:
        rng, size = generator(self.seed, "epoch", epoch), self.batch_size
        batches = []
        for bucket in self.buckets:
            indices = _shuffled(bucket, rng)
            in_last_batch = set(indices[len(indices) // size * size :])
            while len(indices) % size:
                # Those that are not in the last batch yet come first.
                more = sorted(_shuffled(bucket, rng), key=in_last_batch.__contains__)
                indices += more[: size - len(indices) % size]
            batches += [indices[start : start + size] for start in range(0, len(indices), size)]
        return _shuffled(batches, rng)


@dataclass(frozen=True)
class TrainingBatch:
    """n samples and their noise, on the CPU.

    Attributes:
        samples: as they are seen this time.
        latents, noise: (n, c, *size), float32.
        times: for each sample its place between clean (0) and noise (1).
        mask: (n, 1, *size) in 0…1, or None where no sample has one.
        sample_weight: (n,), factor of each sample's loss.
        class_prompts: what is asked for output preservation, or None without it.
        low: a picture slider's samples of strength −1, with the same noise and times.
    """

    samples: list[Sample]
    latents: Tensor
    noise: Tensor
    times: list[float]
    mask: Tensor | None
    sample_weight: Tensor
    class_prompts: list[str] | None = None
    low: TrainingBatch | None = None


class BatchSampler:
    """The batches of a run.

    Args:
        batch_size: of all processes together.
        places: which of a batch's places are this process's; all of them by default.

    Raises:
        LoHaError: nothing to train on, a batch size below 1, or preservation of what the data set does not have:
            captions with the trigger word, or masks.
    """

    def __init__(
        self, dataset: Dataset, objective: Objective, batch_size: int, seed: int, places: range | None = None
    ) -> None:
        self.dataset, self.objective, self.seed = dataset, objective, seed
        if objective.preservation:
            objective.preservation.check(dataset)
        if objective.masked_preservation:
            _check_masks(dataset)
        self.order = BatchOrder(dataset.buckets(), batch_size, seed)
        self.places = range(batch_size) if places is None else places

    def batch(self, number: int) -> TrainingBatch:
        """This process's part of batch ``number``, counted from the start of training."""
        indices = self.order.indices(number)
        rngs = [generator(self.seed, "draw", number, place) for place in self.places]
        samples = [self.dataset.draw(indices[place], rng) for place, rng in zip(self.places, rngs, strict=True)]
        times = [self.objective.time(rng, tokens(s.latent)) for s, rng in zip(samples, rngs, strict=True)]
        noise = torch.stack([self.objective.noise(s.latent.shape, rng) for s, rng in zip(samples, rngs, strict=True)])
        classes = self._class_prompts(samples, rngs)
        lows = [sample.low for sample in samples if isinstance(sample, PictureSample)]
        low = together(lows, noise, times) if lows else None
        return replace(together(samples, noise, times), class_prompts=classes, low=low)

    def _class_prompts(self, samples: Sequence[Sample], rngs: Sequence[torch.Generator]) -> list[str] | None:
        if (preservation := self.objective.preservation) is None:
            return None
        return [preservation.class_prompt(s.caption, rng) for s, rng in zip(samples, rngs, strict=True)]

    def steps(self, epochs: int, gradient_accumulation_steps: int) -> int:
        """Optimizer steps in so many epochs."""
        return math.ceil(epochs * self.order.batches_per_epoch / gradient_accumulation_steps)


def prompts(dataset: Dataset, objective: Objective) -> list[str]:
    """Every prompt that will be encoded, to do so beforehand; but for captions of which there are too many."""
    captions, preservation = dataset.all_captions(), objective.preservation
    return captions if preservation is None else [*captions, *preservation.class_prompts(captions)]


def tokens(latent: Tensor) -> int:
    """Cells of 2×2 in a latent (c, h, w) or (c, t, h, w); places, where cells are channels already (Flux.2's 128)."""
    return latent[0].numel() // (4 if len(latent) <= 64 else 1)


def together(samples: list[Sample], noise: Tensor, times: list[float]) -> TrainingBatch:
    """A batch of samples of one size, with their noise (n, c, *size)."""
    latents = torch.stack([sample.latent for sample in samples])
    weight = torch.tensor([sample.weight for sample in samples])
    return TrainingBatch(samples, latents, noise, times, _mask(samples, latents), weight)


def _check_masks(dataset: Dataset) -> None:
    if isinstance(dataset, SLIDERS):
        raise LoHaError("masked_preservation has no part in a slider, which learns no pictures; set it to 0")
    if all(item.mask is None for item in dataset.items):
        raise LoHaError("masked_preservation keeps what masks leave out, and no picture has a mask; give masks, or set "
                        "it to 0")  # fmt: skip


def _mask(samples: list[Sample], latents: Tensor) -> Tensor | None:
    """A sample without a mask counts everywhere, and the frames of a video have one in common."""
    masks = [sample.mask for sample in samples]
    if all(mask is None for mask in masks):
        return None
    size = latents.shape[-2:]
    axes = [1] * (latents.dim() - 4)
    return torch.stack([(torch.ones(1, *size) if m is None else m).view(1, *axes, *size) for m in masks])


def _shuffled(values: Sequence[Any], rng: torch.Generator) -> list[Any]:
    return [values[place] for place in torch.randperm(len(values), generator=rng).tolist()]
