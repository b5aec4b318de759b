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

from . import tokens, weights
from .acting import is_operator, layer_cost, why_not_live
from .injection import KEY, LiveAdapters, eject_with, live_of, renew
from .patches import Patch, Strength
from .regions import Region
from .updates import ActingUpdate, LiveUpdate, SamplingCall, acts, agreed


def apply_live(
    patcher: Any,
    patches: Iterable[Patch],
    strength: Strength,
    schedule: Callable[[float], float] | None = None,
    region: Region | None = None,
) -> Any:
    """A clone of ``patcher`` with the updates live, on top of those it has; ``patcher`` itself at strength 0.

    Args:
        strength: one, or one for each picture of the batch that will be sampled.
        region: where in the picture the updates act.

    Raises:
        LoHaError: an update of a parameter that live mode cannot reach; strengths for different numbers of pictures; a
            region on a model, or a layer, whose tokens' places are not known.
    """
    patches = [patch for patch in patches if acts(strength, patch.block_strength)]
    if not patches:
        return patcher
    if region is not None:
        tokens.count_seeing(patcher.model, [weight_key(patch.target) for patch in patches])
        region = None if region.is_everywhere else region
    if why := why_unsupported(patcher, patches):
        raise LoHaError(f"{why}; set mode to merge")
    before = carried(patcher)
    new = tuple(LiveUpdate(patch, strength, schedule, before.call, region=region) for patch in patches)
    agreed(update.pictures for update in (*before.updates, *new))
    clone = patcher.clone()
    needs_call = schedule is not None or any(update.varies for update in new)
    if needs_call and KEY not in clone.wrappers.get(WrappersMP.APPLY_MODEL, {}):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, before.call)
    if region is not None and KEY not in clone.wrappers.get(WrappersMP.PREDICT_NOISE, {}):
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, before.call.of_sampler)
    carry(clone, (*before.updates, *new), before.call)
    return clone


def carried(patcher: Any) -> LiveAdapters:
    """What a patcher has live now, perhaps nothing."""
    return live_of(patcher) or LiveAdapters((), SamplingCall())


def carry(clone: Any, updates: Iterable[LiveUpdate], call: SamplingCall) -> None:
    """Let a new clone have just these updates, those of hooks after the others."""
    clone.set_injections(KEY, [LiveAdapters(tuple(sorted(updates, key=lambda u: u.hook is not None)), call)])
    if not clone.get_callbacks(CallbacksMP.ON_CLONE, KEY):
        clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda _, new: _guard(new))
        clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, renew)
    _guard(clone)


def patches_of(patcher: Any, key: str) -> list[tuple[Any, ...]]:
    """A weight's live updates, as ``ModelPatcher.patches`` holds updates; those of hooks are not among them."""
    live = live_of(patcher)
    updates = [update for update in live.by_key.get(key, ()) if update.hook is None] if live else []
    for update in updates:
        if update.schedule or update.varies:
            what = "a schedule" if update.schedule else "a region" if update.region else "a strength for each picture"
            raise LoHaError(f"a LoHa with {what} has no single strength to merge into a model with")
    return [update.native(update.strength_now()) for update in updates]


def why_unsupported(patcher: Any, patches: Iterable[Patch]) -> str | None:
    """Why some update cannot be live, or None."""
    for patch in patches:
        key = weight_key(patch.target)
        module, parameter = weights.place(patcher.model, key)
        if why := why_not_live(module, parameter, [ActingUpdate(LiveUpdate(patch))]):
            return f"{key}: {why}"
    return None


def overhead(patcher: Any, patches: Iterable[Patch], count: int = 1024) -> float:
    """What live costs beside the layers' own work, estimated for ``count`` tokens of input: 0.1 is a tenth more."""
    added = base = 0.0
    for patch in patches:
        module, parameter = weights.place(patcher.model, weight_key(patch.target))
        update, castable = ActingUpdate(LiveUpdate(patch)), weights.is_castable(module, parameter)
        if update.loha is not None and (castable or is_operator(module, update)):
            cost = layer_cost(module, update.loha, count, patcher.load_device.type)
            added += min(cost.khatri_rao.total, cost.rebuild.total)
            base += 2.0 * count * prod(update.loha.shape)
        elif not castable:
            product = 2.0 * count * prod(weights.shape(module, parameter))
            added, base = added + product, base + product  # a second product with the weight
    return added / base if base else 0.0


def about_region(patcher: Any, patches: Iterable[Patch], region: Region) -> str:
    """Which share of the layers sees the picture, what becomes of the others, and the cost."""
    patches = list(patches)
    seeing = tokens.count_seeing(patcher.model, [weight_key(patch.target) for patch in patches])
    share = sum(region.shares) / len(region.shares)
    others = {"share": f"at {share:.0%} of the strength", "off": "not at all", "full": "in full"}[region.placeless]
    return (
        f"region: {share:.0%} of the picture. {seeing} of {len(patches)} layers see the picture and act there; the "
        f"others see text or the time alone and act {others}. "
        f"One pass; live adds about {overhead(patcher, patches):.0%}"
    )


# --- the patcher's class ---------------------------------------------------------------------------------------------

_SAVING = (
    "this model carries a live LoHa, which is not in its weights: saving would lose it. "
    "Set mode to merge on the LoHa node, or take the model before its hooks were set, then save."
)


class _CarriesLive:
    """Mixed into the class of a patcher with live adapters: where ComfyUI asks for weights, they are among them."""

    current_hooks: Any  # the patcher's own
    hook_patches: dict[Any, Any]
    hook_backup: dict[str, Any]
    injections: dict[str, list[Any]]

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """Some packs (GGUF) set the class of a clone when all else is done."""
        clone = super().clone(*args, **kwargs)  # type: ignore[misc]
        _guard(clone)
        return clone

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """What ComfyUI's model merges read: each weight and its patches."""
        merged: dict[str, list[Any]] = super().get_key_patches(filter_prefix)  # type: ignore[misc]
        return {key: [*patches, *patches_of(self, key)] for key, patches in merged.items()}

    def patch_hooks(self, hooks: Any) -> None:
        """Hooks that patch no weight need no ejection; those that do patch the weights as they are without ours."""
        hooked = any(self.hook_patches.get(hook.hook_ref) for hook in (hooks.hooks if hooks else ()))
        if not hooked and not self.hook_backup:
            self.current_hooks = hooks
            return
        with self.use_ejected():  # type: ignore[attr-defined]
            live = self.injections.pop(KEY)
            try:
                super().patch_hooks(hooks)  # type: ignore[misc]
            finally:
                self.injections[KEY] = live

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
