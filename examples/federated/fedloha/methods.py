"""What is learned, what of it travels, and what stays with a client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loha_core import LoHaConfig, LoHaModel
from loha_core.fedpara import factorize, global_parameters, local_parameters, plan

from . import data
from .nets import low_rank, net


@dataclass
class Learner:
    """A model, the tensors that travel, those that stay, and how it sees a picture."""

    model: nn.Module
    shared: dict[str, Tensor]
    private: dict[str, Tensor]
    see: Callable[[Tensor], Tensor] = lambda x: x


def learner(config: Mapping[str, Any]) -> Learner:
    """By ``method``; the first values are the same wherever this runs."""
    torch.manual_seed(config["seed"])
    model = net(config["net"], data.pictures(config["data"])[0].shape[-1], config["width"])
    return METHODS[config["method"]](model, config)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def plain(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """FedAvg of all weights."""
    return Learner(model, _parameters(model), {})


def fedpara(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """All weights but the last layer's as W₁∘W₂ (Hyeon-Woo et al., arXiv 2108.06098)."""
    form = {"tucker": config["tucker"], "fan": config["fan"], "activation": config["activation"] or None}
    factorize(model, config["gamma"], **form, skip=("head",))
    return Learner(model, global_parameters(model), {})


def low_rank_of_equal_size(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """The layers that FedPara factorizes, as low-rank ones of as many parameters."""
    for layer in plan(model, config["gamma"], tucker=config["tucker"], skip=("head",)).layers:
        if layer.rank:
            parent, _, name = layer.name.rpartition(".")
            plain_layer: Any = model.get_submodule(layer.name)
            setattr(model.get_submodule(parent), name, low_rank(plain_layer, layer.after))
    return Learner(model, _parameters(model), {})


def pfedpara(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """W = W₁∘(W₂ + 1) in all layers: W₁ travels, W₂ stays."""
    factorize(model, config["gamma"], tucker=config["tucker"], fan=config["fan"], personal=True)
    return Learner(model, global_parameters(model), local_parameters(model))


def pfedpara_and_head(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """pFedPara in all layers but the last, which stays as FedPer's does."""
    head = {key: t for key, t in _parameters(model).items() if key.startswith("head.")}
    factorize(model, config["gamma"], tucker=config["tucker"], fan=config["fan"], personal=True, skip=("head",))
    shared = {key: t for key, t in global_parameters(model).items() if key not in head}
    return Learner(model, shared, local_parameters(model) | head)


def fedper(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """FedPer (Arivazhagan et al., arXiv 1912.00818): the last layer stays."""
    tensors = _parameters(model)
    head = {key for key in tensors if key.startswith("head.")}
    return Learner(model, {k: t for k, t in tensors.items() if k not in head}, {k: tensors[k] for k in head})


def local(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """Nothing travels: every client by itself."""
    return Learner(model, {}, _parameters(model))


def adapter(model: nn.Module, config: Mapping[str, Any]) -> Learner:
    """A LoHa on a frozen model that can read digits, for digits that are turned by a quarter and inverted."""
    model.load_state_dict(_base(config["net"], config["data"], config["width"]))
    kinds = (nn.Linear, nn.Conv2d)
    targets = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    rank = config["rank"]
    adapted = LoHaModel(model, LoHaConfig(r=rank, alpha=rank, target_modules=targets, init_weights="balanced"))
    shared = {
        f"{name}.{part}": getattr(layer, part)["default"]
        for name, layer in adapted.loha_layers()
        for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    }
    return Learner(adapted, shared, {}, see=turned)


def turned(x: Tensor) -> Tensor:
    """Another domain than the base was trained on."""
    return -x.rot90(1, (2, 3))


@cache
def _base(name: str, source: str, width: int) -> dict[str, Tensor]:
    """A model trained on the pictures that no client of "adapter" has: the same wherever it is made."""
    x, y = (values[data.base_part(source)] for values in data.pictures(source))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net(name, x.shape[-1], width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(8):
            for places in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[places]), y[places]).backward()
                optimizer.step()
    return model.state_dict()


METHODS: dict[str, Callable[[nn.Module, Mapping[str, Any]], Learner]] = {
    "plain": plain,
    "low-rank": low_rank_of_equal_size,
    "fedpara": fedpara,
    "pfedpara": pfedpara,
    "pfedpara-head": pfedpara_and_head,
    "fedper": fedper,
    "local": local,
    "adapter": adapter,
}
