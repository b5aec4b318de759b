"""A client's own learning, and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loha_core.federated.flower.client import proximal
from loha_core.fedpara import JacobianCorrection

from .methods import Learner

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0),
    "sgd": torch.optim.SGD,
}


def learn(learner: Learner, x: Tensor, y: Tensor, config: Mapping[str, Any], mu: float, seed: int) -> float:
    """``epochs`` over a client's own pictures, by an optimizer that begins anew; returns the mean loss of the last one.

    Args:
        mu: of FedProx's term; 0 for none.
        seed: of the order of the pictures.
    """
    model = learner.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = {key: tensor.detach().clone() for key, tensor in learner.shared.items()}
    optimizer = OPTIMIZERS[config["optimizer"]](parameters, lr=config["lr"])
    correction = JacobianCorrection(model) if config["jacobian"] else None
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(config["epochs"]):
        losses = []
        for places in torch.randperm(len(y), generator=generator).split(config["batch-size"]):
            with correction or nullcontext():
                loss = F.cross_entropy(model(x[places]), y[places])
                penalty = correction(loss, config["lr"]) if correction else 0.0
            losses.append(float(loss.detach()))
            loss = loss + config["jacobian"] * penalty
            if mu:
                loss = loss + mu * proximal(learner.shared, start)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
    return sum(losses) / len(losses)


def score(learner: Learner, x: Tensor, y: Tensor) -> dict[str, float]:
    """Mean loss and accuracy."""
    with torch.no_grad():
        predicted = learner.model.eval()(x)
        right = (predicted.argmax(1) == y).float().mean()
        return {"loss": float(F.cross_entropy(predicted, y)), "accuracy": float(right)}
