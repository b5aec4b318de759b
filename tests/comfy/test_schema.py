"""What workflows and API clients rely on: ids, inputs and outputs of the nodes, in order, as `schema.json` holds them.

A change on purpose: `python -m tests.comfy.test_locales` writes it, and the English texts.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from demo import comfyui

REPOSITORY = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("schema.json")
# What an input says and how it looks may change, and so may what lies in the model folders.
LOOKS = {"tooltip", "placeholder", "multiline", "display", "advanced"}
FILES = {"lora_name", "base_model", "folder"}


def ours(info: dict[str, Any]) -> dict[str, Any]:
    """This pack's part of /object_info."""
    return {node: about for node, about in info.items() if about["python_module"] == "custom_nodes.ComfyUI-LoHa"}


def contract(info: dict[str, Any]) -> str:
    """JSON with a line for each node, input and output."""
    lines: dict[str, Any] = {}
    for node, about in ours(info).items():
        lines[node] = {"output_node": about["output_node"]}
        for section in ("required", "optional"):
            for name, (kind, options) in about["input"].get(section, {}).items():
                ignored = LOOKS | {"options"} if name in FILES else LOOKS
                kept = {key: value for key, value in options.items() if key not in ignored}
                lines[f"{node} {section} {name}"] = {"type": kind} | kept
        for index, name in enumerate(about["output_name"]):
            kind, is_list = about["output"][index], about["output_is_list"][index]
            lines[f"{node} output {index} {name}"] = {"type": kind, "list": is_list}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines.items()) + "\n}\n"


def test_nothing_changed_that_saved_workflows_rely_on(server: comfyui.Server):
    before, now = SNAPSHOT.read_text(), contract(server.object_info())
    diff = difflib.unified_diff(before.splitlines(), now.splitlines(), "released", "now", n=0, lineterm="")
    assert before == now, "on purpose? Then run python -m tests.comfy.test_locales\n" + "\n".join(diff)
