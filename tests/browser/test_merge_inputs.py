"""Merge LoHas shows a weight for each adapter that is connected, and saves and sends all of them."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page, expect

from demo import workflows

from .conftest import STEP, TRACKER, expect_value, until
from .test_merge import LOOK, WEIGHT, slide
from .test_undo import redo, undo

BUILD = """() => {
  const add = (type, x, y) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    return node;
  };
  const merge = add("LoHaMerge", 450, 60);
  for (const slot of [1, 2]) {
    const load = add("LoHaLoadAdapter", 40, 60 + 250 * (slot - 1));
    load.widgets.find(w => w.name === "lora_name").value = "seven.safetensors";
    load.connect(0, merge, `loha_${slot}`);
  }
  merge.widgets.find(w => w.name === "weight_5").value = 0.5;
}"""
MERGE = "app.graph._nodes.find(n => n.type === 'LoHaMerge')"
# What is drawn of it: LiteGraph's rows have a place, those of Nodes 2.0 are elements.
WEIGHTS = f"""() => {{
  const merge = {MERGE};
  if (!merge) return null; // while a step is undone
  const element = document.querySelector(`[data-node-id="${{merge.id}}"]`);
  const words = element?.innerText.toLowerCase().replaceAll(" ", "_");
  // 1.58.1 calls a connected one invisible, though its row is there.
  const row = w => w.y > 0 && (merge.isWidgetVisible(w) || merge.getSlotFromWidget(w)?.link != null);
  return merge.widgets.filter(w => w.name.startsWith("weight") && (element ? words.includes(w.name) : row(w)))
    .map(w => w.name);
}}"""
LOAD = "slot => app.graph._nodes.find(n => n.type === 'LoHaLoadAdapter').connect(0, MERGE, `loha_${slot}`)"
LOAD = LOAD.replace("MERGE", MERGE)
OFF = f"slot => {MERGE}.disconnectInput({MERGE}.findInputSlot(`loha_${{slot}}`))"
VALUES = f"{MERGE}.serialize().widgets_values"
SENT = "app.graphToPrompt().then(({output}) => Object.values(output).find(n => n.class_type === 'LoHaMerge').inputs)"
FIRST = ["weight_1", "weight_2"]
ALL = [1.0, 1.0, 1.0, 1.0, 0.5, 1.0]


def expect_weights(page: Page, names: list[str]) -> None:
    expect_value(page, f"({WEIGHTS})()", names)


def values(page: Page) -> tuple[list[Any], list[Any]]:
    sent = page.evaluate(SENT)
    return [sent[f"weight_{slot}"] for slot in range(1, 7)], page.evaluate(VALUES)


def change(page: Page, script: str, arg: Any = None) -> None:
    """What a script does becomes a step for undo, by the page itself or when it is asked."""
    steps = page.evaluate(f"{TRACKER}.undoQueue.length")
    page.evaluate(script, arg)
    until(page, lambda: page.evaluate(STEP), lambda: page.evaluate(f"{TRACKER}.undoQueue.length") > steps)


def test_a_weight_is_shown_for_each_adapter(page: Page, shoot):
    change(page, BUILD)
    expect_weights(page, FIRST)
    sent, saved = values(page)
    assert sent == ALL and len(saved) == 13
    shoot("merge-inputs-two")

    change(page, LOAD, 5)
    expect_weights(page, [*FIRST, "weight_5"])
    assert values(page) == (sent, saved)
    node = page.evaluate(f"[{MERGE}.size[1], {MERGE}.computeSize()[1]]")
    assert node[0] >= node[1]
    shoot("merge-inputs-five")

    undo(page)
    expect_weights(page, FIRST)
    redo(page)
    expect_weights(page, [*FIRST, "weight_5"])
    assert values(page) == (sent, saved)
    workflow = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate(OFF, 5)
    expect_weights(page, FIRST)
    page.evaluate("text => app.loadGraphData(JSON.parse(text))", workflow)
    expect_weights(page, [*FIRST, "weight_5"])
    assert values(page) == (sent, saved)


def test_it_follows_after_another_value_has_changed(page: Page):
    """The front end 1.32.9 then holds on to what it has read of a node's widgets."""
    page.evaluate(BUILD)
    expect_weights(page, FIRST)
    slide(page, 0.1)
    slid = page.evaluate(WEIGHT)
    assert slid > 2
    page.evaluate(LOAD, 3)
    expect_weights(page, [*FIRST, "weight_3"])
    slide(page, 0.1)
    assert page.evaluate(WEIGHT) > slid + 2
    page.evaluate(OFF, 3)
    expect_weights(page, FIRST)
    page.evaluate(LOAD, 4)
    expect_weights(page, [*FIRST, "weight_4"])
    expect(page.locator("pre.loha-info")).to_be_visible()
    assert values(page)[0] == [page.evaluate(WEIGHT), 1, 1, 1, 0.5, 1]


def test_two_of_them_know_nothing_of_each_other(page: Page):
    page.evaluate(BUILD)
    page.evaluate("""() => {
      const other = LiteGraph.createNode("LoHaMerge");
      other.pos = [900, 60];
      app.graph.add(other);
      const load = app.graph._nodes.find(n => n.type === "LoHaLoadAdapter");
      for (const slot of [3, 4, 6]) load.connect(0, other, `loha_${slot}`);
    }""")
    expect_weights(page, FIRST)


def test_a_weight_that_is_connected_itself_stays(page: Page):
    page.evaluate(BUILD)
    page.evaluate(f"""() => {{
      const number = LiteGraph.createNode("PrimitiveFloat");
      app.graph.add(number);
      number.connect(0, {MERGE}, "weight_4");
    }}""")
    expect_weights(page, [*FIRST, "weight_4"])


def test_the_template_and_workflows_saved_before_open(page: Page):
    """They hold all weights, and the height that these took."""
    workflow = workflows.filled(workflows.MERGE)
    [merge] = [node for node in workflow["nodes"] if node["type"] == "LoHaMerge"]
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.evaluate(LOOK)
    expect_weights(page, FIRST)
    assert page.evaluate(VALUES) == merge["widgets_values"]
    names = page.evaluate(f"{MERGE}.inputs.map(i => i.name)")
    assert sorted(names) == sorted(socket["name"] for socket in merge["inputs"])
