"""Adapters to adapters: merge, resize, convert. What is lost is shown before anyone saves."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from loha_core import Adapter, Compression, convert, merge, resize
from loha_core.transform import compress
from loha_core.transform.merge import METHODS, combination

from .inputs import choice, known
from .results import KINDS, kind_input, schema, shown
from .save import DTYPES
from .types import LOHA, LOHA_BLOCKS

SLOTS = (1, 2, 3, 4, 5, 6)
BOUNDS = ("rank", "energy", "max_error")
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
        return schema(
            "LoHaMerge",
            "Merge LoHas",
            "Merges adapters into one LoHa, and shows what is lost by it.",
            [
                *(_slot(slot) for slot in SLOTS[:2]),
                *(_weight(slot) for slot in SLOTS[:2]),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="svd",
                    tooltip="exact: the sum itself, of a high rank. svd: its best approximation of a rank. fit: a LoHa "
                    "of a rank whose halves are both free; slow, and often closer. slerp: along the arc between two. "
                    "ties, dare, dare_ties, magnitude_prune: leave out small or random parts before they are summed.",
                ),
                *_bound_inputs(64),
                io.Combo.Input(
                    "factor",
                    options=["svd", "fit"],
                    default="svd",
                    optional=True,
                    tooltip="How slerp, ties, dare, … are written as a LoHa.",
                ),
                io.Float.Input(
                    "density", default=0.5, min=0.01, max=1.0, step=0.01, optional=True,
                    tooltip="Share of the numbers that ties, dare, … keep.",
                ),
                kind_input(),
                LOHA_BLOCKS.Input("blocks", optional=True, tooltip="Multiplies all weights, block by block."),
                *(_slot(slot, optional=True) for slot in SLOTS[2:]),
                *(_weight(slot, optional=True) for slot in SLOTS[2:]),
            ],
            "The merged adapter, for Apply LoHa or Save LoHa.",
        )  # fmt: skip

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
        return shown(
            cls,
            "Lost by merging",
            lambda progress: merge(adapters, weights, compression, combine=combine, blocks=blocks, progress=progress),
        )


class LoHaResize(io.ComfyNode):
    """LOHA -> the same update of another rank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoHaResize",
            "Resize LoHa",
            "Gives an adapter another rank, and shows what is lost by it.",
            [
                LOHA.Input("loha", tooltip="The adapter to resize; it is not changed."),
                *_bound_inputs(16),
                io.Combo.Input(
                    "method",
                    options=["svd", "fit"],
                    default="svd",
                    tooltip="svd: the update's best approximation of that matrix rank. fit: a LoHa of that rank with "
                    "both halves free; slower, and never worse.",
                ),
            ],
            "The resized adapter.",
        )

    @classmethod
    def execute(cls, loha: Adapter, bound: str, rank: int, amount: float, method: str) -> io.NodeOutput:
        compression = _compression(method, bound, rank, amount)
        return shown(cls, "Lost by resizing", lambda progress: resize(loha, compression, progress=progress))


class LoHaConvert(io.ComfyNode):
    """LOHA -> the same update, written otherwise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoHaConvert",
            "Convert LoHa",
            "Writes an adapter otherwise: as LoHa or LoRA, with other names, alphas or numbers.",
            [
                LOHA.Input("loha", tooltip="The adapter to convert; it is not changed."),
                kind_input(keep=True),
                io.Int.Input(
                    "rank", default=0, min=0, max=4096,
                    tooltip="Rank when changing between LoHa and LoRA. 0: exact; a LoHa of rank r is a LoRA of r².",
                ),
                io.Combo.Input(
                    "names",
                    options=list(SPELLINGS),
                    default="as they are",
                    tooltip="How layers are called: which programs find their way in the file. Where a model's names "
                    "in that style are not known, it says so and converts nothing.",
                ),
                io.Float.Input(
                    "alpha", default=0.0, min=0.0, max=1e6, step=0.01,
                    tooltip="A new alpha; the factors change so that the update stays. 0: as it is.",
                ),
                io.Combo.Input("dtype", options=list(DTYPES), default="as it is", tooltip="Of the factors."),
                LOHA_BLOCKS.Input(
                    "blocks", optional=True, tooltip="Writes these block strengths into the adapter for good."
                ),
            ],
            "The converted adapter.",
        )  # fmt: skip

    @classmethod
    def execute(
        cls, loha: Adapter, kind: str, rank: int, names: str, alpha: float, dtype: str, blocks: Any = None
    ) -> io.NodeOutput:
        style, unet = choice("names", names, SPELLINGS)
        compression = None
        if kind in KINDS:
            compression = Compression("svd" if rank else "exact", rank or None, kind=choice("kind", kind, KINDS))
        return shown(
            cls,
            "Lost by converting",
            lambda progress: convert(
                loha, blocks=blocks, compression=compression, alpha=alpha or None, dtype=choice("dtype", dtype, DTYPES),
                names=style, unet=unet, progress=progress,
            ),
        )  # fmt: skip


# --- inputs -------------------------------------------------------------------------------------


def _slot(slot: int, *, optional: bool = False) -> Any:
    return LOHA.Input(
        f"loha_{slot}", optional=optional, tooltip=f"Adapter {slot}, from Load LoHa Adapter or a trainer."
    )


def _weight(slot: int, *, optional: bool = False) -> Any:
    return io.Float.Input(
        f"weight_{slot}", default=1.0, min=-20.0, max=20.0, step=0.01, optional=optional,
        display_mode=io.NumberDisplay.slider,
        tooltip=f"How much of adapter {slot}: 1 as it is, 0 none, negative values its opposite.",
    )  # fmt: skip


def _bound_inputs(rank: int) -> list[Any]:
    return [
        io.Combo.Input(
            "bound",
            options=list(BOUNDS),
            default="rank",
            tooltip="What limits the result: its rank, the share of each update that is kept (energy), or the largest "
            "relative error of a layer. Not for exact.",
        ),
        io.Int.Input("rank", default=rank, min=1, max=4096, tooltip="The rank, where that is the bound."),
        io.Float.Input(
            "amount", default=0.99, min=0.0, max=1.0, step=0.001, tooltip="The energy or the error, where that is it."
        ),
    ]


def _compression(method: Any, bound: str, rank: int, amount: float, kind: Any = "loha") -> Compression:
    if method == "exact":
        return Compression("exact", kind=kind)
    limit: dict[str, Any] = {known("bound", bound, BOUNDS): rank if bound == "rank" else amount}
    return Compression(method, kind=kind, **limit)
