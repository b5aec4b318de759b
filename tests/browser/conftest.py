"""ComfyUI's own page in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from demo.browser import chromium
from demo.comfyui import Server

from ..comfy.conftest import server  # noqa: F401  (one server for both folders)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield chromium(playwright)


@pytest.fixture(params=[False, True], ids=["LiteGraph", "Nodes 2.0"])
def page(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Page]:  # noqa: F811
    """ComfyUI's page with an empty graph, in either renderer."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    opened = context.new_page()
    opened.goto(server.address)
    opened.wait_for_function("!!(window.app?.graph && window.app.extensionManager?.setting)", timeout=60_000)
    opened.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", request.param)
    opened.evaluate("app.extensionManager.setting.set('Comfy.TutorialCompleted', true)")
    opened.reload()
    opened.wait_for_function(
        "!!(window.app?.graph && window.LiteGraph?.registered_node_types?.LoHaInfo)", timeout=60_000
    )
    opened.evaluate("app.graph.clear()")
    opened.keyboard.press("Escape")  # the template browser opens by itself on an empty profile
    yield opened
    context.close()
