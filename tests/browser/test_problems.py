"""What is known before a run is said on the node, in the words of the run."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from demo.comfyui import REPOSITORY, ComfyUIError, Server

from .conftest import OWN_WIDGETS_ON_SUBGRAPHS, STEP
from .test_undo import undo
from .test_widgets import add, sent

SET = """([id, name, value]) => {
  const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name);
  widget.value = value;
  widget.callback?.(value);
}"""
SAID = (
    "reason => reason.includes([...document.querySelectorAll('.loha-error')].map(e => e.textContent).join('') || '-')"
)
# node -> a widget, a value that cannot be run, one that can.
WRONG: dict[str, tuple[str, Any, Any]] = {
    "LoHaLoader": ("lora_name", "gone.safetensors", "seven.safetensors"),
    "LoHaStack": ("text", "<lora:nowhere:1>", "<lora:seven:1>"),
    "LoHaBlockStrength": ("rules", "attn(: 1", "attn: 0.5"),
    "LoHaSchedule": ("keyframes", "half: 1", "0.5: 1"),
    "LoHaGrid": ("strengths", "much", "0, 1"),
    "LoHaNetwork": ("patterns", "attn2: many", "attn2: 4"),
    "LoHaOptimizer": ("options", "{", '{"betas": [0.9, 0.99]}'),
    "LoHaTrainer": ("name", "a/b", "ab"),
    "LoHaSave": ("filename", "../a", "a"),
    "LoHaExtract": ("only", "attn(", "attn"),
}
OWN_PLACE = {"LoHaBlockStrength", "LoHaSchedule"}
"""Nodes with a widget that has a place for it."""


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_value_is_said_on_the_node(page: Page, server: Server, nodes_2: bool, kind: str, shoot):
    if nodes_2 and kind not in OWN_PLACE and page.evaluate(OWN_WIDGETS_ON_SUBGRAPHS):
        pytest.skip("Nodes 2.0 of the front end 1.32.9 draws no line that comes after a change; the run tells")
    name, wrong, right = WRONG[kind]
    node = add(page, kind)
    said = page.locator(".loha-error:visible")
    page.wait_for_timeout(500)
    expect(said).to_have_count(0)
    page.evaluate(SET, [node, name, wrong])
    expect(said).to_have_count(1)
    reason = told(server, page, kind, node)
    page.wait_for_function(SAID, arg=reason)
    text = said.inner_text()
    shoot(f"problem-{kind}")
    page.evaluate(STEP)
    add(page, "Note", 900, 700)
    page.evaluate(STEP)
    undo(page)
    expect(said).to_have_text(text)
    page.evaluate(SET, [node, name, right])
    expect(said).to_have_count(0)


def told(server: Server, page: Page, kind: str, node: int) -> str:
    """What the server says of a prompt with the node's inputs."""
    prompt = {"1": {"class_type": kind, "inputs": sent(page, node)}}
    prompt["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    with pytest.raises(ComfyUIError) as refused:
        server.post("/prompt", {"prompt": prompt})
    return str(refused.value)


def test_the_page_asks_for_each_node_that_the_server_can_check(page: Page, server: Server):
    with pytest.raises(ComfyUIError) as refused:
        server.get("/loha/problem?node=none&inputs={}")
    known = set(re.findall(r"\bLoHa\w+", str(refused.value)))
    assert known > WRONG.keys()
    source = (REPOSITORY / "web" / "loha_widgets.js").read_text("utf-8")
    assert set(re.findall(r"LoHa\w+", source.partition("CHECKED = [")[2].partition("]")[0])) == known
