"""Batches and their loss, for whatever diffusion model ComfyUI runs.

ComfyUI's own `model_sampling` says how noise is added and what an output means, so nothing here knows a model family:
x = noise_scaling(σ, ε, x₀), and x₀ is linear in the model's output at a given x, with the gain ∂x₀/∂output. An error of
the output is an error of x₀ divided by the gain, whether the model predicts ε, v, x₀ or a flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from loha_core import LoHaError
from loha_core.training.data.batches import Draws
from loha_core.training.data.dataset import Dataset, Sample
from loha_core.training.objectives import Objective

# What places a conditioning in a picture or in time, for sampling.
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
    share: Tensor  # (n,)


class Diffusion:
    """A model and the data that it is trained on.

    Args:
        patcher: the loaded model.
        dataset: latents as a VAE gives them, captions or conditionings.
        clip: text encoders, if they are trained too; else the data set's own encodings are used.
    """

    def __init__(
        self, patcher: Any, dataset: Dataset, objective: Objective, batch_size: int, seed: int, clip: Any = None
    ) -> None:
        self.patcher, self.model, self.clip = patcher, patcher.model, clip
        self.dataset, self.objective, self.seed = dataset, objective, seed
        self.draws = Draws(dataset, objective, batch_size, seed)
        self.device = patcher.load_device
        channels, found = self.model.latent_format.latent_channels, dataset.items[0].latent.shape[0]
        if channels != found:
            raise LoHaError(
                f"the data set's latents have {found} channels; this model's have {channels}. Encode the pictures "
                "with the VAE that belongs to the model."
            )

    # Batches

    def batch(self, number: int) -> Batch:
        """Batch ``number`` since training began: what is in it and all its noise follow from the number."""
        draw = self.draws.at(number)
        sigma = torch.tensor([self._sigma(time) for time in draw.times])
        clean = self.model.process_latent_in(draw.latents)
        noisy = self.model.model_sampling.noise_scaling(sigma.to(clean), draw.noise, clean, False)
        clean, noisy, sigma, share = (t.to(self.device, torch.float32) for t in (clean, noisy, sigma, draw.share))
        return Batch(clean, noisy, sigma, draw.samples, None if draw.mask is None else draw.mask.to(self.device), share)

    def _sigma(self, time: float) -> float:
        """Noise at a share of the way from clean to noise; one of the steps that a model knows, if it knows steps."""
        sampling = self.model.model_sampling
        if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
            return float(sampling.sigmas[int(time * len(sampling.sigmas))])
        return float(sampling.percent_to_sigma(1 - time))

    # Loss

    def loss(self, batch: Batch) -> Tensor:
        """The batch's loss, differentiable with respect to the layers that act in the model."""
        denoised = self._denoised(batch)
        gain, snr = self._gain_and_snr(batch)
        rows = gain.view(-1, *[1] * (batch.clean.dim() - 1))
        return self.objective.loss(denoised / rows, batch.clean / rows, gain, snr, mask=batch.mask, share=batch.share)

    def _gain_and_snr(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sampling, sigma = self.model.model_sampling, batch.sigma
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        gain = sampling.calculate_denoised(sigma, one, zero) - sampling.calculate_denoised(sigma, zero, zero)
        signal = sampling.noise_scaling(sigma, zero, one, False)
        noise = sampling.noise_scaling(sigma, one, zero, False)
        return gain, (signal / noise).square()

    def _denoised(self, batch: Batch) -> Tensor:
        """The model's x₀ for each sample; together if their conditionings can be, else one by one."""
        conds = [self._cond(s, batch.noisy[i : i + 1], batch.sigma[i : i + 1]) for i, s in enumerate(batch.samples)]
        together = all(_fit(conds[0], other) for other in conds[1:])
        groups = [range(len(conds))] if together else [range(i, i + 1) for i in range(len(conds))]
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

    def _cond(self, sample: Sample, noisy: Tensor, sigma: Tensor) -> dict[str, Any]:
        """What ComfyUI makes of a conditioning for this model: by name, with ways to join them."""
        if sample.conditioning is not None:
            conditioning = sample.conditioning
        elif self.clip is not None:
            conditioning = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(sample.caption))
        else:
            conditioning = self.dataset.encode(sample.caption)
        tensor, options = conditioning[0]
        if "control" in options:
            raise LoHaError("a conditioning carries a ControlNet, which has no part in training; leave it out")
        options = {key: value for key, value in options.items() if key not in _FOR_SAMPLING}
        conds = {"positive": comfy.sampler_helpers.convert_cond([[tensor, options]])}
        conds = comfy.samplers.process_conds(self.model, noisy, conds, self.device, latent_image=noisy, seed=self.seed)
        found = comfy.samplers.get_area_and_mult(conds["positive"][0], noisy, sigma)
        return dict(found.conditioning)


def _attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """torch's own, in place of what is chosen for sampling: that may keep all scores (sub-quadratic), or have no
    backward (Sage), and then what comes before it learns nothing."""
    y: Tensor = comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
    return y


def _fit(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name].can_concat(other[name]) for name in one)


@contextmanager
def trainable_weights(*modules: nn.Module | None) -> Iterator[None]:
    """Weights that autograd accepts: loaded in inference mode, as a graph does, they are of a kind that it refuses.

    Each of those is replaced by a copy with the same values, one after the other, wherever it is used, and stays
    replaced. While this lasts none asks for gradients.
    """
    asked: list[nn.Parameter] = []
    for places in _places(modules):
        tensor = getattr(*places[0])
        if tensor.is_inference():
            copy = tensor.detach().clone()
            copy = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
            for part, name in places:
                setattr(part, name, copy)
        elif isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            tensor.requires_grad_(False)
            asked.append(tensor)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _places(modules: Iterable[nn.Module | None]) -> list[list[tuple[nn.Module, str]]]:
    """For each parameter and buffer the (module, name)s under which it is found: several, if weights are tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    parts = [part for module in modules if module is not None for part in module.modules()]
    for part in dict.fromkeys(parts):  # modules, too, may be shared
        parameters = part.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in (*parameters, *part.named_buffers(recurse=False, remove_duplicate=False)):
            found.setdefault(id(tensor), []).append((part, name))
    return list(found.values())
