"""Which live adapters act on a model now: those of the patcher that is loaded, as ComfyUI's `PatcherInjection` says."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.utils
from comfy.patcher_extension import PatcherInjection
from torch import nn

from loha_core import LoHaError
from loha_core.bind import weight_key

from . import versions
from .acting import ActingLayer
from .tokens import layout_of
from .updates import LiveUpdate, SamplingCall
from .varying import VaryingLayer

KEY = "loha"  # one injection for all live adapters of a model


@dataclass
class _Injected:
    """What acts on a model now."""

    live: LiveAdapters
    owner: int  # id of the patcher that injected
    layers: list[ActingLayer]


class LiveAdapters(PatcherInjection):
    """All live adapters of one patcher and its clones.

    Clones share a model, and at most one LiveAdapters acts on it; some have another model (torch.compile, several
    GPUs), so nothing that belongs to a model is kept here. ComfyUI ejects a patcher's injection when it loads another,
    but not when a patcher is garbage-collected: see `eject_with`.
    """

    injected: weakref.WeakKeyDictionary[nn.Module, _Injected] = weakref.WeakKeyDictionary()

    def __init__(self, updates: tuple[LiveUpdate, ...], call: SamplingCall) -> None:
        super().__init__(inject=self._inject, eject=self._eject)
        self.updates, self.call = updates, call

    @cached_property
    def by_key(self) -> dict[str, list[LiveUpdate]]:
        by_key: dict[str, list[LiveUpdate]] = defaultdict(list)
        for update in self.updates:
            by_key[weight_key(update.patch.target)].append(update)
        return by_key

    def _inject(self, patcher: Any) -> None:
        eject(patcher.model)
        modules: dict[str, dict[str, list[LiveUpdate]]] = defaultdict(dict)
        for key, updates in self.by_key.items():
            path, _, parameter = key.rpartition(".")
            modules[path][parameter] = updates
        layout = layout_of(patcher.model) if any(update.region for update in self.updates) else None
        layers: list[ActingLayer] = []
        for path, parameters in modules.items():
            module = comfy.utils.get_attr(patcher.model, path)
            if any(update.varies for updates in parameters.values() for update in updates):
                layers.append(VaryingLayer(module, path, parameters, layout))
            else:
                layers.append(ActingLayer(module, path, parameters))
        LiveAdapters.injected[patcher.model] = _Injected(self, id(patcher), layers)
        self.call.patcher = weakref.ref(patcher)
        try:
            for layer in layers:
                layer.start()
        except LoHaError:
            eject(patcher.model)
            raise
        versions.forget_graphs(patcher.model)
        versions.call_layers_with_links()

    def _eject(self, patcher: Any) -> None:
        if (injected := LiveAdapters.injected.get(patcher.model)) is not None and injected.live is self:
            eject(patcher.model)


def live_of(patcher: Any) -> LiveAdapters | None:
    """A patcher's live adapters."""
    injections = patcher.get_injections(KEY)
    return injections[0] if injections else None


def eject(model: nn.Module) -> None:
    """Let the live adapters of a model, if it has any, act no longer."""
    if (injected := LiveAdapters.injected.pop(model, None)) is None:
        return
    for layer in injected.layers:
        layer.stop()
    versions.forget_graphs(model)
    idle = [layer for layer in injected.layers if not layer.ran]
    if hasattr(model, "diffusion_model") and 0 < len(idle) < len(injected.layers):
        logging.warning(
            "LoHa: %d of %d layers with a live adapter were never called, such as %s (%s). If the picture lacks them, "
            "set mode to merge.", len(idle), len(injected.layers), idle[0].path, type(idle[0].module).__name__,
        )  # fmt: skip


def eject_with(patcher: Any) -> None:
    """Eject when ``patcher`` is garbage-collected, if it is then the one that injected."""
    weakref.finalize(patcher, _eject_owner, weakref.ref(patcher.model), id(patcher)).atexit = False


def _eject_owner(reference: weakref.ref[nn.Module], patcher: int) -> None:
    model = reference()
    if model is not None and model in LiveAdapters.injected and LiveAdapters.injected[model].owner == patcher:
        eject(model)


def renew(patcher: Any) -> None:
    """Before sampling: links that another pack has pushed aside act again."""
    if (injected := LiveAdapters.injected.get(patcher.model)) is not None:
        for layer in injected.layers:
            layer.renew()
