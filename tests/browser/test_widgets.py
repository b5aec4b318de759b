"""The widgets under a real pointer and keyboard, in both renderers: what they show, and what arrives in the prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from .conftest import MARKUP, STYLES, expect_error

ADD = """([kind, x, y, values]) => {
  const node = LiteGraph.createNode(kind);
  node.pos = [x, y];
  app.graph.add(node);
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find(w => w.name === name);
    widget.value = value;
    widget.callback?.(value);
  }
  app.canvas.setDirty(true, true);
  return node.id;
}"""
PLACES = "app.graph._nodes.map(n => [...n.pos].map(Math.round))"


def add(page: Page, kind: str, x: int = 300, y: int = 160, **values: Any) -> int:
    return page.evaluate(ADD, [kind, x, y, values])


def sent(page: Page, node: int) -> dict[str, Any]:
    """The node's inputs in the prompt that the page would queue."""
    return page.evaluate("async id => (await app.graphToPrompt()).output[id].inputs", str(node))


def drag(page: Page, target: Locator, start: tuple[float, float], by: tuple[float, float], *keys: str) -> None:
    """Press at a share of the target's size, move by pixels, release."""
    box = target.bounding_box()
    assert box
    target.hover(position={"x": start[0] * box["width"], "y": start[1] * box["height"]})  # waits until it stands still
    box = target.bounding_box()
    assert box
    x, y = box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"]
    for key in keys:
        page.keyboard.down(key)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by[0], y + by[1], steps=6)
    page.mouse.up()
    for key in keys:
        page.keyboard.up(key)


def rows_of(page: Page, node: int) -> list[dict[str, Any]]:
    return json.loads(sent(page, node)["rows"])


def rows(*names: str) -> str:
    return json.dumps([{"on": True, "name": name, "strength_model": 1} for name in names])


# --- strength ---------------------------------------------------------------------------------


def test_strength(page: Page, shoot):
    node = add(page, "LoHaLoader")
    before = page.evaluate(PLACES)
    model, clip = page.get_by_role("slider", name="model strength"), page.get_by_role("slider", name="clip strength")
    typed = page.get_by_role("spinbutton", name="model strength")

    drag(page, model, (0.5, 0.5), (0, 0))
    assert sent(page, node)["strength_model"] == 0
    width = model.bounding_box()["width"]
    drag(page, model, (0.5, 0.5), (width / 4, 0))
    assert sent(page, node)["strength_model"] == pytest.approx(1, abs=0.051)
    drag(page, model, (0.25, 0.5), (0, 0))
    assert sent(page, node)["strength_model"] == pytest.approx(-1, abs=0.051)
    model.dblclick()
    assert sent(page, node)["strength_model"] == 1
    drag(page, model, (0.2, 0.5), (10, 0), "Shift")  # fine: from where it was, in hundredths
    fine = sent(page, node)["strength_model"]
    assert 1 < fine < 1.1 and fine == round(fine, 2)

    typed.click()
    typed.fill("12,5")
    typed.press("Enter")
    assert sent(page, node)["strength_model"] == 12.5
    expect(model).to_have_class("loha-track beyond")
    for wrong in ("much", ""):
        typed.click()
        typed.fill(wrong)
        typed.press("Enter")
        assert sent(page, node)["strength_model"] == 12.5
    typed.click()
    typed.fill("-99")
    typed.press("Tab")
    assert sent(page, node)["strength_model"] == -20
    typed.dblclick()
    assert sent(page, node)["strength_model"] == 1
    drag(page, typed, (0.5, 0.5), (20, 0))
    assert sent(page, node)["strength_model"] == pytest.approx(1.2, abs=0.051)

    clip.focus()
    for key, value in (("Home", 0), ("ArrowUp", 0.05), ("Shift+ArrowRight", 0.06), ("End", 1), ("ArrowDown", 0.95)):
        page.keyboard.press(key)
        assert sent(page, node)["strength_clip"] == value
    page.get_by_role("button", name="link model and clip strength").click()
    assert sent(page, node)["strength_clip"] == sent(page, node)["strength_model"]
    drag(page, clip, (0.6, 0.5), (0, 0))
    assert sent(page, node)["strength_clip"] == sent(page, node)["strength_model"] == pytest.approx(0.4, abs=0.051)
    page.keyboard.press("Delete")  # in a widget, this is not the node's
    assert page.evaluate(PLACES) == before
    shoot("widget-strength")


