"""The training monitor: a run's curve while it runs and after a reload, and Cancel."""

from __future__ import annotations

import json
import re
import time

from playwright.sync_api import Page, expect

from demo import comfyui, train_loha

from ..comfy.test_sampling import ready  # noqa: F401  (the demo's checkpoint and pictures)
from .test_nodes import shoot

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


def run_of(server: comfyui.Server, name: str) -> dict:
    return next((run for run in server.get("/loha/training")["runs"] if run["name"] == name), {"step": 0})


def test_curve_reload_and_cancel(page: Page, ready, request):  # noqa: F811
    name = "monitored" + request.node.callspec.id.replace(" ", "").replace(".", "")
    workflow = json.loads(train_loha.WORKFLOW.read_text())
    [trainer] = [node for node in workflow["nodes"] if node["type"] == "LoHaTrainer"]
    values = trainer["widgets_values"]
    values[0], values[1], values[3] = name, 400, 8
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.evaluate(LOOK)
    # Until it runs, the node shows its last run: here that of the renderer before.
    expect(page.locator(".loha-monitor")).to_contain_text(re.compile("Run the workflow|cancelled"))
    page.evaluate("app.queuePrompt(0)")
    expect(page.locator(".loha-monitor")).to_contain_text("left", timeout=90_000)
    page.wait_for_function(f"({SHOWN})() > 5", timeout=90_000)
    page.get_by_role("button", name="Log", exact=True).click()
    shoot(page, "monitor", request)

    page.reload()
    page.wait_for_function("!!(window.app?.graph && document.querySelector('.loha-monitor'))", timeout=60_000)
    there = run_of(ready, name)["step"]
    page.wait_for_function(f"({SHOWN})() >= {there}", timeout=30_000)
    page.evaluate(LOOK)
    shoot(page, "monitor-reloaded", request)

    # With a page's old connection ComfyUI may drop its new one, too; then the page hears nothing more. Here it does.
    page.evaluate(DEAFEN)
    cancel = page.locator(".loha-monitor").get_by_role("button", name="Cancel")
    cancel.focus()
    before = run_of(ready, name)
    assert before["state"] == "running"
    with page.expect_response("**/interrupt"):
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
