"""Example workflows as they open: no node lies on another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

from demo.comfyui import REPOSITORY

from .conftest import settle

# [title, left, top, right, bottom] of each node, in the graph's pixels. LiteGraph paints them, Nodes 2.0 has elements.
PLACES = """() => app.graph._nodes.map(node => {
  if (!LiteGraph.vueNodesMode) {
    const [x, y, width, height] = node.boundingRect;
    return [node.title, x, y, x + width, y + height];
  }
  const box = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
  return [node.title, ...["left", "top", "right", "bottom"].map(side => (box?.[side] ?? 0) / app.canvas.ds.scale)];
})"""
# All in sight: Nodes 2.0 leaves out what is not.
FIT = """() => {
  const { ds, canvas } = app.canvas, nodes = app.graph._nodes;
  const [left, top] = [0, 1].map(axis => Math.min(...nodes.map(n => n.pos[axis])));
  const [right, bottom] = [0, 1].map(axis => Math.max(...nodes.map(n => n.pos[axis] + n.size[axis])));
  ds.scale = Math.min((canvas.clientWidth - 300) / (right - left), (canvas.clientHeight - 300) / (bottom - top), 1);
  ds.offset = [150 / ds.scale - left, 150 / ds.scale - top];
  app.canvas.setDirty(true, true);
}"""
DRAWN = f"({PLACES})().every(([, left, , right]) => right > left)"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_nodes_do_not_overlap(page: Page, path: Path, shoot):
    workflow = json.loads(path.read_text("utf-8"))
    workflow.get("extra", {}).pop("linearMode", None)  # an app would hide its nodes
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.evaluate(FIT)
    page.wait_for_function(DRAWN)
    settle(page, PLACES)  # the nodes take the sizes that their widgets ask for
    assert page.evaluate(DRAWN)
    shoot(f"example-{path.stem}")
    places = page.evaluate(PLACES)
    for index, (one, *a) in enumerate(places):
        for other, *b in places[:index]:
            by = [min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])]
            assert min(by) <= 1, f"{one} and {other} overlap by {by} pixels"
