"""Several adapters at once, and the LORA_STACK that other packs exchange."""

from __future__ import annotations

import json
import math
from typing import Any

from comfy_api.latest import io

from loha_core import LoHaError
from loha_core.errors import about, check_number

from ..host import files, modes
from .loader import MAX_REPORTED, mode_input, patched_outputs
from .types import LORA_STACK

NONE = "None"
EXAMPLE = '[{"on": true, "name": "style.safetensors", "strength_model": 1, "strength_clip": 1}]'

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
                io.String.Input(
                    "rows",
                    default="[]",
                    multiline=True,
                    placeholder=EXAMPLE,
                    tooltip="The adapters, first to last: which file or PEFT folder under models/loras, whether it is "
                    f"on, and its strengths. By API: a JSON list such as {EXAMPLE}; without strength_clip, that of "
                    "the model counts for the text encoders too.",
                ),
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
    def fingerprint_inputs(cls, rows: str | None = None, **_: Any) -> str:
        # Connected rows, and adapters from a connected list, are not known yet.
        return "|".join(files.fingerprint(name) for name, _, _ in chosen(rows or "[]"))

    @classmethod
    def execute(
        cls, rows: str, model: Any = None, clip: Any = None, lora_stack: Any = None, mode: str = "auto"
    ) -> io.NodeOutput:
        chosen_here = chosen(rows)
        entries = [*received(lora_stack), *chosen_here]
        if model is None and clip is None:
            for name, _, _ in chosen_here:
                files.resolve(name)  # other packs load by these names: no others may leave here
            return io.NodeOutput(None, None, entries, f"{len(entries)} adapters in the list; none applied here")
        reports = []
        for name, strength_model, strength_clip in entries:
            model, clip, report = modes.apply(model, clip, files.load(name), strength_model, strength_clip, mode=mode)
            reports.append(report.text(MAX_REPORTED))
        return io.NodeOutput(model, clip, entries, "\n\n".join(reports) or "no adapter is on")


def chosen(rows: str) -> list[Entry]:
    """The rows that are on, out of the node's JSON.

    Raises:
        LoHaError: not JSON, not a list of rows, or a row with a wrong value; says which and what to write.
    """
    try:
        parsed = json.loads(rows)
    except (ValueError, RecursionError) as error:
        raise LoHaError(f"rows is not JSON ({error}); write a list such as {EXAMPLE}") from None
    if not isinstance(parsed, list):
        raise LoHaError(f"rows is {type(parsed).__name__}; expected a list such as {EXAMPLE}")
    entries = [_row(place, row) for place, row in enumerate(parsed, 1)]
    return [entry for entry in entries if entry is not None]


def _row(place: int, row: Any) -> Entry | None:
    """A row as an entry; None if it is off."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"]:
        raise LoHaError(f"row {place}: expected an object with a name, as in {EXAMPLE}, found {row!r:.200}")
    values = {"on": True, "strength_model": 1.0} | row
    values.setdefault("strength_clip", values["strength_model"])
    with about(f"row {place} ({row['name']})"):
        if unknown := values.keys() - {"on", "name", "strength_model", "strength_clip"}:
            raise LoHaError(f"unknown {', '.join(sorted(unknown))}; write it as in {EXAMPLE}")
        if not isinstance(values["on"], bool):
            raise LoHaError(f"on is {values['on']!r:.80}; write true or false")
        for key in ("strength_model", "strength_clip"):
            check_number(key, values[key])
    return (row["name"], float(values["strength_model"]), float(values["strength_clip"])) if values["on"] else None


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
