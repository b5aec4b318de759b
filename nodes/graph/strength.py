"""Where and when an adapter acts: strength by block of the model, and over the progress of sampling."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from loha_core.blocks import FAMILIES, PRESETS, BlockStrength
from loha_core.schedule import INTERPOLATIONS, Schedule

from ..page import charts
from ..page.blocks import AUTO, spell
from .inputs import problems, schema
from .types import LOHA_BLOCKS, LOHA_SCHEDULE

# How many rules the picture lists; the others are counted.
MAX_RULES_SHOWN = 8


class LoHaBlockStrength(io.ComfyNode):
    """Preset, vector and rules -> LOHA_BLOCKS, and a picture of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaBlockStrength",
            display_name="LoHa Block Strength",
            search_aliases=["block weight", "lora block weight", "lbw"],
            category="LoHa",
            description="Lets an adapter act more or less on each block of the model and on chosen layers.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="ALL",
                    tooltip="What to start from. ALL: everything at 1. NONE: everything at 0. INALL, MIDALL, OUTALL: "
                    "only a U-Net's input, middle or output blocks. DOUBLE, SINGLE: only the double or single blocks "
                    "of Flux and models built like it. EARLY, MIDDLE, LATE: only the first, middle or last third of "
                    "any model's blocks. All but NONE keep BASE at 1.",
                ),
                io.String.Input(
                    "vector",
                    default="",
                    placeholder="1,0,0,1,…  or  OUT=0.5, IN04-IN08=0",
                    tooltip="Numbers for all blocks in order, as block-weight tools write them (SD1.5: 17, 26, 27; "
                    "SDXL: 12, 20, 21; Flux: 18, 19, 20, 55, 57, 58; others: one per block, with or without one for "
                    "BASE in front); they replace the preset. Or names, which change it: OUT=0.5, IN04-IN08=0, "
                    "LATE=0.5, BASE=1. Empty: the preset alone.",
                ),
                io.String.Input(
                    "rules",
                    default="",
                    multiline=True,
                    placeholder="attn2.*: 0.3",
                    tooltip="Lines of 'regular expression: number'. A layer whose name contains a match is multiplied "
                    "by the number, on top of its block's. Of several rules that match, the last counts.",
                ),
                io.Combo.Input(
                    "family",
                    options=[AUTO, *FAMILIES],
                    default=AUTO,
                    tooltip="Whose blocks these are. auto: those of the connected model; without one, as the number "
                    "of values in the vector tells.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The diffusion model, to find its blocks; it is not changed. Needed for models of families "
                    "that are not in the list, whose blocks go by their own names.",
                ),
            ],
            outputs=[
                LOHA_BLOCKS.Output(display_name="blocks", tooltip="For the blocks input of Load LoHa or Apply LoHa."),
                io.Image.Output(display_name="image", tooltip="The node's bars as a picture, with the rules."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        vector: str | None = None,
        rules: str | None = None,
        family: str | None = None,
        preset: str | None = None,
    ) -> bool | str:
        if family in (None, AUTO):  # a connected model's blocks are not known yet
            return problems(lambda: BlockStrength.parse(None, "", rules or ""))
        return problems(lambda: BlockStrength.parse(family, vector or "", rules or "", preset=preset or "ALL"))

    @classmethod
    def execute(cls, preset: str, vector: str, rules: str, family: str, model: Any = None) -> io.NodeOutput:
        known = family if family != AUTO else None if model is None else list(model.model.state_dict())
        blocks = BlockStrength.parse(known, vector, rules, preset=preset)
        image = block_chart(blocks)
        # The widget draws the bars of the model that it was told of last.
        return io.NodeOutput(blocks, image, ui={"layout": (spell(blocks.layout),)} if blocks.layout else None)


def block_chart(blocks: BlockStrength) -> Any:
    """A bar for each block, and the rules below."""
    about = f"{blocks.layout.family}: {blocks.layout}" if blocks.layout else "no model connected; parts it may have"
    notes = [f"{shorten(rule.pattern.pattern)}: {rule.value:g}" for rule in blocks.rules]
    if len(notes) > MAX_RULES_SHOWN:
        notes[MAX_RULES_SHOWN:] = [f"… and {len(notes) - MAX_RULES_SHOWN} more rules"]
    return charts.bars("Strength by block", about, blocks.table(), notes)


class LoHaSchedule(io.ComfyNode):
    """Keyframes -> LOHA_SCHEDULE, and a picture of the curve."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaSchedule",
            display_name="LoHa Schedule",
            search_aliases=["lora schedule", "strength schedule", "lora keyframes"],
            category="LoHa",
            description="Lets the strength of an adapter follow a curve over the progress of sampling.",
            inputs=[
                io.String.Input(
                    "keyframes",
                    default="0: 1, 1: 1",
                    multiline=True,
                    tooltip="'progress: strength' pairs, by commas or on lines of their own: 0: 0, 0.5: 1, 100%: 0.3. "
                    "The adapter's strength is multiplied by the curve. Empty: 1 throughout.",
                ),
                io.Combo.Input(
                    "interpolation",
                    options=list(INTERPOLATIONS),
                    default="linear",
                    tooltip="Between keyframes. linear: straight lines. smooth: eases out of one and into the next. "
                    "step: each value holds until the next keyframe.",
                ),
                *(
                    io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)
                    for name, default, tooltip in (
                        ("start_percent", 0.0, "Before this progress (0 to 1) the adapter does not act."),
                        ("end_percent", 1.0, "After this progress (0 to 1) the adapter does not act."),
                    )
                ),
            ],
            outputs=[
                LOHA_SCHEDULE.Output(
                    display_name="schedule", tooltip="For the schedule input of Load LoHa or Apply LoHa."
                ),
                io.Image.Output(display_name="image", tooltip="The node's curve as a picture."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, keyframes: str | None = None, start_percent: float | None = None, end_percent: float | None = None
    ) -> bool | str:
        start, end = (0.0 if start_percent is None else start_percent), (1.0 if end_percent is None else end_percent)
        return problems(lambda: Schedule.parse(keyframes or "", start=start, end=end))

    @classmethod
    def execute(cls, keyframes: str, interpolation: str, start_percent: float, end_percent: float) -> io.NodeOutput:
        schedule = Schedule.parse(keyframes, interpolation, start_percent, end_percent)
        image = schedule_chart(schedule)
        return io.NodeOutput(schedule, image)


def shorten(text: str) -> str:
    return text if len(text) <= 50 else text[:49] + "…"


def schedule_chart(schedule: Schedule) -> Any:
    """The curve over the progress of sampling, with its keyframes."""
    about = f"{schedule.interpolation}, from {schedule.start * 100:g} % to {schedule.end * 100:g} %"
    active = (schedule.start, schedule.end)
    return charts.curve("Strength over the progress of sampling", about, schedule, schedule.keyframes, active)
