"""Live strength on a ModelPatcher: the base weights stay as they are, and each layer adds its adapters as it runs.

ComfyUI's `PatcherInjection` says while which patcher is loaded. A new strength is a new float in the injection; nothing
is unloaded or copied.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

import comfy.ops
import comfy.utils
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import nn

from loha_core import LoHaError
from loha_core.bind import weight_key
from loha_core.ops.paths import estimate
from loha_core.tuner import forwards

from . import weights
from .acting import ActingLayer, Update, is_operator, why_not_live
from .entries import Entry, SamplingProgress
from .patches import Patch

KEY = "loha"  # one injection for all live adapters of a model


@dataclass
class _Injected:
    """What acts on a model now."""

    live: Live
    owner: int  # id of the patcher that injected
    layers: list[ActingLayer]


class Live(PatcherInjection):
    """All live adapters of one patcher and its clones.

    Clones share a model, and at most one Live acts on it; some have another model (torch.compile, several GPUs), so
    nothing that belongs to a model is kept here. ComfyUI ejects a patcher's injection when it loads another; what it
    does not do is eject when a patcher dies, so that is seen to here.
    """

    _injected: weakref.WeakKeyDictionary[nn.Module, _Injected] = weakref.WeakKeyDictionary()

    def __init__(self, entries: tuple[Entry, ...], progress: SamplingProgress) -> None:
        super().__init__(inject=self._inject, eject=self._eject)
        self.entries, self.progress = entries, progress

    @cached_property
    def by_key(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            found[weight_key(entry.patch.target)].append(entry)
        return found

    def _inject(self, patcher: Any) -> None:
        end(patcher.model)
        modules: dict[str, dict[str, list[Entry]]] = defaultdict(dict)
        for key, entries in self.by_key.items():
            path, _, parameter = key.rpartition(".")
            modules[path][parameter] = entries
        layers = [ActingLayer(comfy.utils.get_attr(patcher.model, path), path, p) for path, p in modules.items()]
        Live._injected[patcher.model] = _Injected(self, id(patcher), layers)
        try:
            for layer in layers:
                layer.start()
        except LoHaError:
            end(patcher.model)
            raise
        _forget_graphs(patcher.model)
        _call_layers()

    def _eject(self, patcher: Any) -> None:
        if (injected := Live._injected.get(patcher.model)) is not None and injected.live is self:
            end(patcher.model)

    def watch(self, patcher: Any) -> None:
        """End with ``patcher``, if it is the one that injected when it dies."""
        weakref.finalize(patcher, _end_with, weakref.ref(patcher.model), id(patcher)).atexit = False


def end(model: nn.Module) -> None:
    """Let the live adapters of a model, if it has any, act no longer."""
    if (injected := Live._injected.pop(model, None)) is None:
        return
    for layer in injected.layers:
        layer.stop()
    _forget_graphs(model)
    idle = [layer for layer in injected.layers if not layer.ran]
    if hasattr(model, "diffusion_model") and 0 < len(idle) < len(injected.layers):
        logging.warning(
            "LoHa: %d of %d layers with a live adapter were never called, such as %s (%s). If the picture lacks them, "
            "set mode to merge.", len(idle), len(injected.layers), idle[0].path, type(idle[0].module).__name__,
        )  # fmt: skip


def _end_with(model: weakref.ref[nn.Module], patcher: int) -> None:
    that = model()
    if that is not None and that in Live._injected and Live._injected[that].owner == patcher:
        end(that)


def _renew(patcher: Any) -> None:
    """Before sampling: links that another pack has pushed aside act again."""
    if (injected := Live._injected.get(patcher.model)) is not None:
        for layer in injected.layers:
            layer.renew()


def _forget_graphs(model: nn.Module) -> None:
    """ComfyUI 0.33 replays CUDA graphs of text encoders' blocks: made with other adapters, they would go on so."""
    for module in model.modules():
        vars(module).pop("_comfy_graph", None)


