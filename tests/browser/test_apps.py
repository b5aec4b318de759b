"""Apps: a workflow's few inputs and its results without the graph, where the front end has that mode."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from demo import workflows
from demo.comfyui import Json, Server

from .conftest import OWN_WIDGETS_ON_SUBGRAPHS
from .test_widgets import drag

APPS = sorted(workflows.EXAMPLES.glob("*.app.json"))
OPEN = "([workflow, name]) => app.loadGraphData(workflow, true, true, name)"


@pytest.fixture
def app(page: Page) -> Page:
    if page.evaluate(OWN_WIDGETS_ON_SUBGRAPHS):
        pytest.skip("the front end 1.32.9 has no app mode")
    return page


def fields(app: Page) -> Locator:
    return app.get_by_test_id("linear-widgets")


def open_app(page: Page, path: Path) -> dict[str, Any]:
    workflow = workflows.filled(path)
    page.evaluate(OPEN, [workflow, path.stem])
    expect(fields(page)).to_be_visible()
    page.wait_for_timeout(1500)
    if page.get_by_role("button", name="Skip").count():  # a tour, the first time
        page.get_by_role("button", name="Skip").click()
    return workflow


def run(app: Page, server: Server) -> tuple[Json, np.ndarray]:
    """Press Run -> the prompt, and the pictures that are saved and that the app shows."""
    before = server.get("/history").keys()
    app.get_by_test_id("linear-run-button").get_by_role("button", name="Run", exact=True).click()
    deadline = time.monotonic() + 180
    while not server.get("/history").keys() - before:
        assert time.monotonic() < deadline
        app.wait_for_timeout(200)
    *_, entry = server.get("/history").values()
    assert entry["status"]["status_str"] == "success", entry["status"]
    _, _, prompt, *_ = entry["prompt"]
    saved = [picture for output in entry["outputs"].values() for picture in output.get("images", ())]
    saved = [picture for picture in saved if picture["type"] == "output"]
    pictures = app.locator(f"img[src*='{saved[0]['filename']}']").filter(visible=True)  # the graph has its own, unseen
    expect(pictures.first).to_be_visible()
    return prompt, server.images({"outputs": {"": {"images": saved}}}).astype(int)


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.stem)
def test_it_opens_as_an_app_with_plain_labels(app: Page, path: Path, shoot):
    workflow = open_app(app, path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node, widget in workflow["extra"]["linearData"]["inputs"]:
        [label] = [socket["label"] for socket in nodes[node]["inputs"] if socket["name"] == widget]
        expect(fields(app).get_by_text(label, exact=True).first).to_be_visible()
    shoot(f"app-{path.stem}")


def test_strength_0_and_1_draw_different_pictures(app: Page, ready, shoot):
    open_app(app, workflows.EXAMPLES / "LoHa slider.app.json")
    slider = fields(app).get_by_role("slider", name="model strength")
    changes: dict[int, Callable[[], None]] = {
        0: lambda: drag(app, slider, (0.5, 0.5), (0, 0)),
        1: lambda: slider.press("End"),
    }
    drawn = []
    for strength, change in changes.items():
        change()
        expect(slider).to_have_attribute("aria-valuenow", str(strength))
        prompt, pictures = run(app, ready)
        assert prompt["2"]["inputs"]["strength_model"] == strength
        drawn.append(pictures)
        shoot(f"app-strength-{strength}")
    assert np.abs(drawn[1] - drawn[0]).max() > 20


def test_a_grid_compares_strengths_0_and_1(app: Page, ready, shoot):
    workflow = open_app(app, workflows.EXAMPLES / "Compare strengths.app.json")
    [grid] = [str(node["id"]) for node in workflow["nodes"] if node["type"] == "LoHaGrid"]
    strengths = fields(app).get_by_role("textbox").last
    drawn = []
    for typed in ("0, 1", "1, 0"):
        strengths.fill(typed)
        strengths.press("Tab")
        prompt, [picture] = run(app, ready)
        assert prompt[grid]["inputs"]["strengths"] == typed
        drawn.append(picture[len(picture) // 2 :])  # below the labels
        shoot(f"app-grid-{typed[0]}")
    assert np.abs(drawn[1] - drawn[0]).max() > 20
