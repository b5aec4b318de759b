"""Reduced pipelines with LoHa layers that do something, and the same model in float64, put together by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from loha_core import LoHaConfig
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.diffusers.pipeline import Diffusion, Feed
from loha_core.training.objectives import Objective
from loha_core.training.randomness import generator

from . import pipelines

CPU = torch.device("cpu")


def diffusion(family: str, *, text: bool = False, **config: Any) -> Diffusion:
    """A pipeline whose LoHa layers are far from zero."""
    d = Diffusion(pipelines.build(family), CPU)
    networks = d.networks(LoHaConfig(**{"r": 2, "alpha": 2.0, "init_weights": "lycoris", **config}), text)
    rng = torch.Generator().manual_seed(1)
    for p in parameters(networks):
        p.data.copy_(0.4 * torch.randn(p.shape, generator=rng))
    for layer in d.strength.layers:
        layer.training = True  # as the Trainer sets it
    return d


def parameters(networks: Mapping[str, Mapping[str, Any]]) -> list[torch.nn.Parameter]:
    return [p for layers in networks.values() for layer in layers.values() for p in layer.parameters_of("default")]


def trained(d: Diffusion) -> list[torch.nn.Parameter]:
    return [p for layer in d.strength.layers for p in layer.parameters_of("default")]


def items(family: str, count: int = 2) -> list[Item]:
    channels = {"sd15": 4, "sdxl": 4, "sd3": 4, "flux": 4}[family]
    return [
        Item(torch.randn(channels, 8, 8, generator=generator("item", number)), f"a cat, number {number}")
        for number in range(count)
    ]


def feed(d: Diffusion, dataset: Dataset, objective: Objective | None = None, batch_size: int = 2) -> Feed:
    return Feed(d, dataset, objective or Objective(), batch_size, 7)


class Exactly:
    """The model of ``family`` without LoHa layers, in float64; updates are added to its weights by hand."""

    def __init__(self, family: str, d: Diffusion) -> None:
        self.d = Diffusion(pipelines.build(family), CPU)
        self.encode = self.d.encode
        self.d.model.double()
        self.d.model.requires_grad_(False)
        layers = {name: m for name, m in d.model.named_modules() if hasattr(m, "hada_w1_a")}
        self.factors = {
            name: [p.detach().double().requires_grad_() for p in layer.parameters_of("default")]
            for name, layer in layers.items()
        }
        self.scales = {name: layer.scaling["default"] for name, layer in layers.items()}

    def at(self, strength: float) -> dict[str, Tensor]:
        """Weights of the model, with (w1_a w1_b) ∘ (w2_a w2_b) added."""
        weights = dict(self.d.model.named_parameters())
        for name, (a1, b1, a2, b2) in self.factors.items():
            base = weights[f"{name}.weight"]
            delta = self.scales[name] * (a1 @ b1) * (a2 @ b2)
            weights[f"{name}.weight"] = base + strength * delta.view(base.shape)
        return weights

    def output(self, noisy: Tensor, timesteps: Tensor, prompts: Sequence[str], strength: float) -> Tensor:
        encoded = [self.encode(prompt) for prompt in prompts]
        weights, model = self.at(strength), self.d.model
        asked = _Called(model, weights)
        self.d.model = asked
        try:
            return self.d.output(noisy.double(), timesteps, encoded)
        finally:
            self.d.model = model

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [p for factors in self.factors.values() for p in factors]))


class _Called:
    """A model that is called with other weights."""

    def __init__(self, model: Any, weights: dict[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.weights, args, kwargs)


def close(found: Sequence[Tensor | None], wanted: Sequence[Tensor], rel: float) -> None:
    """All gradients together, and each that is not small beside the others."""
    a = torch.cat(
        [(torch.zeros_like(w) if f is None else f.double()).flatten() for f, w in zip(found, wanted, strict=True)]
    )
    b = torch.cat([w.flatten() for w in wanted])
    assert float((a - b).norm()) <= rel * float(b.norm()) > 0
