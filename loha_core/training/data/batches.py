"""What is in each batch of a run, with its noise: a function of the seed and the batch's number, for every model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import Objective
from .dataset import Dataset, Sample, generator, order


@dataclass(frozen=True)
class Draw:
    """n samples and their chance, on the CPU.

    Attributes:
        samples: as they are seen this time.
        latents, noise: (n, c, *size), float32.
        times: for each sample how far it is from clean to noise, in (0, 1).
        mask: (n, 1, *size) in 0…1, or None where no sample has one.
        share: (n,), how much each sample counts.
    """

    samples: list[Sample]
    latents: Tensor
    noise: Tensor
    times: list[float]
    mask: Tensor | None
    share: Tensor


class Draws:
    """The batches of a run.

    Args:
        batch_size: of all processes together.
        places: which of a batch's places are this process's; all of them by default.

    Raises:
        LoHaError: nothing to train on, or a batch size below 1.
    """

    def __init__(
        self, dataset: Dataset, objective: Objective, batch_size: int, seed: int, places: range | None = None
    ) -> None:
        self.dataset, self.objective, self.seed = dataset, objective, seed
        self.order = order(dataset.buckets(), batch_size, seed)
        self.places = range(batch_size) if places is None else places

    def at(self, number: int) -> Draw:
        """This process's part of batch ``number``, counted from the start of training."""
        indices = self.order.at(number)
        chance = [generator(self.seed, "draw", number, place) for place in self.places]
        samples = [self.dataset.draw(indices[place], g) for place, g in zip(self.places, chance, strict=True)]
        latents = torch.stack([sample.latent for sample in samples])
        times = [self.objective.time(g) for g in chance]
        noise = torch.stack([self.objective.noise(s.latent.shape, g) for s, g in zip(samples, chance, strict=True)])
        share = torch.tensor([sample.weight for sample in samples])
        return Draw(samples, latents, noise, times, _mask(samples, latents), share)


def _mask(samples: list[Sample], latents: Tensor) -> Tensor | None:
    """A sample without one is seen whole, and the frames of a video share theirs."""
    masks = [sample.mask for sample in samples]
    if all(mask is None for mask in masks):
        return None
    size = latents.shape[-2:]
    axes = [1] * (latents.dim() - 4)
    return torch.stack([(torch.ones(1, *size) if m is None else m).view(1, *axes, *size) for m in masks])
