"""Several adapters at once, and the LORA_STACK that other packs exchange."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from loha_core import LoHaError

from . import bridge, files
from .loader import REPORT_LIMIT, mode_input, patched_outputs

LORA_STACK = io.Custom("LORA_STACK")
SLOTS = (1, 2, 3, 4)
NONE = "None"

# Name in the loras folder, strength on the model, strength on the text encoders.
Entry = tuple[str, float, float]


class LoHaStack(io.ComfyNode):
    """Adapters with on/off and strengths -> patched MODEL and CLIP, and the list of what is on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        model, clip, report = patched_outputs()
        return io.Schema(
            node_id="LoHaStack",
            display_name="LoHa Stack",
            category="LoHa",
            description="Applies several adapters at once, and exchanges lists of them with other stack nodes.",
            inputs=[
                *(widget for slot in SLOTS for widget in _slot_inputs(slot)),
                mode_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The diffusion model to apply the adapters to. Leave model and clip empty to make a list "
                    "only, for another stack or for another pack's node that applies it.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders to apply the adapters to."),
                LORA_STACK.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="A list from another stack node. Its adapters come before the ones chosen here and are "
                    "applied here too: connect it to a node that has not applied them yet.",
                ),
            ],
            outputs=[
                model,
                clip,
                LORA_STACK.Output(
                    display_name="lora_stack",
                    tooltip="All adapters that are on, those of the lora_stack input first: a list of (name, model "
                    "strength, clip strength).",
                ),
                report,
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        # Adapters from a connected list are not known yet; here are those chosen on the node.
        return "|".join(files.fingerprint(name) for name, _, _ in chosen(inputs))

    @classmethod
    def execute(
        cls, model: Any = None, clip: Any = None, lora_stack: Any = None, mode: str = "auto", **slots: Any
    ) -> io.NodeOutput:
        entries = [*received(lora_stack), *chosen(slots)]
        if model is None and clip is None:
            for name, _, _ in chosen(slots):
                files.resolve(name)  # other packs load by these names: no others may leave here
            return io.NodeOutput(None, None, entries, f"{len(entries)} adapters in the list; none applied here")
        reports = []
        for name, strength_model, strength_clip in entries:
            model, clip, report = bridge.apply(model, clip, files.load(name), strength_model, strength_clip, mode=mode)
            reports.append(report.text(REPORT_LIMIT))
        return io.NodeOutput(model, clip, entries, "\n\n".join(reports) or "no adapter is on")


def _slot_inputs(slot: int) -> list[Any]:
    strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}
    return [
        io.Boolean.Input(f"on_{slot}", default=True, tooltip=f"Whether adapter {slot} is applied and listed."),
        io.Combo.Input(
            f"lora_name_{slot}",
            options=[NONE, *files.names()],
            default=NONE,
            tooltip=f"Adapter {slot}: a file or PEFT folder under models/loras, or None.",
        ),
        io.Float.Input(
            f"strength_model_{slot}", **strength, tooltip=f"Strength of adapter {slot} on the diffusion model."
        ),
        io.Float.Input(
            f"strength_clip_{slot}", **strength, tooltip=f"Strength of adapter {slot} on the text encoders."
        ),
    ]


def chosen(inputs: Mapping[str, Any]) -> list[Entry]:
    """The slots that are on and not None."""
    return [
        (name, inputs[f"strength_model_{slot}"], inputs[f"strength_clip_{slot}"])
        for slot in SLOTS
        if inputs.get(f"on_{slot}") and (name := inputs.get(f"lora_name_{slot}")) not in (None, NONE)
    ]


def received(stack: Any) -> list[Entry]:
    """Another node's list, checked; a strength of None leaves that network alone.

    Raises:
        LoHaError: not a list of (name, model strength, clip strength).
    """
    entries: list[Entry] = []
    for place, item in enumerate(stack or (), 1):
        try:
            name, *strengths = item
            on_model, on_clip = (0.0 if strength is None else float(strength) for strength in strengths)
        except (TypeError, ValueError):
            name, on_model, on_clip = None, math.nan, math.nan
        if not (isinstance(name, str) and math.isfinite(on_model) and math.isfinite(on_clip)):
            raise LoHaError(
                f"entry {place} of the lora_stack input: expected (name, model strength, clip strength), found {item!r}"
            )
        if name != NONE:
            entries.append((name, on_model, on_clip))
    return entries
