"""Models of ComfyUI's real classes with random weights, an adapter for each, and a call as samplers make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from loha_core import Adapter, LoHaFactors

from ..reduced_families import variants, weights_of
from . import reduced
from .test_families import model_of

PICTURES, TEXT = 2, 7


@dataclass(frozen=True)
class Case:
    """A model, and what it is asked.

    Attributes:
        build: the ModelPatcher, with weights of a fixed seed.
        latent: (channels, …, height, width).
        context: width of the text's tokens.
        more: inputs of ``apply_model`` for so many rows.
    """

    build: Callable[[], Any]
    latent: tuple[int, ...]
    context: int
    more: Callable[[int], dict[str, Any]] = lambda rows: {}
    text: int = TEXT


def family(name: str, variant: int = 0, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        kind, settings = variants(name)[variant].comfyui
        model = model_of(kind, settings | changes, torch.device("cpu"))
        for buffer in model.diffusion_model.buffers():
            if buffer.is_floating_point():
                buffer.data.normal_()
        for parameter in model.diffusion_model.parameters():
            # Norms near 1; the others as wide as keeps the size of what passes.
            size = 0.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.05
            values = torch.randn(parameter.shape) * size + (parameter.dim() == 1 and 0.5)
            parameter.data = values.to(parameter.dtype)
            parameter.requires_grad_(False)
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return build


def _vector(width: int) -> Callable[[int], dict[str, Any]]:
    return lambda rows: {"y": torch.randn(rows, width)}


def _guided(width: int | None) -> Callable[[int], dict[str, Any]]:
    vector = {} if width is None else {"y": width}
    return lambda rows: {"guidance": torch.full((rows,), 3.5)} | {k: torch.randn(rows, n) for k, n in vector.items()}


CASES = {
    "SD1.5": Case(lambda: reduced.build("sd15", narrow=True).model, (4, 16, 24), 64, text=77),
    "SDXL": Case(lambda: reduced.build("sdxl", narrow=True).model, (4, 16, 24), 128, _vector(64 + 6 * 256), text=77),
    "SD1.5, odd": Case(lambda: reduced.build("sd15", narrow=True).model, (4, 17, 23), 64, text=77),
    "SD3": Case(lambda: reduced.build("sd3").model, (16, 16, 24), 4096, _vector(128)),
    "SD3.5": Case(family("SD3", 1), (16, 6, 8), 24, _vector(20)),
    "Flux": Case(family("Flux"), (16, 16, 24), 24, _guided(20)),
    "Flux, odd": Case(family("Flux"), (16, 15, 23), 24, _guided(20)),
    "Flux.2": Case(family("Flux.2"), (64, 8, 12), 24, _guided(None)),
    "Chroma": Case(family("Chroma"), (16, 16, 24), 24, _guided(None)),
    "Qwen-Image": Case(family("Qwen-Image"), (16, 1, 16, 24), 24),
    "Wan": Case(family("Wan"), (16, 3, 16, 24), 20),
    "Wan i2v": Case(family("Wan", 1), (16, 3, 16, 24), 20, lambda rows: {
        "c_concat": torch.randn(rows, 20, 3, 16, 24), "clip_fea": torch.randn(rows, 257, 1280)
    }),
    "HunyuanVideo": Case(family("HunyuanVideo"), (16, 3, 16, 24), 24, _guided(20)),
    "HunyuanImage": Case(family("HunyuanImage 2.1"), (64, 8, 12), 24, _guided(None)),
    "Z-Image": Case(
        family("Z-Image", dim=256, axes_dims=[32, 48, 48]), (16, 16, 20), 20, lambda rows: {"num_tokens": TEXT}
    ),
    "Lumina 2": Case(family("Lumina 2"), (16, 16, 24), 20, lambda rows: {"num_tokens": TEXT}),
    "AuraFlow": Case(family("AuraFlow"), (4, 8, 8), 24),
    "PixArt": Case(family("PixArt", 1), (4, 64, 96), 20),
    "LTX-Video": Case(family("LTX-Video"), (20, 3, 8, 12), 24, lambda rows: {"attention_mask": None}),
    "Cosmos-Predict2": Case(family("Cosmos-Predict2"), (16, 1, 16, 24), 20),
    "Anima": Case(family("Anima"), (16, 1, 16, 24), 20),
}  # fmt: skip


def adapter_for(patcher: Any, size: float = 0.3, rank: int = 2) -> Adapter:
    """A LoHa for every layer that multiplies; ``size`` is that of its update beside the weight."""
    layers = {}
    state = patcher.model.diffusion_model.state_dict()
    for n, (name, shape) in enumerate(weights_of(patcher.model.diffusion_model).items()):
        if name.endswith("llm_adapter") or f"{name}.weight" not in state:
            continue
        rng = torch.Generator().manual_seed(n)
        a, b = (torch.randn(2, *s, generator=rng) for s in ((shape[0], rank), (rank, prod(shape[1:]))))
        factors = LoHaFactors(a[0], b[0], a[1], b[1], float(rank))
        weight = state[f"{name}.weight"].float()
        scale = size * weight.norm() / factors.delta().norm()
        layers[f"diffusion_model.{name}"] = LoHaFactors(a[0] * scale, b[0], a[1], b[1], float(rank))
    return Adapter(layers, source="random.safetensors")


def call(patcher: Any, case: Case, pictures: int = PICTURES, chunks: int = 2, **more: Any) -> Tensor:
    """What the model makes of the batch with both conditionings stacked, (chunks · pictures, …)."""
    comfy.model_management.load_models_gpu([patcher])
    torch.manual_seed(5)
    rows = pictures * chunks
    x = torch.randn(rows, *case.latent)
    context = torch.randn(rows, case.text, case.context)
    inputs = case.more(rows) | more
    sigma = float(patcher.model.model_sampling.percent_to_sigma(0.3))
    sigmas = {"sigmas": torch.tensor([sigma]), "sample_sigmas": torch.tensor([sigma, 0.5 * sigma, 0.0])}
    options = {"wrappers": patcher.wrappers, "cond_or_uncond": list(range(chunks)), **sigmas}
    with torch.inference_mode():
        return patcher.model.apply_model(
            x, torch.full((rows,), sigma), c_crossattn=context, transformer_options=options, **inputs
        )
