"""Which layers of a model are factorized, at what rank, and what that saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from ..errors import LoHaError, about, check_number
from . import ranks
from .layers import FedParaLayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The last is nn.MultiheadAttention's own name for a linear layer.
KINDS = (nn.Linear, *CONVOLUTIONS, nn.modules.linear.NonDynamicallyQuantizableLinear)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class LayerPlan(NamedTuple):
    """One layer: its rank, or 0 where it stays as it is since its factors would not be fewer numbers."""

    name: str
    shape: tuple[int, ...]
    rank: int
    least: int
    most: int
    tucker: bool

    @property
    def before(self) -> int:
        """Numbers of the weight."""
        return prod(self.shape)

    @property
    def after(self) -> int:
        """Numbers of its factors."""
        return ranks.parameter_count(self.shape, self.rank, self.tucker) if self.rank else self.before


@dataclass(frozen=True)
class Plan:
    """What `factorize` does to a model; ``print`` it.

    Attributes:
        layers: those that could be factorized, in the model's order.
        others: how many parameters the model has elsewhere: biases, norms, embeddings, layers that are skipped.
    """

    layers: tuple[LayerPlan, ...]
    others: int

    @property
    def before(self) -> int:
        """Parameters of the model as it is."""
        return self.others + sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Parameters of the factorized model."""
        return self.others + sum(layer.after for layer in self.layers)

    def lines(self) -> Iterator[str]:
        for layer in self.layers:
            what = f"rank {layer.rank} of {layer.least}…{layer.most}" if layer.rank else "stays as it is"
            yield f"{layer.name or 'model':24} {layer.shape!s:20} {what:24} {layer.before:>10,} → {layer.after:>10,}"
        yield f"{self.before:,} parameters → {self.after:,}, of {self.before / self.after:.2f} times fewer"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def plan(
    model: nn.Module, gamma: float = 0.1, *, rank: int | None = None, tucker: bool = True, skip: Collection[str] = ()
) -> Plan:
    """Ranks and parameter counts, without changing the model (which may be on the meta device).

    Args:
        gamma: r = (1 − γ)·r_min + γ·r_max for each layer, from 0 to 1.
        rank: the same for all layers, instead of gamma.
        tucker: factors of kernels of more than one element have Tucker cores.
        skip: names of modules to leave as they are with all that is in them, or ends of names, as ``"head"``.

    Raises:
        LoHaError: values out of range, a name in ``skip`` that no module has, or a layer that cannot be factorized;
            names it and says why.
    """
    if rank is not None:
        check_number("rank", rank, minimum=1, integer=True)
    check_number("gamma", gamma, minimum=0, maximum=1)
    layers = dict(candidates(model, skip))
    plans = []
    for name, module in layers.items():
        shape = tuple(module.weight.shape)  # type: ignore[union-attr,arg-type]
        with_core = tucker and prod(shape[2:]) > 1
        least, most = ranks.least_rank(shape, with_core), ranks.most_rank(shape, with_core)
        chosen = ranks.rank_of(gamma, shape, with_core) if rank is None else rank if rank <= most else 0
        plans.append(LayerPlan(name, shape, chosen, least, most, with_core))
    has_shape = (p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter))
    return Plan(tuple(plans), sum(p.numel() for p in has_shape) - sum(each.before for each in plans))


def candidates(model: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Layers that can be factorized, by name.

    Raises:
        LoHaError: one looks like such a layer, but is none.
    """
    if isinstance(skip, str):
        raise LoHaError(f"skip is {skip!r}; expected a list of names")
    named = [(name, module) for name, module in model.named_modules()]
    if unknown := [entry for entry in skip if not any(_within(name, entry) for name, _ in named)]:
        raise LoHaError(f"skip names {', '.join(unknown)}, which the model does not have; print(model) shows its names")
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, module in named:
        if not _looks_like_one(module) or any(_within(name, entry) for entry in skip):
            continue
        with about(name or type(module).__name__):
            if fault := _fault(module, users):
                raise LoHaError(f"{fault}; leave it out (skip)")
        yield name, module


def _within(name: str, entry: str) -> bool:
    """Whether a module is the one that ``entry`` names, by its whole path or the end of it, or lies in it."""
    return f".{entry}." in f".{name}."


def _looks_like_one(module: nn.Module) -> bool:
    return not isinstance(module, FedParaLayer) and (
        isinstance(module, KINDS) or type(module).__name__ in {kind.__name__ for kind in KINDS}
    )


def _fault(module: nn.Module, users: Counter[int]) -> str | None:
    """Why a layer cannot be factorized, or None."""
    weight = module._parameters.get("weight")
    if torch.nn.utils.parametrize.is_parametrized(module) or (isinstance(module, KINDS) and weight is None):
        return "its weight is parametrized, so that it is no parameter of its own; remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "is lazy and has no shape yet; run a batch through the model first"
    if type(module) not in KINDS:
        return f"is a {type(module).__module__}.{type(module).__qualname__}, whose forward may be another's"
    assert weight is not None
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}; FedPara's are plain and floating point"
    if users[id(weight)] > 1:
        return "its weight is tied: another module has the same; untie them"
    if not weight.requires_grad:
        return "is frozen; FedPara learns its weight from scratch"
    if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
        return "has hooks or another forward, which would be lost; remove them first"
    return None
