"""What newer versions of ComfyUI (0.33 and later) need beside the oldest that is supported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.model_management
import comfy.ops
from torch import nn

from loha_core.tuner import forwards


@contextmanager
def in_training() -> Iterator[None]:
    """While this is set, ComfyUI calls layers rather than kernels that have no backward."""
    before = getattr(comfy.model_management, "in_training", False)
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def call_layers_with_links() -> None:
    """Let ComfyUI call a layer in whose place links act, as it does in training.

    Its `linear_input_act` reads a layer's weight by itself, for one kernel with the activation before it.
    """
    fused = getattr(comfy.ops, "linear_input_act", None)
    if fused is None or hasattr(fused, "calls_layers_with_links"):
        return

    def linear_input_act(linear: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with in_training() if forwards.has_links(linear) else nullcontext():
            return fused(linear, *args, **kwargs)

    linear_input_act.calls_layers_with_links = True  # type: ignore[attr-defined]
    comfy.ops.linear_input_act = linear_input_act


def forget_graphs(model: nn.Module) -> None:
    """Drop the CUDA graphs of text encoders' blocks, which replay the adapters that they were captured with."""
    for module in model.modules():
        vars(module).pop("_comfy_graph", None)
