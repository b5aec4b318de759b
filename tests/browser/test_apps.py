"""Apps: a workflow's few inputs and its results without the graph, where the front end has that mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from demo import workflows

from .conftest import OWN_WIDGETS_ON_SUBGRAPHS

APPS = sorted(workflows.EXAMPLES.glob("*.app.json"))
OPEN = "([workflow, name]) => app.loadGraphData(workflow, true, true, name)"


@pytest.fixture
def app(page: Page) -> Page:
    if page.evaluate(OWN_WIDGETS_ON_SUBGRAPHS):
        pytest.skip("the front end 1.32.9 has no app mode")
    return page


def open_app(page: Page, path: Path) -> dict[str, Any]:
    workflow = workflows.filled(path)
    page.evaluate(OPEN, [workflow, path.stem])
    expect(page.get_by_test_id("linear-widgets")).to_be_visible()
    page.wait_for_timeout(1500)
    if page.get_by_role("button", name="Skip").count():  # a tour, the first time
        page.get_by_role("button", name="Skip").click()
    return workflow


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.stem)
def test_it_opens_as_an_app_with_plain_labels(app: Page, path: Path, shoot):
    workflow = open_app(app, path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node, widget in workflow["extra"]["linearData"]["inputs"]:
        [label] = [socket["label"] for socket in nodes[node]["inputs"] if socket["name"] == widget]
        expect(app.get_by_test_id("linear-widgets").get_by_text(label, exact=True).first).to_be_visible()
    shoot(f"app-{path.stem}")


def test_strength_0_and_1_draw_different_pictures(app: Page, ready, shoot):
    open_app(app, workflows.EXAMPLES / "LoHa slider.app.json")
    drawn = []
    for strength in (0, 1):
        app.evaluate("s => app.graph.getNodeById(2).widgets.find(w => w.name === 'strength_model').value = s", strength)
        before = len(ready.get("/history"))
        app.get_by_test_id("linear-run-button").get_by_role("button", name="Run", exact=True).click()
        while len(ready.get("/history")) == before:
            app.wait_for_timeout(200)
        *_, entry = ready.get("/history").values()
        drawn.append(ready.images(entry).astype(int))
        app.wait_for_timeout(1000)
        shoot(f"app-strength-{strength}")
    assert np.abs(drawn[1] - drawn[0]).max() > 20
