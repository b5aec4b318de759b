"""A LoHaModel's adapters to and from files."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ..adapter import WRAPPER, Adapter
from ..bind import Network, bind, weight_key
from ..errors import LoHaError
from ..factors import LoHaFactors
from ..formats import load_adapter, peft
from ..naming import spelling
from ..naming.respell import like
from ..transform import lowrank
from .config import LoHaConfig
from .layer import LoHaLayer
from .saved_modules import SavedModule
from .targets import is_transformers_conv1d


@dataclass
class Loaded:
    """What a file has for one model: factors and whole modules' states by module name."""

    config: LoHaConfig
    layers: dict[str, LoHaFactors]
    saved: dict[str, dict[str, Tensor]]


def to_adapter(
    layers: Iterable[tuple[str, LoHaLayer]], saved: Iterable[tuple[str, SavedModule]], adapter_name: str
) -> Adapter:
    """Factors by module name at strength 1, and the modules that are saved whole as extras."""
    factors = {
        name: replace(layer.factors(adapter_name), alpha=layer._full_scale[adapter_name] * layer.r[adapter_name])
        for name, layer in layers
        if adapter_name in layer.hada_w1_a
    }
    extras = {
        f"{WRAPPER}{name}.{key}": tensor.detach()
        for name, module in saved
        if adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }
    return Adapter(factors, extras, dialect="peft")


def save(adapter: Adapter, config: LoHaConfig, folder: Path) -> None:
    """PEFT's two files. Nothing is written unless everything can be."""
    if any(f.dora_scale is not None for f in adapter.layers.values()):
        raise LoHaError(
            f"{folder}: PEFT's LoHa format cannot hold DoRA; save it with "
            "loha_core.save_adapter(model.to_adapter(), 'name.safetensors', format='lycoris')"
        )
    # PEFT's LoHa knows no rs-LoRA: what it does is written as alphas.
    config = config.describing(adapter.layers) if config.use_rslora else copy.deepcopy(config)
    config.inference_mode = True
    config.use_scalar = False  # folded into w1_a
    tensors = adapter.extras | peft.tensors_of(adapter.layers)
    peft.write_folders({folder: peft.Folder(config.to_dict(), tensors)})


def read(model: nn.Module, path: Path, config: LoHaConfig | None) -> Loaded:
    """What ``path`` has for ``model``. Warns of what does not fit.

    Raises:
        LoHaError: nothing fits, or shapes say that it was made for another model.
    """
    adapter = load_adapter(path)
    if config is None:
        file = (path if os.path.isdir(path) else path.parent) / peft.CONFIG_NAME
        config = LoHaConfig.from_pretrained(file) if adapter.dialect == "peft" and os.path.isfile(file) else None
    config = copy.deepcopy(config) if config else LoHaConfig()
    modules = {name: getattr(module, "base_layer", module) for name, module in model.named_modules() if name}
    weights = {n: w for n, m in modules.items() if isinstance(w := getattr(m, "weight", None), Tensor) and w.dim() > 1}
    shapes = {n: _shape(modules[n], w) for n, w in weights.items()}
    # A diffusers U-Net is also found by the names of the original code, and the other way round.
    targets = spelling.aliases(shapes) | {name: name for name in shapes}
    bound = bind(like(adapter, shapes), {"model": Network(targets, shapes)})
    stacks: dict[str, list[LoHaFactors]] = {}
    for _, target, factors in bound.layers["model"]:
        stacks.setdefault(weight_key(target), []).append(factors)
    # Two updates of one weight add up.
    layers = {n: s[0] if len(s) == 1 else lowrank.exact_sum(s, [1.0] * len(s)) for n, s in stacks.items()}
    if not layers:
        raise LoHaError(f"{path}: nothing in it fits this model.\n{bound.report.text(limit=5)}")
    for note in adapter.notes:
        warnings.warn(f"{path}: {note}", stacklevel=4)
    saved = _saved(adapter.extras, config)
    unused = [key for key in adapter.extras if not any(key.removeprefix(WRAPPER).startswith(f"{m}.") for m in saved)]
    unused = [*bound.report.unmatched, *unused]
    if unused:
        warnings.warn(f"{path}: {len(unused)} keys not applied: {', '.join(unused[:5])}", stacklevel=4)
    return Loaded(config, layers, saved)


def _shape(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """As factors see it: out first."""
    shape = tuple(weight.shape)
    return shape[::-1] if is_transformers_conv1d(module) else shape


def _saved(extras: Mapping[str, Tensor], config: LoHaConfig) -> dict[str, dict[str, Tensor]]:
    """Module name -> state, for modules_to_save."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in extras.items():
        path = key.removeprefix(WRAPPER).split(".")
        for cut in range(1, len(path)):
            module = ".".join(path[:cut])
            if module.endswith(tuple(config.modules_to_save or ())):
                saved.setdefault(module, {})[".".join(path[cut:])] = tensor
                break
    return saved
