"""Undo and redo: what the page shows of a node is what the node sends, and it answers to the next press.

Undo makes every node anew. Nodes 2.0 would go on showing the elements of the nodes that are gone.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from demo.comfyui import REPOSITORY, Server
from loha_core.schedule import Schedule

from .conftest import OWN_WIDGETS_ON_SUBGRAPHS, SQUASHED, STEP, STYLES, TRACKER, expect_value
from .test_nodes import BUILD
from .test_widgets import add, drag, rows, sent


def step(page: Page, key: str, by: int) -> None:
    """Press the keys for undo or redo, and wait until it is done."""
    wanted = page.evaluate(f"{TRACKER}.undoQueue.length") + by
    page.keyboard.press(key, delay=100)  # as fingers do: the front end 1.32.9 takes a key that is up at once for a step
    page.wait_for_function(f"n => {TRACKER}.undoQueue.length === n && !{TRACKER}._restoringState", arg=wanted)
    page.evaluate(SQUASHED)


def undo(page: Page) -> None:
    step(page, "Control+z", -1)


def redo(page: Page) -> None:
    step(page, "Control+y", 1)


@dataclass
class Kind:
    """A widget: its node, two changes by hand, what a user sees of it, and what ought to be seen of what is sent."""

    node: str
    values: dict[str, Any]
    changes: tuple[Callable[[Page], None], Callable[[Page], None]]
    shown: str
    expected: Callable[[dict[str, Any], Server], Any]


def slide(name: str, share: float) -> Callable[[Page], None]:
    return lambda it: drag(it, it.get_by_role("slider", name=name, exact=True), (share, 0.5), (3, 0))


def click(role: Any, name: str) -> Callable[[Page], None]:
    return lambda it: it.get_by_role(role, name=name).click()


def choose(page: Page) -> None:
    page.get_by_role("button", name="+ Add").click()
    page.get_by_role("dialog", name="Add adapters").get_by_role("combobox", name="filter").fill("anv2")
    page.keyboard.press("Enter")


def swap(typed: str) -> Callable[[Page], None]:
    def by_chooser(page: Page) -> None:
        page.get_by_role("button", name="adapter: ").click()
        page.get_by_role("dialog", name="Choose an adapter").get_by_role("combobox", name="filter").fill(typed)
        page.keyboard.press("Enter")

    return by_chooser


def raise_strength(page: Page) -> None:
    drag(page, page.get_by_role("spinbutton", name="strength of seven"), (0.5, 0.5), (40, 0))


def strengths(inputs: dict[str, Any], _: Server) -> Any:
    found = [inputs["strength_model"], inputs["strength_clip"]]
    return [[str(value), str(value), f"{25 * value + 50:g}%"] for value in found]


def bars(inputs: dict[str, Any], server: Server) -> Any:
    query = {name: inputs[name] for name in ("family", "preset", "vector")}
    values = server.get(f"/loha/blocks?{urllib.parse.urlencode(query)}")["values"]
    return [inputs["vector"], {label: f"{value:g}" for label, value in values.items()}]


def frames(inputs: dict[str, Any], _: Server) -> Any:
    found = Schedule.parse(inputs["keyframes"]).keyframes
    return [inputs["keyframes"], sorted(f"{100 * x:g} %: {y:g}" for x, y in found)]


def stack(inputs: dict[str, Any], _: Server) -> Any:
    return [[row["name"], str(row["on"]).lower(), f"{row['strength_model']:g}"] for row in json.loads(inputs["rows"])]


def file(inputs: dict[str, Any], _: Server) -> Any:
    return [inputs["lora_name"], Path(inputs["lora_name"]).stem]


# seen(selector) are the elements that can be seen: the front end 1.32.9 keeps those of nodes that are gone.
SEEN = "(seen => ({}))(selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()))"
FILE = SEEN.format("""[seen(".loha-file .loha-button")[0]?.title, seen(".loha-file span")[0]?.textContent]""")
SLIDERS = SEEN.format("""seen(".loha-strength").map(e => [
  e.querySelector(".loha-track").ariaValueNow, e.querySelector("input").value,
  e.querySelector(".loha-thumb").style.left])""")
ROWS = SEEN.format("""seen(".loha-stack-row").map(e => [
  e.querySelector("[data-part=name]").title, e.querySelector("[role=switch]").ariaChecked,
  e.querySelector("input").value])""")
BARS = SEEN.format("""[seen(".loha-equaliser textarea")[0]?.value,
  Object.fromEntries(seen(".loha-bar").map(e => [e.ariaLabel, e.ariaValueNow]))]""")
FRAMES = SEEN.format("""[seen(".loha-schedule textarea")[0]?.value,
  seen(".loha-keyframe").map(e => e.title).sort()]""")

VISIBLE_SLIDERS = """[...document.querySelectorAll(".loha-track")].filter(e => e.checkVisibility())
  .map(e => Number(e.ariaValueNow))"""

KINDS = {
    "file": Kind("LoHaLoadAdapter", {"lora_name": "seven.safetensors"}, (swap("anv2"), swap("look_03")), FILE, file),
    "model strength": Kind(
        "LoHaLoader",
        {},
        (slide("model strength", 0.2), slide("model strength", 0.7)),
        SLIDERS,
        strengths,
    ),
    "clip strength": Kind(
        "LoHaApply",
        {},
        (slide("clip strength", 0.4), slide("clip strength", 0.9)),
        SLIDERS,
        strengths,
    ),
    "stack's switch": Kind(
        "LoHaStack",
        {"rows": rows("seven.safetensors", STYLES[1])},
        (click("switch", "seven on"), click("switch", "look_01 on")),
        ROWS,
        stack,
    ),
    "stack's strength": Kind(
        "LoHaStack", {"rows": rows("seven.safetensors")}, (raise_strength, raise_strength), ROWS, stack
    ),
    "stack's chooser": Kind("LoHaStack", {"rows": rows("seven.safetensors")}, (choose, choose), ROWS, stack),
    "block bars": Kind(
        "LoHaBlockStrength",
        {"family": "SD1.5", "vector": "OUT=0.5"},
        (slide("IN04", 0.5), slide("M01", 0.5)),
        BARS,
        bars,
    ),
    "block bars of any model": Kind(
        "LoHaBlockStrength", {"vector": "OUT=0.5"}, (slide("IN", 0.5), slide("BASE", 0.5)), BARS, bars
    ),
    "keyframes": Kind(
        "LoHaSchedule",
        {"keyframes": "0: 0.2, 0.5: 1"},
        (
            lambda it: drag(it, it.locator(".loha-plot:visible"), (0.75, 0.5), (0, -20)),
            lambda it: drag(it, it.locator(".loha-keyframe:visible").first, (0.5, 0.5), (30, -20)),
        ),
        FRAMES,
        frames,
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_shown_is_sent(page: Page, server: Server, kind: Kind):
    node = add(page, kind.node, **kind.values)
    page.evaluate(STEP)

    def compare() -> Any:
        values = kind.expected(sent(page, node), server)
        expect_value(page, kind.shown, values)
        return values

    first, second = kind.changes
    before = compare()
    first(page)
    changed = compare()
    assert changed != before
    undo(page)
    assert compare() == before
    redo(page)
    assert compare() == changed
    undo(page)
    assert compare() == before
    second(page)
    other = compare()
    assert other != before
    undo(page)
    assert compare() == before
    first(page)
    assert compare() == changed


def test_strengths_of_a_subgraph(page: Page):
    """Their sliders lie in nodes inside; a user sees them, or plain fields, on the subgraph's own."""
    workflow = json.loads((REPOSITORY / "subgraphs" / "Compare two LoHas.json").read_text("utf-8"))
    page.evaluate("workflow => app.loadGraphData(workflow, true, true)", workflow)
    sliders = page.locator(".loha-track:visible")
    own = page.evaluate(OWN_WIDGETS_ON_SUBGRAPHS)
    expect(sliders).to_have_count(2 if own else 0)

    def compare() -> list[float]:
        prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
        values = [node["inputs"]["strength_model"] for node in prompt.values() if "strength_model" in node["inputs"]]
        if own:
            expect_value(page, VISIBLE_SLIDERS, values)
        fields = "app.graph._nodes[0].widgets.filter(w => w.name.startsWith('strength_')).map(w => w.value)"
        expect_value(page, fields, values)
        return values

    def change(index: int, value: float) -> None:
        if own:
            drag(page, sliders.nth(index), ((value + 2) / 4, 0.5), (0, 0))
        else:
            name = f"strength_{index + 1}"
            page.evaluate(f"name => {{ app.graph._nodes[0].widgets.find(w => w.name === name).value = {value} }}", name)
            page.evaluate(STEP)

    before = compare()
    change(0, 0.4)
    changed = compare()
    assert changed[0] != before[0] and changed[1] == before[1]
    undo(page)
    assert compare() == before
    redo(page)
    assert compare() == changed
    change(1, 0.4)
    assert compare() == [changed[0], pytest.approx(0.4, abs=0.051)]


