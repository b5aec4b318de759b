"""Modules that are trained and saved whole: ``modules_to_save``."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class SavedModule(nn.Module):
    """A frozen module and a trainable copy of it per adapter; the first active adapter's copy answers."""

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

    @property
    def current(self) -> nn.Module:
        names = [] if self._disabled else [name for name in self._active if name in self.modules_to_save]
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
