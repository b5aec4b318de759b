"""The loss of a batch: what a model is asked, at which strength, and what it should have said."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..data.batches import BatchSampler, TrainingBatch
from ..data.dataset import Dataset, Sample
from ..objectives import Objective
from .slider import PromptSample, PromptSlider
from .strength import Strength

PURE_NOISE = 1 - 1e-6  # a time, as `Objective.time` limits it


class Batch(Protocol):
    """n samples with their noise, as a model takes them."""

    @property
    def samples(self) -> list[Sample]: ...
    @property
    def class_prompts(self) -> list[str] | None: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def sample_weight(self) -> Tensor: ...
    @property
    def low(self) -> Any: ...


B = TypeVar("B", bound=Batch)


class Model(ABC, Generic[B]):
    """A diffusion model whose layers are trained, and the batches that it is trained on.

    Attributes:
        sampler: the batches' samples, and with them the data set and the objective.
        strength: of the layers.
    """

    sampler: BatchSampler
    strength: Strength

    @abstractmethod
    def noised(self, drawn: TrainingBatch) -> B:
        """The samples' x_t, and all that goes with them, on the model's device."""

    @abstractmethod
    def parts(self, batch: B, output: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents, as the data set has them, and the noise that an output stands for, on the CPU."""

    @abstractmethod
    def prediction(self, batch: B, prompts: Sequence[str] | None = None) -> Tensor:
        """The model's output for each sample (n, c, *size); of ``prompts`` in place of the samples' own."""

    @abstractmethod
    def target(self, batch: B) -> Tensor:
        """What `prediction` should be, of the noise that was added."""

    @abstractmethod
    def gain_and_snr(self, batch: B) -> tuple[Tensor, Tensor]:
        """Of each sample (n,), as `Objective.loss` takes them."""

    def batch(self, number: int) -> B:
        """This process's part of batch ``number`` since training began; all that is random follows from the number."""
        return noised_batch(self, self.sampler.batch(number), self.sampler.dataset)

    def base_prediction(self, batch: B, prompts: Sequence[str] | None = None) -> Tensor:
        """What the frozen model says, without anything that is trained, and without gradients; as `prediction`."""
        with torch.no_grad(), self.strength.at(0):
            return self.prediction(batch, prompts)

    def error(
        self,
        batch: B,
        target: Tensor,
        prompts: Sequence[str] | None = None,
        strength: float = 1.0,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The objective's error of `prediction`, with the layers at ``strength``; differentiable.

        ``kept`` is what the output shall be where nothing is learned, see `Objective.loss`.
        """
        gain, snr = self.gain_and_snr(batch)
        with self.strength.at(strength):
            output = self.prediction(batch, prompts)
        return self.sampler.objective.loss(
            output, target, gain, snr, mask=batch.mask, sample_weight=batch.sample_weight, kept=kept
        )

    def loss(self, batch: B) -> Tensor:
        """A scalar, differentiable with respect to the layers."""
        return loss(self, batch, self.sampler.objective)


def noised_batch(model: Model[B], drawn: TrainingBatch, dataset: Dataset) -> B:
    """A batch's x_t: its pictures' with noise, or where the base gets from noise alone."""
    if isinstance(dataset, PromptSlider) and dataset.denoising_steps:
        return from_noise(model, drawn, dataset.denoising_steps)
    return model.noised(drawn)


def from_noise(model: Model[B], drawn: TrainingBatch, steps: int) -> B:
    """x_t at a batch's times as the base itself gets there from pure noise, for the samples' captions.

    The steps are DDIM's (arXiv 2010.02502, η = 0), which for a flow are Euler's: output → x₀ and ε → less of ε.
    """
    drawn = replace(drawn, latents=torch.zeros_like(drawn.latents))
    batch = model.noised(replace(drawn, times=[PURE_NOISE] * len(drawn.times)))
    for step in range(1, steps + 1):
        latents, noise = model.parts(batch, model.base_prediction(batch))
        times = [PURE_NOISE + (time - PURE_NOISE) * step / steps for time in drawn.times]
        batch = model.noised(replace(drawn, latents=latents, noise=noise, times=times))
    return batch


def loss(model: Model[B], batch: B, objective: Objective) -> Tensor:
    """A scalar, differentiable with respect to the layers."""
    if isinstance(batch.samples[0], PromptSample):
        return _of_prompts(model, batch, [s for s in batch.samples if isinstance(s, PromptSample)])
    if batch.low is not None:
        high, low = (model.error(b, model.target(b), strength=s) for b, s in ((batch, 1), (batch.low, -1)))
        return (high + low) / 2
    kept = model.base_prediction(batch) if objective.masked_preservation and batch.mask is not None else None
    total = model.error(batch, model.target(batch), kept=kept)
    if objective.preservation and batch.class_prompts:
        of_class = model.base_prediction(batch, batch.class_prompts)
        total = total + objective.preservation.weight * model.error(batch, of_class, batch.class_prompts)
    return total


def _of_prompts(model: Model[B], batch: B, samples: Sequence[PromptSample]) -> Tensor:
    """The base's outputs for three prompts say where strengths 1 and −1 shall go."""
    positive = model.base_prediction(batch, [sample.positive for sample in samples])
    negative = model.base_prediction(batch, [sample.negative for sample in samples])
    target, direction = model.base_prediction(batch), samples[0].guidance * (positive - negative)
    errors = [model.error(batch, target + strength * direction, strength=strength) for strength in (1, -1)]
    return (errors[0] + errors[1]) / 2
