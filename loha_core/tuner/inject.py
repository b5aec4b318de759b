"""Putting LoHa layers, and modules that are saved whole, into a model's tree."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import nn

from ..errors import LoHaError
from ..naming.patterns import path_end
from .config import LoHaConfig
from .layers import LoHaConv1d, LoHaConv2d, LoHaConv3d, LoHaLayer, LoHaLinear
from .saved_modules import SavedModule
from .targets import is_transformers_conv1d

LAYERS: dict[type[nn.Module], type[LoHaLayer]] = {
    nn.Linear: LoHaLinear,
    nn.Conv1d: LoHaConv1d,
    nn.Conv2d: LoHaConv2d,
    nn.Conv3d: LoHaConv3d,
}

Add = Callable[[LoHaLayer], None]
"""What adds an adapter to a layer."""


def new_modules(
    model: nn.Module, adding: Mapping[str, Add], config: LoHaConfig, active: list[str], on_meta: bool
) -> dict[str, nn.Module]:
    """What takes the place of the modules named in ``adding``, and of those in ``config.modules_to_save``.

    A module that is a LoHa layer or wrapped already stays, and gets the adapter.

    Raises:
        LoHaError: a module of a kind that cannot be adapted, or modules_to_save that match nothing. Nothing is
            changed then.
    """
    classes = {name: _class_for(name, model.get_submodule(name)) for name in adding}
    for name in adding:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise LoHaError(
                f"{name}: nn.MultiheadAttention reads this layer's weight and never calls it, so that an adapter would "
                "do nothing; leave it out (exclude_modules)"
            )
    wrappers = _modules_to_save(model, config)
    layers: dict[str, LoHaLayer] = {}
    with torch.device("meta") if on_meta else nullcontext():
        for name, add in adding.items():
            module = model.get_submodule(name)
            layer = module if isinstance(module, LoHaLayer) else classes[name](module)
            layer._active = list(active)
            add(layer)
            if layer is not module:
                layers[name] = layer.train(module.training)
    return {**layers, **wrappers}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _class_for(name: str, module: nn.Module) -> type[LoHaLayer]:
    if isinstance(module, LoHaLayer):
        return type(module)
    if is_transformers_conv1d(module):
        return LoHaLinear
    for base, layer in LAYERS.items():
        if isinstance(module, base):
            return layer
    kinds = ", ".join(kind.__name__ for kind in LAYERS)
    raise LoHaError(f"{name} is a {type(module).__name__}; LoHa adapts {kinds} and transformers' Conv1D only")


def _modules_to_save(model: nn.Module, config: LoHaConfig) -> dict[str, SavedModule]:
    """New wrappers, by the name of what they wrap."""
    if not config.modules_to_save:
        return {}
    named = [(name, m) for name, m in model.named_modules() if name.endswith(tuple(config.modules_to_save))]
    if not named:
        raise LoHaError(f"modules_to_save {config.modules_to_save} match nothing")
    return {name: SavedModule(module) for name, module in named if not isinstance(module, SavedModule)}


def warn_unmatched_patterns(config: LoHaConfig, names: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, float] = getattr(config, field)
        unused = [p for p in patterns if not any(path_end(p).match(name) for name in names)]
        if unused:
            warnings.warn(f"{field}: {', '.join(unused)} match no adapted module", stacklevel=4)


def warn_tied(model: nn.Module, layers: list[LoHaLayer]) -> None:
    """Merging into a weight that another module shares changes that module too."""
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    if any(users[id(layer.weight)] > 1 for layer in layers):
        warnings.warn(
            "an adapted weight is shared with another module (tied embeddings?), which merging changes too; "
            "untie them first if that is not wanted",
            stacklevel=4,
        )
