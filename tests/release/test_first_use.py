"""The first minutes with LoHa, as somebody spends them who has ComfyUI, some checkpoints and LoHas, and a mouse.

None of the files has a name that the demo gives. `make test-release` runs it, or `pytest
tests/release/test_first_use.py` alone; a picture of each step is kept in .cache/screenshots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from demo import workflows
from demo.comfyui import Server

from ..browser.conftest import VUE, of_ours
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


# Where LiteGraph has drawn the checkpoint's field; in Nodes 2.0 it is an element.
FIELD = """() => {
  const node = app.graph._nodes.find(n => n.type === "CheckpointLoaderSimple");
  const [x, y] = node.pos;
  const place = app.canvas.convertOffsetToCanvas([x + node.size[0] / 2, y + node.widgets[0].y + 10]);
  const canvas = app.canvas.canvas.getBoundingClientRect();
  return [node.id, canvas.left + place[0], canvas.top + place[1]];
}"""
# What ComfyUI would mark red, and what it says of files that a workflow names and nobody has.
RED = "app.graph._nodes.filter(n => n.has_errors).map(n => n.type)"
MISSING = re.compile("missing|not found|error", re.IGNORECASE)
# The demo's files -> what they are called here. The lists begin with others.
OWN = {
    ("checkpoints", workflows.CHECKPOINT): "my checkpoint.safetensors",
    ("loras", workflows.LOHA): "styles/my first LoHa.safetensors",
    ("loras", workflows.OTHER): "another.safetensors",
}
CHOSEN = {"ckpt_name": "my checkpoint.safetensors", "lora_name": "styles/my first LoHa.safetensors"}


@pytest.fixture
def own(ready: Server) -> Iterator[Server]:
    """Files as somebody has them who has never heard of the demo."""
    moved = {ready.path("models", kind, old): ready.path("models", kind, new) for (kind, old), new in OWN.items()}
    for old, new in moved.items():
        old.rename(new)
    checkpoint = ready.path("models", "checkpoints", "my checkpoint.safetensors")
    (other := checkpoint.with_name("a checkpoint.safetensors")).hardlink_to(checkpoint)
    yield ready
    other.unlink()
    for old, new in moved.items():
        new.rename(old)


@pytest.fixture
def page(browser: Browser, own: Server) -> Iterator[Page]:
    """ComfyUI's page as it opens for somebody who has never been here."""
    ready, said = own, []
    ready.path("user", "default", "comfy.settings.json").unlink(missing_ok=True)
    ready.post("/free", {"unload_models": True, "free_memory": True})
    context = browser.new_context(viewport={"width": 1920, "height": 1080})
    opened = context.new_page()
    opened.on("console", lambda message: said.append(message.text) if of_ours(message) else None)
    opened.goto(ready.address)
    yield opened
    context.close()
    assert said == []


def choose(page: Page, nodes_2: bool) -> None:
    """Their checkpoint from ComfyUI's list, their LoHa from ours."""
    node, x, y = page.evaluate(FIELD)
    if nodes_2:
        page.locator(f"[data-node-id='{node}']").get_by_text("a checkpoint.safetensors").click()
    else:
        page.mouse.click(x, y)
    option = page.get_by_text(CHOSEN["ckpt_name"], exact=True).last
    expect(option).to_be_visible()
    if nodes_2 and page.evaluate("__COMFYUI_FRONTEND_VERSION__ === '1.32.9'"):  # it opens its list behind the nodes
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
    else:
        option.click()
    page.get_by_role("button", name="adapter: ").click()
    page.get_by_role("dialog", name="Choose an adapter").get_by_role("combobox", name="filter").fill("first my")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="adapter: ")).to_contain_text("my first LoHa")


def expect_nothing_red(page: Page) -> None:
    page.wait_for_timeout(1000)  # for a dialog that would come
    assert page.evaluate(RED) == []
    expect(page.get_by_role("dialog").filter(visible=True)).to_have_count(0)
    expect(page.get_by_text(MISSING).filter(visible=True)).to_have_count(0)


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
def test_first_use(page: Page, own: Server, renderer: str, shoot):
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
    expect_nothing_red(page)
    choose(page, renderer == "Nodes 2.0")
    shoot("first-use-2-chosen")
    page.evaluate(SMALL)

    shown, pictures, log = press_run(page, own, None)
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

    shown, changed, log = press_run(page, own, shown)
    assert np.abs(changed - pictures).max() > 20
    assert loads(log) == []
    shoot("first-use-5-changed")

    expect_nothing_red(page)

    *_, entry = own.get("/history").values()
    [loader] = [node for node in entry["prompt"][2].values() if node["class_type"] == "LoHaLoader"]
    inputs = {name: value for node in entry["prompt"][2].values() for name, value in node["inputs"].items()}
    assert {name: inputs[name] for name in CHOSEN} == CHOSEN
    assert loader["inputs"]["strength_model"] == 0.4 and loader["inputs"]["strength_clip"] == 1
