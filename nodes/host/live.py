"""Live strength on a ModelPatcher: the base weights stay as they are, and each layer adds its adapters as it runs.

A new strength is a new float in the injection: no weight is unloaded, copied or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from typing import Any

from comfy.patcher_extension import CallbacksMP, WrappersMP

from loha_core import LoHaError
from loha_core.bind import weight_key

from . import weights
from .acting import is_operator, layer_cost, why_not_live
from .injection import KEY, LiveAdapters, eject_with, live_of, renew
from .patches import Patch
from .updates import ActingUpdate, LiveUpdate, SamplingCall


def apply_live(
    patcher: Any, patches: Iterable[Patch], strength: float, schedule: Callable[[float], float] | None = None
) -> Any:
    """A clone of ``patcher`` with the updates live, on top of those it has; ``patcher`` itself at strength 0.

    Raises:
        LoHaError: an update of a parameter that live mode cannot reach.
    """
    patches = [patch for patch in patches if patch.block_strength * strength != 0]
    if not patches:
        return patcher
    if why := why_unsupported(patcher, patches):
        raise LoHaError(f"{why}; set mode to merge")
    before = live_of(patcher) or LiveAdapters((), SamplingCall())
    new = tuple(LiveUpdate(patch, strength, schedule, before.call) for patch in patches)
    clone = patcher.clone()
    clone.set_injections(KEY, [LiveAdapters((*before.updates, *new), before.call)])
    if schedule is not None and KEY not in clone.wrappers.get(WrappersMP.APPLY_MODEL, {}):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, before.call)
    if not before.updates:
        clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda _, new: _guard(new))
        clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, renew)
    _guard(clone)
    return clone


def patches_of(patcher: Any, key: str) -> list[tuple[Any, ...]]:
    """A weight's live updates, as ``ModelPatcher.patches`` holds updates."""
    live = live_of(patcher)
    updates = live.by_key.get(key, ()) if live else ()
    if any(update.schedule for update in updates):
        raise LoHaError("a LoHa with a schedule has no single strength to merge into a model with")
    return [update.native(update.strength_now()) for update in updates]


def why_unsupported(patcher: Any, patches: Iterable[Patch]) -> str | None:
    """Why some update cannot be live, or None."""
    for patch in patches:
        key = weight_key(patch.target)
        module, parameter = weights.place(patcher.model, key)
        if why := why_not_live(module, parameter, [ActingUpdate(LiveUpdate(patch))]):
            return f"{key}: {why}"
    return None


def overhead(patcher: Any, patches: Iterable[Patch], tokens: int = 1024) -> float:
    """What live costs beside the layers' own work, estimated for ``tokens`` of input: 0.1 is a tenth more."""
    added = base = 0.0
    for patch in patches:
        module, parameter = weights.place(patcher.model, weight_key(patch.target))
        update, castable = ActingUpdate(LiveUpdate(patch)), weights.is_castable(module, parameter)
        if update.loha is not None and (castable or is_operator(module, update)):
            cost = layer_cost(module, update.loha, tokens, patcher.load_device.type)
            added += min(cost.khatri_rao.total, cost.rebuild.total)
            base += 2.0 * tokens * prod(update.loha.shape)
        elif not castable:
            product = 2.0 * tokens * prod(weights.shape(module, parameter))
            added, base = added + product, base + product  # a second product with the weight
    return added / base if base else 0.0


# --- the patcher's class ---------------------------------------------------------------------------------------------

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
        merged: dict[str, list[Any]] = super().get_key_patches(filter_prefix)  # type: ignore[misc]
        return {key: [*patches, *patches_of(self, key)] for key, patches in merged.items()}

    def partially_load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> Any:
        """Save nodes of ComfyUI 0.3.75 load with force_patch_weights, then write the weights."""
        if force_patch_weights and live_of(self):
            raise LoHaError(_SAVING)
        return super().partially_load(*args, force_patch_weights=force_patch_weights, **kwargs)  # type: ignore[misc]

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        """What save nodes of ComfyUI 0.33 read."""
        if live_of(self):
            raise LoHaError(_SAVING)
        return super().model_state_dict_for_saving(*args, **kwargs)  # type: ignore[misc]


@cache
def _carrying(patcher_class: type) -> type:
    return type(f"Live{patcher_class.__name__}", (_CarriesLive, patcher_class), {})


def _guard(patcher: Any) -> None:
    """Prepare a new clone, if it has live adapters."""
    if live_of(patcher) is None:
        return
    if not isinstance(patcher, _CarriesLive):
        patcher.__class__ = _carrying(type(patcher))  # type: ignore[arg-type]
    patcher.is_injected = False  # a clone of an injected patcher is not injected itself, though ComfyUI copies the flag
    eject_with(patcher)
