"""Several adapters at once, and the LORA_STACK that other packs exchange."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from comfy_api.latest import io

from loha_core import Adapter, LoHaError, load_adapter
from loha_core.errors import about, check_number

from ..host import files, modes
from . import tags, words
from .inputs import schema, switch
from .loader import MAX_REPORTED, mode_input, patched_outputs
from .region import region_input
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
        return schema(
            node_id="LoHaStack",
            display_name="LoHa Stack",
            category="LoHa",
            description="Applies several adapters at once, and exchanges lists of them with other stack nodes.",
            search_aliases=["lora stack", "power lora", "multi lora", "lycoris stack", "lora tag", "lora from prompt"],
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
                io.String.Input(
                    "text",
                    default="",
                    optional=True,
                    dynamic_prompts=True,
                    placeholder="a cat <lora:style:0.8>",
                    tooltip="A prompt whose tags are applied, too, after the rows: <lora:name>, <lora:name:0.8> or "
                    "<lora:name:0.8:0.6>, the model's strength first. The name with or without folder and extension.",
                ),
                switch(
                    "skip_missing",
                    "Leave out adapters whose file is not found, with a warning in the report and the log. Off: an "
                    "error.",
                    optional=True,
                ),
                *words.word_inputs(),
                region_input(),
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
                words.words_output(),
                io.String.Output(display_name="prompt", tooltip="The text without its tags."),
                io.String.Output(
                    display_name="lora_tags",
                    tooltip="All adapters that are on as <lora:name:strength:clip>, for metadata, a prompt, or the "
                    "text of another stack.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, rows: str | None = None, text: str | None = None, skip_missing: bool | None = False
    ) -> bool | str:
        try:
            _, _, missing = wanted("[]" if rows is None else rows, text or "")
        except LoHaError as error:
            return str(error)
        # Connected inputs are None: not known yet.
        return "\n".join(missing) if missing and skip_missing is False else True

    @classmethod
    def fingerprint_inputs(cls, rows: str | None = None, text: str | None = None, **others: Any) -> str:
        # Connected rows and text, and adapters from a connected list, are not known yet.
        entries, _, missing = wanted("[]" if rows is None else rows, text or "")
        return "|".join([*(files.fingerprint(name) for name, _, _ in entries), *missing])

    @classmethod
    def execute(
        cls,
        rows: str,
        model: Any = None,
        clip: Any = None,
        lora_stack: Any = None,
        mode: str = "auto",
        text: str = "",
        skip_missing: bool = False,
        max_trigger_words: int = words.DEFAULT_COUNT,
        trigger_words: str = "",
        region: Any = None,
    ) -> io.NodeOutput:
        is_list = model is None and clip is None
        if is_list and region is not None:
            raise LoHaError("a list of adapters cannot hold a region; connect the model here, or remove the region")
        here, prompt, missing = wanted(rows, text)
        listed, lost = received(lora_stack), list[str]()
        if skip_missing or not is_list:  # what only passes through may be another pack's to find
            listed, lost = present(listed)
        missing = lost + missing
        if missing and not skip_missing:
            raise LoHaError("\n".join(missing))
        entries, reports = listed + here, [f"left out: {reason}" for reason in missing]
        for reason in missing:
            logging.warning("LoHa Stack left out %s", reason)
        adapters = []
        for name, strength_model, strength_clip in entries:
            adapter = header(name, reports) if is_list else files.load(name)
            if not is_list:
                model, clip, report = modes.apply(
                    model, clip, adapter, strength_model, strength_clip, mode=mode, region=region
                )
                reports.append(report.text(MAX_REPORTED))
            adapters += [adapter] if strength_model or strength_clip else []
        if is_list:
            reports.append(f"{len(entries)} adapters in the list; none applied here")
        given = words.joined(adapters, max_trigger_words, trigger_words)
        spelled = " ".join(spell(entries, reports))
        return io.NodeOutput(model, clip, entries, "\n\n".join(reports) or "no adapter is on", given, prompt, spelled)


def wanted(rows: str, text: str) -> tuple[list[Entry], str, list[str]]:
    """The adapters of rows and tags that are there, the text without tags, and what is missing, a sentence each.

    Raises:
        LoHaError: a row or a tag that cannot be understood, or a name that several adapters have.
    """
    prompt, found = tags.read(text)
    entries, missing = present(chosen(rows))
    names = tags.Names(files.names() if found else ())
    for tag in found:
        if name := names.find(tag.name):
            entries.append((name, tag.strength_model, tag.strength_clip))
        else:
            near = ", ".join(names.nearest(tag.name)) or "none is like it"
            missing.append(f"{tag.name!r}: no such adapter in ComfyUI's {files.FOLDER} folders; nearest: {near}")
    return entries, prompt, missing


def present(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Those whose files can be opened, and why the others cannot."""
    there, missing = [], []
    for entry in entries:
        try:
            files.resolve(entry[0])
            there.append(entry)
        except LoHaError as error:
            missing.append(str(error))
    return there, missing


def header(name: str, reports: list[str]) -> Adapter:
    """What a file says of itself; nothing, and a line in the reports, where it cannot be read here."""
    try:
        return load_adapter(files.resolve(name), values=False)
    except (LoHaError, OSError) as error:
        reports.append(f"{name}: no trigger words, as it cannot be read ({str(error).partition(chr(10))[0]})")
        return Adapter({})


def spell(entries: list[Entry], reports: list[str]) -> list[str]:
    """The entries as tags, and a line in the reports for each that no tag can hold."""
    names = tags.Names(files.names())
    spelled = []
    for entry in entries:
        if tag := names.write(*entry):
            spelled.append(tag)
        else:
            reports.append(f"{entry[0]}: not among lora_tags, since no tag can hold such a name")
    return spelled


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