def test_a_link_between_strengths_is_saved(page: Page):
    add(page, "LoHaLoader")
    link = page.get_by_role("button", name="link model and clip strength")
    link.click()
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    link.click()
    page.evaluate("async saved => { app.graph.clear(); await app.loadGraphData(JSON.parse(saved)) }", saved)
    expect(link).to_have_attribute("aria-pressed", "true")
    drag(page, page.get_by_role("slider", name="model strength"), (0.6, 0.5), (0, 0))
    node = page.evaluate("app.graph._nodes[0].id")
    assert sent(page, node)["strength_clip"] == sent(page, node)["strength_model"] == pytest.approx(0.4, abs=0.051)


# --- stack ------------------------------------------------------------------------------------


def test_stack_rows(page: Page, shoot):
    node = add(page, "LoHaStack")
    page.get_by_role("button", name="+ Add").click()
    dialog = page.get_by_role("dialog", name="Add adapters")
    options = dialog.get_by_role("listbox").get_by_role("option")
    dialog.get_by_role("combobox", name="filter").fill("anv2")
    expect(options).to_have_count(1)
    page.keyboard.press("Enter")
    assert rows_of(page, node) == [{"on": True, "name": "characters/anna_v2.safetensors", "strength_model": 1}]

    page.get_by_role("button", name="+ Add").click()
    dialog.get_by_role("combobox", name="folder").select_option("styles/film")
    expect(options).to_have_count(30)
    options.filter(has_text="look_02").click()
    dialog.get_by_role("combobox", name="filter").fill("look07")
    options.filter(has_text="look_07").click()
    shoot("widget-chooser")
    dialog.get_by_role("button", name="Add 2").click()
    names = [row["name"] for row in rows_of(page, node)]
    assert names == ["characters/anna_v2.safetensors", STYLES[2], STYLES[7]]
    places = page.evaluate(PLACES)

    drag(page, page.get_by_role("button", name="reorder look_07"), (0.5, 0.5), (0, -60))
    assert [row["name"] for row in rows_of(page, node)] == [STYLES[7], "characters/anna_v2.safetensors", STYLES[2]]
    page.get_by_role("button", name="reorder look_07").press("ArrowDown")
    assert [row["name"] for row in rows_of(page, node)] == ["characters/anna_v2.safetensors", STYLES[7], STYLES[2]]
    page.get_by_role("button", name="reorder look_07").press("ArrowUp")  # the focus has moved with the row
    page.get_by_role("switch", name="anna_v2 on").click()
    assert [row["on"] for row in rows_of(page, node)] == [True, False, True]
    everything = page.get_by_role("switch", name="all on or off")
    for state in (True, False):
        everything.click()
        assert [row["on"] for row in rows_of(page, node)] == [state] * 3
    everything.click()

    drag(page, page.get_by_role("spinbutton", name="strength of look_07"), (0.5, 0.5), (-50, 0))
    assert rows_of(page, node)[0]["strength_model"] == pytest.approx(0.5, abs=0.051)
    page.get_by_role("button", name="M|C").click()
    field = page.get_by_role("spinbutton", name="clip strength of anna_v2")
    field.click()
    field.fill("-0.35")
    field.press("Enter")
    assert rows_of(page, node)[1]["strength_clip"] == -0.35 and rows_of(page, node)[1]["strength_model"] == 1
    shoot("widget-stack")
    page.get_by_role("button", name="M|C").click()
    assert "strength_clip" not in rows_of(page, node)[1]
    page.get_by_role("button", name="Remove look_07").click()
    page.locator(".loha-stack-row .loha-button", has_text="look_02").click()
    page.get_by_role("dialog", name="Choose an adapter").get_by_role("option", name="seven", exact=True).click()
    assert [row["name"] for row in rows_of(page, node)] == ["characters/anna_v2.safetensors", "seven.safetensors"]
    assert page.evaluate(PLACES) == places


