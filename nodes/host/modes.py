"""What the nodes do to a model: merge an adapter into its weights, or let it act live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from loha_core import Adapter, LoHaError, Report
from loha_core.errors import check_number

from . import live, patches
from .patches import CLIP, MODEL

Mode = Literal["auto", "merge", "live"]
MODES: tuple[str, ...] = get_args(Mode)

# The share of a step that live may add, by estimate, for "auto" to choose it.
MAX_LIVE_OVERHEAD = 0.15


def apply(
    model: Any,
    clip: Any,
    adapter: Adapter,
    strength_model: float,
    strength_clip: float,
    *,
    mode: str = "auto",
    blocks: Callable[[str, str], float] | None = None,
    schedule: Callable[[float], float] | None = None,
) -> tuple[Any, Any, Report]:
    """Clones of ``model`` and ``clip`` (either may be None) with the adapter, and what matched.

    Args:
        mode: "merge" patches the weights; "live" leaves them alone and adds the update as layers run; "auto" is live
            where that is cheap and possible.
        blocks: (weight key, name in the file) -> multiplier of the strength.
        schedule: multiplier of strength_model over the progress of sampling; needs live.

    Raises:
        LoHaError: nothing matches, a shape does not fit, a strength is not finite, or the mode cannot do it. Model and
            clip are then untouched.
    """
    check_number("strength_model", strength_model)
    check_number("strength_clip", strength_clip)
    if mode not in MODES:
        raise LoHaError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if schedule is not None and mode == "merge":
        raise LoHaError(
            "a schedule changes the strength while sampling, which merged weights cannot; choose live or auto"
        )
    bound = patches.find(adapter, model, clip, blocks or (lambda key, name: 1.0))
    if mode == "auto":
        mode = "live" if schedule is not None or _is_better_live(model, clip, bound) else "merge"
    bound.report.notes.append(f"mode: {mode}")
    if mode == "merge":
        return (
            patches.merge(model, bound.patches.get(MODEL, ()), strength_model),
            patches.merge(clip, bound.patches.get(CLIP, ()), strength_clip),
            bound.report,
        )
    if clip is not None:
        patcher = live.apply_live(clip.patcher, bound.patches[CLIP], strength_clip)
        if patcher is not clip.patcher:
            clip = clip.clone()
            clip.patcher = patcher
    if model is not None:
        model = live.apply_live(model, bound.patches[MODEL], strength_model, schedule)
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
