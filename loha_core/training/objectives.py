"""Training objectives of diffusion models: noise levels, prediction targets, and weights of the error.

A clean x₀ and noise ε make x = α·x₀ + σ·ε, with α² + σ² = 1 for the models that know a thousand timesteps and
α = 1 − σ for rectified flow. A model's output is one of `PREDICTIONS`; each gives x₀ linearly, x₀ = … + gain·output,
so that an error of the output is |gain| times as large in x₀. With SNR = α²/σ² all weightings follow from that:

    plain             1
    min-SNR-γ         min(SNR, γ) · gain²      (arXiv 2303.09556, eq. 6, for every prediction at once)
    debiased          |gain|                   (arXiv 2310.08442: 1/√SNR for ε)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LoHaError, check_choice, check_number
from .losses import timesteps as distributions
from .losses.preservation import Preservation
from .losses.timesteps import MODE_SCALES, TOKENS, Quantile, Timesteps

LossType = Literal["mse", "huber", "l1"]


class Prediction(NamedTuple):
    """The meaning of a model's output: target(x₀, ε, α, σ), and gain(α, σ) = ∂x₀/∂output at a given x."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gain: Callable[[Tensor, Tensor], Tensor]


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(lambda x0, e, a, s: e, lambda a, s: -s / a),
    "v": Prediction(lambda x0, e, a, s: a * e - s * x0, lambda a, s: -s),  # arXiv 2202.00512, appendix D
    "x0": Prediction(lambda x0, e, a, s: x0, lambda a, s: torch.ones_like(s)),
    "flow": Prediction(lambda x0, e, a, s: e - x0, lambda a, s: -s),  # arXiv 2209.03003, eq. 1
}


