"""Nodes that make an adapter: their schema, their progress, and how they show the error of the result."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io, ui

from loha_core import ErrorReport, Result
from loha_core.naming import names

from ..host.progress import ProgressBar
from ..page import charts
from .info import block_order
from .inputs import one_of, schema
from .types import LOHA

KINDS = {"LoHa": "loha", "LoRA": "lora"}
# The chart's scale never ends below this, so that rounding doesn't look like a loss.
MIN_SCALE = 0.01


def result_schema(
    node_id: str, display_name: str, description: str, inputs: list[Any], result: str, aliases: list[str]
) -> io.Schema:
    """The schema of a node whose outputs are `shown`; ``result`` is the adapter's tooltip."""
    return schema(
        node_id=node_id,
        display_name=display_name,
        search_aliases=aliases,
        category="LoHa/merge",
        description=description,
        inputs=inputs,
        outputs=[
            LOHA.Output(display_name="loha", tooltip=result),
            io.String.Output(display_name="text", tooltip="The relative error, over all and where it is largest."),
            io.Image.Output(display_name="image", tooltip="The relative error of each block, as the node shows it."),
        ],
        is_output_node=True,
    )


def kind_input(*, keep: bool = False) -> Any:
    options = ["as it is", *KINDS] if keep else [*KINDS]
    return one_of("kind", options, "LoHa, or LoRA for programs that know nothing else.", optional=not keep)


def shown(cls: Any, title: str, transform: Callable[..., Result]) -> io.NodeOutput:
    """Run ``transform(progress=…)`` with ComfyUI's progress bar, where Cancel acts, too; show the result's error."""
    bar = ProgressBar(1)
    with torch.inference_mode(False), torch.no_grad():
        adapter, report = transform(progress=lambda done, total, name: bar.update_absolute(done, total))
    text, image = report.text(), error_chart(report, title)
    preview = {"text": (text,), "layers": layers(report), **ui.PreviewImage(image, cls=cls).as_dict()}
    return io.NodeOutput(adapter, text, image, ui=preview)


def layers(report: ErrorReport) -> list[tuple[str, str, float, int]]:
    """Name, block, relative error and rank of each, from the model's input to its output: the node's bars."""
    rows = [(layer.name, names.block_label(layer.name), layer.error, layer.rank) for layer in report.layers]
    return sorted(rows, key=lambda row: block_order(row[1]))


def error_chart(report: ErrorReport, title: str) -> torch.Tensor:
    """The relative error of each block of the model."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in report.layers:
        sums = squares[re.sub("_blocks| layers", "", names.block_label(layer.name))]  # bars are narrow
        sums[0] += (layer.error * layer.size) ** 2
        sums[1] += layer.size**2
    errors = {b: math.sqrt(squares[b][0] / (squares[b][1] or 1.0)) for b in sorted(squares, key=block_order)}
    ranks = [layer.rank for layer in report.layers]
    subtitle = f"relative error {report.error:.3g} over {len(ranks)} layers"
    if ranks:
        subtitle += f", rank {min(ranks)}" + (f" to {max(ranks)}" if max(ranks) > min(ranks) else "")
    if report.lora_error is not None:
        subtitle += f"; a LoRA of equal size: {report.lora_error:.3g}"
    return charts.bars(title, subtitle, errors or {"nothing": 0.0}, reference=max(MIN_SCALE, *errors.values(), 0.0))
