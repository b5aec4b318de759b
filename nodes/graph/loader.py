"""Loading an adapter and applying it to a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from loha_core import Adapter

from ..host import files, modes
from . import words
from .inputs import problems, schema
from .region import region_input
from .types import LOHA, LOHA_BLOCKS, LOHA_SCHEDULE

# How many unmatched keys a report lists; the others are counted.
MAX_REPORTED = 100
# What people look for who have adapters of this kind, in other packs' words.
ALIASES = ["lycoris", "lora", "lora loader", "slider", "trigger words"]


def file_input() -> Any:
    return io.Combo.Input(
        "lora_name",
        options=files.names(),
        tooltip="A LoHa file (LyCORIS/kohya, PEFT, OneTrainer, diffusers, …) or PEFT folder under models/loras.",
    )


def problem_of(lora_name: str | None) -> bool | str:
    """What keeps a file's name from being loaded; True is nothing, or that it is connected and not known yet."""
    return True if lora_name is None else problems(lambda: files.resolve(lora_name))


def strength_inputs() -> list[Any]:
    """One slider for each network. 1 is the strength that the adapter was trained at."""
    return [
        io.Float.Input(
            f"strength_{network}",
            default=1.0,
            min=-20.0,
            max=20.0,
            step=0.01,
            display_mode=io.NumberDisplay.slider,
            tooltip=f"Strength on {what}: 1 is as trained, 0 leaves it unchanged, negative values push the other way.",
        )
        for network, what in (("model", "the diffusion model"), ("clip", "the text encoders"))
    ]


def patched_outputs() -> list[Any]:
    return [
        io.Model.Output(tooltip="The diffusion model with the adapter applied."),
        io.Clip.Output(tooltip="The text encoders with the adapter applied; empty when none were connected."),
        io.String.Output(
            display_name="report", tooltip="How many layers matched where, and each key that did not, with the reason."
        ),
    ]


def mode_input() -> Any:
    return io.Combo.Input(
        "mode",
        optional=True,
        options=list(modes.MODES),
        default="auto",
        tooltip="merge patches the weights: fastest sampling, and what save nodes need. live leaves them alone and "
        "adds the update as layers run: a new strength reloads nothing. auto is live where that is cheap.",
    )


def optional_inputs() -> list[Any]:
    return [
        mode_input(),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="Text encoders. Leave empty to apply the adapter to the diffusion model alone.",
        ),
        LOHA_BLOCKS.Input("blocks", optional=True, tooltip="Multipliers per block, from LoHa Block Strength."),
        LOHA_SCHEDULE.Input(
            "schedule", optional=True, tooltip="Strength over the progress of sampling, from LoHa Schedule; needs live."
        ),
        region_input(),
    ]


def _patched(model: Any, clip: Any, adapter: Adapter, *more: Any, **options: Any) -> io.NodeOutput:
    model, clip, report = modes.apply(model, clip, adapter, **options)
    return io.NodeOutput(model, clip, report.text(MAX_REPORTED), *more)


class LoHaLoader(io.ComfyNode):
    """File -> patched MODEL and CLIP, in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaLoader",
            display_name="Load LoHa",
            category="LoHa",
            description="Loads a LoHa adapter from the loras folder and applies it to the model and the text encoders.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to apply the adapter to."),
                file_input(),
                *strength_inputs(),
                *optional_inputs(),
                *words.word_inputs(),
            ],
            outputs=[*patched_outputs(), words.words_output()],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return problem_of(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        return files.fingerprint(lora_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        clip: Any = None,
        max_trigger_words: int = words.DEFAULT_COUNT,
        trigger_words: str = "",
        **options: Any,
    ) -> io.NodeOutput:
        adapter = files.load(lora_name)
        return _patched(model, clip, adapter, words.joined([adapter], max_trigger_words, trigger_words), **options)


class LoHaLoadAdapter(io.ComfyNode):
    """File -> LOHA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaLoadAdapter",
            display_name="Load LoHa Adapter",
            category="LoHa",
            description="Loads a LoHa adapter without applying it, to look into it or to apply it elsewhere.",
            search_aliases=["load lora", "load lycoris", "trigger words"],
            inputs=[
                file_input(),
                io.Boolean.Input(
                    "legacy_tucker",
                    default=False,
                    tooltip="For Tucker files by LyCORIS before October 2023, whose effect used t1 for both halves.",
                ),
                *words.word_inputs(),
            ],
            outputs=[
                LOHA.Output(display_name="loha", tooltip="The adapter, for Apply LoHa or LoHa Info."),
                words.words_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return problem_of(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        return files.fingerprint(lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        legacy_tucker: bool,
        max_trigger_words: int = words.DEFAULT_COUNT,
        trigger_words: str = "",
    ) -> io.NodeOutput:
        adapter = files.load(lora_name, legacy_tucker=legacy_tucker)
        return io.NodeOutput(adapter, words.joined([adapter], max_trigger_words, trigger_words))


class LoHaApply(io.ComfyNode):
    """LOHA + MODEL + CLIP -> patched MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaApply",
            display_name="Apply LoHa",
            category="LoHa",
            description="Applies a loaded LoHa adapter to the model and the text encoders.",
            search_aliases=["apply lora", "apply lycoris", "slider"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to apply the adapter to."),
                LOHA.Input("loha", tooltip="The adapter, from Load LoHa Adapter."),
                *strength_inputs(),
                *optional_inputs(),
            ],
            outputs=patched_outputs(),
        )

    @classmethod
    def execute(cls, model: Any, loha: Adapter, clip: Any = None, **options: Any) -> io.NodeOutput:
        return _patched(model, clip, loha, **options)
