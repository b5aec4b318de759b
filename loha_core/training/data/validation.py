"""Pictures that are held back from training, and the loss on them: the same noise and times each time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...errors import LoHaError, check_number
from ..losses.loss import loss, noised_batch
from ..losses.slider import SLIDERS
from ..objectives import Objective
from ..randomness import generator
from .batches import TrainingBatch, together, tokens
from .captions import Captions
from .dataset import Dataset, Sample

# Of each picture, at times spread over all that are trained.
DRAWS = 4


def held_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Data to train on, and a share of the pictures to validate with; which, follows from the seed.

    Regularisation pictures are always trained on.

    Raises:
        LoHaError: a share outside 0…1, one that leaves nothing to train on or to validate with, or a slider.
    """
    check_number("the validation share", share, above=0, below=1)
    _refuse_sliders(dataset)
    learned = [index for index, item in enumerate(dataset.items) if not item.regularisation]
    count = math.floor(share * len(learned) + 0.5)
    if not 0 < count < len(learned):
        raise LoHaError(
            f"a validation share of {share:g} of {len(learned)} pictures is {count}, which leaves "
            f"{len(learned) - count} to train on; expected at least one of each: give more pictures, or another share"
        )
    order = torch.randperm(len(learned), generator=generator(seed, "held out")).tolist()
    out = {learned[place] for place in order[:count]}
    return (
        dataset.subset([index for index in range(len(dataset)) if index not in out]),
        dataset.subset(sorted(out)),
    )


class Validation:
    """The loss on held-out pictures.

    Each is seen at `DRAWS` times, and all the times together are quantiles of the objective's distribution. Captions
    don't vary, pictures are not mirrored, and preservation of a class does not count.

    Args:
        dataset: what is validated with; regularisation pictures in it are left out.
        objective: the run's.
        batch_size: pictures at once.
        seed: of the noise, and of which picture is seen at which time.

    Raises:
        LoHaError: nothing to validate with, or a slider.
    """

    def __init__(self, dataset: Dataset, objective: Objective, batch_size: int, seed: int) -> None:
        _refuse_sliders(dataset)
        indices = [index for index, item in enumerate(dataset.items) if not item.regularisation]
        if not indices:
            raise LoHaError("there is nothing to validate with: all pictures are for regularisation")
        self.dataset, self.objective, self.batch_size, self.seed = dataset.subset(indices), objective, batch_size, seed
        self._captions = Captions(dataset.captions.trigger)

    def prompts(self) -> list[str]:
        """Every prompt that will be encoded, to do so beforehand."""
        return [self._caption(i) for i, item in enumerate(self.dataset.items) if item.conditioning is None]

    def batches(self) -> Iterator[TrainingBatch]:
        """All that is seen, pictures of one size together."""
        count = len(self.dataset)
        place = torch.randperm(count, generator=generator(self.seed, "validation")).tolist()
        for bucket in self.dataset.buckets():
            seen = [(index, draw) for index in dict.fromkeys(bucket) for draw in range(DRAWS)]
            for start in range(0, len(seen), self.batch_size):
                samples, times, noise = [], [], []
                for index, draw in seen[start : start + self.batch_size]:
                    item, rng = self.dataset.items[index], generator(self.seed, "validation", index, draw)
                    samples.append(Sample(item.latent, self._caption(index), item.mask, item.weight, item.conditioning))
                    u = (draw + (place[index] + 0.5) / count) / DRAWS
                    times.append(self.objective.quantile(u, tokens(item.latent)))
                    noise.append(self.objective.noise(item.latent.shape, rng))
                yield together(samples, torch.stack(noise), times)

    def loss(self, model: Any) -> float:
        """The mean over all that is seen.

        Args:
            model: as `losses.loss.Model` has it.
        """
        total = 0.0
        with torch.no_grad():
            for drawn in self.batches():
                batch = noised_batch(model, drawn, self.dataset)
                total += len(drawn.samples) * float(loss(model, batch, self.objective))
        return total / (DRAWS * len(self.dataset))

    def fingerprint(self) -> str:
        """Of what is validated with; see `Dataset.fingerprint`."""
        return self.dataset.fingerprint()

    def _caption(self, index: int) -> str:
        return self._captions.draw(self.dataset.items[index].caption, torch.Generator(), trigger=True)


def _refuse_sliders(dataset: Dataset) -> None:
    if isinstance(dataset, SLIDERS):
        raise LoHaError("a slider learns a direction and no pictures, and none can be held out; leave validation off")
