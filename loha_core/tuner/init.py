"""Shapes and first values of an adapter's parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..algebra import factor_shapes
from .config import LoHaConfig


def create(shape: tuple[int, ...], rank: int, tucker: bool, config: LoHaConfig) -> dict[str, Tensor]:
    """New float32 factors for a weight of ``shape`` (o, i, *k), by parameter name.

    On the default device. They are drawn in PEFT's order, or in LyCORIS', so that the same seed gives the same
    values there and here.
    """
    new = {f"hada_{name}": torch.empty(s) for name, s in factor_shapes(shape, rank, tucker).items()}
    if config.init_weights == "lycoris":
        _lycoris(new, config.use_scalar)
    elif config.init_weights == "balanced":
        _balanced(new, rank, math.prod(shape[1:]), config.use_scalar)
    else:
        # A scalar of zero and a factor of zero would both wait for the other to move.
        _peft(new, zero=config.init_weights is not False and not config.use_scalar)
    if config.use_scalar:
        new["scalar"] = torch.zeros(()) if config.init_weights is not False else torch.ones(())
    return new


def _peft(new: dict[str, Tensor], zero: bool) -> None:
    """Kaiming uniform as for nn.Linear; w2_b is zero."""
    for name, tensor in new.items():
        if zero and name == "hada_w2_b":
            nn.init.zeros_(tensor)
        else:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def _lycoris(new: dict[str, Tensor], scalar: bool) -> None:
    """Standard deviation 0.1 outside and in the core, 1 inside; w2_a is zero."""
    deviations = {"hada_t1": 0.1, "hada_t2": 0.1, "hada_w1_b": 1.0, "hada_w1_a": 0.1, "hada_w2_b": 1.0}
    for name, std in deviations.items():
        if name in new:
            nn.init.normal_(new[name], std=std)
    if scalar:
        nn.init.normal_(new["hada_w2_a"], std=0.1)
    else:
        nn.init.zeros_(new["hada_w2_a"])


def _balanced(new: dict[str, Tensor], rank: int, fan_in: int, scalar: bool) -> None:
    """All factors are about as large, so that none hardly learns: σ√2 inside, σ/2 outside, σ in the core; w2_a is zero.

    Zero on the output's side, as a LoRA: with w2_b at zero instead, the same LoHa learnt less (docs/recipes.md). An
    optimizer that moves every element by its rate η, as Adam does, first moves ΔW by r·σ³·η (root mean square) and
    that of a LoRA of rank R = 2r, whose A has the variance 1 / 3i, by √(R / 3i)·η. σ makes them equal. Tucker factors
    have a core in each half: r²·σ⁵·η.
    """
    sizes = {"a": 0.5, "b": math.sqrt(2)}  # (1/2)·√2·√2 = 1
    tucker = "hada_t1" in new
    move = math.sqrt(2 * rank / (3 * fan_in))
    std = (move / rank**2) ** (1 / 5) if tucker else (move / rank) ** (1 / 3)
    for name, tensor in new.items():
        if name == "hada_w2_a" and not scalar:
            nn.init.zeros_(tensor)
        else:
            nn.init.normal_(tensor, std=std * sizes.get(name[-1], 1.0))