def test_stack_tells_what_is_missing_and_what_is_in_a_file(page: Page, shoot):
    add(page, "LoHaStack", rows=rows("characters/anna_v2.safetensors", "gone.safetensors"))
    expect(page.locator(".loha-stack-row.missing")).to_have_count(1)
    expect(page.locator(".loha-stack-row.missing")).to_contain_text("gone")
    page.get_by_role("button", name="About anna_v2").click()
    dialog = page.get_by_role("dialog", name="anna_v2")
    expect(dialog).to_contain_text("stable-diffusion-v1")
    expect(dialog.get_by_role("button", name=MARKUP, exact=True)).to_be_visible()  # text, never markup
    expect(dialog.locator("dl")).to_contain_text("lycoris")
    page.wait_for_function("document.querySelector('.loha-about img')?.naturalWidth === 60")
    dialog.get_by_role("button", name="anna", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == "anna"
    assert page.evaluate("window.hacked") is None
    shoot("widget-info")
    page.mouse.click(1300, 850)  # outside
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="About gone").click()
    expect(page.get_by_role("dialog", name="gone")).to_contain_text("no such adapter")
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0


def test_stack_runs_in_the_server_and_bad_rows_say_so(page: Page):
    node = add(page, "LoHaStack", rows=rows("seven.safetensors"))
    show = add(page, "PreviewAny", 800, 160)
    page.evaluate("([a, b]) => app.graph.getNodeById(a).connect(2, app.graph.getNodeById(b), 0)", [node, show])
    page.get_by_role("switch", name="seven on").focus()
    drag(page, page.get_by_role("spinbutton", name="strength of seven"), (0.5, 0.5), (-25, 0))
    strength = rows_of(page, node)[0]["strength_model"]
    page.evaluate("app.queuePrompt(0)")
    done = "id => app.nodeOutputs[id]?.text?.[0] ?? ''"
    page.wait_for_function(f"id => ({done})(id).includes('seven')", arg=show, timeout=120_000)
    assert json.loads(page.evaluate(done, show)) == [["seven.safetensors", strength, strength]]

    page.evaluate("id => app.graph.getNodeById(id).widgets[0].value = '[{'", node)
    expect(page.locator(".loha-stack")).to_contain_text("not a list of rows")
    assert sent(page, node)["rows"] == "[{"  # kept until it is edited
    page.evaluate("app.queuePrompt(0)")
    expect_error(page, "rows is not JSON")
    page.keyboard.press("Escape")


def test_new_nodes_after_a_refresh_have_the_widgets(page: Page):
    page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    page.wait_for_timeout(2000)
    node = add(page, "LoHaStack", rows=rows("seven.safetensors"))
    expect(page.locator(".loha-stack-row")).to_have_count(1)
    assert page.evaluate("id => app.graph.getNodeById(id).widgets[0].type", node) == "loha"


def test_tab_goes_through_a_row_from_left_to_right(page: Page):
    add(page, "LoHaStack", rows=rows("seven.safetensors", STYLES[1]))
    page.get_by_role("button", name="reorder seven").focus()
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
    order = []
    for _ in range(6):
        order.append(page.evaluate(focused))
        page.keyboard.press("Tab")
    assert order == ["reorder seven", "seven on", "seven", "strength of seven", "About seven", "Remove seven"]
    assert page.evaluate(focused) == "reorder look_01"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".loha-stack-row")).to_have_count(1)


def test_thirty_rows_stay_fluent(page: Page):
    node = add(page, "LoHaStack", rows=rows(*STYLES))
    expect(page.locator(".loha-stack-row")).to_have_count(30)
    field = page.get_by_role("spinbutton", name="strength of look_03")
    page.evaluate("window.frames_ = 0; (function tick() { frames_++; requestAnimationFrame(tick) })()")
    field.hover()
    box = field.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 10)
    page.mouse.down()
    start = page.evaluate("[frames_, performance.now()]")
    for step in range(60):
        page.mouse.move(box["x"] + 20 + 2 * step, box["y"] + 10)
    end = page.evaluate("[frames_, performance.now()]")
    page.mouse.up()
    assert rows_of(page, node)[3]["strength_model"] > 1.5
    rate = (end[0] - start[0]) / (end[1] - start[1]) * 1000
    assert rate > 30, f"{rate:.0f} frames a second"