def _call_layers() -> None:
    """ComfyUI's `linear_input_act` (0.33) reads a layer's weight for one kernel with what surrounds it.

    Where links act in the layer's place it has to call the layer, as it does itself in training.
    """
    fused = getattr(comfy.ops, "linear_input_act", None)
    if fused is None or hasattr(fused, "beside_loha"):
        return

    def linear_input_act(linear: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with weights.in_training() if forwards.has_links(linear) else nullcontext():
            return fused(linear, *args, **kwargs)

    linear_input_act.beside_loha = True  # type: ignore[attr-defined]
    comfy.ops.linear_input_act = linear_input_act


# --- on a ModelPatcher ---------------------------------------------------------------------------


def apply(
    patcher: Any, patches: Iterable[Patch], strength: float, schedule: Callable[[float], float] | None = None
) -> Any:
    """A clone of ``patcher`` with the updates live, on top of those it has; ``patcher`` itself at strength 0.

    Raises:
        LoHaError: an update of a parameter that live mode cannot reach.
    """
    wanted = [patch for patch in patches if patch.share * strength != 0]
    if not wanted:
        return patcher
    if problem := why_unsupported(patcher, wanted):
        raise LoHaError(f"{problem}; set mode to merge")
    before = of(patcher) or Live((), SamplingProgress())
    new = tuple(Entry(patch, strength, schedule, before.progress) for patch in wanted)
    clone = patcher.clone()
    clone.set_injections(KEY, [Live((*before.entries, *new), before.progress)])
    if schedule is not None and KEY not in clone.wrappers.get(WrappersMP.APPLY_MODEL, {}):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, before.progress)
    if not before.entries:
        clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda _, new: _guard(new))
        clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _renew)
    _guard(clone)
    return clone


def of(patcher: Any) -> Live | None:
    """A patcher's live adapters."""
    injections = patcher.get_injections(KEY)
    return injections[0] if injections else None


def patches_of(patcher: Any, key: str) -> list[tuple[Any, ...]]:
    """A weight's live updates, as ``ModelPatcher.patches`` holds updates."""
    live = of(patcher)
    entries = live.by_key.get(key, ()) if live else ()
    if any(entry.schedule for entry in entries):
        raise LoHaError("a LoHa with a schedule has no single strength to merge into a model with")
    return [entry.native(entry.now()) for entry in entries]


def why_unsupported(patcher: Any, patches: Iterable[Patch]) -> str | None:
    """Why some update cannot be live, or None."""
    for patch in patches:
        key = weight_key(patch.target)
        module, parameter = weights.place(patcher.model, key)
        if why := why_not_live(module, parameter, [Update(Entry(patch, 1.0, None, SamplingProgress()))]):
            return f"{key}: {why}"
    return None


def overhead(patcher: Any, patches: Iterable[Patch], tokens: int = 1024) -> float:
    """What live costs beside the layers' own work, estimated for ``tokens`` of input: 0.1 is a tenth more."""
    extra = own = 0.0
    for patch in patches:
        module, parameter = weights.place(patcher.model, weight_key(patch.target))
        update = Update(Entry(patch, 1.0, None, SamplingProgress()))
        shape = weights.shape(module, parameter)
        work = 2.0 * tokens * prod(shape)
        if update.loha is not None and (weights.is_castable(module, parameter) or is_operator(module, update)):
            out, columns = update.loha.shape[0], prod(update.loha.shape[1:])
            cost = estimate(out, columns, update.loha.rank, tokens, training=False, device=patcher.load_device.type)
            extra += cost.cost(cost.best)
            own += 2.0 * tokens * out * columns
        elif not weights.is_castable(module, parameter):
            extra, own = extra + work, own + work  # a second product with the weight
    return extra / own if own else 0.0


_SAVING = (
    "this model carries a live LoHa, which is not in its weights: saving would lose it. "
    "Set mode to merge on the LoHa node, then save."
)


class _CarriesLive:
    """Mixed into the class of a patcher with live adapters: where ComfyUI asks for weights, they are among them."""

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """Some packs (GGUF) set the class of a clone when all else is done."""
        clone = super().clone(*args, **kwargs)  # type: ignore[misc]
        _guard(clone)
        return clone

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """What ComfyUI's model merges read: each weight and its patches."""
        found: dict[str, list[Any]] = super().get_key_patches(filter_prefix)  # type: ignore[misc]
        return {key: [*patches, *patches_of(self, key)] for key, patches in found.items()}

    def partially_load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> Any:
        """Save nodes of ComfyUI 0.3.75 load with force_patch_weights, then write the weights."""
        if force_patch_weights and of(self):
            raise LoHaError(_SAVING)
        return super().partially_load(*args, force_patch_weights=force_patch_weights, **kwargs)  # type: ignore[misc]

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        """What save nodes of ComfyUI 0.33 read."""
        if of(self):
            raise LoHaError(_SAVING)
        return super().model_state_dict_for_saving(*args, **kwargs)  # type: ignore[misc]


@cache
def _carrying(patcher_class: type) -> type:
    return type(f"Live{patcher_class.__name__}", (_CarriesLive, patcher_class), {})


def _guard(patcher: Any) -> None:
    """See to a new clone with live adapters."""
    if (live := of(patcher)) is None:
        return
    if not isinstance(patcher, _CarriesLive):
        patcher.__class__ = _carrying(type(patcher))  # type: ignore[arg-type]
    patcher.is_injected = False  # a clone of an injected patcher is not injected itself, though ComfyUI copies the flag
    live.watch(patcher)
