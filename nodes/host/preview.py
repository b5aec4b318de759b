"""Pictures of what a run has learnt so far, by ComfyUI's own sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import numpy as np
import torch
from PIL import Image

from .training import TrainingRun


@dataclass(frozen=True)
class Preview:
    """How previews are sampled and decoded."""

    prompts: Sequence[str]
    steps: int
    cfg: float
    vae: Any

    def pictures(self, run: TrainingRun, patcher: Any) -> list[Image.Image]:
        """A picture for each prompt, from one noise; the model is then loaded for training again."""
        pictures = [self._picture(run, patcher, prompt) for prompt in self.prompts]
        comfy.model_management.load_models_gpu([patcher], memory_required=run.memory())
        return pictures

    def _picture(self, run: TrainingRun, patcher: Any, prompt: str) -> Image.Image:
        """Of the size of the dataset's first item."""
        latent, seed = run.sampler.dataset.items[0].latent[None], run.config.seed
        positive, negative = _conditioning(run, prompt), _conditioning(run, "")
        with torch.no_grad():
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
            sampled = comfy.sample.sample(
                patcher, noise, self.steps, self.cfg, "euler", "normal", positive, negative, torch.zeros_like(latent),
                seed=seed, disable_pbar=True,
            )  # fmt: skip
            pictures = self.vae.decode(sampled)
        picture = pictures.reshape(-1, *pictures.shape[-3:])[0].clamp(0, 1)
        return Image.fromarray((picture.float().cpu().numpy() * 255).round().astype(np.uint8))


def _conditioning(run: TrainingRun, prompt: str) -> Any:
    """The prompt's; where no text encoder is at hand, the first item's, or one of zeros for an empty prompt."""
    with torch.no_grad():
        if run.clip is not None:
            return run.clip.encode_from_tokens_scheduled(run.clip.tokenize(prompt))
        conditioning = run.sampler.dataset.items[0].conditioning
        if conditioning is None:
            return run.sampler.dataset.encode(prompt)
        return conditioning if prompt or not isinstance(conditioning, list) else _zeros(conditioning)


def _zeros(conditioning: Any) -> Any:
    """As ComfyUI's ConditioningZeroOut does."""
    return [
        [torch.zeros_like(t), {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in o.items()}]
        for t, o in conditioning
    ]
