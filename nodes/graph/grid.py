"""The same picture with an adapter at many strengths, in few runs of the sampler, and all of them in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from loha_core import Adapter, LoHaError
from loha_core.blocks import BlockStrength
from loha_core.errors import about

from ..host import files as adapter_files
from ..host import modes
from ..host.pictures import Latent, fitting, repeated, shared_noise
from ..page.grid import GridPlan, Label, draw
from . import axes
from .inputs import number, problems, schema
from .loader import MAX_REPORTED
from .types import LOHA, LOHA_BLOCKS, LOHA_GRID

ADAPTERS, BLOCKS = (1, 2, 3, 4, 5, 6), (1, 2, 3)
MAX_PICTURES = 1024
ALIASES = ["xy plot", "x/y/z plot", "strength grid", "compare lora"]


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: which one of the latent's, and what acts on it."""

    place: int
    adapter: Adapter
    blocks: BlockStrength | None
    strength: float


class LoHaGrid(io.ComfyNode):
    """MODEL, LATENT and axes -> models and batches, for a sampler to run one after the other, and the plan."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaGrid",
            display_name="LoHa Grid",
            category="LoHa",
            description="Plans one picture at many strengths, with several adapters or block strengths, as a batch in "
            "which each has its own. For any sampler; LoHa Grid Image lays them out.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model. Adapters act on it alone, not on text encoders."),
                io.Latent.Input(
                    "latent",
                    tooltip="The picture to begin with, as for a single run. A batch gives a row for each of its "
                    "pictures, each with noise of its own.",
                ),
                io.String.Input(
                    "strengths",
                    default="0, 0.25, 0.5, 0.75, 1",
                    tooltip=f"The columns: numbers, or a range and how many: {axes.EXAMPLE}. Of the model; prompts are "
                    "encoded once, so give the text encoders the adapter before the grid if they need it.",
                ),
                io.String.Input(
                    "files",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="files, one a line: style.safetensors",
                    tooltip="Rows: adapters by their names in the loras folder, one a line.",
                ),
                io.String.Input(
                    "run",
                    default="",
                    optional=True,
                    placeholder="my_loha",
                    tooltip="Rows: all steps that Train LoHa saved under this name, in output/loha.",
                ),
                io.String.Input(
                    "block_settings",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="block settings, one a line: late blocks: LATE",
                    tooltip="Rows: where the adapters act, one a line: a preset, a vector or named blocks as in LoHa "
                    "Block Strength (OUTALL; 1,0,0,…; OUT=0.5). A name before a colon is the row's label.",
                ),
                number(
                    "at_once",
                    0,
                    "Pictures in one batch; the sampler then runs as often as needed. 0: as many as should fit into "
                    "memory. 1: each has a model of its own.",
                    0,
                    MAX_PICTURES,
                    optional=True,
                ),
                *(
                    LOHA.Input(f"loha_{slot}", optional=True, tooltip=f"Rows: adapter {slot}, from any node.")
                    for slot in ADAPTERS
                ),
                *(
                    LOHA_BLOCKS.Input(
                        f"blocks_{slot}", optional=True, tooltip="Rows: where they act, from LoHa Block Strength."
                    )
                    for slot in BLOCKS
                ),
            ],
            outputs=[
                io.Model.Output(is_output_list=True, tooltip="For the sampler: the model with the adapters live."),
                io.Latent.Output(
                    is_output_list=True, tooltip="For the same sampler: a batch of as many pictures, of equal noise."
                ),
                LOHA_GRID.Output(display_name="plan", tooltip="What each picture is, for LoHa Grid Image."),
                io.String.Output(display_name="report", tooltip="The pictures, and what each adapter matched."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, strengths: str | None = None, files: str | None = None, run: str | None = None
    ) -> bool | str:
        return problems(
            lambda: strengths is None or axes.strengths(strengths),
            *(partial(adapter_files.resolve, name) for name in axes.lines(files or "")),
            lambda: axes.saved_steps(run or ""),
        )

    @classmethod
    def fingerprint_inputs(cls, files: str | None = None, run: str | None = None, **_: Any) -> str:
        return axes.fingerprint(files or "", run or "")

    @classmethod
    def execute(
        cls,
        model: Any,
        latent: Latent,
        strengths: str,
        files: str = "",
        run: str = "",
        block_settings: str = "",
        at_once: int = 0,
        **slots: Any,
    ) -> io.NodeOutput:
        connected = [slots[f"loha_{slot}"] for slot in ADAPTERS if slots.get(f"loha_{slot}") is not None]
        settings = [slots[f"blocks_{slot}"] for slot in BLOCKS if slots.get(f"blocks_{slot}") is not None]
        cells, plan = planned(
            axes.strengths(strengths),
            axes.adapters(connected, files, run),
            axes.blocks(model, block_settings, settings),
            len(latent["samples"]),
        )
        models, latents, reports = [], [], dict[str, str]()
        size = at_once or fitting(model, latent["samples"].shape)
        chunks = [cells[start : start + size] for start in range(0, len(cells), size)]
        for chunk in chunks:
            models.append(_applied(model, chunk, len(latent["samples"]), reports))
            latents.append(repeated(latent, [cell.place for cell in chunk]))
        sizes = " + ".join(str(len(chunk)) for chunk in chunks)
        what = f"{len(plan.rows)} rows of {len(plan.columns)} pictures, sampled by {sizes}"
        return io.NodeOutput(models, latents, plan, "\n\n".join([what, *reports.values()]))


def planned(
    strengths: Sequence[float],
    adapters: Sequence[tuple[str, Adapter]],
    blocks: Sequence[tuple[str, BlockStrength | None]],
    pictures: int,
) -> tuple[list[Cell], GridPlan]:
    """Every picture, row by row, and what the rows and columns are called.

    Raises:
        LoHaError: there would be too many.
    """
    count = len(strengths) * len(adapters) * len(blocks) * pictures
    if count > MAX_PICTURES:
        raise LoHaError(
            f"{len(strengths)} strengths × {len(adapters)} adapters × {len(blocks)} block settings × {pictures} of the "
            f"latent are {count} pictures; expected at most {MAX_PICTURES}: make several grids"
        )
    several = {"adapter": len(adapters) > 1, "blocks": len(blocks) > 1, "picture": pictures > 1}
    cells: list[Cell] = []
    rows: list[Label] = []
    for (name, adapter), (setting, strength), place in product(adapters, blocks, range(pictures)):
        parts = {"adapter": name, "blocks": setting, "picture": f"picture {place + 1}"}
        rows.append(tuple(part for axis, part in parts.items() if several[axis]))
        cells += [Cell(place, adapter, strength, value) for value in strengths]
    alone = [label for label, _ in (*adapters[:1], *blocks[:1])]
    title = ", ".join(label for label, axis in zip(alone, several, strict=False) if label and not several[axis])
    columns = [f"{value:g}" for value in strengths]
    return cells, GridPlan(title, "strength", columns, ", ".join(axis for axis in several if several[axis]), rows)


def _applied(model: Any, cells: Sequence[Cell], pictures: int, reports: dict[str, str]) -> Any:
    """The model for a batch of these; ``reports`` gets what each adapter matched."""
    blocks = _block_strengths(cells)
    for adapter in dict.fromkeys(cell.adapter for cell in cells):
        strengths = tuple(cell.strength if cell.adapter is adapter else 0.0 for cell in cells)
        # One picture needs no strength of its own: its model may be merged.
        strength = strengths if len(cells) > 1 else strengths[0]
        with about("with at_once at 1 adapters may be merged, with more they are live", adapter.source):
            model, _, report = modes.apply(model, None, adapter, strength, 0.0, blocks=blocks)
        reports.setdefault(adapter.source, f"{adapter.source}\n{report.text(MAX_REPORTED)}")
    return shared_noise(model, [cell.place for cell in cells], pictures)


def _block_strengths(cells: Sequence[Cell]) -> Any:
    """(weight key, name in the file) -> multiplier for all pictures, or for each."""
    settings = {id(cell.blocks): cell.blocks for cell in cells}

    def of(key: str, name: str) -> float | tuple[float, ...]:
        values = {number: 1.0 if blocks is None else blocks(key, name) for number, blocks in settings.items()}
        each = tuple(values[id(cell.blocks)] for cell in cells)
        return each if len(set(each)) > 1 else each[0]

    return of


class LoHaGridImage(io.ComfyNode):
    """The pictures of a plan -> one, labelled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaGridImage",
            display_name="LoHa Grid Image",
            category="LoHa",
            description="Lays the pictures of a LoHa Grid out in one, with its axes and their values.",
            search_aliases=ALIASES,
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="All pictures that were sampled with the plan, decoded."),
                LOHA_GRID.Input("plan", tooltip="From LoHa Grid."),
                number(
                    "size",
                    256,
                    "The longer side of each picture as it is drawn; smaller ones are enlarged. 0: their own size.",
                    0,
                    4096,
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The labelled picture that the node shows."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: list[Tensor], plan: list[GridPlan], size: list[int]) -> io.NodeOutput:
        if len(plan) != 1:
            raise LoHaError(f"{len(plan)} plans are connected; expected that of one LoHa Grid")
        image = draw(plan[0], [picture for batch in images for picture in batch], size[0])
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
