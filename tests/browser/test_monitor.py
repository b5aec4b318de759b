"""The training monitor: a run's curve while it runs and after a reload, and Cancel."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Iterator

from playwright.sync_api import Page, Route, expect

from demo import comfyui, workflows

from .conftest import HEAR, STEP
from .test_widgets import add

LOOK = """() => {
  const node = app.graph._nodes.find(n => n.type === "LoHaTrainer");
  app.canvas.ds.scale = 0.7;
  app.canvas.ds.offset = [300 - node.pos[0], 150 - node.pos[1]];
  app.canvas.setDirty(true, true);
}"""
SHOWN = "() => +/\\d+/.exec(document.querySelector('.loha-monitor canvas')?.getAttribute('aria-label') ?? '0')?.[0]"

DEAFEN = """() => new Promise(done => {
  const twin = new WebSocket(app.api.socket.url);
  twin.onopen = () => twin.close();
  twin.onclose = () => setTimeout(done, 300);
})"""


@contextlib.contextmanager
def deaf(page: Page) -> Iterator[None]:
    page.evaluate(DEAFEN)
    try:
        yield
    finally:
        page.evaluate(HEAR)


SET = """([type, name, value]) => {
  app.graph._nodes.find(n => n.type === type).widgets.find(w => w.name === name).value = value;
}"""


def values_of(workflow: dict, node_type: str) -> list:
    [node] = [node for node in workflow["nodes"] if node["type"] == node_type]
    return node["widgets_values"]


def run_of(server: comfyui.Server, name: str) -> dict:
    return next((run for run in server.get("/loha/training")["runs"] if run["name"] == name), {"step": 0})


def test_curve_reload_and_cancel(page: Page, ready, nodes_2: bool, shoot):
    name = f"monitored{nodes_2:d}"
    workflow = workflows.filled(workflows.TRAIN)
    values = values_of(workflow, "LoHaTrainer")
    values[0], values[1], values[3] = name, 400, 8
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.evaluate(LOOK)
    # Until it runs, the node shows its last run: here that of the renderer before.
    expect(page.locator(".loha-monitor")).to_contain_text(re.compile("Run the workflow|cancelled"))
    page.evaluate("app.queuePrompt(0)")
    expect(page.locator(".loha-monitor")).to_contain_text("left", timeout=120_000)
    page.wait_for_function(f"({SHOWN})() > 5", timeout=120_000)
    page.get_by_role("button", name="Log", exact=True).click()
    shoot("monitor")

    # The front end 1.58.1 keeps a workflow over a reload once something in it has been changed.
    page.evaluate("() => { app.graph._nodes[0].pos[0] += 10 }")
    page.evaluate(STEP)
    page.wait_for_timeout(1000)
    page.reload()
    page.wait_for_function("!!(window.app?.graph && document.querySelector('.loha-monitor'))", timeout=120_000)
    there = run_of(ready, name)["step"]
    page.wait_for_function(f"({SHOWN})() >= {there}", timeout=120_000)
    page.evaluate(LOOK)
    shoot("monitor-reloaded")

    # With a page's old connection ComfyUI may drop its new one, too; then the page hears nothing more. Here it does.
    with deaf(page):
        cancel = page.locator(".loha-monitor").get_by_role("button", name="Cancel")
        cancel.focus()
        before = run_of(ready, name)
        assert before["state"] == "running"
        with page.expect_response(lambda answer: answer.ok and answer.url.endswith(("/interrupt", "/cancel"))):
            page.keyboard.press("Enter")
        asked = run_of(ready, name)["step"]
        deadline = time.monotonic() + 30
        while (run := run_of(ready, name))["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert run["state"] == "cancelled"
        assert before["step"] <= run["step"] <= asked + 1
        while not (history := ready.get("/history")) or name not in json.dumps(history):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [entry] = [one for one in history.values() if name in json.dumps(one["prompt"])]
        assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]
        expect(page.locator(".loha-monitor")).to_contain_text("cancelled")
    assert list(ready.path("output", "loha", name, "").glob("*state*"))


def test_previews_the_run_before_a_fixed_axis_and_another_tab(page: Page, ready, nodes_2: bool, shoot):
    name = f"before{nodes_2:d}"
    workflow = workflows.filled(workflows.TRAIN) | {"id": str(uuid.uuid4())}
    trainer = values_of(workflow, "LoHaTrainer")
    trainer[:2], trainer[3], trainer[9:14] = [name, 12], 8, [False, 6, "a handwritten seven", 2, 2.0]
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.evaluate(LOOK)
    view = page.locator(".loha-monitor")
    expect(view).to_contain_text("Run the workflow")
    curve = view.get_by_role("img", name="Loss of")
    fix, log = (view.get_by_role("button", name=label, exact=True) for label in ("Fix", "Log"))

    page.evaluate("app.queuePrompt(0)")
    expect(view).to_contain_text("12 of 12", timeout=120_000)
    expect(view).to_contain_text("done")
    expect(view.locator(".loha-previews img")).to_have_count(2)
    page.wait_for_function("[...document.querySelectorAll('.loha-previews img')].every(i => i.naturalWidth > 0)")
    expect(view.get_by_role("button", name="Cancel")).to_be_disabled()
    held = curve.get_attribute("aria-label").split("; ")[1]
    assert held.startswith("axis from 0 to ")
    log.click()
    expect(curve).not_to_have_attribute("aria-label", re.compile("axis from 0 to"))
    log.click()
    fix.click()

    # Another run, of another learning rate and so of another range, on the same axis; the first lies behind.
    page.evaluate(SET, ["LoHaOptimizer", "learning_rate", 0.1])
    page.evaluate("app.queuePrompt(0)")
    expect(curve).to_have_attribute("aria-label", f"Loss of 12 steps, 12 of the run before; {held}", timeout=120_000)
    shoot("monitor-fixed")
    fix.click()
    expect(curve).not_to_have_attribute("aria-label", re.compile(re.escape(held) + "$"))

    # The same workflow in another tab shows the same; a copy with an id of its own has not run yet.
    other = page.context.new_page()
    other.goto(ready.address)
    other.wait_for_function("!!(window.app?.graph && LiteGraph.registered_node_types?.LoHaTrainer)", timeout=120_000)
    other.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    other.evaluate(LOOK)
    expect(other.get_by_role("img", name="Loss of 12 steps, 12 of the run before")).to_have_count(1)
    other.evaluate("workflow => app.loadGraphData(workflow)", workflow | {"id": str(uuid.uuid4())})
    other.evaluate(LOOK)  # a page may show another workflow from where it likes
    expect(other.locator(".loha-monitor")).to_contain_text("Run the workflow")
    other.close()


def test_the_loss_on_held_out_pictures_and_a_preview_for_each_line(page: Page, ready, nodes_2: bool, shoot):
    name = f"validated{nodes_2:d}"
    workflow = workflows.filled(workflows.TRAIN) | {"id": str(uuid.uuid4())}
    trainer = values_of(workflow, "LoHaTrainer")
    trainer[:2], trainer[3] = [name, 24], 8
    trainer[9:14] = [False, 24, "a handwritten seven\n\na handwritten one", 2, 2]
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.evaluate(SET, ["LoHaTrainer", "validation_share", 0.05])
    page.evaluate(SET, ["LoHaTrainer", "validate_every", 4])
    page.evaluate(SET, ["LoHaOptimizer", "learning_rate", 0.02])
    page.evaluate(LOOK)
    view = page.locator(".loha-monitor")
    page.evaluate("app.queuePrompt(0)")
    expect(view).to_contain_text("24 of 24", timeout=120_000)
    curve = view.get_by_role("img", name="Loss of 24 steps, validated 6 times; axis from 0 to")
    expect(curve).to_have_count(1)
    expect(view.locator(".loha-previews img")).to_have_count(2)
    page.wait_for_function("[...document.querySelectorAll('.loha-previews img')].every(i => i.naturalWidth > 0)")
    held_out = run_of(ready, name)["validation"]
    best, _ = min(held_out, key=lambda pair: pair[1])
    assert [step for step, _ in held_out] == [4, 8, 12, 16, 20, 24]
    expect(view).to_contain_text(f"at step {best}")
    shoot("monitor-validation")
    files = {path.name for path in ready.path("output", "loha", name, "").iterdir()}
    assert files >= {"best.safetensors", "preview_000024.png", "preview_000024_2.png"}


# What of the line is cut off: nothing may be, and there must be a plot and buttons below it.
CUT = """() => {
  const line = document.querySelector(".loha-monitor .loha-count");
  const view = document.querySelector(".loha-monitor").getBoundingClientRect();
  const buttons = [...document.querySelectorAll(".loha-monitor .loha-button")].map(e => e.getBoundingClientRect());
  return [
    Math.max(0, line.scrollWidth - line.clientWidth), Math.max(0, line.scrollHeight - line.clientHeight),
    buttons.every(b => b.top >= line.getBoundingClientRect().bottom - 1 && b.right <= view.right + 1),
    document.querySelector(".loha-monitor .loha-plot").clientHeight >= 100,
  ];
}"""


def test_all_of_the_line_is_seen_at_the_width_that_the_node_begins_with(page: Page, shoot):
    about = {"id": "a", "name": "portraits of anna", "step": 1200, "steps": 1200, "loss": 0.1234, "lr": 1e-3}
    held_out = {"validation": [[1100, 0.1133], [1200, 0.1235]], "began": 1.7e9}
    for state in ("running", "done"):
        run = about | held_out | {"state": state, "seconds_left": 4000, "previews": [], "losses": [0.1] * 1200}
        told = {"runs": [run | {"previous": []}]}
        page.route("**/loha/training*", lambda route, _, told=told: route.fulfill(json=told))
        add(page, "LoHaTrainer", 300, 120)
        expect(page.locator(".loha-monitor .loha-count")).to_contain_text("lowest 0.113 at step 1100")
        assert page.evaluate(CUT) == [0, 0, True, True]
        shoot(f"monitor-line-{state}")
        page.evaluate("app.graph.clear()")


RATE = """async events => {
  const start = performance.now();
  let frames = 0;
  for (; performance.now() - start < 1000; frames++) {
    if (events) app.api.dispatchCustomEvent("loha.training", {});
    await new Promise(requestAnimationFrame);
  }
  return frames / (performance.now() - start);
}"""


def test_ten_thousand_points_stay_fluent(page: Page, ready):
    """The server's answer is made up, to have so many at once; at each frame there is one more."""
    run = {"id": "a", "step": 0, "steps": 10_100, "loss": 0.1, "lr": 1e-3, "seconds_left": 60, "previews": []}
    losses = [0.1 + 0.05 * math.sin(i / 7) + 0.05 * math.cos(i * i) for i in range(10_000)]

    def answer(route: Route) -> None:
        known = int(re.search(r"since=(\d+)", route.request.url)[1])
        found = run | {"state": "running", "step": max(known + 1, 10_000), "losses": [0.1] if known else losses}
        route.fulfill(json={"runs": [found if known else found | {"previous": losses}]})

    page.route("**/loha/training*", answer)
    add(page, "LoHaTrainer", 300, 120)
    page.wait_for_function(f"({SHOWN})() >= 10000", timeout=120_000)
    before = page.evaluate(f"({SHOWN})()")
    # Beside what the page manages with nothing to draw, on a machine that may be busy.
    shares = []
    for _ in range(3):
        idle, drawing = (page.evaluate(RATE, events) for events in (False, True))
        shares.append(drawing / idle)
    assert page.evaluate(f"({SHOWN})()") > before + 10  # it was redrawn meanwhile
    assert max(shares) > 0.5, f"{max(shares):.0%} of the frames that the page manages without"
