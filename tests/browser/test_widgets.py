"""The widgets under a real pointer and keyboard, in both renderers: what they show, and what arrives in the prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from safetensors.torch import save_file

from demo.comfyui import CACHE, Server
from loha_core.schedule import INTERPOLATIONS, Schedule

SHOTS = CACHE / "screenshots"
WIDGETS = "/extensions/ComfyUI-LoHa"
MARKUP = "<img src=x onerror=window.hacked=1>"
STYLES = [f"styles/film/look_{number:02d}.safetensors" for number in range(30)]
READY = "!!(window.app?.graph && app.extensionManager?.setting && LiteGraph.registered_node_types?.LoHaStack)"

ADD = """([kind, x, y, values]) => {
  const node = LiteGraph.createNode(kind);
  node.pos = [x, y];
  app.graph.add(node);
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find(w => w.name === name);
    widget.value = value;
    widget.callback?.(value);
  }
  node.expandToFitContent(); // as ComfyUI does when it loads a node
  app.canvas.setDirty(true, true);
  return node.id;
}"""
SET = """(id, name, value) => {
  const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name);
  widget.value = value;
  widget.callback?.(value);
}"""
PLACES = "app.graph._nodes.map(n => [...n.pos].map(Math.round))"
SIZES = "app.graph._nodes.map(n => [...n.size].map(Math.round))"
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
VUE = "Comfy.VueNodes.Enabled"


@pytest.fixture(scope="module")
def adapters(server: Server) -> list[str]:
    """Small adapters in folders; one says things of itself, and has a picture."""
    factors = {f"lora_unet_mid_block_x.hada_{name}": torch.ones(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    factors["lora_unet_mid_block_x.alpha"] = torch.tensor(2.0)
    about = {"modelspec.trigger_phrase": f"anna, {MARKUP}", "modelspec.architecture": "stable-diffusion-v1"}
    names = ["characters/anna_v2.safetensors", "seven.safetensors", *STYLES]
    for name in names:
        save_file(factors, server.path("models", "loras", *name.split("/")), about if "anna" in name else None)
    Image.new("RGB", (60, 40), (90, 140, 200)).save(server.path("models", "loras", "characters", "anna_v2.preview.png"))
    server.object_info("LoHaStack")
    return names


@pytest.fixture(scope="module", params=[False, True], ids=["LiteGraph", "Nodes 2.0"])
def opened(request: pytest.FixtureRequest, browser: Browser, server: Server, adapters: list[str]) -> Iterator[Page]:
    """One page for all tests of a renderer."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, permissions=["clipboard-read"])
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.add_init_script("window.failures = []; addEventListener('error', e => failures.push(e.message))")
    page.goto(server.address)
    page.wait_for_function(READY, timeout=60_000)
    for setting, value in ((VUE, request.param), ("Comfy.TutorialCompleted", True), ("Comfy.Minimap.Visible", False)):
        page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])
    page.reload()
    page.wait_for_function(READY, timeout=60_000)
    page.keyboard.press("Escape")  # the template browser opens by itself on an empty profile
    yield page
    assert page.evaluate("failures") == []
    context.close()


@pytest.fixture
def page(opened: Page) -> Page:
    opened.evaluate("app.graph.clear(); app.canvas.ds.reset(); app.canvas.setDirty(true, true)")
    opened.mouse.move(5, 895)
    return opened


