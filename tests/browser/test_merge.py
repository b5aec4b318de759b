"""Merging on the page: text and picture say what is lost, and a slid weight changes both."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from demo import workflows

WORKFLOW = workflows.filled(workflows.MERGE)
# Where a LiteGraph slider lies on the page; in Nodes 2.0 it is an element.
SLIDER = """() => {
  const node = app.graph._nodes.find(n => n.comfyClass === "LoHaMerge");
  const widget = node.widgets.find(w => w.name === "weight_1");
  const place = app.canvas.convertOffsetToCanvas([node.pos[0] + 15, node.pos[1] + widget.last_y + 10]);
  const canvas = app.canvas.canvas.getBoundingClientRect();
  return [canvas.left + place[0], canvas.top + place[1], (node.size[0] - 30) * app.canvas.ds.scale];
}"""
SET = """([type, name, value]) => {
  app.graph._nodes.find(n => n.type === type).widgets.find(w => w.name === name).value = value;
}"""
WEIGHT = "app.graph._nodes.find(n => n.comfyClass === 'LoHaMerge').widgets.find(w => w.name === 'weight_1').value"
PICTURE = """old => {
  const node = app.graph._nodes.find(n => n.comfyClass === "LoHaMerge");
  const shown = node.imgs?.[0] ?? document.querySelector(`[data-node-id="${node.id}"] img`);
  return shown?.complete && shown.naturalWidth > 0 && shown.src !== old && shown.src;
}"""


LOOK = """() => {
  const node = app.graph._nodes.find(n => n.comfyClass === "LoHaMerge");
  app.canvas.ds.scale = 0.8;
  app.canvas.ds.offset = [120 - node.pos[0], 160 - node.pos[1]];
  app.canvas.setDirty(true, true);
  return new Promise(done => setTimeout(done, 500));
}"""


def slide(page: Page, by: float) -> None:
    """weight_1, by a share of its range."""
    x, y, width = page.evaluate(SLIDER)
    node = page.evaluate("app.graph._nodes.find(n => n.comfyClass === 'LoHaMerge').id")
    slider = page.locator(f"[data-node-id='{node}'] [role=slider]")
    if slider.count():
        handle = slider.first.bounding_box()
        track = slider.first.locator("xpath=..").bounding_box()
        assert handle and track
        x, y, width = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2, track["width"]
    else:
        x += width * (page.evaluate(WEIGHT) + 20) / 40
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by * width, y, steps=8)
    page.mouse.up()


def look_at_bars(page: Page, layers: list) -> None:
    """Each layer's bar, by mouse and by keys."""
    plot = page.get_by_role("slider", name="relative error by layer")
    bars, status = plot.locator(".loha-error-bar"), page.locator(".loha-errors .loha-count")
    expect(bars).to_have_count(len(layers))
    worst = max(layers, key=lambda layer: layer[2])
    expect(status).to_have_text(re.compile(rf"^{len(layers)} layers, at most [\d.]+ % lost$"))
    heights = bars.evaluate_all("bars => bars.map(bar => parseFloat(bar.firstChild.style.height))")
    assert heights == pytest.approx([100 * layer[2] / worst[2] for layer in layers], rel=1e-4)

    bars.nth(3).hover()
    expect(status).to_have_text(f"{100 * layers[3][2]:.3g} %, rank {layers[3][3]}: {layers[3][0]}")
    plot.focus()
    page.keyboard.press("ArrowRight")
    expect(status).to_contain_text(layers[4][0])
    page.keyboard.press("End")
    expect(status).to_contain_text(layers[-1][0])
    sort = page.get_by_role("button", name="Sort", exact=True)
    sort.click()
    plot.focus()
    page.keyboard.press("Home")
    expect(status).to_contain_text(worst[0])
    sort.click()


def test_merge_shows_what_is_lost(page: Page, ready, shoot):
    page.evaluate("workflow => app.loadGraphData(workflow)", WORKFLOW)
    # Ranks of 16 and 16 in 8: some of it is lost.
    for node, name, value in (("KSampler", "steps", 4), ("LoHaMerge", "rank", 8)):
        page.evaluate(SET, [node, name, value])
    page.evaluate(LOOK)  # LiteGraph has no elements of nodes that are out of sight
    merged = page.locator("pre.loha-info").filter(has_text="what is lost")
    expect(merged).to_have_count(1)
    page.evaluate("app.queuePrompt(0)")
    text = page.locator("pre.loha-info").filter(has_text="relative error")
    expect(text).to_contain_text("layers", timeout=120_000)
    first = text.inner_text()
    picture = page.wait_for_function(PICTURE, timeout=120_000).json_value()
    saved = page.locator("pre.loha-info").filter(has_text="loha_demo_merged.safetensors")
    expect(saved).to_have_count(1, timeout=120_000)
    shoot("merge")

    page.wait_for_function("app.ui.lastQueueSize === 0", timeout=120_000)
    *_, entry = ready.get("/history").values()
    [layers] = [output["layers"] for output in entry["outputs"].values() if "layers" in output]
    look_at_bars(page, layers)
    shoot("merge-bars")
    slide(page, 0.1)
    assert page.evaluate(WEIGHT) > 2, shoot("merge-slid")
    page.evaluate("app.queuePrompt(0)")
    expect(text).not_to_have_text(first, timeout=120_000)
    page.wait_for_function(PICTURE, arg=picture, timeout=120_000)
    shoot("merge-slid")

    page.wait_for_function("app.ui.lastQueueSize === 0", timeout=120_000)
    *_, entry = ready.get("/history").values()
    assert entry["status"]["status_str"] == "success"
    [shown] = [
        picture
        for output in entry["outputs"].values()
        for picture in output.get("images", ())
        if picture["type"] == "output"
    ][:1]
    file = ready.path("output", shown["subfolder"], shown["filename"])
    assert np.asarray(Image.open(file)).std() > 5
