"""ComfyUI's own page in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from demo.browser import chromium
from demo.comfyui import Server

from ..comfy.conftest import server  # noqa: F401  (one server for both folders)

# What a busy machine may take; a quiet one never waits for it.
PATIENCE = 60_000


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        yield chromium(playwright)


VUE = "Comfy.VueNodes.Enabled"
READY = """!!(window.app?.graph && app.extensionManager?.setting && app.extensionManager.workflow?.activeWorkflow
  && LiteGraph.registered_node_types?.LoHaTrainer)"""
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
STEP = f"{TRACKER}.checkState()"  # what a script has changed becomes a step for undo
# With an id of its own: of a graph without, 1.49.6 and 1.58.1 keep the widgets' values beyond its end.
EMPTY = """async () => {
  const graph = { id: crypto.randomUUID(), last_node_id: 0, last_link_id: 0, nodes: [], links: [], version: 0.4 };
  await app.loadGraphData(graph, true, false, app.extensionManager.workflow.activeWorkflow);
  const { setting } = app.extensionManager;
  if (setting.get("Comfy.RightSidePanel.IsOpen")) await setting.set("Comfy.RightSidePanel.IsOpen", false);
  app.nodeOutputs = {};
  app.canvas.ds.reset();
  app.canvas.setDirty(true, true);
}"""
# The front ends 1.49.6 and 1.58.1 show a pack's widget only on its own node; on a subgraph it is a plain field.
OWN_WIDGETS_ON_SUBGRAPHS = "window.__COMFYUI_FRONTEND_VERSION__ === '1.32.9'"


def expect_error(page: Page, text: str) -> None:
    """ComfyUI says why a run failed: in a dialog, from 1.49.6 on in the side panel that a button opens."""
    details = page.get_by_role("button", name="View details")
    expect(details.or_(page.get_by_role("dialog").filter(has_text=text)).first).to_be_visible(timeout=120_000)
    if details.count():
        details.first.click()
    expect(page.get_by_text(text).filter(visible=True).first).to_be_visible()


def enter(page: Page, server: Server, nodes_2: bool) -> None:  # noqa: F811
    """Open ComfyUI with an empty graph."""
    settings = {VUE: nodes_2, "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
    server.post("/settings", settings)
    page.goto(server.address)
    page.wait_for_function(READY, timeout=120_000)
    page.keyboard.press("Escape")  # the template browser opens by itself on an empty profile
    page.evaluate(EMPTY)


@pytest.fixture(params=[False, True], ids=["LiteGraph", "Nodes 2.0"])
def page(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Page]:  # noqa: F811
    """ComfyUI's page with an empty graph, in either renderer."""
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        context.set_default_timeout(2 * PATIENCE)
        opened = context.new_page()
        enter(opened, server, request.param)
        yield opened
