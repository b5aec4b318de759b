"""Copies, tabs, a reload, a subgraph: what the page shows of a node is what the node sends, and a press changes both.

Undo and redo are in test_undo.py, whose widgets these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from demo import prepare
from demo.comfyui import Server

from .conftest import HEAR, OWN_WIDGETS_ON_SUBGRAPHS, READY, STEP, VUE, expect_value, settle
from .test_undo import BARS, KINDS, SEEN, Kind, bars, slide, swap, training
from .test_widgets import add
from .test_widgets_curves import SIZES, output

# The graph that is looked at: inside a subgraph its nodes are the ones that are seen.
NODES = "app.canvas.graph._nodes"
ACTIVE = "app.extensionManager.workflow.activeWorkflow.path"


PILES_UP = f"{OWN_WIDGETS_ON_SUBGRAPHS} && LiteGraph.vueNodesMode"
# The first node where it can be pressed: by its place, and where that is an element, by where it is drawn.
LOOK = """async () => {
  const [node] = app.graph._nodes, { ds } = app.canvas;
  ds.scale = 1;
  ds.offset = [300 - node.pos[0], 160 - node.pos[1]];
  app.canvas.setDirty(true, true);
  for (let frame = 0; frame < 10; frame++) await new Promise(requestAnimationFrame);
  const box = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
  if (box) ds.offset = [ds.offset[0] + 300 - box.left, ds.offset[1] + 130 - box.top];
  app.canvas.setDirty(true, true);
}"""


def command(page: Page, name: str) -> None:
    page.evaluate("name => app.extensionManager.command.execute(name)", name)


def select(page: Page) -> None:
    page.evaluate(f"app.canvas.selectItems({NODES})")
    page.wait_for_function(f"app.canvas.selectedItems.size === {NODES}.length")


def copy(page: Page) -> None:
    """The originals go, and their copies stay."""
    page.mouse.click(900, 850)
    originals = page.evaluate(f"{NODES}.map(node => node.id)")
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+c")
    page.mouse.move(300, 500)
    page.keyboard.press("Control+v")
    page.wait_for_function(f"n => {NODES}.length === n", arg=2 * len(originals))
    page.evaluate("ids => ids.forEach(id => app.graph.remove(app.graph.getNodeById(id)))", originals)
    page.evaluate(LOOK)


def look_at_another_tab(page: Page) -> None:
    here = page.evaluate(ACTIVE)
    command(page, "Comfy.NewBlankWorkflow")
    page.wait_for_function(f"here => {ACTIVE} !== here && !app.graph._nodes.length", arg=here)
    add(page, "LoHaStack")  # with an id of the first tab's
    command(page, "Workspace.PreviousOpenedWorkflow")
    page.wait_for_function(f"here => {ACTIVE} === here && app.graph._nodes.length", arg=here)


def reload(page: Page) -> None:
    page.wait_for_timeout(600)  # the page keeps it for the next one after a while
    page.reload()
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(HEAR)
    page.wait_for_function("app.graph._nodes.length")


def go_into_a_subgraph(page: Page) -> None:
    select(page)
    command(page, "Comfy.Graph.ConvertToSubgraph")
    page.wait_for_function("app.graph._nodes.length === 1 && app.graph._nodes[0].subgraph")
    page.evaluate("app.canvas.openSubgraph(app.graph._nodes[0].subgraph, app.graph._nodes[0])")
    page.wait_for_function("app.canvas.subgraph?._nodes.length")
    page.evaluate("app.canvas.ds.reset()")


def make_a_subgraph_and_unpack_it(page: Page) -> None:
    go_into_a_subgraph(page)
    command(page, "Comfy.Graph.ExitSubgraph")
    page.wait_for_function("!app.canvas.subgraph")
    select(page)
    command(page, "Comfy.Graph.UnpackSubgraph")
    page.wait_for_function("app.graph._nodes.length && !app.graph._nodes.some(node => node.subgraph)")
    page.evaluate(LOOK)


def look_in_the_other_renderer(page: Page) -> None:
    first = page.evaluate(f"app.extensionManager.setting.get('{VUE}')")
    for on in (not first, first):
        page.evaluate(f"on => app.extensionManager.setting.set('{VUE}', on)", on)
        settle(page, SIZES)


ACTIONS: dict[str, Callable[[Page], None]] = {
    "copy": copy,
    "tab": look_at_another_tab,
    "reload": reload,
    "inside a subgraph": go_into_a_subgraph,
    "subgraph and back": make_a_subgraph_and_unpack_it,
    "renderer": look_in_the_other_renderer,
}


def info(page: Page) -> None:
    """LoHa Info tells of a file before a run."""
    node = add(page, "LoHaInfo", 700)
    page.evaluate("id => app.graph._nodes[0].connect(0, app.graph.getNodeById(id), 0)", node)


def checkpoint(page: Page) -> None:
    """The bars of the model that is connected."""
    node = add(page, "CheckpointLoaderSimple", 800, ckpt_name=prepare.CHECKPOINT)
    page.evaluate(
        """id => {
          const [block] = app.graph._nodes;
          app.graph.getNodeById(id).connect(0, block, block.inputs.findIndex(i => i.name === "model"));
        }""",
        node,
    )


def of_the_checkpoint(inputs: dict[str, Any], server: Server) -> Any:
    layout = server.get(f"/loha/layout?folder=checkpoints&name={prepare.CHECKPOINT}")["layout"]
    return bars(inputs | {"family": layout}, server)


def nothing(page: Page) -> None:
    pass


WIDGETS: dict[str, tuple[Kind, Callable[[Page], None]]] = {
    **{name: (kind, nothing) for name, kind in KINDS.items()},
    "info": (
        Kind(
            "LoHaLoadAdapter",
            {"lora_name": "seven.safetensors"},
            (swap("anv2"), swap("look_03")),
            SEEN.format("seen('pre.loha-info')[0]?.textContent.split('\\n')[0]"),
            lambda inputs, _: f"file: {inputs['lora_name']}",
        ),
        info,
    ),
    "block bars of the connected model": (
        Kind(
            "LoHaBlockStrength",
            {"vector": "OUT=0.5"},
            (slide("IN01", 0.5), slide("M00", 0.5)),
            BARS,
            of_the_checkpoint,
        ),
        checkpoint,
    ),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", WIDGETS)
def test_what_is_shown_is_sent(page: Page, ready: Server, shoot, name: str, action: str):
    kind, beside = WIDGETS[name]
    if action == "subgraph and back" and beside is not nothing and page.evaluate(PILES_UP):
        pytest.skip("the front end 1.32.9 lays nodes of an unpacked subgraph on each other in Nodes 2.0")
    add(page, kind.node, **kind.values)
    beside(page)
    page.evaluate(STEP)

    def compare() -> Any:
        values = kind.expected(output(page)[kind.node], ready)
        expect_value(page, kind.shown, values)
        return values

    first, second = kind.changes
    before = compare()
    first(page)
    changed = compare()
    assert changed != before
    ACTIONS[action](page)
    assert compare() == changed
    second(page)
    assert compare() not in (before, changed)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_monitor_goes_on(page: Page, action: str):
    losses = [0.3, 0.2]
    with training(page, losses) as view:
        add(page, "LoHaTrainFolder")
        page.evaluate(STEP)
        expect(view).to_contain_text("2 of 9")
        ACTIONS[action](page)
        losses.append(0.1)
        page.evaluate("app.api.dispatchCustomEvent('loha.training', {})")
        expect(view).to_have_count(1)
        expect(view).to_contain_text("3 of 9")
        expect(view.get_by_role("img", name="Loss of 3 steps")).to_be_visible()
