"""The nodes' help in ComfyUI's side bar, and the pictures there and in the template browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from demo.comfyui import REPOSITORY, Server

PAGES = sorted((REPOSITORY / "web" / "docs").glob("*.md"))
PICTURE = re.compile(r"!\[(.+?)\]\((.+?)\)")
SELECT = """kind => {
  app.graph.clear();
  const node = LiteGraph.createNode(kind);
  node.pos = [600, 300]; // a narrow node has its buttons beside the side bar, too
  app.graph.add(node);
  app.canvas.selectNode(node);
}"""
SHOWN = """() => [...document.querySelectorAll('.node-help-content img')].map(
  image => [image.complete && image.naturalWidth, image.alt, image.clientWidth, image.parentElement.clientWidth])"""


def test_each_node_has_a_page(server: Server):
    nodes = server.object_info().values()
    assert {path.stem for path in PAGES} == {n["name"] for n in nodes if n["python_module"].endswith("ComfyUI-LoHa")}


@pytest.mark.parametrize("page_path", PAGES, ids=lambda path: path.stem)
def test_pictures_are_named_small_and_described(page_path: Path):
    found = PICTURE.findall(page_path.read_text("utf-8"))
    assert found
    for alt, name in found:
        path = page_path.parent / name
        assert len(alt) > 20 and path.stat().st_size < 64 * 1024 and Image.open(path).width > 400


@pytest.mark.parametrize("workflow", sorted((REPOSITORY / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_workflows_have_a_thumbnail(workflow: Path):
    with Image.open(workflow.with_suffix(".jpg")) as picture:  # the one name that the template browser asks for
        assert picture.width == picture.height >= 512
    assert workflow.with_suffix(".jpg").stat().st_size < 64 * 1024


@pytest.mark.parametrize("nodes_2", [False], indirect=True, ids=["LiteGraph"], scope="session")
def test_help_shows_its_picture(page: Page):
    content = page.locator(".node-help-content")
    for path in PAGES:
        title = path.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        page.evaluate(SELECT, path.stem)
        page.get_by_test_id("info-button").click()
        expect(content.get_by_role("heading", name=title, exact=True)).to_be_visible()
        page.wait_for_function(f"(({SHOWN})()).every(([width]) => width > 0)", timeout=120_000)
        [(_, alt, width, room), *_] = page.evaluate(SHOWN)
        assert alt and width <= room, path.stem
