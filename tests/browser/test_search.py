"""ComfyUI's search for nodes: what people type who look for what this pack has."""

from __future__ import annotations

from playwright.sync_api import Page

from .conftest import until

# ComfyUI 0.3.75 does not tell a node's aliases, and its front end 1.32.9 would not look into them.
ALIASES = """window.__COMFYUI_FRONTEND_VERSION__ !== '1.32.9'
  && LiteGraph.registered_node_types.LoHaLoader.nodeData.search_aliases?.length > 0"""
FOCUSED = "document.activeElement.tagName === 'INPUT'"
TITLES = """[...document.querySelectorAll("[role=option]")].map(e => e.innerText.trim().split("\\n")[0].trim())
  .filter(Boolean)"""


def listed(page: Page, typed: str) -> list[str]:
    """What the open search lists, from the first to the last."""
    page.keyboard.press("Control+a")
    page.keyboard.type(typed)
    before: list[str] = []
    for _ in range(40):
        page.wait_for_timeout(400)  # it waits for more to be typed
        titles = page.evaluate(TITLES)
        if titles and titles == before:
            break
        before = titles
    return before


def test_what_people_type(page: Page, shoot):
    until(page, lambda: page.mouse.dblclick(700, 700), lambda: page.evaluate(FOCUSED))
    assert listed(page, "loha")[0] == "Load LoHa"
    shoot("search")
    assert listed(page, "load")[0] == "Load Image"  # more people look for that
    if page.evaluate(ALIASES):
        assert listed(page, "lycoris")[0] == "Load LoHa"
        assert listed(page, "power lora")[0] == "LoHa Stack"
        assert listed(page, "xy plot")[0] == "LoHa Grid"
        # Directly behind the nodes that are called so.
        names = listed(page, "lora")
        assert all("lora" in name.lower() for name in names[: names.index("Load LoHa")])
    page.keyboard.press("Escape")
