"""The block equaliser and the schedule's curve under a real pointer; and what all widgets have in common."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from loha_core.blocks import BlockStrength
from loha_core.schedule import INTERPOLATIONS, Schedule

from .conftest import HEAR, MARKUP, READY, STEP, STYLES, TRACKER, VUE, expect_value, settle, until
from .test_widgets import PLACES, add, drag, rows, rows_of, sent

WIDGETS = "/extensions/ComfyUI-LoHa"
SET = """(id, name, value) => {
  const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name);
  widget.value = value;
  widget.callback?.(value);
}"""
SIZES = "app.graph._nodes.map(n => [...n.size].map(Math.round))"


# --- block equaliser --------------------------------------------------------------------------


def test_blocks(page: Page, shoot):
    node = add(page, "LoHaBlockStrength", family="SD1.5")
    bars = page.locator(".loha-bar")
    expect(bars).to_have_count(28)
    before = page.evaluate(PLACES)
    vector = page.get_by_role("textbox", name="vector")

    def bar(label: str) -> Locator:
        return page.get_by_role("slider", name=label, exact=True)

    drag(page, bar("IN04"), (0.5, 0.5), (0, 0))  # the middle of −1…2
    assert sent(page, node)["vector"] == "IN04=0.5"
    drag(page, bar("OUT03"), (0.5, 0.3), (3, 20))
    value = float(bar("OUT03").get_attribute("aria-valuenow"))
    assert sent(page, node)["vector"] == f"IN04=0.5, OUT03={value:g}" and 0.5 < value < 1
    bar("OUT03").dblclick()
    assert sent(page, node)["vector"] == "IN04=0.5"
    bar("IN04").focus()
    for key in ("ArrowUp", "Shift+ArrowUp", "ArrowRight", "Home"):
        page.keyboard.press(key)
    assert sent(page, node)["vector"] == "IN04=0.56, IN05=0"
    drag(page, page.get_by_role("button", name="all of OUT"), (0.5, 0.5), (0, 15))
    group = float(bar("OUT07").get_attribute("aria-valuenow"))
    assert sent(page, node)["vector"] == f"IN04=0.56, IN05=0, OUT={group:g}" and group < 1

    vector.fill("MID=0.25, IN00-IN02=-0.5")
    expect(bar("M01")).to_have_attribute("aria-valuenow", "0.25")
    expect(bar("IN01")).to_have_attribute("aria-valuenow", "-0.5")
    expect(bar("OUT07")).to_have_attribute("aria-valuenow", "1")
    shoot("widget-blocks")
    vector.fill("IN04=much")
    expect(page.locator(".loha-equaliser .loha-error")).to_contain_text("expected a number")
    page.evaluate(f"id => ({SET})(id, 'preset', 'OUTALL')", node)
    vector.fill(",".join("1" * 17))  # numbers stay numbers; a block that they leave out goes with its neighbour
    expect(bar("IN00")).to_have_attribute("aria-valuenow", "1")
    drag(page, bar("IN02"), (0.5, 0.5), (0, 0))
    assert sent(page, node)["vector"] == "1,1,0.5" + ",1" * 14
    expect(bar("IN03")).to_have_attribute("aria-valuenow", "0.5")
    drag(page, bar("M02"), (0.5, 0.5), (0, 0))  # not among the 17: from here on all blocks are listed
    assert sent(page, node)["vector"].count(",") == 27
    assert page.evaluate(PLACES) == before

    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function("id => app.nodeOutputs[id]?.layout?.[0] === 'SD1.5'", arg=node, timeout=120_000)


def test_blocks_of_a_model_that_is_not_known_yet(page: Page):
    node = add(page, "LoHaBlockStrength", vector="OUT03-OUT05=0")
    expect(page.locator(".loha-bar")).to_have_count(8)  # BASE, six parts, and the range
    drag(page, page.get_by_role("slider", name="IN", exact=True), (0.5, 0.5), (0, 0))
    written = sent(page, node)["vector"]
    assert written == "IN=0.5, OUT03-05=0"
    for block, value in (("input_blocks.7", 0.5), ("output_blocks.4", 0), ("output_blocks.6", 1)):
        assert BlockStrength.parse(None, written)(f"diffusion_model.{block}.0.weight") == value


def test_block_presets_are_kept_and_shared(page: Page, shoot):
    node = add(page, "LoHaBlockStrength", family="Flux", vector="D00-D02=0.5, S=0.8")
    expect(page.locator(".loha-bar")).to_have_count(58)
    page.get_by_role("button", name="Presets").click()
    dialog = page.get_by_role("dialog", name="Block presets")
    dialog.get_by_role("textbox", name="name").fill(MARKUP)
    dialog.get_by_role("button", name="Save").click()
    saved = dialog.get_by_role("button", name=MARKUP, exact=True)
    expect(saved).to_be_visible()
    dialog.get_by_role("button", name="Copy as numbers").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).split(',').length === 58")
    shoot("widget-presets")
    page.keyboard.press("Escape")

    other = add(page, "LoHaBlockStrength", 800)
    page.get_by_role("button", name="Presets").nth(1).click()
    saved.click()
    inputs = sent(page, other)
    assert (inputs["vector"], inputs["family"]) == ("D00-D02=0.5, S=0.8", "Flux") and sent(page, node) == inputs
    page.get_by_role("button", name="Presets").nth(1).click()
    dialog.get_by_role("button", name=f"remove {MARKUP}").click()
    expect(dialog).to_contain_text("none saved yet")
    page.keyboard.press("Escape")


def test_a_preset_s_name_typed_before_the_list_comes_is_kept(page: Page):
    asked: list[Route] = []
    add(page, "LoHaBlockStrength", family="Flux", vector="S=0.8")
    page.route("**/userdata/loha_block_presets*", lambda route: asked.append(route))
    page.get_by_role("button", name="Presets").click()
    dialog = page.get_by_role("dialog", name="Block presets")
    name = dialog.get_by_role("textbox", name="name")
    name.fill("typed early")
    until(page, lambda: None, lambda: bool(asked))
    asked[0].continue_()
    expect(dialog).to_contain_text("none saved yet")
    expect(name).to_have_value("typed early")


# --- schedule ---------------------------------------------------------------------------------


def test_schedule(page: Page, shoot):
    node = add(page, "LoHaSchedule", keyframes="")
    before = page.evaluate(PLACES)
    plot, handles = page.locator(".loha-plot"), page.locator(".loha-keyframe")
    assert sent(page, node)["keyframes"] == ""

    def frames() -> list[tuple[float, float]]:
        return list(Schedule.parse(sent(page, node)["keyframes"]).keyframes)

    drag(page, plot, (0.25, 1 / 3), (0, 0))
    assert frames() == [(pytest.approx(0.25, abs=0.011), pytest.approx(1, abs=0.051))]
    drag(page, plot, (0.75, 0.5), (0, -20))
    assert len(frames()) == 2 and frames()[1][1] > 0.8
    drag(page, handles.first, (0.5, 0.5), (30, 40))
    (x, y), _ = frames()
    assert 0.3 < x < 0.4 and y < 0.8
    drag(page, handles.first, (0.5, 0.5), (0, 400))  # beyond the plot: negative, and the plot follows
    assert frames()[0][1] < -1
    shoot("widget-schedule-negative")
    page.wait_for_timeout(700)
    handles.first.dblclick()
    assert len(frames()) == 1
    handles.first.focus()
    (x, y), *_ = frames()
    for key in ("ArrowLeft", "ArrowDown", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    assert frames() == [(pytest.approx(x - 0.011), pytest.approx(y - 0.05))]
    page.keyboard.press("Insert")
    assert len(frames()) == 2
    page.keyboard.press("Delete")
    assert len(frames()) == 1

    text = page.get_by_role("textbox", name="keyframes")
    text.fill("# mine\n0: 0, 50%: 1\n1: .3")
    expect(handles).to_have_count(3)
    page.keyboard.press("Tab")
    drag(page, handles.nth(2), (0.5, 0.5), (-30, 0))
    assert sent(page, node)["keyframes"].startswith("# mine\n0: 0, 0.5: 1, 0.9")
    text.fill("soon")
    expect(page.locator(".loha-schedule .loha-error")).to_contain_text("expected progress: strength")
    assert sent(page, node)["keyframes"] == "soon"
    text.fill("0: 0, 0.5: 1, 1: 0.3")
    curve = page.locator(".loha-plot path")
    straight = curve.get_attribute("d")
    page.evaluate(f"id => ({SET})(id, 'interpolation', 'smooth')", node)
    assert curve.get_attribute("d") != straight
    assert page.evaluate(PLACES) == before
    shoot("widget-schedule")


def test_the_curve_is_the_one_that_the_server_follows(page: Page):
    texts = ["", "0: 0, 1: 1", "0.2: 1, 60%: -0.5; 0.6: 2\n# no: line\n1: 0.3", ".5:1e-1", "0.4: 2, 0.1: 1"]
    module = f"{WIDGETS}/curve.mjs"
    follow = """async ([module, texts, kinds]) => {
      const { parseFrames, strengthAt } = await import(module);
      const points = Array.from({length: 21}, (_, i) => i / 20);
      return texts.map(text => kinds.map(kind => points.map(x => strengthAt(parseFrames(text), kind, x))));
    }"""
    drawn = page.evaluate(follow, [module, texts, list(INTERPOLATIONS)])
    for text, curves in zip(texts, drawn, strict=True):
        for kind, curve in zip(INTERPOLATIONS, curves, strict=True):
            schedule = Schedule.parse(text, kind)
            assert curve == pytest.approx([schedule(place / 20) for place in range(21)]), (text, kind)
    refused = ["0.5", "7: 1", "a: 1", "0: 1: 2", "0: nan", "50: 1"]
    parse = "async ([module, texts]) => texts.map((await import(module)).parseFrames).map(found => found ?? null)"
    assert page.evaluate(parse, [module, refused]) == [None] * len(refused)


# --- what all have in common ------------------------------------------------------------------


def everything(page: Page) -> dict[str, dict[str, Any]]:
    """One node of each kind with values of its own -> what they send."""
    add(page, "LoHaLoader", 120, 160, strength_model=0.85, strength_clip=-0.4)
    add(page, "LoHaStack", 120, 520, rows=rows("seven.safetensors", STYLES[1]))
    add(page, "LoHaBlockStrength", 500, 160, family="SDXL", vector="OUT=0.5, IN04-IN08=0")
    add(page, "LoHaSchedule", 950, 160, keyframes="0: 0.2, 0.5: 1", interpolation="smooth")
    return output(page)


def output(page: Page) -> dict[str, dict[str, Any]]:
    """Class of node -> what it sends, without links."""
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    return {node["class_type"]: node["inputs"] for node in prompt.values()}


def held(page: Page) -> dict[str, dict[str, Any]]:
    """The same from the widgets: making a prompt numbers the nodes anew, which is a step for undo."""
    return page.evaluate(
        "Object.fromEntries(app.graph._nodes.map("
        "n => [n.type, Object.fromEntries(n.widgets.map(w => [w.name, w.value]))]))"
    )


def shown(page: Page) -> list[Any]:
    """What a user sees of the values."""
    page.wait_for_function("document.querySelectorAll('.loha-bar').length === 22")
    read = """() => [
      ...[...document.querySelectorAll('.loha-track, .loha-keyframe, .loha-bar')].map(e => Number(e.ariaValueNow)),
      ...[...document.querySelectorAll('.loha-stack-row .loha-button')].map(e => e.textContent)]"""
    return page.evaluate(read)


def test_values_survive(page: Page, opened: Page, shoot):
    values = everything(page)
    seen = shown(page)
    assert seen[:2] == [0.85, -0.4] and values["LoHaLoader"]["strength_clip"] == -0.4

    settle(page, SIZES)
    sizes = page.evaluate(SIZES)
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate("async saved => { app.graph.clear(); await app.loadGraphData(JSON.parse(saved)) }", saved)
    assert (output(page), shown(page)) == (values, seen)
    if not page.evaluate(f"app.extensionManager.setting.get('{VUE}')"):  # Nodes 2.0 scales what it did not save itself
        expect_value(page, SIZES, sizes)

    # Undo and redo, a step for a drag.
    drag(page, page.get_by_role("slider", name="model strength"), (0.3, 0.5), (20, 0))
    drag(page, page.get_by_role("slider", name="IN01", exact=True), (0.5, 0.8), (0, 10))
    page.get_by_role("switch", name="seven on").click()
    changed = held(page)
    assert all(changed[kind] != values[kind] for kind in ("LoHaLoader", "LoHaBlockStrength", "LoHaStack"))
    page.mouse.click(900, 850)
    assert page.evaluate(f"{TRACKER}.undoQueue.length") == 3
    for key, back in (("Control+z", (2, 1, 0)), ("Control+y", (1, 2, 3))):
        for steps in back:
            page.keyboard.press(key)
            page.wait_for_function(f"n => {TRACKER}.undoQueue.length === n && !{TRACKER}._restoringState", arg=steps)
        assert held(page) == (changed if key == "Control+y" else values)
    assert shown(page) != seen

    # Copies are copies, not two views of one.
    page.mouse.click(900, 850)
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+c")
    page.evaluate("app.graph.clear()")
    page.keyboard.press("Control+v")
    page.wait_for_function("app.graph._nodes.length === 4")
    assert output(page) == changed

    # The other renderer and back.
    first = page.evaluate(f"app.extensionManager.setting.get('{VUE}')")
    for on in (not first, first):
        page.evaluate(f"on => app.extensionManager.setting.set('{VUE}', on)", on)
        settle(page, SIZES)
        assert output(page) == changed
        expect(page.locator(".loha-bar")).to_have_count(22)
        expect(page.get_by_role("slider", name="model strength")).to_be_visible()

    # A reload of the page.
    page.evaluate(STEP)
    page.wait_for_timeout(600)
    page.reload()
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(HEAR)
    page.wait_for_function("app.graph._nodes.length === 4")
    assert output(page) == changed
    expect(page.locator(".loha-bar")).to_have_count(22)
    shoot("widget-after-reload")


def test_a_link_overrides_the_widget(page: Page, shoot):
    node = add(page, "LoHaStack", 700, rows=rows("seven.safetensors"))
    source = add(page, "PrimitiveStringMultiline", value="[]")
    connect = """([from, to]) => {
      const target = app.graph.getNodeById(to);
      app.graph.getNodeById(from).connect(0, target, target.inputs.findIndex(i => i.name === 'rows'));
    }"""
    page.evaluate(connect, [source, node])
    frame = page.locator(".loha-frame").filter(has=page.locator(".loha-stack"))
    free = page.locator(".loha-frame:visible:not([data-overridden])").filter(has=page.locator(".loha-stack"))
    hidden = page.evaluate("__COMFYUI_FRONTEND_VERSION__ === '1.58.1'")  # it may show no widget whose input has a link

    def overridden() -> None:
        expect(free).to_have_count(0)
        if not hidden:
            expect(frame).to_have_attribute("data-overridden", "")
            assert frame.evaluate("e => e.inert") is True

    overridden()
    assert sent(page, node)["rows"] == [str(source), 0]
    shoot("widget-overridden")
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate("async saved => { app.graph.clear(); await app.loadGraphData(JSON.parse(saved)) }", saved)
    overridden()
    page.evaluate(
        "id => { const n = app.graph.getNodeById(id); n.disconnectInput(n.inputs.findIndex(i => i.name === 'rows')) }",
        node,
    )
    expect(free).to_have_count(1)
    assert [row["name"] for row in rows_of(page, node)] == ["seven.safetensors"]


@pytest.mark.parametrize(("width", "height"), [(225, 200), (620, 620)], ids=["narrow", "wide"])
def test_sizes(page: Page, shoot, width: int, height: int):
    everything(page)
    size = """([w, h]) => {
      app.graph._nodes.forEach((n, i) => { n.pos = [60 + i * (w + 30), 160]; n.setSize([w, h]) });
      app.canvas.ds.scale = w > 400 ? 0.6 : 1; // farther away LiteGraph leaves the widgets out
      app.canvas.ds.offset = [60, 40];
    }"""
    page.evaluate(size, [width, height])
    first = page.evaluate(f"app.extensionManager.setting.get('{VUE}')")
    for on in (not first, first):  # Nodes 2.0 takes sizes over when it starts
        page.evaluate(f"on => app.extensionManager.setting.set('{VUE}', on)", on)
    shown(page)
    page.evaluate("app.canvas.setDirty(true, true)")
    settle(page, SIZES)
    shoot(f"widget-{'narrow' if width < 400 else 'wide'}")
    spill = """() => [...document.querySelectorAll('.loha')].filter(e => {
      const box = e.parentElement.getBoundingClientRect(), scale = box.width / e.parentElement.offsetWidth;
      return [...e.querySelectorAll(':scope > *')].some(c => {
        const r = c.getBoundingClientRect();
        return r.right > box.right + 2 * scale || r.bottom > box.bottom + 2 * scale;
      });
    }).map(e => e.className)"""
    assert page.evaluate(spill) == []
