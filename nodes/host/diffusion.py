"""Batches and their loss, for whatever diffusion model ComfyUI runs.

ComfyUI's own `model_sampling` says how noise is added and what an output means, so nothing here knows a model family:
x = noise_scaling(σ, ε, x₀), and x₀ is linear in the model's output at a given x, with the gain ∂x₀/∂output. An error of
the output is an error of x₀ divided by the gain, whether the model predicts ε, v, x₀ or a flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from loha_core import LoHaError
from loha_core.training.data.batches import BatchSampler, TrainingBatch
from loha_core.training.data.dataset import Sample
from loha_core.training.losses.loss import Model
from loha_core.training.losses.strength import Strength

# Options of a conditioning that give it a place in a picture or in time; they concern sampling alone.
_FOR_SAMPLING = {
    *("area", "mask", "mask_strength", "strength", "default"),
    *("timestep_start", "timestep_end", "start_percent", "end_percent"),
}


@dataclass(frozen=True)
class Batch:
    """n samples with their noise, on the model's device."""

    clean: Tensor  # (n, c, *size), as the model sees latents
    noisy: Tensor
    sigma: Tensor  # (n,)
    samples: list[Sample]
    mask: Tensor | None  # (n, 1, *size)
    sample_weight: Tensor  # (n,)
    class_prompts: list[str] | None = None
    low: Batch | None = None  # of strength −1, in a slider


class Diffusion(Model[Batch]):
    """A diffusion model and the batches that it is trained on.

    Args:
        patcher: the loaded model.
        sampler: batches of latents as a VAE gives them, with captions or conditionings.
        clip: text encoders, if they are trained too; else the dataset's encodings are used.
        strength: of the layers that are trained.

    Raises:
        LoHaError: the latents are another model's.
    """

    def __init__(self, patcher: Any, sampler: BatchSampler, clip: Any = None, strength: Strength | None = None) -> None:
        self.patcher, self.model, self.sampler, self.clip = patcher, patcher.model, sampler, clip
        self.strength = strength or Strength()
        self.device = patcher.load_device
        expected = self.model.latent_format.latent_channels
        if (channels := len(sampler.dataset.items[0].latent)) != expected:
            raise LoHaError(
                f"the data set's latents have {channels} channels; this model's have {expected}. Encode the pictures "
                "with the VAE that belongs to the model."
            )

    # Batches

    def noised(self, drawn: TrainingBatch) -> Batch:
        """x = noise_scaling(σ, ε, x₀), on the model's device."""
        sigma = torch.tensor([self._sigma(time) for time in drawn.times])
        clean = self.model.process_latent_in(drawn.latents)
        noisy = self.model.model_sampling.noise_scaling(sigma.to(clean), drawn.noise, clean, False)
        clean, noisy, sigma, weight = (
            tensor.to(self.device, torch.float32) for tensor in (clean, noisy, sigma, drawn.sample_weight)
        )
        mask = None if drawn.mask is None else drawn.mask.to(self.device)
        low = None if drawn.low is None else self.noised(drawn.low)
        return Batch(clean, noisy, sigma, drawn.samples, mask, weight, drawn.class_prompts, low)

    def parts(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, as a VAE gives them, and the noise that an output stands for, on the CPU."""
        gain, signal, noise = (self._per_sample(values, batch) for values in self._levels(batch))
        clean = output * gain
        return self.model.process_latent_out(clean).cpu(), ((batch.noisy - signal * clean) / noise).cpu()

    def _sigma(self, time: float) -> float:
        """The noise level at a time from clean (0) to noise (1); a discrete model's nearest step below."""
        sampling = self.model.model_sampling
        if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
            return float(sampling.sigmas[int(time * len(sampling.sigmas))])
        return float(sampling.percent_to_sigma(1 - time))

    # Predictions and the loss

    def prediction(self, batch: Batch, prompts: Sequence[str] | None = None) -> Tensor:
        """The model's output for each sample (n, c, *size), up to a term in x that its target has too.

        Args:
            prompts: one for each sample, in place of the samples' own captions or conditionings.
        """
        return self._denoised(batch, prompts) / self._per_sample(self._levels(batch)[0], batch)

    def target(self, batch: Batch) -> Tensor:
        return batch.clean / self._per_sample(self._levels(batch)[0], batch)

    def gain_and_snr(self, batch: Batch) -> tuple[Tensor, Tensor]:
        gain, signal, noise = self._levels(batch)
        return gain, (signal / noise).square()

    @staticmethod
    def _per_sample(values: Tensor, batch: Batch) -> Tensor:
        return values.view(-1, *[1] * (batch.clean.dim() - 1))

    def _levels(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each sample: the gain, and how much of the picture and of the noise there is in x."""
        sampling, sigma = self.model.model_sampling, batch.sigma
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        gain = sampling.calculate_denoised(sigma, one, zero) - sampling.calculate_denoised(sigma, zero, zero)
        signal = sampling.noise_scaling(sigma, zero, one, False)
        noise = sampling.noise_scaling(sigma, one, zero, False)
        return gain, signal, noise

    def _denoised(self, batch: Batch, prompts: Sequence[str] | None) -> Tensor:
        """The model's x₀ for each sample; together if their conditionings can be, else one by one."""
        if prompts is None:
            asked = [self._encoded(s.caption) if s.conditioning is None else s.conditioning for s in batch.samples]
        else:
            asked = [self._encoded(prompt) for prompt in prompts]
        conds = [self._cond(a, batch.noisy[i : i + 1], batch.sigma[i : i + 1]) for i, a in enumerate(asked)]
        joinable = all(_can_join(conds[0], other) for other in conds[1:])
        groups = [range(len(conds))] if joinable else [range(i, i + 1) for i in range(len(conds))]
        return torch.cat([self._apply([conds[i] for i in g], batch, slice(g.start, g.stop)) for g in groups])

    def _apply(self, conds: list[dict[str, Any]], batch: Batch, part: slice) -> Tensor:
        options = dict(self.patcher.model_options.get("transformer_options", {}))
        options |= {"cond_or_uncond": [0] * len(conds), "sigmas": batch.sigma[part], "sample_sigmas": batch.sigma[part]}
        options["optimized_attention_override"] = _attention
        inputs = comfy.samplers.cond_cat(conds)
        output: Tensor = self.model.apply_model(
            batch.noisy[part], batch.sigma[part], **inputs, transformer_options=options
        )
        return output

    def _encoded(self, prompt: str) -> Any:
        if self.clip is None:
            return self.sampler.dataset.encode(prompt)
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    def _cond(self, conditioning: Any, noisy: Tensor, sigma: Tensor) -> dict[str, Any]:
        """A conditioning as this model takes it, by name, of objects that know how to be joined."""
        tensor, options = conditioning[0]
        if "control" in options:
            raise LoHaError("a conditioning carries a ControlNet, which has no part in training; leave it out")
        options = {key: value for key, value in options.items() if key not in _FOR_SAMPLING}
        conds = {"positive": comfy.sampler_helpers.convert_cond([[tensor, options]])}
        conds = comfy.samplers.process_conds(
            self.model, noisy, conds, self.device, latent_image=noisy, seed=self.sampler.seed
        )
        return dict(comfy.samplers.get_area_and_mult(conds["positive"][0], noisy, sigma).conditioning)


def _attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """torch's attention in place of the one chosen for sampling, which may keep all scores (sub-quadratic), or have no
    backward (Sage), so that no layer before it would learn."""
    y: Tensor = comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
    return y


def _can_join(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name].can_concat(other[name]) for name in one)