@pytest.fixture
def shoot(page: Page, request: pytest.FixtureRequest) -> Callable[[str], None]:
    def shoot(name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        renderer = request.node.callspec.id.replace(" ", "")
        page.screenshot(path=SHOTS / f"widget-{name}-{renderer}.png")

    return shoot


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
    shoot("strength")


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
    shoot("chooser")
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
    shoot("stack")
    page.get_by_role("button", name="M|C").click()
    assert "strength_clip" not in rows_of(page, node)[1]
    page.get_by_role("button", name="Remove look_07").click()
    page.locator(".loha-stack-row .loha-button", has_text="look_02").click()
    page.get_by_role("dialog", name="Choose an adapter").get_by_role("option", name="seven").click()
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
    page.wait_for_function("document.querySelector('.loha-info img')?.naturalWidth === 60")
    dialog.get_by_role("button", name="anna", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == "anna"
    assert page.evaluate("window.hacked") is None
    shoot("info")
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
    page.wait_for_function(f"id => ({done})(id).includes('seven')", arg=show, timeout=30_000)
    assert json.loads(page.evaluate(done, show)) == [["seven.safetensors", strength, strength]]

    page.evaluate("id => app.graph.getNodeById(id).widgets[0].value = '[{'", node)
    expect(page.locator(".loha-stack")).to_contain_text("not a list of rows")
    assert sent(page, node)["rows"] == "[{"  # kept until it is edited
    page.evaluate("app.queuePrompt(0)")
    dialog = page.get_by_role("dialog").filter(has_text="rows is not JSON")
    expect(dialog).to_be_visible(timeout=30_000)
    page.keyboard.press("Escape")


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
    shoot("blocks")
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
    page.wait_for_function("id => app.nodeOutputs[id]?.layout?.[0] === 'SD1.5'", arg=node, timeout=30_000)


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
    shoot("presets")
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
    shoot("schedule-negative")
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
    shoot("schedule")


def test_the_curve_is_the_one_that_the_server_follows(page: Page):
    texts = ["", "0: 0, 1: 1", "0.2: 1, 60%: -0.5; 0.6: 2\n# no: line\n1: 0.3", ".5:1e-1", "0.4: 2, 0.1: 1"]
    module = f"{WIDGETS}/curve.mjs"
    follow = """async ([module, texts, kinds]) => {
      const { parseFrames, strengthAt } = await import(module);
      return texts.map(text => kinds.map(kind => Array.from({length: 21}, (_, i) => strengthAt(parseFrames(text), kind, i / 20))));
    }"""
    drawn = page.evaluate(follow, [module, texts, list(INTERPOLATIONS)])
    for text, curves in zip(texts, drawn, strict=True):
        for kind, curve in zip(INTERPOLATIONS, curves, strict=True):
            schedule = Schedule.parse(text, kind)
            assert curve == pytest.approx([schedule(place / 20) for place in range(21)]), (text, kind)
    refused = ["0.5", "7: 1", "a: 1", "0: 1: 2", "0: nan", "50: 1"]
    parse = "async ([m, texts]) => { const { parseFrames } = await import(m); return texts.map(t => parseFrames(t) ?? null) }"
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
        "Object.fromEntries(app.graph._nodes.map(n => [n.type, Object.fromEntries(n.widgets.map(w => [w.name, w.value]))]))"
    )


def shown(page: Page) -> list[Any]:
    """What a user sees of the values."""
    page.wait_for_function("document.querySelectorAll('.loha-bar').length === 22")
    read = """() => [
      ...[...document.querySelectorAll('.loha-track, .loha-keyframe, .loha-bar')].map(e => Number(e.getAttribute('aria-valuenow'))),
      ...[...document.querySelectorAll('.loha-stack-row .loha-button')].map(e => e.textContent)]"""
    return page.evaluate(read)


def test_values_survive(page: Page, opened: Page, shoot):
    values = everything(page)
    seen = shown(page)
    assert seen[:2] == [0.85, -0.4] and values["LoHaLoader"]["strength_clip"] == -0.4

    page.wait_for_timeout(300)
    sizes = page.evaluate(SIZES)
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate("async saved => { app.graph.clear(); await app.loadGraphData(JSON.parse(saved)) }", saved)
    assert (output(page), shown(page)) == (values, seen)
    if not page.evaluate(f"app.extensionManager.setting.get('{VUE}')"):  # Nodes 2.0 scales what it did not save itself
        page.wait_for_timeout(300)
        assert page.evaluate(SIZES) == sizes

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
        page.wait_for_timeout(500)
        assert output(page) == changed
        expect(page.locator(".loha-bar")).to_have_count(22)
        expect(page.get_by_role("slider", name="model strength")).to_be_visible()

    # A reload of the page.
    page.evaluate(f"{TRACKER}.checkState()")
    page.wait_for_timeout(600)
    page.reload()
    page.wait_for_function(READY, timeout=60_000)
    page.wait_for_function("app.graph._nodes.length === 4")
    assert output(page) == changed
    expect(page.locator(".loha-bar")).to_have_count(22)
    shoot("after-reload")


def test_a_link_overrides_the_widget(page: Page, shoot):
    node = add(page, "LoHaStack", 700, rows=rows("seven.safetensors"))
    source = add(page, "PrimitiveStringMultiline", value="[]")
    connect = """([from, to]) => {
      const target = app.graph.getNodeById(to);
      app.graph.getNodeById(from).connect(0, target, target.inputs.findIndex(i => i.name === 'rows'));
    }"""
    page.evaluate(connect, [source, node])
    frame = page.locator(".loha-frame").filter(has=page.locator(".loha-stack"))
    expect(frame).to_have_attribute("data-overridden", "")
    assert sent(page, node)["rows"] == [str(source), 0]
    assert frame.evaluate("e => e.inert") is True
    shoot("overridden")
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate("async saved => { app.graph.clear(); await app.loadGraphData(JSON.parse(saved)) }", saved)
    expect(frame).to_have_attribute("data-overridden", "")
    page.evaluate(
        "id => { const n = app.graph.getNodeById(id); n.disconnectInput(n.inputs.findIndex(i => i.name === 'rows')) }",
        node,
    )
    expect(frame).not_to_have_attribute("data-overridden", "")
    assert [row["name"] for row in rows_of(page, node)] == ["seven.safetensors"]


@pytest.mark.parametrize(("width", "height"), [(225, 200), (620, 620)], ids=["narrow", "wide"])
def test_sizes(page: Page, shoot, width: int, height: int):
    everything(page)
    size = "([w, h]) => app.graph._nodes.forEach((n, i) => { n.pos = [60 + i * (w + 30), 160]; n.setSize([w, h]); app.canvas.ds.scale = w > 400 ? 0.5 : 1; app.canvas.ds.offset = [60, 40] })"
    page.evaluate(size, [width, height])
    first = page.evaluate(f"app.extensionManager.setting.get('{VUE}')")
    for on in (not first, first):  # Nodes 2.0 takes sizes over when it starts
        page.evaluate(f"on => app.extensionManager.setting.set('{VUE}', on)", on)
    shown(page)
    page.evaluate("app.canvas.setDirty(true, true)")
    page.wait_for_timeout(400)
    shoot("narrow" if width < 400 else "wide")
    spill = """() => [...document.querySelectorAll('.loha')].filter(e => {
      const box = e.parentElement.getBoundingClientRect(), scale = box.width / e.parentElement.offsetWidth;
      return [...e.querySelectorAll(':scope > *')].some(c => {
        const r = c.getBoundingClientRect();
        return r.right > box.right + 2 * scale || r.bottom > box.bottom + 2 * scale;
      });
    }).map(e => e.className)"""
    assert page.evaluate(spill) == []
