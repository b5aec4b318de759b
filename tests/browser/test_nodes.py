"""What a user sees: text and picture on LoHaInfo, and what failed, where ComfyUI says it."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from .conftest import expect_error
from .test_widgets import add

BUILD = """name => {
  const load = LiteGraph.createNode("LoHaLoadAdapter");
  load.pos = [60, 120];
  app.graph.add(load);
  load.widgets.find(w => w.name === "lora_name").value = name;
  const info = LiteGraph.createNode("LoHaInfo");
  info.pos = [420, 120];
  app.graph.add(info);
  load.connect(0, info, 0);
}"""


def test_info_on_the_node(page: Page, adapter: str, shoot):
    page.evaluate(BUILD, adapter)
    text = page.locator("pre.loha-info")
    expect(text).to_contain_text("Run the workflow")
    expect(text).to_contain_text("file: shown.safetensors")  # before a run, what the file says of itself
    expect(text).to_contain_text("layers: 9")
    page.evaluate("app.queuePrompt(0)")
    expect(text).to_contain_text("LoHa layers   9", timeout=120_000)
    # Metadata is text, never markup.
    expect(text).to_contain_text("<img src=x onerror=window.hacked=1>")
    assert page.evaluate("window.hacked") is None
    # LiteGraph draws the picture on its canvas, Nodes 2.0 shows an element.
    page.wait_for_function(
        "!!(app.graph._nodes.some(n => n.comfyClass === 'LoHaInfo' && n.imgs?.length) ||"
        " document.querySelector('[data-node-id] img'))",
        timeout=120_000,
    )
    shoot("info")


def test_errors_reach_the_user(page: Page, adapter: str, shoot):
    page.evaluate(BUILD, "broken.safetensors")
    page.evaluate("app.queuePrompt(0)")
    expect_error(page, "not a safetensors file")
    expect(page.get_by_text("broken.safetensors").filter(visible=True).first).to_be_visible()
    shoot("error")


def test_what_is_shown_is_not_saved(page: Page, adapter: str):
    """A workflow holds a value per input that has one, and nothing of the texts and curves."""
    counts = page.evaluate("""() => ["LoHaMerge", "LoHaTrainer", "LoHaSave", "LoHaNetwork"].map(type => {
      const node = LiteGraph.createNode(type);
      app.graph.add(node);
      return [node.serialize().widgets_values.length, node.inputs.filter(input => input.widget).length];
    })""")
    assert all(saved == inputs for saved, inputs in counts), counts


def test_the_right_button_opens_the_nodes_menu_over_our_widgets(page: Page):
    node = add(page, "LoHaLoader", lora_name="seven.safetensors")
    page.locator(".loha-strength .loha-track").first.click(button="right")
    expect(page.get_by_text(re.compile("^(Clone|Duplicate|Bypass)")).first).to_be_visible()
    assert page.evaluate("Object.keys(app.canvas.selected_nodes)") == [str(node)]
    page.keyboard.press("Escape")
    page.mouse.click(1200, 800)


def test_strengths_keep_their_height_and_call_themselves_beside_the_fill(page: Page, shoot):
    node = add(page, "LoHaLoader", lora_name="seven.safetensors")
    page.evaluate("id => app.graph.getNodeById(id).setSize([270, 700])", node)
    page.wait_for_timeout(500)
    heights = page.evaluate("[...document.querySelectorAll('.loha-track')].map(e => e.offsetHeight)")
    assert heights == [24, 24]
    gaps = page.evaluate("""[...document.querySelectorAll(".loha-track")].map(e => {
      const words = document.createRange();
      words.selectNodeContents(e.querySelector(".loha-label"));
      const fill = e.querySelector(".loha-fill").getBoundingClientRect();
      return fill.left - words.getBoundingClientRect().right;
    })""")
    shoot("strength-tall")
    assert min(gaps) > 2, gaps
