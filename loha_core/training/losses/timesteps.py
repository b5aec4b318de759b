"""Distributions of times in (0, 1), from the clean picture to noise, by their quantile functions.

uniform         u
logit-normal    σ(m + s·Φ⁻¹(u))                               (SD3, arXiv 2403.03206, eq. 19)
heavy-tail      u′ = 1 − u: 1 − u′ − s·(cos²(π/2·u′) − 1 + u′)  (mode sampling with heavy tails, eq. 20 there)
shifted         s·u / (1 + (s − 1)·u)                         (eq. 23 there)
beta            of density t^(a−1)·(1 − t)^(b−1) / B(a, b)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Timesteps = Literal["uniform", "logit-normal", "shifted", "heavy-tail", "beta"]
Quantile = Callable[[float], float]

# Of `heavy_tail`: beyond these it is no quantile function any more.
MODE_SCALES = -1.0, 2 / (math.pi - 2)
# Flux: the logit's rise at so many tokens of 2×2 latents, linear between and beyond (256² and 1024² pixels).
TOKENS, SHIFTS = (256, 4096), (0.5, 1.15)

_NORMAL = NormalDist()
_TINY = 2.0**-53


def logit_normal(mean: float, std: float) -> Quantile:
    return lambda u: _sigmoid(mean + std * _NORMAL.inv_cdf(u))


def shifted(shift: float) -> Quantile:
    return lambda u: shift * u / (1 + (shift - 1) * u)


def heavy_tail(scale: float) -> Quantile:
    """Little of the middle and more of both ends for ``scale`` < 0, the other way round for > 0; 0 is uniform."""
    return lambda u: u - scale * (math.cos(math.pi / 2 * (1 - u)) ** 2 - u)


def beta(a: float, b: float) -> Quantile:
    """By a table over the logit x, in which the density σ(x)^a·σ(−x)^b is smooth for every a and b above 0."""
    x, cumulative = _beta_table(a, b)

    def quantile(u: float) -> float:
        place = min(max(int(torch.searchsorted(cumulative, u)), 1), len(x) - 1)
        low, high = float(cumulative[place - 1]), float(cumulative[place])
        part = (u - low) / (high - low) if high > low else 0.5
        return _sigmoid(float(torch.lerp(x[place - 1], x[place], part)))

    return quantile


@lru_cache(32)
def _beta_table(a: float, b: float) -> tuple[Tensor, Tensor]:
    """Logits, and how much lies below each: float64."""
    mode = math.log(a / b)

    def log_density(x: Tensor) -> Tensor:
        return a * F.logsigmoid(x) + b * F.logsigmoid(-x)

    def end(side: int) -> float:
        highest, reach = log_density(torch.tensor(mode, dtype=torch.float64)), 1e-3
        while highest - log_density(torch.tensor(mode + side * reach, dtype=torch.float64)) < 40:
            reach *= 1.5
        return mode + side * reach

    x = torch.linspace(end(-1), end(1), 20_001, dtype=torch.float64)
    log = log_density(x)
    cumulative = torch.cumulative_trapezoid((log - log.max()).exp(), x)
    cumulative = torch.cat([cumulative.new_zeros(1), cumulative / cumulative[-1]])
    return x, cumulative


def risen(quantile: Quantile, tokens: int) -> Quantile:
    """The same with the shift that Flux has for a picture of so many tokens: more noise for larger ones.

    t → e^µ / (e^µ + 1/t − 1), which adds µ to the logit.
    """
    (few, many), (least, most) = TOKENS, SHIFTS
    shift = math.exp(least + (most - least) * (tokens - few) / (many - few))
    return lambda u: shifted(shift)(quantile(u))


def within(quantile: Quantile, low: float, high: float) -> Quantile:
    """The distribution on the condition that low ≤ t ≤ high."""
    if (low, high) == (0, 1):
        return quantile
    below, upto = (_cumulative(quantile, t) for t in (low, high))
    return lambda u: min(max(quantile(_inside(below + (upto - below) * u)), low), high)


def _cumulative(quantile: Quantile, time: float) -> float:
    """How much lies below a time, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if quantile(_inside(middle)) < time else (low, middle)
    return (low + high) / 2


def _inside(u: float) -> float:
    return min(max(u, _TINY), 1 - _TINY)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
