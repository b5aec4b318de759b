"""LoHa layers on a model whose module tree, names and weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..tuner.forwards import acting_as
from ..tuner.layer import LoHaLayer
from .digest import digest
from .losses.strength import Strength


@contextmanager
def attached(layers: Iterable[LoHaLayer]) -> Iterator[None]:
    """While this lasts, each layer's base module acts with its adapters."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.standing_in())
        yield


@contextmanager
def recomputing(blocks: Iterable[nn.Module], strength: Strength | None = None) -> Iterator[None]:
    """Gradient checkpointing (arXiv 1604.06174): each block keeps its input only, and runs again in the backward.

    Args:
        strength: of the layers in the blocks, where a loss changes it.
    """
    strength = strength or Strength()

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return strength.recomputed(forward, *args, **kwargs)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(acting_as(block, run))
        yield


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's norms and biases: few numbers, which any fine-tuning moves, and no adapter.

    They are rounded to bfloat16, so that the dtype in which the model was loaded does not matter.
    """
    vectors = ((name, p) for name, p in model.named_parameters() if p.dim() == 1 and p.is_floating_point())
    return digest([(name, p.detach().to(torch.bfloat16)) for name, p in vectors])


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A model's blocks: the entries of its direct lists of modules."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return [block for entries in lists for block in entries if any(True for _ in block.parameters())]