@dataclass(frozen=True)
class Objective:
    """Noise levels of a run, and its loss.

    Attributes:
        timesteps: "uniform"; "logit-normal", the logit of a normal with ``logit_mean`` and ``logit_std``; "shifted",
            uniform moved towards noise by ``shift``; "heavy-tail", SD3's mode sampling with ``mode_scale``; "beta",
            with ``beta_a`` and ``beta_b``. See `losses.timesteps`.
        loss_type: "mse", "huber" (squared within ``huber_delta``, linear beyond) or "l1".
        min_snr_gamma: γ of min-SNR; 0 is off. 5 is usual.
        debiased: weight errors by |gain|; not together with min-SNR.
        noise_offset: strength of noise that is one number per channel; 0.03 to 0.1 lets pictures get dark or bright.
        preservation: keep the base's output for a class of what is learned; None is off.
        min_timestep, max_timestep: the times that are trained, whatever the distribution, in 0…1 from clean to noise.
        resolution_shift: more noise for larger pictures, as Flux has it, on top of the distribution.
        masked_preservation: where a mask says that nothing is learned, the error against the base's own output counts
            so much, against 1 where it is; 0 is off.

    Raises:
        LoHaError: a value out of its range.
    """

    timesteps: Timesteps = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 3.0
    loss_type: LossType = "mse"
    huber_delta: float = 0.1
    min_snr_gamma: float = 0.0
    debiased: bool = False
    noise_offset: float = 0.0
    preservation: Preservation | None = None
    mode_scale: float = 1.29
    beta_a: float = 2.0
    beta_b: float = 2.0
    min_timestep: float = 0.0
    max_timestep: float = 1.0
    resolution_shift: bool = False
    masked_preservation: float = 0.0

    def __post_init__(self) -> None:
        check_choice("timesteps", self.timesteps, get_args(Timesteps))
        check_choice("loss_type", self.loss_type, get_args(LossType))
        for name in ("logit_std", "shift", "huber_delta"):
            check_number(name, getattr(self, name), above=0)
        for name in ("logit_mean", "noise_offset"):
            check_number(name, getattr(self, name))
        for name in ("min_snr_gamma", "masked_preservation"):
            check_number(name, getattr(self, name), minimum=0)
        check_number("mode_scale", self.mode_scale, minimum=MODE_SCALES[0], maximum=MODE_SCALES[1])
        for name in ("beta_a", "beta_b"):
            check_number(name, getattr(self, name), minimum=0.01, maximum=1e6)
        check_number("min_timestep", self.min_timestep, minimum=0, below=1)
        check_number("max_timestep", self.max_timestep, above=0, maximum=1)
        if self.min_timestep >= self.max_timestep:
            raise LoHaError(
                f"min_timestep is {self.min_timestep:g} and max_timestep {self.max_timestep:g}; the first must be less"
            )
        if self.debiased and self.min_snr_gamma:
            raise LoHaError("debiased and min_snr_gamma are two weightings of the same error; choose one")

    def time(self, generator: torch.Generator, tokens: int = TOKENS[1]) -> float:
        """A random time in (0, 1), from the clean picture to noise; ``tokens`` as in `quantile`."""
        return self.quantile(float(torch.rand((), generator=generator, dtype=torch.float64)), tokens)

    def quantile(self, u: float, tokens: int = TOKENS[1]) -> float:
        """The time in (0, 1) below which the share ``u`` of all times lies.

        Args:
            tokens: cells of 2×2 latents in the picture, for ``resolution_shift``.
        """
        of = _distribution(self, tokens if self.resolution_shift else None)
        return min(max(of(min(max(u, 2.0**-53), 1 - 2.0**-53)), 1e-6), 1 - 1e-6)

    def noise(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise for one latent (c, *size), float32 on the CPU: the same on every machine."""
        noise = torch.randn(shape, generator=generator)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
        return noise

    def weight(self, gain: Tensor, snr: Tensor) -> Tensor:
        """The factor of an output's squared error, per sample."""
        if self.min_snr_gamma:
            return snr.clamp(max=self.min_snr_gamma) * gain.square()
        # At pure noise 1/√SNR is unbounded; diffusion trainers limit it to the same value.
        return gain.abs().clamp(max=1000.0) if self.debiased else torch.ones_like(gain)

    def loss(
        self,
        output: Tensor,
        target: Tensor,
        gain: Tensor,
        snr: Tensor,
        *,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The mean error of a batch, in float32.

        Args:
            output, target: (n, c, *size).
            gain, snr: (n,).
            mask: (n, 1, *size) in 0…1, the weight of each place in a sample's mean.
            sample_weight: (n,), factor of each sample's error: prior preservation.
            kept: (n, c, *size), what the output shall be where the mask is 0, with ``masked_preservation``.
        """
        error = self._error(output.float(), target.float())
        if mask is None:
            errors = error.flatten(1).mean(1)
        else:
            mask = mask.expand_as(error)
            total, weight = error * mask, mask
            if kept is not None:
                outside = self.masked_preservation * (1 - mask)
                total, weight = total + self._error(output.float(), kept.float()) * outside, weight + outside
            errors = total.flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)
        errors = errors * self.weight(gain, snr)
        return (errors if sample_weight is None else errors * sample_weight).mean()

    def _error(self, output: Tensor, target: Tensor) -> Tensor:
        if self.loss_type == "mse":
            return F.mse_loss(output, target, reduction="none")
        if self.loss_type == "l1":
            return F.l1_loss(output, target, reduction="none")
        # Twice torch's: equal to the squared error where that is small.
        return 2 * F.huber_loss(output, target, reduction="none", delta=self.huber_delta)


@lru_cache(64)
def _distribution(of: Objective, tokens: int | None) -> Quantile:
    """Times of an objective, for a picture of so many tokens; with limits it takes a search, hence kept."""
    known: dict[str, Callable[[], Quantile]] = {
        "uniform": lambda: lambda u: u,
        "logit-normal": lambda: distributions.logit_normal(of.logit_mean, of.logit_std),
        "shifted": lambda: distributions.shifted(of.shift),
        "heavy-tail": lambda: distributions.heavy_tail(of.mode_scale),
        "beta": lambda: distributions.beta(of.beta_a, of.beta_b),
    }
    quantile = known[of.timesteps]()
    if tokens is not None:
        quantile = distributions.risen(quantile, tokens)
    return distributions.within(quantile, of.min_timestep, of.max_timestep)
