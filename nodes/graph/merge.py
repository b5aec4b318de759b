"""Adapters to adapters: merge, resize, convert. What is lost is shown before anyone saves."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from loha_core import Adapter, Compression, convert, merge, resize
from loha_core.errors import check_choice
from loha_core.transform import compress
from loha_core.transform.merge import METHODS, combination

from .inputs import choice, number, one_of
from .results import KINDS, kind_input, result_schema, shown
from .save import DTYPES
from .types import LOHA, LOHA_BLOCKS

SLOTS = (1, 2, 3, 4, 5, 6)
BOUNDS = ("rank", "energy", "max_error")
FITS = ("svd", "fit")
# What LoHaConvert calls the spellings -> `convert`'s names and unet.
SPELLINGS = {
    "as they are": ("keep", "keep"),
    "LyCORIS": ("kohya", "keep"),
    "LyCORIS, diffusers' blocks": ("kohya", "diffusers"),
    "LyCORIS, LDM's blocks": ("kohya", "ldm"),
    "ComfyUI": ("native", "ldm"),
    "diffusers": ("diffusers", "diffusers"),
    "PEFT": ("peft", "keep"),
}


class LoHaMerge(io.ComfyNode):
    """Several LOHA and weights -> one LOHA, and how far it is from their sum."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return result_schema(
            "LoHaMerge",
            "Merge LoHas",
            "Merges adapters into one LoHa, and shows what is lost by it.",
            [
                *(_slot(slot) for slot in SLOTS[:2]),
                *(_weight(slot) for slot in SLOTS[:2]),
                one_of(
                    "method",
                    METHODS,
                    "exact: the sum itself, of a high rank. svd: its best approximation of a rank. fit: a LoHa "
                    "of a rank whose halves are both free; slow, and often closer. slerp: along the arc between two. "
                    "ties, dare, dare_ties, magnitude_prune: leave out small or random parts before they are summed.",
                    default="svd",
                ),
                *_bound_inputs(64),
                one_of("factor", FITS, "How slerp, ties, dare, … are written as a LoHa.", optional=True),
                number(
                    "density", 0.5, "Share of the numbers that ties, dare, … keep.", 0.01, 1, step=0.01, optional=True
                ),
                kind_input(),
                LOHA_BLOCKS.Input("blocks", optional=True, tooltip="Multiplies all weights, block by block."),
                *(_slot(slot, optional=True) for slot in SLOTS[2:]),
                *(_weight(slot, optional=True) for slot in SLOTS[2:]),
            ],
            "The merged adapter, for Apply LoHa or Save LoHa.",
            aliases=["merge lora", "lora merge", "combine"],
        )

    @classmethod
    def execute(
        cls,
        method: str,
        bound: str,
        rank: int,
        amount: float,
        factor: str = "svd",
        density: float = 0.5,
        kind: str = "LoHa",
        blocks: Any = None,
        **slots: Any,
    ) -> io.NodeOutput:
        used = [slot for slot in SLOTS if slots.get(f"loha_{slot}") is not None]
        adapters = [slots[f"loha_{slot}"] for slot in used]
        weights = [float(slots[f"weight_{slot}"]) for slot in used]
        combine = combination(method, density)
        form = method if method in compress.METHODS else factor
        compression = _compression(form, bound, rank, amount, choice("kind", kind, KINDS))
        transform = partial(merge, adapters, weights, compression, combine=combine, blocks=blocks)
        return shown(cls, "Lost by merging", transform)


class LoHaResize(io.ComfyNode):
    """LOHA -> the same update of another rank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return result_schema(
            "LoHaResize",
            "Resize LoHa",
            "Gives an adapter another rank, and shows what is lost by it.",
            [
                LOHA.Input("loha", tooltip="The adapter to resize; it is not changed."),
                *_bound_inputs(16),
                one_of(
                    "method",
                    FITS,
                    "svd: the update's best approximation of that matrix rank. fit: a LoHa of that rank with "
                    "both halves free; slower, and never worse.",
                ),
            ],
            "The resized adapter.",
            aliases=["resize lora", "lora rank"],
        )

    @classmethod
    def execute(cls, loha: Adapter, bound: str, rank: int, amount: float, method: str) -> io.NodeOutput:
        compression = _compression(method, bound, rank, amount)
        return shown(cls, "Lost by resizing", partial(resize, loha, compression))


class LoHaConvert(io.ComfyNode):
    """LOHA -> the same update, written otherwise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return result_schema(
            "LoHaConvert",
            "Convert LoHa",
            "Writes an adapter otherwise: as LoHa or LoRA, with other names, alphas or numbers.",
            [
                LOHA.Input("loha", tooltip="The adapter to convert; it is not changed."),
                kind_input(keep=True),
                number(
                    "rank",
                    0,
                    "Rank when changing between LoHa and LoRA. 0: exact; a LoHa of rank r is a LoRA of r².",
                    maximum=4096,
                ),
                one_of(
                    "names",
                    SPELLINGS,
                    "How layers are called: which programs find their way in the file. Where a model's names "
                    "in that style are not known, it says so and converts nothing.",
                ),
                number(
                    "alpha", 0.0, "A new alpha; the factors change so that the update stays. 0: as it is.", step=0.01
                ),
                one_of("dtype", DTYPES, "Of the factors."),
                LOHA_BLOCKS.Input(
                    "blocks", optional=True, tooltip="Writes these block strengths into the adapter for good."
                ),
            ],
            "The converted adapter.",
            aliases=["convert lora", "loha to lora"],
        )

    @classmethod
    def execute(
        cls, loha: Adapter, kind: str, rank: int, names: str, alpha: float, dtype: str, blocks: Any = None
    ) -> io.NodeOutput:
        style, unet = choice("names", names, SPELLINGS)
        compression = None
        if kind in KINDS:
            compression = Compression("svd" if rank else "exact", rank or None, kind=choice("kind", kind, KINDS))
        transform = partial(
            convert,
            loha,
            blocks=blocks,
            compression=compression,
            alpha=alpha or None,
            dtype=choice("dtype", dtype, DTYPES),
            names=style,
            unet=unet,
        )
        return shown(cls, "Lost by converting", transform)


# --- inputs -------------------------------------------------------------------------------------


def _slot(slot: int, *, optional: bool = False) -> Any:
    return LOHA.Input(
        f"loha_{slot}", optional=optional, tooltip=f"Adapter {slot}, from Load LoHa Adapter or a trainer."
    )


def _weight(slot: int, *, optional: bool = False) -> Any:
    tooltip = f"How much of adapter {slot}: 1 as it is, 0 none, negative values its opposite."
    slider = io.NumberDisplay.slider
    return number(f"weight_{slot}", 1.0, tooltip, -20, 20, step=0.01, optional=optional, display_mode=slider)


def _bound_inputs(rank: int) -> list[Any]:
    return [
        one_of(
            "bound",
            BOUNDS,
            "What limits the result: its rank, the share of each update that is kept (energy), or the largest "
            "relative error of a layer. Not for exact.",
        ),
        number("rank", rank, "The rank, where that is the bound.", 1, 4096),
        number("amount", 0.99, "The energy or the error, where that is it.", maximum=1, step=0.001),
    ]


def _compression(method: Any, bound: str, rank: int, amount: float, kind: Any = "loha") -> Compression:
    if method == "exact":
        return Compression("exact", kind=kind)
    check_choice("bound", bound, BOUNDS)
    limit: dict[str, Any] = {bound: rank if bound == "rank" else amount}
    return Compression(method, kind=kind, **limit)
