"""What is in an adapter, to read and to see."""

from __future__ import annotations

import math
import re
from collections import defaultdict

import torch
from comfy_api.latest import io, ui

from loha_core import Adapter, describe
from loha_core.naming import names

from ..page.charts import BACKGROUND, INK, Canvas, ramp
from .inputs import schema
from .types import LOHA

CELL, ROW, MARGIN, TOP = 118, 26, 150, 74


class LoHaInfo(io.ComfyNode):
    """LOHA -> text on the node, and a picture of how much each block is changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaInfo",
            display_name="LoHa Info",
            search_aliases=["lora info", "lora metadata", "trigger words"],
            category="LoHa",
            description="Shows what is in a LoHa: dialect, ranks, trigger words, and where it changes the model.",
            inputs=[LOHA.Input("loha", tooltip="The adapter to look into.")],
            outputs=[
                io.String.Output(display_name="text", tooltip="The summary that the node shows."),
                io.Image.Output(
                    display_name="image", tooltip="Size of the update (Frobenius norm) by block and kind of layer."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, loha: Adapter) -> io.NodeOutput:
        text, image = describe(loha), norm_chart(loha)
        return io.NodeOutput(text, image, ui={"text": (text,), **ui.PreviewImage(image, cls=cls).as_dict()})


def norm_table(adapter: Adapter) -> dict[str, dict[str, float]]:
    """block -> kind of layer -> Frobenius norm of that part of the update at strength 1."""
    squares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, factors in adapter.layers.items():
        squares[names.block_label(name)][names.kind_of(name)] += factors.norm() ** 2
    return {
        block: {kind: math.sqrt(value) for kind, value in squares[block].items()}
        for block in sorted(squares, key=block_order)
    }


def block_order(block: str) -> tuple[int, str, int]:
    """Text encoders first, then the diffusion model's blocks from input to output."""
    stages = ("te", "down|input|double|joint", "transformer|blocks|layers", "middle", "up|output|single", "other")
    stage = next((n for n, pattern in enumerate(stages) if re.match(pattern, block)), len(stages))
    lead, _, number = block.rpartition(" ")
    return stage, lead, int(number) if number.isdigit() else 0


def norm_chart(adapter: Adapter) -> torch.Tensor:
    """The table as a heat map: (1, height, width, 3) float32 in 0…1."""
    table = norm_table(adapter)
    kinds = sorted({kind for row in table.values() for kind in row}) or ["no LoHa layers"]
    largest = max((value for row in table.values() for value in row.values()), default=0.0)
    canvas = Canvas(
        MARGIN + CELL * len(kinds) + 16,
        TOP + ROW * max(1, len(table)) + 16,
        f"Size of the update at strength 1: {adapter.source}",
        "Frobenius norm; brighter is more",
    )
    for column, kind in enumerate(kinds):
        canvas.text((MARGIN + CELL * column + CELL // 2, TOP - 14), kind, anchor="mm")
    for line, (block, row) in enumerate(table.items()):
        y = TOP + ROW * line
        canvas.text((MARGIN - 10, y + ROW // 2), block, anchor="rm")
        for column, kind in enumerate(kinds):
            box = (MARGIN + CELL * column, y, MARGIN + CELL * (column + 1) - 3, y + ROW - 3)
            if kind not in row:
                continue
            brightness = row[kind] / largest if largest else 0.0
            canvas.draw.rectangle(box, ramp(brightness))
            middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
            canvas.text(middle, f"{row[kind]:.3g}", BACKGROUND if brightness > 0.5 else INK, anchor="mm")
    return canvas.image()
