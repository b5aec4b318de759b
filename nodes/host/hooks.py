"""An adapter as one of ComfyUI's hooks: it acts for the conditionings that carry it, and patches no weight.

ComfyUI runs conditionings with different hooks one after the other, and has its patcher hold the hooks of the running
one as ``current_hooks``: there a live update finds whether, and by its keyframes how strongly, it acts. For text
encoders these are the hooks of Set CLIP Hooks, at the keyframe that is being encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from comfy import patcher_extension
from comfy.hooks import EnumHookScope, EnumHookType, EnumWeightTarget, Hook, HookGroup
from comfy.patcher_extension import WrappersMP

from loha_core import Adapter, LoHaError
from loha_core.errors import check_number
from loha_core.formats.describe import is_text

from . import live, patches
from .injection import KEY
from .patches import CLIP, MODEL
from .updates import LiveUpdate, SamplingCall, acts


class LiveHook(Hook):
    """An adapter that acts where conditionings carry this hook, as strongly as its keyframes say."""

    # Clones share these, as they share hook_ref.
    adapter: Adapter
    blocks: patches.Blocks | None
    strengths: dict[str, float]  # by network

    def __init__(self) -> None:
        # Of the types of hook, this is the one that ComfyUI registers for text encoders too.
        super().__init__(hook_type=EnumHookType.Weight, hook_scope=EnumHookScope.HookedOnly)

    def clone(self) -> LiveHook:
        clone: LiveHook = super().clone()
        clone.adapter, clone.blocks, clone.strengths = self.adapter, self.blocks, self.strengths
        return clone

    def add_hook_patches(
        self, model: Any, model_options: dict[str, Any] | None, target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """ComfyUI asks this of each hook: of the conditionings' when sampling begins, of a CLIP's in Set CLIP Hooks.

        Raises:
            LoHaError: nothing matches, a shape does not fit, live mode cannot reach a layer, or the model samples in a
                way that hooks of this kind do not know.
        """
        if not self.should_register(model, model_options, target_dict, registered):
            return False
        if target_dict.get("target") == EnumWeightTarget.Clip:
            _add_to_clip(self, model)
        else:
            if model_options is None:
                raise LoHaError(
                    "LoHa hooks on a diffusion model act while a sampler of ComfyUI's runs, which this call does not "
                    "come from: put them on the conditioning by Cond Set Props"
                )
            run = _Run.of(model, model_options)
            run.updates += self._updates(model, MODEL, run.call)
        registered.add(self)  # also if it does nothing here: ComfyUI fails on conditionings whose hooks are not known
        return True

    def _updates(self, patcher: Any, label: str, call: SamplingCall) -> list[LiveUpdate]:
        strength = self.strengths[label]
        if strength == 0:
            return []
        if not any(is_text(name) == (label == CLIP) for name in (*self.adapter.layers, *self.adapter.extras)):
            logging.info("LoHa: %s has no layers for the %s; its hook does nothing there.", self.adapter.source, label)
            return []
        model, clip = (patcher, None) if label == MODEL else (None, SimpleNamespace(cond_stage_model=patcher.model))
        bound = patches.find(self.adapter, model, clip, self.blocks or (lambda key, name: 1.0))
        acting = [patch for patch in bound.patches[label] if acts(strength, patch.block_strength)]
        if why := live.why_unsupported(patcher, acting):
            raise LoHaError(
                f"{self.adapter.source}: {why}. LoHa Hook acts live only: hook this file by Create Hook LoRA instead, "
                "or apply it to all of the picture by Load LoHa with mode at merge"
            )
        return [LiveUpdate(patch, strength, call=call, hook=self) for patch in acting]


def create(
    adapter: Adapter, strength_model: float, strength_clip: float, blocks: patches.Blocks | None = None
) -> HookGroup:
    """A group of one hook; of none where both strengths are 0.

    Raises:
        LoHaError: a strength is not finite.
    """
    check_number("strength_model", strength_model)
    check_number("strength_clip", strength_clip)
    hook, group = LiveHook(), HookGroup()
    hook.adapter, hook.blocks, hook.strengths = adapter, blocks, {MODEL: strength_model, CLIP: strength_clip}
    if strength_model or strength_clip:
        group.add(hook)
    return group


class _Run:
    """Around one run of a sampler: as long as that lasts, its patcher is a clone on which the hooks' updates are live.

    It lies in the options that ComfyUI makes for each run, so nothing of it stays on a patcher.
    """

    def __init__(self, call: SamplingCall) -> None:
        self.call = call
        self.updates: list[LiveUpdate] = []

    @classmethod
    def of(cls, patcher: Any, model_options: dict[str, Any]) -> _Run:
        """The run that these options are of; its first hook begins it."""
        if patcher.get_additional_models_with_key("multigpu"):
            raise LoHaError("LoHa hooks act on one GPU, and this model samples on several: take MultiGPU off the model")
        runs = patcher_extension.get_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY, model_options, True)
        if runs:
            return runs[0]  # type: ignore[no-any-return]
        run = cls(live.carried(patcher).call)
        patcher_extension.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run, model_options, True)
        if not patcher_extension.get_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY, model_options, True):
            patcher_extension.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, run.call, model_options, True)
        return run

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper around ``CFGGuider.outer_sample``."""
        guider = executor.class_obj
        patcher = guider.model_patcher
        guider.model_patcher = clone = patcher.clone()
        live.carry(clone, (*live.carried(patcher).updates, *self.updates), self.call)
        try:
            return executor(*args, **kwargs)
        finally:
            clone.eject_model()
            guider.model_patcher = patcher


def _add_to_clip(hook: LiveHook, patcher: Any) -> None:
    """``patcher`` is the clone that Set CLIP Hooks has made; hooks set there before act no longer."""
    before = live.carried(patcher)
    group: Iterable[Hook] = patcher.forced_hooks.hooks if patcher.forced_hooks else ()
    kept = [u for u in before.updates if u.hook is None or (u.hook != hook and u.hook in group)]
    new = hook._updates(patcher, CLIP, before.call)
    if new or len(kept) < len(before.updates):
        live.carry(patcher, (*kept, *new), before.call)