def test_what_runs_have_shown_stays_and_the_next_run_follows(page: Page, adapter: str):
    """Text, the bars of what is lost, and the layout of block bars."""
    page.evaluate(BUILD, adapter)
    page.evaluate("""() => {
      const make = (type, x, y) => app.graph.add(Object.assign(LiteGraph.createNode(type), { pos: [x, y] }));
      make("LoHaResize", 850, 120);
      make("LoHaInfo", 420, 700);
      const [load, , resize, info] = app.graph._nodes;
      load.connect(0, resize, 0);
      resize.connect(0, info, 0);
      resize.widgets.find(w => w.name === "rank").value = 2;
    }""")
    texts, lost = page.locator("pre.loha-info"), page.locator(".loha-error-bar")
    for file, layers in ((adapter, 9), ("seven.safetensors", 1)):
        page.evaluate("file => { app.graph._nodes[0].widgets[0].value = file }", file)
        page.evaluate("app.queuePrompt(0)")
        expect(texts.first).to_contain_text(f"LoHa layers   {layers}", timeout=120_000)
        expect(lost).to_have_count(layers, timeout=120_000)
        page.wait_for_function("app.ui.lastQueueSize === 0", timeout=120_000)
        said = texts.all_inner_texts()
        add(page, "Note")
        page.evaluate(STEP)
        undo(page)
        expect(texts).to_have_text(said, use_inner_text=True)
        expect(lost).to_have_count(layers)


