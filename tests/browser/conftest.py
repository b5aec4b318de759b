"""ComfyUI's own page in a real Chromium: one page for all tests of a renderer, emptied before each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from safetensors.torch import save_file

from demo.browser import chromium
from demo.comfyui import CACHE, Server

from ..comfy.conftest import ready, server  # noqa: F401  (one server for both folders)

# What a busy machine may take; a quiet one never waits for it.
PATIENCE = 60_000
SHOTS = CACHE / "screenshots"
MARKUP = "<img src=x onerror=window.hacked=1>"
STYLES = [f"styles/film/look_{number:02d}.safetensors" for number in range(30)]
VUE = "Comfy.VueNodes.Enabled"
READY = """!!(window.app?.graph && app.extensionManager?.setting && app.extensionManager.workflow?.activeWorkflow
  && LiteGraph.registered_node_types?.LoHaTrainer)"""
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
# 1.58.1 takes what a script changes within 50 ms of a step into that step.
SQUASHED = "new Promise(resolve => setTimeout(resolve, 100))"
# What a script has changed becomes a step for undo; while the page restores or loads a graph it would take none.
STEP = f"""(async tracker => {{
  const isBusy = () => tracker._restoringState || tracker.changeCount > 0 || tracker.constructor.isLoadingGraph;
  for (let frame = 0; isBusy() && frame < 600; frame += 1) await new Promise(requestAnimationFrame);
  tracker.checkState();
  await {SQUASHED};
}})({TRACKER})"""
# With an id of its own: of a graph without, 1.49.6 and 1.58.1 keep the widgets' values beyond its end.
EMPTY = """async vue => {
  const { setting, sidebarTab, workflow } = app.extensionManager;
  const graph = { id: crypto.randomUUID(), last_node_id: 0, last_link_id: 0, nodes: [], links: [], version: 0.4 };
  await app.loadGraphData(graph); // in a tab of its own, since another one would restore what its runs have shown
  for (const tab of [...workflow.openWorkflows])
    if (tab.path !== workflow.activeWorkflow.path) await workflow.closeWorkflow(tab);
  if (sidebarTab.activeSidebarTabId) sidebarTab.toggleSidebarTab(sidebarTab.activeSidebarTabId);
  if (setting.get("Comfy.RightSidePanel.IsOpen")) await setting.set("Comfy.RightSidePanel.IsOpen", false);
  if (setting.get("Comfy.VueNodes.Enabled") !== vue) await setting.set("Comfy.VueNodes.Enabled", vue);
  app.canvas.ds.reset();
  app.canvas.setDirty(true, true);
  for (let frame = 0; frame < 60 && document.querySelector("[role=dialog]"); frame++)
    await new Promise(requestAnimationFrame); // it fades
}"""
# What the tests before have left behind.
LEFT = """() => [
  ...app.graph._nodes.map(node => node.type),
  ...[...document.querySelectorAll("[role=dialog], [data-node-id], .loha")].map(e => e.outerHTML.slice(0, 200)),
  ...failures,
]"""
# The front ends 1.49.6 and 1.58.1 show a pack's widget only on its own node; on a subgraph it is a plain field.
OWN_WIDGETS_ON_SUBGRAPHS = "window.__COMFYUI_FRONTEND_VERSION__ === '1.32.9'"
# Errors that nothing has caught; of promises those of ours.
WATCH = """performance.setResourceTimingBufferSize(5000);
window.failures = [];
addEventListener("error", e => failures.push(e.message));
addEventListener("unhandledrejection", e => /LoHa/.test(e.reason?.stack) && failures.push(e.reason.stack));"""
LOADED = """performance.getEntriesByType('resource').filter(e => /ComfyUI-LoHa\\/.*js$/.test(e.name))
  .reduce((sum, e) => sum + e.decodedBodySize, 0)"""
# ComfyUI may drop a reloaded page's new connection with its old one, and then the page hears nothing more.
HEAR = """() => new Promise(done => {
  app.api.addEventListener("reconnected", () => done(), { once: true });
  app.api.socket.close();
})"""
FRAMES = "count => new Promise(done => (function tick() { count-- ? requestAnimationFrame(tick) : done() })())"


def expect_error(page: Page, text: str) -> None:
    """ComfyUI says why a run failed: in a dialog, from 1.49.6 on in the side panel that a button opens."""
    details = page.get_by_role("button", name="View details")
    expect(details.or_(page.get_by_role("dialog").filter(has_text=text)).first).to_be_visible(timeout=120_000)
    if details.count():
        details.first.click()
    expect(page.get_by_text(text).filter(visible=True).first).to_be_visible()


def until(page: Page, act: Callable[[], None], done: Callable[[], Any]) -> None:
    """Do it, and again where a page that has just begun has not heard the key or the click."""
    for _ in range(12):
        act()
        for _ in range(50):
            if done():
                return
            page.wait_for_timeout(100)
    raise AssertionError("the page does not answer")


def expect_value(page: Page, expression: str, value: Any) -> None:
    """A script's value becomes this one, and stays so."""
    same = 0
    for _ in range(100):
        same = same + 1 if page.evaluate(expression) == value else 0
        if same == 2:
            return
        page.evaluate(FRAMES, 5)
    assert page.evaluate(expression) == value


