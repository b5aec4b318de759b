"""Adapters to adapters: merge, resize, convert. What is lost is shown before anyone saves."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io, ui

from loha_core import Adapter, ErrorReport, Made
from loha_core.naming import names
from loha_core.transform import convert
from loha_core.transform.merge import METHODS, merge

from ..host.progress import ProgressBar
from ..page import charts
from .info import block_order
from .inputs import choice, known
from .loader import LOHA, LOHA_BLOCKS
from .save import DTYPES

CATEGORY = "LoHa/merge"
SLOTS = (1, 2, 3, 4, 5, 6)
# The chart's scale never ends below this, so that rounding doesn't look like a loss.
LEAST_ERROR = 0.01

KINDS = {"LoHa": "loha", "LoRA": "lora"}
BOUNDS = ("rank", "energy", "max_error")
# What LoHaConvert calls the spellings -> convert.respell's arguments; PEFT has rules of its own.
SPELLINGS: dict[str, tuple[str, str] | None] = {
    "as they are": None,
    "LyCORIS": ("kohya", "keep"),
    "LyCORIS, diffusers' blocks": ("kohya", "diffusers"),
    "LyCORIS, LDM's blocks": ("kohya", "ldm"),
    "ComfyUI": ("native", "ldm"),
    "diffusers": ("diffusers", "diffusers"),
    "PEFT": None,
}


class LoHaMerge(io.ComfyNode):
    """Several LOHA and weights -> one LOHA, and how far it is from their sum."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoHaMerge",
            display_name="Merge LoHas",
            category=CATEGORY,
            description="Merges adapters into one LoHa, and shows what is lost by it.",
            inputs=[
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
            outputs=outputs("The merged adapter, for Apply LoHa or Save LoHa."),
            is_output_node=True,
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
        limits = {} if method == "exact" else _bounds(bound, rank, amount)
        made = computed(
            lambda progress: merge(
                adapters, weights, method=method, factor=factor, density=density, kind=choice("kind", kind, KINDS),
                blocks=blocks, progress=progress, **limits,
            )
        )  # fmt: skip
        return shown(cls, made, "Lost by merging")


class LoHaResize(io.ComfyNode):
    """LOHA -> the same update of another rank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoHaResize",
            display_name="Resize LoHa",
            category=CATEGORY,
            description="Gives an adapter another rank, and shows what is lost by it.",
            inputs=[
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
            outputs=outputs("The resized adapter."),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, loha: Adapter, bound: str, rank: int, amount: float, method: str) -> io.NodeOutput:
        limits = _bounds(bound, rank, amount)
        made = computed(lambda progress: convert.resize(loha, method=method, progress=progress, **limits))  # type: ignore[arg-type]
        return shown(cls, made, "Lost by resizing")


class LoHaConvert(io.ComfyNode):
    """LOHA -> the same update, written otherwise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoHaConvert",
            display_name="Convert LoHa",
            category=CATEGORY,
            description="Writes an adapter otherwise: as LoHa or LoRA, with other names, alphas or numbers.",
            inputs=[
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
            outputs=outputs("The converted adapter."),
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, loha: Adapter, kind: str, rank: int, names: str, alpha: float, dtype: str, blocks: Any = None
    ) -> io.NodeOutput:
        made = computed(lambda progress: converted(loha, kind, rank, names, alpha, dtype, blocks, progress))
        return shown(cls, made, "Lost by converting")


def converted(
    adapter: Adapter, kind: str, rank: int, spelling: str, alpha: float, dtype: str, blocks: Any, progress: Any = None
) -> Made:
    """The steps that are asked for, one after the other; their errors add up to at most their sum."""
    steps: list[Callable[[Adapter], Made]] = []
    if blocks is not None:
        steps.append(lambda a: convert.bake_blocks(a, blocks))
    if kind == "LoRA":
        steps.append(lambda a: convert.to_lora(a, rank=rank or None, progress=progress))
    elif kind == "LoHa":
        method: Any = "svd" if rank else "exact"
        steps.append(lambda a: convert.from_lora(a, rank=rank or None, method=method, progress=progress))
    if alpha:
        steps.append(lambda a: convert.change_alpha(a, alpha=alpha))
    if (wanted := choice("dtype", dtype, DTYPES)) is not None:
        steps.append(lambda a: convert.to_dtype(a, wanted))
    if spelling == "PEFT":
        steps.append(convert.to_peft)
    elif style := choice("names", spelling, SPELLINGS):
        steps.append(lambda a: convert.respell(a, *style))  # type: ignore[arg-type]
    report = ErrorReport()
    for step in steps:
        adapter, found = step(adapter)
        if found.error >= report.error:
            report = ErrorReport(found.layers, [*report.notes, *found.notes])
    return Made(adapter, report)


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


def kind_input(*, keep: bool = False) -> Any:
    return io.Combo.Input(
        "kind",
        options=["as it is", *KINDS] if keep else list(KINDS),
        default="as it is" if keep else "LoHa",
        optional=not keep,
        tooltip="LoHa, or LoRA for programs that know nothing else.",
    )


def outputs(tooltip: str) -> list[Any]:
    return [
        LOHA.Output(display_name="loha", tooltip=tooltip),
        io.String.Output(display_name="text", tooltip="The relative error, over all and where it is largest."),
        io.Image.Output(display_name="image", tooltip="The relative error of each block, as the node shows it."),
    ]


def _bounds(bound: str, rank: int, amount: float) -> dict[str, Any]:
    return {known("bound", bound, BOUNDS): rank if bound == "rank" else amount}


# --- results ------------------------------------------------------------------------------------


def computed(work: Callable[[Callable[[int, int, str], object]], Made]) -> Made:
    """``work`` with ComfyUI's progress bar, which is also where Cancel acts."""
    bar = ProgressBar(1)
    with torch.inference_mode(False), torch.no_grad():
        return work(lambda done, total, name: bar.update_absolute(done, total))


def shown(cls: Any, made: Made, title: str) -> io.NodeOutput:
    text, image = made.report.text(), error_chart(made.report, title)
    shown = {"text": (text,), "layers": layers(made.report), **ui.PreviewImage(image, cls=cls).as_dict()}
    return io.NodeOutput(made.adapter, text, image, ui=shown)


def layers(report: ErrorReport) -> list[tuple[str, str, float, int]]:
    """Name, block, relative error and rank of each, from the model's input to its output: the node's bars."""
    rows = [(layer.name, names.block_of(layer.name), layer.error, layer.rank) for layer in report.layers]
    return sorted(rows, key=lambda row: block_order(row[1]))


def error_chart(report: ErrorReport, title: str) -> torch.Tensor:
    """The relative error of each block of the model."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in report.layers:
        sums = squares[re.sub("_blocks| layers", "", names.block_of(layer.name))]  # bars are narrow
        sums[0] += (layer.error * layer.size) ** 2
        sums[1] += layer.size**2
    values = {b: math.sqrt(squares[b][0] / (squares[b][1] or 1.0)) for b in sorted(squares, key=block_order)}
    sight = max(LEAST_ERROR, *values.values()) if values else LEAST_ERROR
    ranks = [layer.rank for layer in report.layers]
    about = f"relative error {report.error:.3g} over {len(ranks)} layers"
    if ranks:
        about += f", rank {min(ranks)}" + (f" to {max(ranks)}" if max(ranks) > min(ranks) else "")
    if report.lora_error is not None:
        about += f"; a LoRA of equal size: {report.lora_error:.3g}"
    return charts.bars(title, about, values or {"nothing": 0.0}, sight=sight)
