"""A LoHaModel's adapters to and from files."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ...adapter import WRAPPER, Adapter
from ...bind import Network, bind, weight_key
from ...errors import LoHaError
from ...factors import LoHaFactors
from ...formats import load_adapter, peft
from ...naming import spelling
from ...naming.respell import like
from ...transform import lowrank
from ..config import LoHaConfig
from ..layer import LoHaLayer
from ..saved_modules import SavedModule
from ..targets import is_target, is_transformers_conv1d, modules


@dataclass
class Loaded:
    """What a file has for one model: factors and whole modules' states by module name; and what did not fit.

    Attributes:
        missing: PEFT's keys of what the configuration asks for and the file has not.
        unexpected: keys of what the file has and the model no place for.
    """

    config: LoHaConfig
    layers: dict[str, LoHaFactors]
    saved: dict[str, dict[str, Tensor]]
    missing: list[str]
    unexpected: list[str]


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
    """What ``path`` has for ``model``, and the configuration that describes it. Warns of what does not fit.

    Args:
        config: takes the place of the folder's own, and is changed.

    Raises:
        LoHaError: nothing fits, or shapes say that it was made for another model.
    """
    adapter = load_adapter(path)
    if config is None:
        file = (path if os.path.isdir(path) else path.parent) / peft.CONFIG_NAME
        config = LoHaConfig.from_pretrained(file) if adapter.dialect == "peft" and os.path.isfile(file) else None
    config = LoHaConfig() if config is None else LoHaConfig.of(config)
    bases = {name: getattr(module, "base_layer", module) for name, module in model.named_modules() if name}
    weights = {n: w for n, m in bases.items() if isinstance(w := getattr(m, "weight", None), Tensor) and w.dim() > 1}
    shapes = {n: _shape(bases[n], w) for n, w in weights.items()}
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
    extras = [key for key in adapter.extras if not any(key.removeprefix(WRAPPER).startswith(f"{m}.") for m in saved)]
    if unused := [*bound.report.unmatched, *extras]:
        warnings.warn(f"{path}: {len(unused)} keys not applied: {', '.join(unused[:5])}", stacklevel=4)
    layers_left = {name: adapter.layers[name] for name in bound.report.unmatched if name in adapter.layers}
    unexpected = [*(peft.tensors_of(layers_left) if adapter.dialect == "peft" else layers_left), *extras]
    missing = list(_missing(model, config, layers, saved, shapes))
    if missing:
        warnings.warn(f"{path}: Found missing adapter keys while loading: {', '.join(missing[:5])}", stacklevel=4)
    vars(config).update(vars(config.describing(layers)))
    return Loaded(config, layers, saved, missing, unexpected)


def _missing(
    model: nn.Module,
    config: LoHaConfig,
    layers: Container[str],
    saved: Container[str],
    adaptable: Container[str],
) -> Iterator[str]:
    """Keys of what the configuration means in the model and the file has not."""
    for name, module in modules(model):
        is_meant = config.target_modules is not None and name in adaptable and is_target(config, name)
        if is_meant and name not in layers:
            yield from (f"{WRAPPER}{name}.hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if name not in saved and name.endswith(tuple(config.modules_to_save or ())):
            original = getattr(module, "original_module", module)
            yield from (f"{WRAPPER}{name}.{key}" for key in original.state_dict())


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
