"""Writing adapters where they can be loaded from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from loha_core import Adapter, LoHaError, save_adapter
from loha_core.adapter import module_names
from loha_core.formats.lycoris import as_one_file
from loha_core.naming.readers import unread

from ..host.files import FOLDER
from .inputs import choice, json_object, one_of, problems, schema, switch
from .types import LOHA

DTYPES = {"as it is": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = {"LyCORIS (one file)": "lycoris", "PEFT (a folder)": "peft"}
NONE = "None"


class LoHaSave(io.ComfyNode):
    """LOHA -> a file or folder among the adapters."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaSave",
            display_name="Save LoHa",
            search_aliases=["save lora", "lora save"],
            category="LoHa",
            description="Saves a LoHa into the loras folder, where the loader nodes find it.",
            inputs=[
                LOHA.Input("loha", tooltip="The adapter to save."),
                io.String.Input(
                    "filename",
                    default="my_loha",
                    tooltip="Name under models/loras; folders by /. A number is added where the name is taken.",
                ),
                one_of(
                    "format",
                    FORMATS,
                    "LyCORIS: one .safetensors file. Layers keep their names, so that whatever read the file "
                    "that was loaded reads this one; Convert LoHa changes them. PEFT: a folder for diffusers.",
                ),
                one_of(
                    "dtype",
                    DTYPES,
                    "Of the saved numbers. fp16 halves the file and is what most files use.",
                    default="fp16",
                ),
                switch("overwrite", "Replace a file of this name instead.", optional=True),
                io.String.Input(
                    "trigger_words",
                    default="",
                    optional=True,
                    tooltip="Words that call up what was learnt, separated by commas; they are kept in the file.",
                ),
                one_of(
                    "base_model",
                    [NONE, *folder_paths.get_filename_list("checkpoints")],
                    "The checkpoint that it was trained on: its name and hash are kept in the file.",
                    optional=True,
                ),
                io.String.Input(
                    "metadata",
                    default="",
                    optional=True,
                    placeholder='{"modelspec.author": "me"}',
                    tooltip="Further metadata as JSON, text by text.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The name to load it by.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None, metadata: str | None = None) -> bool | str:
        return problems(
            lambda: filename is None or free_path(filename, "", True), lambda: described("", NONE, metadata or "")
        )

    @classmethod
    def execute(
        cls,
        loha: Adapter,
        filename: str,
        format: str,
        dtype: str,
        overwrite: bool = False,
        trigger_words: str = "",
        base_model: str = NONE,
        metadata: str = "",
    ) -> io.NodeOutput:
        kind = FORMATS.get(format, format)
        more = described(trigger_words, base_model, metadata)
        path = free_path(filename, ".safetensors" if kind == "lycoris" else "", overwrite)
        adapter = replace(loha, metadata=loha.metadata | more)
        warning = unread(module_names(as_one_file(adapter))) if kind == "lycoris" else None
        if warning:
            logging.warning("Save LoHa: %s; Convert LoHa with names 'kohya' gives it names that both know", warning)
        save_adapter(adapter, path, format=kind, dtype=choice("dtype", dtype, DTYPES))  # type: ignore[arg-type]
        name = str(path.relative_to(root()))
        return io.NodeOutput(name, ui=ui.PreviewText("\n".join([f"saved as {name}", *([warning] if warning else [])])))


def root() -> Path:
    """The folder that new adapters go to: the first of ComfyUI's loras folders."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def free_path(filename: str, suffix: str, overwrite: bool) -> Path:
    """Where a name from the graph leads: inside the loras folder, on nothing that is there unless told.

    Raises:
        LoHaError: an empty name, or one that leads elsewhere.
    """
    stem = filename.strip().removesuffix(suffix) if suffix else filename.strip()
    parts = [part for part in re.split(r"[/\\]", stem) if part]
    if not parts or stem[0] in "/\\" or any(part in (".", "..") or set(part) & set('\0:*?"<>|') for part in parts):
        raise LoHaError(f"filename is {filename!r}; expected a name inside the loras folder, such as style/my_loha")
    base = root()
    path = base.joinpath(*parts[:-1], parts[-1] + suffix)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(base)):
        raise LoHaError(f"filename is {filename!r}, which leads out of the loras folder; choose another name")
    number = 2
    while not overwrite and os.path.lexists(path):
        path = base.joinpath(*parts[:-1], f"{parts[-1]}_{number}{suffix}")
        number += 1
    return path


def described(trigger_words: str, base_model: str, metadata: str) -> dict[str, str]:
    """The metadata that the node's inputs mean."""
    entries: dict[str, str] = {}
    if trigger_words.strip():
        entries["modelspec.trigger_phrase"] = trigger_words.strip()
    if base_model != NONE:
        path = folder_paths.get_full_path("checkpoints", base_model)
        if path is None:
            raise LoHaError(f"base_model is {base_model!r}, which is not among the checkpoints; refresh the list")
        stat = os.stat(path)
        entries["ss_sd_model_name"] = base_model
        entries["ss_new_sd_model_hash"] = _sha256(path, stat.st_mtime_ns, stat.st_size)
    more = json_object("metadata", metadata, '{"key": "text"}')
    return entries | {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in more.items()}


@lru_cache(maxsize=8)
def _sha256(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
