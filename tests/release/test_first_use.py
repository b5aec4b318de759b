"""The first minutes with LoHa, as somebody spends them who has ComfyUI, a checkpoint, a LoHa, and a mouse.

`make test-release` runs it, or `pytest tests/release/test_first_use.py` alone; a picture of each step is kept in
.cache/screenshots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from demo.comfyui import Server

from ..browser.conftest import VUE
from .conftest import FOLDER

# The address of the picture that the last node shows: LiteGraph draws it, Nodes 2.0 has an element.
SHOWN = """old => {
  const node = app.graph._nodes.find(n => n.type === "SaveImage");
  const shown = node.imgs?.[0] ?? document.querySelector(`[data-node-id="${node.id}"] img`);
  return shown?.complete && shown.naturalWidth > 0 && shown.src !== old && shown.src;
}"""


# The demo's model draws digits, of pixels: 512 a side would take it minutes.
SMALL = """() => {
  const { widgets } = app.graph._nodes.find(n => n.type === "EmptyLatentImage");
  for (const name of ["width", "height"]) widgets.find(w => w.name === name).value = 64;
}"""


@pytest.fixture
def page(browser: Browser, ready: Server) -> Iterator[Page]:
    """ComfyUI's page as it opens for somebody who has never been here."""
    ready.path("user", "default", "comfy.settings.json").unlink(missing_ok=True)
    ready.post("/free", {"unload_models": True, "free_memory": True})
    context = browser.new_context(viewport={"width": 1920, "height": 1080})
    opened = context.new_page()
    opened.goto(ready.address)
    yield opened
    context.close()


def press_run(page: Page, server: Server, shown: str | None) -> tuple[str, np.ndarray, str]:
    """Press Run and wait: the new picture's address, the pictures, and what ComfyUI's log said meanwhile."""
    before = len(server.log())
    page.get_by_role("button", name="Run", exact=True).first.click()  # the second is its menu, from 1.49.6 on
    address = page.wait_for_function(SHOWN, arg=shown, timeout=300_000).json_value()
    page.wait_for_function("app.ui.lastQueueSize === 0", timeout=300_000)
    *_, entry = server.get("/history").values()
    assert entry["status"]["status_str"] == "success"
    return address, server.images(entry).astype(int), server.log()[before:]


def loads(log: str) -> list[str]:
    return re.findall("loaded completely|loaded partially", log)


@pytest.mark.parametrize("renderer", ["LiteGraph", "Nodes 2.0"])
def test_first_use(page: Page, ready: Server, renderer: str, shoot):
    # The template browser opens by itself. Our pack is among the extensions; its workflows have names.
    templates = page.get_by_role("dialog")
    templates.get_by_text(FOLDER, exact=True).click(timeout=300_000)
    template = templates.get_by_text("01 Load a LoHa", exact=True).first  # its title; its description says the same
    expect(template).to_be_visible()
    shoot("first-use-1-templates")

    template.click()
    page.wait_for_function("app.graph._nodes.some(n => n.type === 'LoHaLoader')", timeout=300_000)
    expect(templates).to_have_count(0)
    if page.evaluate("__COMFYUI_FRONTEND_VERSION__ !== '1.32.9'"):  # later ones offer it in the settings only
        page.evaluate(f"on => app.extensionManager.setting.set('{VUE}', on)", renderer == "Nodes 2.0")
    elif renderer == "Nodes 2.0":
        page.get_by_role("button", name="Try it out").click()
    strength = page.get_by_role("slider", name="model strength")
    expect(strength).to_have_attribute("aria-valuenow", "1")
    expect(strength).to_be_visible()
    shoot("first-use-2-workflow")
    page.evaluate(SMALL)

    shown, pictures, log = press_run(page, ready, None)
    assert loads(log)  # this is how the log tells of it
    shoot("first-use-3-run")

    strength.hover()  # waits until it stands still
    box = strength.bounding_box()
    assert box
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.75 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], y, steps=8)
    page.mouse.up()
    expect(strength).to_have_attribute("aria-valuenow", "0.4")
    shoot("first-use-4-slider")

    shown, changed, log = press_run(page, ready, shown)
    assert np.abs(changed - pictures).max() > 20
    assert loads(log) == []
    shoot("first-use-5-changed")

    *_, entry = ready.get("/history").values()
    [loader] = [node for node in entry["prompt"][2].values() if node["class_type"] == "LoHaLoader"]
    assert loader["inputs"]["strength_model"] == 0.4 and loader["inputs"]["strength_clip"] == 1
