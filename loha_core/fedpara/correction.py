"""Jacobian correction (arXiv 2108.06098, supplement): factors that move as their weight would."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from ..algebra import Factors
from ..errors import LoHaError
from .model import fedpara_layers


class JacobianCorrection:
    """½·Σ‖W' − (W − η·J_W)‖² over a model's layers: W' is of the factors after one step of gradient descent.

    J_W and the factors' own gradients J are taken as they are; W and W' are differentiated. While it is open the layers
    make their weights for autograd to keep, which takes the memory of a plain model, and each step has one more
    backward.

        with JacobianCorrection(model) as correction:
            loss = criterion(model(x), y)
            penalty = correction(loss, lr)
        (loss + strength * penalty).backward()

    Raises:
        LoHaError: the model has no FedPara layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for _, layer in fedpara_layers(model)]

    def __enter__(self) -> JacobianCorrection:
        for layer in self._layers:
            layer._weights = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for layer in self._layers:
            layer._weights = None

    def __call__(self, loss: Tensor, lr: float) -> Tensor:
        """The penalty, a scalar to add to ``loss``, from which it takes the gradients.

        Args:
            loss: of the model's forward since this was opened.
            lr: η, the optimizer's.

        Raises:
            LoHaError: no layer took part in a forward since then.
        """
        used = [layer for layer in self._layers if layer._weights]
        if not used:
            raise LoHaError("no FedPara layer has run since the correction was opened; run the model inside of it")
        factors = [layer.factors() for layer in used]
        learned = [t for f in factors for t in f if t is not None and t.requires_grad]
        weights = [weight for layer in used for weight in layer._weights or ()]
        gradients = iter(torch.autograd.grad(loss, [*weights, *learned], retain_graph=True))
        # A layer that ran several times made its weight as often.
        wanted = [(layer._weights or [])[0] - lr * sum(next(gradients) for _ in layer._weights or ()) for layer in used]
        total = loss.new_zeros(())
        for layer, f, target in zip(used, factors, wanted, strict=True):
            moved = (t if t is None or not t.requires_grad else t - lr * next(gradients) for t in f)
            total = total + 0.5 * (layer.weight_of(Factors._make(moved)) - target).square().sum().to(total.dtype)
        return total
