"""How many actions the usual things take, by doing them: a click, a drag, a typed text or a key is one each.

    pytest tests/browser/test_actions.py -s

prints the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from demo.comfyui import REPOSITORY, Server

from .conftest import settle, until
from .test_chooser import dialog_of, options
from .test_search import FOCUSED, TITLES
from .test_widgets import add, drag, rows_of, sent

# The node that is being put down, by later front ends.
GHOST = "app.canvas.state?.ghostNodeId ?? null"


class Hand:
    """A user's, which counts what it does."""

    def __init__(self, page: Page) -> None:
        self.page, self.actions = page, 0

    def click(self, target: Locator) -> None:
        target.click()
        self.actions += 1

    def drag(self, target: Locator, start: tuple[float, float], by: tuple[float, float]) -> None:
        drag(self.page, target, start, by)
        self.actions += 1

    def type(self, text: str) -> None:
        self.page.keyboard.type(text)
        self.actions += 1

    def key(self, key: str) -> None:
        self.page.keyboard.press(key)
        self.actions += 1


@pytest.fixture
def hand(page: Page) -> Hand:
    return Hand(page)


def said(hand: Hand, what: str, most: int) -> None:
    version = hand.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
    print(f"{version} | {what} | {hand.actions} | at most {most}")
    assert hand.actions <= most


def test_load_one_and_swap_it(page: Page, hand: Hand):
    until(page, lambda: page.mouse.dblclick(700, 400), lambda: page.evaluate(FOCUSED))
    hand.actions += 1
    hand.type("loha")
    page.wait_for_function(f"({TITLES})[0] === 'Load LoHa'")
    hand.key("Enter")
    page.wait_for_function("app.graph._nodes[0]?.type === 'LoHaLoader'")
    settle(page, GHOST)
    if page.evaluate(f"!!({GHOST})"):  # it hangs at the pointer until a click puts it down
        page.mouse.click(700, 400)
        hand.actions += 1
    said(hand, "load one", 4)
    node = page.evaluate("app.graph._nodes[0].id")

    hand.actions = 0
    page.mouse.move(5, 895)
    hand.click(page.get_by_role("button", name="adapter: "))
    expect(dialog_of(page).get_by_role("combobox", name="filter")).to_be_focused()
    hand.type("07 film")
    expect(options(page)).to_have_count(1)
    hand.key("Enter")
    assert "look_07" in sent(page, node)["lora_name"]
    said(hand, "find one by two words in any order", 3)  # of 2,000: see test_chooser.py

    hand.actions = 0
    hand.type("v2 anna")
    expect(options(page)).to_have_count(1)
    hand.key("Enter")
    assert "anna_v2" in sent(page, node)["lora_name"]
    said(hand, "swap it", 2)


def test_trigger_words_once_wired(page: Page, hand: Hand, ready: Server):
    node = add(page, "LoHaLoadAdapter", lora_name="seven.safetensors")
    show = add(page, "PreviewAny", 800)
    page.evaluate("([a, b]) => app.graph.getNodeById(a).connect(1, app.graph.getNodeById(b), 0)", [node, show])
    page.evaluate("id => { app.graph.getNodeById(id).widgets[0].value = 'characters/anna_v2.safetensors' }", node)
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function("id => app.nodeOutputs[id]?.text?.[0]?.startsWith('anna')", arg=show, timeout=120_000)
    said(hand, "trigger words once wired, after a swap", 0)


def test_stack_three_and_mute_one(page: Page, hand: Hand):
    node = add(page, "LoHaStack")
    hand.click(page.get_by_role("button", name="+ Add"))
    dialog = page.get_by_role("dialog", name="Add adapters")
    for name in ("look_00", "look_01", "look_02"):
        hand.click(dialog.get_by_role("option", name=name))
    hand.click(dialog.get_by_role("button", name="Add 3"))
    hand.click(page.get_by_role("switch", name="look_01 on"))
    assert [row["on"] for row in rows_of(page, node)] == [True, False, True]
    said(hand, "stack three and mute one", 6)


def test_a_preset_of_blocks(page: Page, hand: Hand, server: Server):
    node = add(page, "LoHaBlockStrength", family="SD1.5")
    for block in ("IN04", "M00"):
        hand.drag(page.get_by_role("slider", name=block, exact=True), (0.5, 0.5), (0, 0))
    hand.click(page.get_by_role("button", name="Presets"))
    name = page.get_by_role("dialog", name="Block presets").get_by_role("textbox", name="name")
    expect(name).to_be_focused()
    typed = sent(page, node)["vector"]
    expect(name).to_have_value(typed)
    hand.key("Enter")
    expect(
        page.get_by_role("dialog", name="Block presets").get_by_role("button", name=typed, exact=True)
    ).to_be_visible()
    said(hand, "set n = 2 blocks and keep them as a preset (n + 2)", 4)
    page.get_by_role("button", name=f"remove {typed}").click()
    page.keyboard.press("Escape")


# What -> its template, a node of it, and the actions that it may take.
TEMPLATES = {
    "five strengths by the grid, in one run": ("05 Compare strengths in a grid", "LoHaGrid", 1),
    "merge two others and save": ("11 Merge two LoHas", "LoHaMerge", 10),
    "train on a folder": ("09 Train a LoHa on a folder", "LoHaTrainFolder", 8),
    "go on with the training": ("09 Train a LoHa on a folder", "LoHaTrainFolder", 1),
}
LOOK = """id => {
  const node = app.graph.getNodeById(id);
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [200 - node.pos[0], 200 - node.pos[1]];
  app.canvas.setDirty(true, true);
}"""


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_is_run(page: Page, hand: Hand, ready: Server, what: str):
    """With what it has chosen already, but for the files that are merged."""
    name, kind, most = TEMPLATES[what]
    workflow = json.loads((REPOSITORY / "example_workflows" / f"{name}.json").read_text("utf-8"))
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    if kind == "LoHaMerge":
        ids = page.evaluate("app.graph._nodes.filter(n => n.type === 'LoHaLoadAdapter').map(n => n.id)")
        for node, typed in zip(ids, ("v2 anna", "look_02"), strict=False):
            page.evaluate(LOOK, node)
            page.wait_for_timeout(500)
            page.mouse.move(5, 895)
            found = page.evaluate("id => app.graph.getNodeById(id).widgets[0].value", node)
            hand.click(page.get_by_role("button", name=f"adapter: {Path(found).stem}", exact=True).first)
            hand.type(typed)
            expect(options(page)).to_have_count(1)
            hand.key("Enter")
    prompts: list[dict[str, Any]] = []

    def queue(route: Route) -> None:
        prompts.append(route.request.post_data_json)
        route.fulfill(json={"prompt_id": "x", "number": 1, "node_errors": {}})

    page.route("**/prompt", lambda route: queue(route) if route.request.method == "POST" else route.continue_())
    until(page, lambda: page.keyboard.press("Control+Enter"), lambda: prompts)
    hand.actions += 1
    page.unroute("**/prompt")
    prompt = prompts[0]
    assert kind in {node["class_type"] for node in prompt["prompt"].values()}
    if kind == "LoHaMerge":
        assert {"characters/anna_v2.safetensors", "styles/film/look_02.safetensors"} <= {
            node["inputs"].get("lora_name") for node in prompt["prompt"].values()
        }
    said(hand, what, most)