@contextmanager
def training(page: Page, losses: list[float]) -> Iterator[Locator]:
    """The server tells of a run with these losses -> the monitors that are seen."""

    def answer(route: Route) -> None:
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(route.request.url).query)
        known = int(asked["since"][0]) if "run" in asked else 0
        run = {"id": "a", "step": len(losses), "steps": 9, "loss": 0.1, "lr": 1e-3, "seconds_left": 60, "previews": []}
        route.fulfill(json={"runs": [run | {"state": "running", "losses": losses[known:], "previous": []}]})

    page.route("**/loha/training*", answer)
    try:
        yield page.locator(".loha-monitor:visible")
    finally:
        page.unroute("**/loha/training*")


def test_the_monitor_goes_on(page: Page):
    losses = [0.3, 0.2]
    with training(page, losses) as view:
        add(page, "LoHaTrainer")
        page.evaluate(STEP)
        expect(view).to_contain_text("2 of 9")
        for _ in range(2):
            add(page, "Note", 800)
            page.evaluate(STEP)
            undo(page)
            losses.append(0.1)
            page.evaluate("app.api.dispatchCustomEvent('loha.training', {})")
            expect(view).to_contain_text(f"{len(losses)} of 9")
            expect(view.get_by_role("img", name=f"Loss of {len(losses)} steps")).to_be_visible()
