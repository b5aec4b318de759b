"""Example workflows as they open: no node lies on another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

from demo.comfyui import REPOSITORY

from .test_nodes import shoot

# [title, left, top, right, bottom] of each node, in the graph's pixels. LiteGraph paints them, Nodes 2.0 has elements.
PLACES = """() => app.graph._nodes.map(node => {
  if (!LiteGraph.vueNodesMode) {
    const [x, y, width, height] = node.boundingRect;
    return [node.title, x, y, x + width, y + height];
  }
  const box = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
  return [node.title, ...[box.left, box.top, box.right, box.bottom].map(value => value / app.canvas.ds.scale)];
})"""
DRAWN = """() => !LiteGraph.vueNodesMode
  || app.graph._nodes.every(node => document.querySelector(`[data-node-id="${node.id}"]`))"""


@pytest.mark.parametrize("path", sorted((REPOSITORY / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_nodes_do_not_overlap(page: Page, path: Path, request: pytest.FixtureRequest):
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads(path.read_text("utf-8")))
    page.wait_for_function(DRAWN)
    page.wait_for_timeout(1000)  # the nodes take the sizes that their widgets ask for
    shoot(page, f"example-{path.stem}", request)
    places = page.evaluate(PLACES)
    for index, (one, *a) in enumerate(places):
        for other, *b in places[:index]:
            by = [min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])]
            assert min(by) <= 0, f"{one} and {other} overlap by {by} pixels"
