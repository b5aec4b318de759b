"""What the nodes do to a model: merge an adapter into its weights, or let it act live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from loha_core import Adapter, LoHaError, Report
from loha_core.errors import check_number

from . import live, patches
from .patches import CLIP, MODEL
from .regions import Region
from .updates import pictures_of

Mode = Literal["auto", "merge", "live"]
MODES: tuple[str, ...] = get_args(Mode)

# The share of a step that live may add, by estimate, for "auto" to choose it.
MAX_LIVE_OVERHEAD = 0.15


def apply(
    model: Any,
    clip: Any,
    adapter: Adapter,
    strength_model: float | Sequence[float],
    strength_clip: float,
    *,
    mode: str = "auto",
    blocks: patches.Blocks | None = None,
    schedule: Callable[[float], float] | None = None,
    region: Region | None = None,
) -> tuple[Any, Any, Report]:
    """Clones of ``model`` and ``clip`` (either may be None) with the adapter, and what matched.

    Args:
        strength_model: one, or one for each picture of the batch that will be sampled; that needs live.
        mode: "merge" patches the weights; "live" leaves them alone and adds the update as layers run; "auto" is live
            where that is cheap and possible.
        blocks: (weight key, name in the file) -> multiplier of the strength, for all pictures or for each.
        schedule: multiplier of strength_model over the progress of sampling; needs live.
        region: where in the picture the adapter acts; needs live. Text encoders see no place: strength_clip is
            multiplied by what the region says of such layers.

    Raises:
        LoHaError: nothing matches, a shape does not fit, a strength is not finite, or the mode cannot do it. Model and
            clip are then untouched.
    """
    strength = tuple(strength_model) if isinstance(strength_model, Sequence) else strength_model
    for each in strength if isinstance(strength, tuple) else (strength,):
        check_number("strength_model", each)
    if strength == ():
        raise LoHaError("strength_model is an empty list; expected a number, or one for each picture of the batch")
    check_number("strength_clip", strength_clip)
    if mode not in MODES:
        raise LoHaError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if schedule is not None and mode == "merge":
        raise LoHaError(
            "a schedule changes the strength while sampling, which merged weights cannot; choose live or auto"
        )
    if region is not None and mode == "merge":
        raise LoHaError("merged weights act on all of the picture, which a region cannot; choose live or auto")
    bound = patches.find(adapter, model, clip, blocks or (lambda key, name: 1.0))
    varies = any(pictures_of(strength, patch.block_strength) for patch in bound.patches.get(MODEL, ()))
    if mode == "auto":
        mode = (
            "live"
            if varies or schedule is not None or region is not None or _is_better_live(model, clip, bound)
            else "merge"
        )
    bound.report.notes.append(f"mode: {mode}")
    if mode == "merge":
        return (
            patches.merge(model, bound.patches.get(MODEL, ()), strength),
            patches.merge(clip, bound.patches.get(CLIP, ()), strength_clip),
            bound.report,
        )
    if region is not None:
        strength_clip *= region.text_gain
        if model is not None:
            bound.report.notes.append(live.about_region(model, bound.patches[MODEL], region))
    if clip is not None:
        patcher = live.apply_live(clip.patcher, bound.patches[CLIP], strength_clip)
        if patcher is not clip.patcher:
            clip = clip.clone()
            clip.patcher = patcher
    if model is not None:
        model = live.apply_live(model, bound.patches[MODEL], strength, schedule, region)
    return model, clip, bound.report


def _is_better_live(model: Any, clip: Any, bound: patches.Bound) -> bool:
    """Live is possible, and cheap, or the weights cannot be written."""
    patchers = {MODEL: model, CLIP: clip and clip.patcher}
    updates = [(patchers[label], each) for label, each in bound.patches.items()]
    if any(live.why_unsupported(patcher, each) for patcher, each in updates):
        return False
    if any(patches.why_not_merged(patcher, (patch.target for patch in each)) for patcher, each in updates):
        return True
    return model is None or live.overhead(model, bound.patches[MODEL]) <= MAX_LIVE_OVERHEAD