def settle(page: Page, expression: str) -> None:
    """Wait until a script's value, of places or sizes, has not changed for a third of a second's frames."""
    before, count = None, 0
    while count < 4:
        page.evaluate(FRAMES, 5)
        now = page.evaluate(expression)
        before, count = now, (count + 1 if now == before else 0)


def empty(page: Page, nodes_2: bool) -> None:
    """An empty graph in the only tab, nothing open above it or beside it."""
    page.keyboard.press("Escape")
    page.evaluate(EMPTY, nodes_2)
    page.mouse.move(5, 895)


def enter(page: Page, server: Server, nodes_2: bool) -> None:  # noqa: F811
    """Open ComfyUI with an empty graph."""
    server.post("/settings", {VUE: nodes_2, "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
    if page.url.startswith(server.address):
        page.evaluate("sessionStorage.clear()")  # with the name of the page's connection, see HEAR
    page.goto(server.address)
    page.wait_for_function(READY, timeout=120_000)
    empty(page, nodes_2)  # the template browser opens by itself on an empty profile


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        yield chromium(playwright)


@pytest.fixture(scope="session")
def adapters(server: Server) -> list[str]:  # noqa: F811
    """Small adapters in folders; one says things of itself, and has a picture."""
    factors = {f"lora_unet_mid_block_x.hada_{name}": torch.ones(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    factors["lora_unet_mid_block_x.alpha"] = torch.tensor(2.0)
    about = {"modelspec.trigger_phrase": f"anna, {MARKUP}", "modelspec.architecture": "stable-diffusion-v1"}
    names = ["characters/anna_v2.safetensors", "seven.safetensors", *STYLES]
    for name in names:
        save_file(factors, server.path("models", "loras", *name.split("/")), about if "anna" in name else None)
    Image.new("RGB", (60, 40), (90, 140, 200)).save(server.path("models", "loras", "characters", "anna_v2.preview.png"))
    server.object_info("LoHaStack")
    return names


@pytest.fixture(scope="session")
def adapter(server: Server) -> str:  # noqa: F811
    """An adapter of nine layers whose trigger phrase looks like markup; and a broken file beside it."""
    torch.manual_seed(0)
    tensors = {}
    for block in ("down_blocks_0", "mid_block", "up_blocks_1"):
        for layer in ("attentions_0_proj_in", "attentions_0_transformer_blocks_0_attn2_to_k", "resnets_0_conv1"):
            for name, shape in (("w1_a", (16, 4)), ("w1_b", (4, 24)), ("w2_a", (16, 4)), ("w2_b", (4, 24))):
                tensors[f"lora_unet_{block}_{layer}.hada_{name}"] = torch.randn(shape)
            tensors[f"lora_unet_{block}_{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, server.path("models", "loras", "shown.safetensors"), {"modelspec.trigger_phrase": MARKUP})
    (server.path("models", "loras", "broken.safetensors")).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    server.object_info("LoHaLoader")
    return "shown.safetensors"


@pytest.fixture(scope="session", params=[False, True], ids=["LiteGraph", "Nodes 2.0"])
def nodes_2(request: pytest.FixtureRequest) -> bool:
    """The renderer: nodes painted by LiteGraph, or elements of the page."""
    return request.param


def of_ours(message: ConsoleMessage) -> bool:
    """A warning or an error from our code, or of our server's event; that a file is not there is none."""
    if message.type not in ("warning", "error") or message.text.startswith("Failed to load resource"):
        return False
    return "/extensions/ComfyUI-LoHa/" in message.location["url"] + message.text or '"loha.' in message.text


@pytest.fixture(scope="session")
def spoken() -> list[str]:
    """What the page has said of us in the browser's console since the test began."""
    return []


@pytest.fixture(scope="session")
def opened(
    browser: Browser,
    ready: Server,  # noqa: F811
    adapter: str,
    adapters: list[str],
    nodes_2: bool,
    spoken: list[str],
) -> Iterator[Page]:
    """One page for all tests of a renderer, which knows all files from its beginning."""
    with browser.new_context(viewport={"width": 1400, "height": 900}, permissions=["clipboard-read"]) as context:
        context.set_default_timeout(2 * PATIENCE)
        page = context.new_page()
        page.add_init_script(WATCH)
        page.on("console", lambda message: spoken.append(message.text) if of_ours(message) else None)
        enter(page, ready, nodes_2)
        assert page.evaluate(LOADED) <= 60 * 1024
        yield page


@pytest.fixture
def page(opened: Page, server: Server, nodes_2: bool, spoken: list[str]) -> Iterator[Page]:  # noqa: F811
    """ComfyUI's page with an empty graph, in either renderer."""
    empty(opened, nodes_2)
    if opened.evaluate(LEFT):  # by a test that failed on its way
        enter(opened, server, nodes_2)
    assert opened.evaluate(LEFT) == []
    spoken.clear()
    yield opened
    opened.unroute_all()
    assert opened.evaluate("failures") == [] == spoken


@pytest.fixture
def shoot(page: Page, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keep a picture of the page, for people to look at."""

    def shoot(name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        renderer = request.node.callspec.id.replace(" ", "")
        page.screenshot(path=Path(SHOTS, f"{name}-{renderer}.png"))

    return shoot
