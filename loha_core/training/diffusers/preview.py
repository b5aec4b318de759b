"""Pictures of what a run has learnt so far, by its pipeline itself. They need what the pipeline needs, and Pillow."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..events import Event, PreviewDue
from ..randomness import fork_rng
from .pipeline import Diffusion
from .settings import PreviewSettings

# Pipelines whose guidance_scale is an input of a distilled model.
_TRUE_CFG = ("QwenImagePipeline",)


class Previews:
    """Writes ``name-000100-1.png`` and so on into a folder. Nothing of the run changes by it.

    Args:
        size: height and width of a latent that is trained on; pictures are about as large.
        writes: whether this is the process that writes.
    """

    def __init__(
        self, diffusion: Diffusion, settings: PreviewSettings, size: Sequence[int], folder: Path, name: str,
        writes: bool = True,
    ) -> None:  # fmt: skip
        self.diffusion, self.settings = diffusion, settings
        # What pipelines ask for.
        step = math.lcm(8, diffusion.multiple)
        self.size = [max(step, diffusion.scale * side // step * step) for side in size]
        self.folder, self.name, self.writes = folder, name, writes

    def __call__(self, event: Event) -> None:
        if not isinstance(event, PreviewDue):
            return
        for number, picture in enumerate(self.pictures(), 1):
            if self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                picture.save(self.folder / f"{self.name}-{event.step:06d}-{number}.png")

    def pictures(self) -> Iterator[Any]:
        """Pillow's, one for each prompt."""
        pipe, s = self.diffusion.pipe, self.settings
        takes = inspect.signature(pipe.__call__).parameters
        options: dict[str, Any] = {"guidance_scale": s.cfg}
        if type(pipe).__name__ in _TRUE_CFG:
            options = {"true_cfg_scale": s.cfg, "negative_prompt": ""}
        if "num_frames" in takes:
            options |= {"num_frames": 1, "output_type": "pil"}
        if "use_resolution_binning" in takes:
            options["use_resolution_binning"] = False  # else other sizes are drawn, and then scaled
        pipe.set_progress_bar_config(disable=True)
        with fork_rng(), self._whole():
            for prompt in s.prompts:
                result = pipe(
                    prompt=prompt, height=self.size[0], width=self.size[1], num_inference_steps=s.steps,
                    generator=torch.Generator().manual_seed(s.seed), **options,
                )  # fmt: skip
                yield result.frames[0][0] if "num_frames" in takes else result.images[0]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """All of the pipeline is on the device, with a scheduler of its own."""
        pipe, model = self.diffusion.pipe, self.diffusion.model
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not model]
        places = [next(part.parameters()).device for part in parts]
        scheduler = pipe.scheduler
        pipe.scheduler = copy.deepcopy(scheduler)
        for part in parts:
            part.to(self.diffusion.device)
        if pipe.vae.dtype != model.dtype:
            pipe.vae.to(model.dtype)  # pictures are encoded by now, so that nothing else needs it in float32
        try:
            yield
        finally:
            pipe.scheduler = scheduler
            for part, place in zip(parts, places, strict=True):
                part.to(place)
