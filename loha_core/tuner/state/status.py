"""What state a model's adapters are in: PEFT's `get_layer_status` and `get_model_status`, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..layer import LoHaLayer
from ..saved_modules import SavedModule

Adapted = (LoHaLayer, SavedModule)
Irregular = Literal["irregular"]
"""Where layers or parameters are not all in the same state."""


@dataclass
class TunerLayerStatus:
    """One adapted layer, or one module that is saved whole. ``quantization_backend`` is PEFT's, and None here."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: None = None


@dataclass
class TunerModelStatus:
    """All adapted layers of a model together."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: None = None


def of_layer(name: str, module: LoHaLayer | SavedModule) -> TunerLayerStatus:
    of_adapter = {adapter: list(module.parameters_of(adapter)) for adapter in module.adapters}
    return TunerLayerStatus(
        name=name,
        # As PEFT's classes are called.
        module_type=f"loha.{module.base_class.__name__}" if isinstance(module, LoHaLayer) else "ModulesToSaveWrapper",
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters),
        requires_grad={name: _same(p.requires_grad for p in all_of_it) for name, all_of_it in of_adapter.items()},
        available_adapters=sorted(module.adapters),
        devices={name: sorted({p.device.type for p in all_of_it}) for name, all_of_it in of_adapter.items()},
    )


def of_model(
    base: nn.Module,
    model: nn.Module,
    configs: Mapping[str, Any],
    counts: tuple[int, int],
    layers: list[TunerLayerStatus],
) -> TunerModelStatus:
    merged = set[str]().union(*(layer.merged_adapters for layer in layers))
    halfway = any(merged & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    available = sorted(set[str]().union(*(layer.available_adapters for layer in layers)))
    active = {tuple(layer.active_adapters) for layer in layers}
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: config.peft_type.value for name, config in configs.items()},
        trainable_params=counts[0],
        total_params=counts[1],
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers) if layers else "irregular",
        active_adapters="irregular" if len(active) > 1 else list(*active),
        merged_adapters="irregular" if halfway else sorted(merged),
        requires_grad={name: _same(_of_all(layers, "requires_grad", name)) for name in available},
        available_adapters=available,
        devices={name: sorted(set().union(*_of_all(layers, "devices", name))) for name in available},
    )


def _of_all(layers: list[TunerLayerStatus], field: str, adapter: str) -> Iterator[Any]:
    return (values[adapter] for layer in layers if adapter in (values := getattr(layer, field)))


def _same(values: Iterable[bool | Irregular]) -> bool | Irregular:
    found = set(values)
    if found <= {True}:
        return True
    return False if found == {False} else "irregular"
