"""What a diffusion model is trained on: how noisy, what to predict, and how an error counts.

A clean x₀ and noise ε make x = α·x₀ + σ·ε, with α² + σ² = 1 for the models that know a thousand timesteps and
α = 1 − σ for rectified flow. A model's output is one of `PREDICTIONS`; each gives x₀ linearly, x₀ = … + gain·output,
so that an error of the output is |gain| times as large in x₀. With SNR = α²/σ² all weightings follow from that:

    plain             1
    min-SNR-γ         min(SNR, γ) · gain²      (arXiv 2303.09556, eq. 6, for every prediction at once)
    debiased          |gain|                   (arXiv 2310.08442: 1/√SNR for ε)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LoHaError

Timesteps = Literal["uniform", "logit-normal", "shifted"]
Distance = Literal["mse", "huber", "l1"]


class Prediction(NamedTuple):
    """What the output means: target(x₀, ε, α, σ), and gain(α, σ) = ∂x₀/∂output at a given x."""

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
    """How a run draws noise and weighs errors.

    Attributes:
        timesteps: "uniform"; "logit-normal", the logit of a normal with ``logit_mean`` and ``logit_std`` (SD3, arXiv
            2403.03206, eq. 19); "shifted", uniform moved towards noise by ``shift`` (eq. 23 there).
        distance: "mse", "huber" (squared within ``huber_delta``, linear beyond) or "l1".
        min_snr_gamma: γ of min-SNR; 0 is off. 5 is usual.
        debiased: weigh by |gain|; not together with min-SNR.
        noise_offset: strength of noise that is one number per channel; 0.03 to 0.1 lets pictures get dark or bright.

    Raises:
        LoHaError: a value out of its range.
    """

    timesteps: Timesteps = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 3.0
    distance: Distance = "mse"
    huber_delta: float = 0.1
    min_snr_gamma: float = 0.0
    debiased: bool = False
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("timesteps", Timesteps), ("distance", Distance)):
            if getattr(self, name) not in get_args(kind):
                raise LoHaError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kind))}")
        for name, positive in (("logit_std", True), ("shift", True), ("huber_delta", True), ("min_snr_gamma", False)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise LoHaError(f"{name} is {value}; expected a number {'above' if positive else 'from'} 0")
        if not (math.isfinite(self.logit_mean) and math.isfinite(self.noise_offset)):
            raise LoHaError("logit_mean and noise_offset must be finite numbers")
        if self.debiased and self.min_snr_gamma:
            raise LoHaError("debiased and min_snr_gamma are two weightings of the same error; choose one")

    def time(self, generator: torch.Generator) -> float:
        """One draw in (0, 1): the share of the way from the clean picture to noise."""
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        if self.timesteps == "logit-normal":
            z = float(torch.randn((), generator=generator, dtype=torch.float64))
            u = float(torch.sigmoid(torch.tensor(self.logit_mean + self.logit_std * z, dtype=torch.float64)))
        elif self.timesteps == "shifted":
            u = self.shift * u / (1 + (self.shift - 1) * u)
        return min(max(u, 1e-6), 1 - 1e-6)

    def noise(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise for one latent (c, *size), float32 on the CPU: the same on every machine."""
        noise = torch.randn(shape, generator=generator)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
        return noise

    def weight(self, gain: Tensor, snr: Tensor) -> Tensor:
        """How much an output's squared error counts, per sample."""
        if self.min_snr_gamma:
            return snr.clamp(max=self.min_snr_gamma) * gain.square()
        # At the very end of the noise 1/√SNR is unbounded; diffusion trainers cut it there, too.
        return gain.abs().clamp(max=1000.0) if self.debiased else torch.ones_like(gain)

    def loss(
        self,
        output: Tensor,
        target: Tensor,
        gain: Tensor,
        snr: Tensor,
        *,
        mask: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """The mean error of a batch, in float32.

        Args:
            output, target: (n, c, *size).
            gain, snr: (n,).
            mask: (n, 1, *size) in 0…1; what it covers with 0 does not count, and the rest counts as if it were all.
            share: (n,), how much each sample counts: prior preservation.
        """
        error = self._error(output.float(), target.float())
        if mask is None:
            errors = error.flatten(1).mean(1)
        else:
            counted = mask.expand_as(error)
            errors = (error * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1e-6)
        errors = errors * self.weight(gain, snr)
        return (errors if share is None else errors * share).mean()

    def _error(self, output: Tensor, target: Tensor) -> Tensor:
        if self.distance == "mse":
            return F.mse_loss(output, target, reduction="none")
        if self.distance == "l1":
            return F.l1_loss(output, target, reduction="none")
        # Twice torch's: equal to the squared error where that is small.
        return 2 * F.huber_loss(output, target, reduction="none", delta=self.huber_delta)
