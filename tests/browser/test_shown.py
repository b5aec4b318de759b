"""What a node shows is of its own inputs and its own run, not of what another node of its id has left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from playwright.sync_api import Page, Route, expect
from safetensors.torch import save_file

from demo import prepare
from demo.comfyui import Server

from .conftest import STEP
from .test_undo import undo
from .test_widgets import add

CONNECT = """([from, to]) => {
  const target = app.graph.getNodeById(to);
  app.graph.getNodeById(from).connect(0, target, target.inputs.findIndex(i => i.name === "model"));
}"""
CHOOSE = """([id, value]) => {
  const widget = app.graph.getNodeById(id).widgets[0];
  widget.value = value;
  widget.callback?.(value);
}"""


@pytest.fixture(scope="module")
def flux(ready: Server) -> str:
    """A checkpoint of which there is a header only: two double and seven single blocks."""
    layers = {"double_blocks": (2, "img_attn.qkv"), "single_blocks": (7, "linear1")}
    keys = [f"{part}.{n}.{layer}.weight" for part, (count, layer) in layers.items() for n in range(count)]
    tensors = {f"model.diffusion_model.{key}": torch.zeros(0) for key in [*keys, "vector_in.in_layer.weight"]}
    save_file(tensors, ready.path("models", "checkpoints", "shown_flux.safetensors"))
    ready.object_info("CheckpointLoaderSimple")
    return "shown_flux.safetensors"


def bars_of(server: Server, checkpoint: str) -> int:
    layout = server.get(f"/loha/layout?folder=checkpoints&name={checkpoint}")["layout"]
    return len(server.get(f"/loha/blocks?family={layout}")["values"])


def test_bars_are_those_of_the_connected_model_before_it_has_run(page: Page, ready: Server, flux: str, shoot):
    loader = add(page, "CheckpointLoaderSimple", 40, ckpt_name=prepare.CHECKPOINT)
    passed = add(page, "LoHaLoader", 420)
    node = add(page, "LoHaBlockStrength", 820)
    bars = page.locator(".loha-bar")
    expect(bars).to_have_count(7)  # BASE and the parts of any model
    page.evaluate(CONNECT, [loader, passed])
    page.evaluate(CONNECT, [passed, node])
    own = bars_of(ready, prepare.CHECKPOINT)
    expect(bars).to_have_count(own)
    page.evaluate(CHOOSE, [loader, flux])
    expect(bars).to_have_count(10)
    expect(page.locator(".loha-equaliser .loha-count")).to_have_text("Flux")
    shoot("blocks-before-a-run")
    page.evaluate(STEP)
    for _ in range(2):  # undo makes the nodes anew
        add(page, "Note", 60, 600)
        page.evaluate(STEP)
        undo(page)
        expect(page.locator(".loha-equaliser .loha-count")).to_have_text("Flux")
        expect(bars).to_have_count(10)


def test_bars_of_a_new_node_are_not_those_of_the_one_before(page: Page):
    node = add(page, "LoHaBlockStrength", family="Flux")
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function("id => app.nodeOutputs[id]?.layout?.[0] === 'Flux'", arg=node, timeout=120_000)
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    [block] = saved["nodes"]
    block["widgets_values"][[i["name"] for i in block["inputs"] if i.get("widget")].index("family")] = "auto"
    page.evaluate("workflow => app.loadGraphData(workflow)", saved)
    expect(page.locator(".loha-bar")).to_have_count(7)


# --- the monitor --------------------------------------------------------------------------------


class Told:
    """What the server answers the monitor, in place of a run that would take its time."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.preparing = ""

    def run(self, name: str, state: str, losses: list[float]) -> None:
        about = {
            "id": name,
            "name": name,
            "prompt": f"{name}-prompt",
            "began": 1.7e9,
            "step": len(losses),
            "steps": 9,
            "loss": losses[-1],
        }
        self.runs = [about | {"lr": 1e-3, "seconds_left": None, "previews": [], "state": state, "losses": losses}]

    def answer(self, route: Route) -> None:
        asked = parse_qs(urlsplit(route.request.url).query)
        runs = [run | {"previous": []} for run in self.runs]
        for run in runs:
            if [run["id"]] == asked.get("run"):
                run["losses"] = run["losses"][int(asked["since"][0]) :]
        route.fulfill(json={"runs": runs, "preparing": self.preparing})


