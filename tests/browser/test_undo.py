"""Undo and redo: what the page shows of a node is what the node sends, and it answers to the next press.

Undo makes every node anew. Nodes 2.0 would go on showing the elements of the nodes that are gone.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from demo.comfyui import Server
from loha_core.schedule import Schedule

from .test_nodes import BUILD, adapter  # noqa: F401
from .test_widgets import (  # noqa: F401  (fixtures among them)
    STYLES,
    adapters,
    add,
    drag,
    opened,
    page,
    rows,
    sent,
)

TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"


def step(page: Page, key: str, by: int) -> None:  # noqa: F811
    """Press the keys for undo or redo, and wait until it is done."""
    wanted = page.evaluate(f"{TRACKER}.undoQueue.length") + by
    page.keyboard.press(key, delay=100)  # as fingers do: the front end 1.32.9 takes a key that is up at once for a step
    page.wait_for_function(f"n => {TRACKER}.undoQueue.length === n && !{TRACKER}._restoringState", arg=wanted)


def undo(page: Page) -> None:  # noqa: F811
    step(page, "Control+z", -1)


def redo(page: Page) -> None:  # noqa: F811
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
    return lambda page: drag(page, page.get_by_role("slider", name=name, exact=True), (share, 0.5), (3, 0))


def click(role: Any, name: str) -> Callable[[Page], None]:
    return lambda page: page.get_by_role(role, name=name).click()


def choose(page: Page) -> None:  # noqa: F811
    page.get_by_role("button", name="+ Add").click()
    page.get_by_role("dialog", name="Add adapters").get_by_role("combobox", name="filter").fill("anv2")
    page.keyboard.press("Enter")


def raise_strength(page: Page) -> None:  # noqa: F811
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


SLIDERS = """[...document.querySelectorAll(".loha-strength")].map(e => [
  e.querySelector(".loha-track").ariaValueNow, e.querySelector("input").value, e.querySelector(".loha-thumb").style.left])"""
ROWS = """[...document.querySelectorAll(".loha-stack-row")].map(e => [
  e.querySelector("[data-part=name]").title, e.querySelector("[role=switch]").ariaChecked, e.querySelector("input").value])"""
BARS = """[document.querySelector(".loha-equaliser textarea").value,
  Object.fromEntries([...document.querySelectorAll(".loha-bar")].map(e => [e.ariaLabel, e.ariaValueNow]))]"""
FRAMES = """[document.querySelector(".loha-schedule textarea").value,
  [...document.querySelectorAll(".loha-keyframe")].map(e => e.title).sort()]"""

KINDS = {
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
            lambda page: drag(page, page.locator(".loha-plot"), (0.75, 0.5), (0, -20)),
            lambda page: drag(page, page.locator(".loha-keyframe").first, (0.5, 0.5), (30, -20)),
        ),
        FRAMES,
        frames,
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_shown_is_sent(page: Page, server: Server, kind: Kind):  # noqa: F811
    node = add(page, kind.node, **kind.values)
    page.evaluate(f"{TRACKER}.checkState()")  # adding it is a step

    def compare() -> Any:
        values = kind.expected(sent(page, node), server)
        page.wait_for_timeout(300)
        assert page.evaluate(kind.shown) == values
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
