"""Modules that are trained and saved whole: ``modules_to_save``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn


class SavedModule(nn.Module):
    """A frozen module and a trainable copy of it per adapter; the active adapter's copy answers."""

    adapter_layer_names = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()
    merged_adapters: tuple[str, ...] = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active: list[str] = []
        self._disabled = False

    def add(self, adapter_name: str, inference_mode: bool) -> None:
        clone = copy.deepcopy(self.original_module)
        clone.requires_grad_(adapter_name in self._active and not inference_mode)
        self.modules_to_save[adapter_name] = clone

    def set_adapter(self, names: list[str], inference_mode: bool = False) -> None:
        self._active = names
        first = next((name for name in names if name in self.modules_to_save), None)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name == first and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled

    def parameters_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        return self.modules_to_save[adapter_name].parameters() if adapter_name in self.modules_to_save else iter(())

    @property
    def adapters(self) -> list[str]:
        """Names of those that have a copy."""
        return list(self.modules_to_save)

    @property
    def active_adapters(self) -> list[str]:
        """Names of those that are active and have a copy."""
        return [name for name in self._active if name in self.modules_to_save]

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def current(self) -> nn.Module:
        names = [] if self._disabled else self.active_adapters
        return self.modules_to_save[names[0]] if names else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.current, name)