@pytest.fixture
def told(page: Page) -> Iterator[Told]:
    told = Told()
    page.route("**/loha/training*", told.answer)
    yield told
    page.unroute("**/loha/training*")


def tell(page: Page, event: str, **detail: Any) -> None:
    page.evaluate("([event, detail]) => app.api.dispatchCustomEvent(event, detail)", [event, detail])


# The monitor lies below a trainer's many inputs.
@pytest.mark.parametrize(("kind", "top"), [("LoHaTrainer", -300), ("LoHaTrainFolder", 160)])
def test_the_run_before_says_so_and_a_new_one_is_prepared(page: Page, told: Told, shoot, kind: str, top: int):
    told.run("first", "done", [0.3, 0.2, 0.1])
    node = add(page, kind, y=top)
    view = page.locator(".loha-monitor")
    curve, cancel = view.get_by_role("img", name="Loss of"), view.get_by_role("button", name="Cancel")
    expect(view).to_contain_text("last run (first, ")
    expect(view).to_contain_text("3 of 9")
    expect(cancel).to_be_disabled()
    expect(curve).to_have_attribute("aria-label", "Loss of 3 steps; axis from 0 to 0.300")
    shoot("monitor-last-run")

    # Queued, and the model is being loaded: nothing of the run before passes for this one's.
    told.preparing = "prompt"
    tell(page, "execution_start", prompt_id="prompt")
    expect(view).to_contain_text("preparing…")
    expect(view).not_to_contain_text("3 of 9")
    expect(curve).to_have_attribute("aria-label", "Loss of 0 steps, 3 of the run before; axis from 0 to 0.300")
    expect(cancel).to_be_enabled()
    shoot("monitor-preparing")
    told.preparing = ""
    told.run("second", "running", [0.25])
    tell(page, "loha.training")
    expect(view).to_contain_text("1 of 9")
    expect(view).not_to_contain_text("last run")

    # Cancel means this job and no other, in the way that ComfyUI can.
    named: list[tuple[str, Any]] = []
    page.route("**/cancel", lambda route: (named.append((route.request.url, None)), route.fulfill(json={})))
    cancel.click()
    page.wait_for_timeout(500)
    assert [url.partition("/jobs/")[2] for url, _ in named] == ["second-prompt/cancel"]
    page.unroute("**/cancel")
    page.route("**/jobs/*/cancel", lambda route: route.fulfill(status=404))
    page.route("**/interrupt", lambda route: (named.append(("", route.request.post_data_json)), route.fulfill()))
    cancel.click()
    page.wait_for_timeout(500)
    assert named[1:] == [("", {"prompt_id": "second-prompt"})]
    page.unroute("**/jobs/*/cancel")
    page.unroute("**/interrupt")

    # A prompt that takes what this node gave before prepares nothing.
    told.run("second", "done", [0.25])
    told.preparing = "other"
    tell(page, "execution_start", prompt_id="other")
    expect(view).to_contain_text("preparing…")
    tell(page, "execution_cached", prompt_id="other", nodes=[str(node)])
    expect(view).to_contain_text("last run (second, ")


def test_what_a_widget_draws_is_not_shown_twice(page: Page):
    for place, kind in enumerate(["LoHaBlockStrength", "LoHaSchedule"]):
        add(page, kind, 300 + 500 * place)
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function("app.ui.lastQueueSize === 0", timeout=120_000)
    page.wait_for_timeout(500)
    assert page.evaluate("app.graph._nodes.map(n => n.imgs?.length ?? 0)") == [0, 0]
    assert page.locator("[data-node-id] img").count() == 0
