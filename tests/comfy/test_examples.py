"""Every saved graph we ship fits the nodes as they are now: values, sockets, links, and no file of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo import comfyui

from .test_schema import REPOSITORY

SHIPPED = sorted([*(REPOSITORY / "example_workflows").glob("*.json"), *(REPOSITORY / "subgraphs").glob("*.json")])
NOTES = {"MarkdownNote"}
# Inputs that list what lies on the user's disk.
FILES = {"ckpt_name", "lora_name", "base_model", "folder"}
TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
INSIDE, OUTSIDE = -10, -20  # where a subgraph's own inputs and outputs stand

Json = dict[str, Any]


def graphs(path: Path) -> Iterator[Json]:
    """A file's graph and its subgraphs, links in one form: [id, from, slot, to, slot, type]."""
    saved = json.loads(path.read_text("utf-8"))
    ends = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    subgraphs = saved.get("definitions", {}).get("subgraphs", [])
    yield saved
    yield from (graph | {"links": [[link[end] for end in ends] for link in graph["links"]]} for graph in subgraphs)


def inputs_of(info: Json) -> dict[str, tuple[str, Json]]:
    """An input's type and options, in the order of the node; both ways of writing a choice are one."""
    found = {}
    for section in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(section, {}).items():
            choice = {"options": kind} if isinstance(kind, list) else {}
            found[name] = ("COMBO" if choice else kind, {**choice, **(options[0] if options else {})})
    return found


def fits(name: str, kind: str, options: Json, value: Any) -> bool:
    if kind == "COMBO":
        if name in FILES:
            return value == "None" or value.startswith("loha_demo")
        return value in options["options"]
    if kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return False
    return isinstance(value, TYPES[kind]) and (kind == "BOOLEAN" or not isinstance(value, bool))


@pytest.fixture(scope="module")
def info(server: comfyui.Server) -> Json:
    return server.object_info()


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def shipped(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_values_fit_their_widgets(shipped, info):
    for graph in graphs(shipped):
        for node in (node for node in graph["nodes"] if node["type"] in info):
            wanted = []
            for name, (kind, options) in inputs_of(info[node["type"]]).items():
                if kind in ("COMBO", *TYPES) and not options.get("forceInput"):
                    wanted.append((name, kind, options))
                    if options.get("control_after_generate"):
                        wanted.append(("after", "COMBO", {"options": ["fixed", "increment", "decrement", "randomize"]}))
            values = node.get("widgets_values", [])
            if not values and FILES & {name for name, _, _ in wanted}:
                continue  # it opens with the first of the user's own files
            assert len(values) == len(wanted), node["type"]
            for (name, kind, options), value in zip(wanted, values, strict=True):
                assert fits(name, kind, options, value), f"{node['type']}.{name}: {value!r}"


def test_they_name_no_file(shipped):
    """Whoever lacks it would open them on a warning of missing models."""
    values = [value for graph in graphs(shipped) for node in graph["nodes"] for value in node.get("widgets_values", ())]
    said = [value for value in values if isinstance(value, str)]
    assert not [value for value in said if "loha_demo" in value or value.endswith((".safetensors", ".ckpt", ".pt"))]


def test_notes_have_no_code(shipped):
    """Nodes 2.0 writes it in blue on a note's brown."""
    notes = [node for graph in graphs(shipped) for node in graph["nodes"] if node["type"] in NOTES]
    assert not [text for node in notes for text in node["widgets_values"] if "`" in text]


def test_sockets_are_those_of_the_nodes(shipped, info):
    subgraphs = {graph["id"] for graph in graphs(shipped) if "inputNode" in graph}
    for graph in graphs(shipped):
        for node in graph["nodes"]:
            if node["type"] in subgraphs | NOTES:
                continue
            about = info[node["type"]]
            known = {name: kind for name, (kind, _) in inputs_of(about).items()}
            sockets = {socket["name"]: socket["type"] for socket in node["inputs"]}
            assert {name: known.get(name) for name in sockets} == sockets, node["type"]
            outputs = list(zip(about["output_name"], about["output"], strict=True))
            for index, socket in enumerate(node["outputs"]):
                assert not socket.get("links") or (socket["name"], socket["type"]) == outputs[index], node["type"]
            linked = {socket["name"] for socket in node["inputs"] if socket["link"] is not None or socket.get("widget")}
            assert about["input"].get("required", {}).keys() <= linked, node["type"]


def test_links_join_sockets_of_one_type(shipped):
    for graph in graphs(shipped):
        nodes = {node["id"]: node for node in graph["nodes"]}
        nodes[INSIDE], nodes[OUTSIDE] = {"outputs": graph.get("inputs")}, {"inputs": graph.get("outputs")}
        joined = set()
        for number, start, output, end, input_, kind in graph["links"]:
            source, target = nodes[start]["outputs"][output], nodes[end]["inputs"][input_]
            assert number in (source.get("links") or source.get("linkIds")), (shipped.stem, number)
            assert number in (target.get("link"), *target.get("linkIds", ())), (shipped.stem, number)
            assert kind in (source["type"], "*") and target["type"] in (source["type"], "*"), (shipped.stem, number)
            joined.add(number)
        assert joined == {s["link"] for n in graph["nodes"] for s in n.get("inputs", ()) if s["link"] is not None} | {
            number for socket in graph.get("outputs", ()) for number in socket["linkIds"]
        }
