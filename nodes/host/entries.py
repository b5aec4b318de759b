"""One live update, how strong it is, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .patches import Patch


@dataclass
class SamplingProgress:
    """How far sampling has come, 0…1; set before each call of the diffusion model."""

    percent: float = 0.0

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper around ``apply_model``; t is sigma."""
        self.percent = percent_of(float(t.max()), executor.class_obj.model_sampling)
        return executor(x, t, *args, **kwargs)


def percent_of(sigma: float, model_sampling: Any) -> float:
    """The inverse of ``percent_to_sigma``, which falls from percent 0 to 1; by bisection, for every kind of model."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return (low + high) / 2


@dataclass
class Entry:
    """One live update of one weight."""

    patch: Patch
    strength: float
    schedule: Callable[[float], float] | None
    progress: SamplingProgress

    def now(self) -> float:
        """The strength at this moment of sampling."""
        strength = self.strength * self.patch.share
        return strength * self.schedule(self.progress.percent) if self.schedule else strength

    def native(self, strength: float) -> tuple[Any, ...]:
        """As ``ModelPatcher.patches`` holds it."""
        target = self.patch.target
        offset, function = (None, None) if isinstance(target, str) else (*target[1:], None)[:2]
        return (strength, self.patch.update, 1.0, offset, function)
