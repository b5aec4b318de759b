"""A LoHaModel's adapters to and from files."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..adapter import WRAPPER, Adapter
from ..bind import Network, bind
from ..errors import LoHaError
from ..factors import LoHaFactors
from ..formats import load_adapter
from ..formats.container import check_finite, write_tensors
from ..naming import spelling
from ..naming.respell import like
from ..transform import lowrank
from .config import CONFIG_NAME, LoHaConfig

if TYPE_CHECKING:
    from .model import LoHaModel

WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass
class Loaded:
    """What a file has for one model."""

    config: LoHaConfig
    layers: dict[str, LoHaFactors]
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def collect(model: LoHaModel, adapter_name: str) -> Adapter:
    """Factors by module name at strength 1, and the modules that are saved whole as extras."""
    layers = {}
    for name, layer in model.layers():
        if adapter_name in layer.hada_w1_a:
            factors = layer.factors(adapter_name)
            layers[name] = replace(factors, alpha=layer._full_scale[adapter_name] * factors.rank)
    extras = {
        f"{WRAPPER}{name}.{key}": tensor.detach()
        for name, module in model._saved_modules()
        if adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }
    return Adapter(layers, extras, dialect="peft")


def save(model: LoHaModel, adapter_name: str, folder: Path) -> None:
    """PEFT's two files. Nothing is written unless everything can be."""
    adapter = collect(model, adapter_name)
    config = copy.deepcopy(model.peft_config[adapter_name])
    if any(f.dora_scale is not None for f in adapter.layers.values()):
        raise LoHaError(
            f"{folder}: PEFT's LoHa format cannot hold DoRA; save it with "
            "loha_core.save_adapter(model.to_adapter(), 'name.safetensors', format='lycoris')"
        )
    if config.use_rslora:
        # PEFT's LoHa knows no rs-LoRA: what it does is written as alphas.
        config = config.describing(adapter.layers)
    config.inference_mode = True
    config.use_scalar = False  # folded into w1_a
    tensors = dict(adapter.extras)
    for name, factors in adapter.layers.items():
        for part, tensor in factors.tensors().items():
            # PEFT has Conv1d's core as (r, r, k, 1).
            shaped = tensor.unsqueeze(3) if part in ("t1", "t2") and tensor.dim() == 3 else tensor
            tensors[f"{WRAPPER}{name}.hada_{part}"] = shaped
    for key, tensor in tensors.items():
        check_finite(tensor, f"{folder}: refusing to save {key}")
    write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    config.save_pretrained(folder)


def read(model: nn.Module, path: Path, config: LoHaConfig | None) -> Loaded:
    """What ``path`` has for ``model``. Warns of what does not fit.

    Raises:
        LoHaError: nothing fits, or shapes say that it was made for another model.
    """
    adapter = load_adapter(path)
    if config is None:
        folder = path if path.is_dir() else path.parent
        found = (folder / CONFIG_NAME).is_file() and adapter.dialect == "peft"
        config = LoHaConfig.from_pretrained(folder) if found else LoHaConfig()
    config = copy.deepcopy(config)
    modules = {name: _unwrapped(module) for name, module in model.named_modules() if name}
    weights = {n: w for n, m in modules.items() if isinstance(w := getattr(m, "weight", None), Tensor) and w.dim() > 1}
    shapes = {n: _shape(modules[n], w) for n, w in weights.items()}
    # A diffusers U-Net is also found by the names of the original code, and the other way round.
    targets = spelling.aliases(shapes) | {name: name for name in shapes}
    bound = bind(like(adapter, shapes), {"model": Network(targets, shapes)})
    stacks: dict[str, list[LoHaFactors]] = {}
    for _, name, factors in bound.layers["model"]:
        stacks.setdefault(name, []).append(factors)
    # Two updates of one weight add up.
    layers = {n: s[0] if len(s) == 1 else lowrank.exact_sum(s, [1.0] * len(s)) for n, s in stacks.items()}
    if not layers:
        raise LoHaError(f"{path}: nothing in it fits this model.\n{bound.report.text(limit=5)}")
    for note in adapter.notes:
        warnings.warn(f"{path}: {note}", stacklevel=4)
    saved = _saved(adapter.extras, config)
    left = [key for key in adapter.extras if not any(_under(key, name) for name in saved)]
    if bound.report.unmatched or left:
        shown = ", ".join([*bound.report.unmatched, *left][:5])
        warnings.warn(f"{path}: {len(bound.report.unmatched) + len(left)} keys not applied: {shown}", stacklevel=4)
    return Loaded(config, layers, saved)


def _unwrapped(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def _shape(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """As factors see it: out first."""
    from .targets import is_transformers_conv1d

    shape = tuple(weight.shape)
    return shape[::-1] if is_transformers_conv1d(module) else shape


def _saved(extras: dict[str, Tensor], config: LoHaConfig) -> dict[str, dict[str, Tensor]]:
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


def _under(key: str, module: str) -> bool:
    return key.removeprefix(WRAPPER).startswith(f"{module}.")
