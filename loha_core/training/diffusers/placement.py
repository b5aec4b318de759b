"""Where the frozen weights of `loha train` are, and in how many bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LoHaError
from ...tuner.layer import LoHaLayer
from ..attach import blocks_of, recomputing
from ..losses.strength import Strength
from ..swap import Swap, pin, swapping


def place(model: Any, layers: Iterable[LoHaLayer], accelerator: Any, wait: Collection[Tensor] = ()) -> None:
    """Move to this process's device all but what waits; under FSDP its part of the frozen weights, and all factors.

    Raises:
        LoHaError: something is to wait under FSDP, which itself moves the weights.
    """
    device = accelerator.device
    if accelerator.distributed_type != "FSDP":
        waiting = set(map(id, wait))
        for tensor in chain(model.parameters(), model.buffers()) if wait else ():
            if id(tensor) not in waiting:
                tensor.data = tensor.data.to(device)
        if not wait:
            model.to(device)
        elif device.type == "cuda":
            pin(wait)
        return
    if wait:
        raise LoHaError("blocks_to_swap has no place under FSDP, which shards the frozen weights; set it to 0")
    from accelerate.utils import fsdp2_prepare_model

    factors = [part for layer in layers for part in layer.children() if isinstance(part, nn.ParameterDict)]
    for part in factors:
        part.to(device)
    accelerator.state.fsdp_plugin.ignored_modules = factors
    fsdp2_prepare_model(accelerator, model)


def blocks_in(model: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """The blocks of the named lists, or of all of the model's."""
    return [block for name in names for block in getattr(model, name)] or blocks_of(model)


@contextmanager
def swapped(
    blocks: list[nn.Module], wait: Collection[Tensor], device: torch.device, strength: Strength
) -> Iterator[Swap | None]:
    """While this lasts, what waits comes a block ahead, and the blocks run again in the backward."""
    if not wait:
        yield None
        return
    with swapping(blocks, wait, device) as swap, recomputing(blocks, strength):
        yield swap


def to_nf4_(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Keep the linear layers in a model's blocks in 4 bits (QLoRA, arXiv 2305.14314); they compute in ``dtype``.

    Raises:
        LoHaError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise LoHaError('[model] quantisation = "nf4" needs bitsandbytes: pip install bitsandbytes') from None
    for block in blocks_of(model):
        for part in block.modules():
            for name, layer in [(n, child) for n, child in part.named_children() if type(child) is nn.Linear]:
                has_bias = layer.bias is not None
                packed = Linear4bit(layer.in_features, layer.out_features, has_bias, dtype, True, "nf4", device="meta")
                packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                packed.bias = layer.bias
                setattr(part, name, packed.to(device))
