"""What a user sees: text and picture on LoHaInfo, and what failed, where ComfyUI says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page, expect
from safetensors.torch import save_file

from demo.comfyui import CACHE, Server

from .conftest import expect_error

SHOTS = CACHE / "screenshots"

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


@pytest.fixture
def adapter(server: Server) -> str:
    torch.manual_seed(0)
    tensors = {}
    for block in ("down_blocks_0", "mid_block", "up_blocks_1"):
        for layer in ("attentions_0_proj_in", "attentions_0_transformer_blocks_0_attn2_to_k", "resnets_0_conv1"):
            for name, shape in (("w1_a", (16, 4)), ("w1_b", (4, 24)), ("w2_a", (16, 4)), ("w2_b", (4, 24))):
                tensors[f"lora_unet_{block}_{layer}.hada_{name}"] = torch.randn(shape)
            tensors[f"lora_unet_{block}_{layer}.alpha"] = torch.tensor(2.0)
    markup = "<img src=x onerror=window.hacked=1>"
    save_file(tensors, server.path("models", "loras", "shown.safetensors"), {"modelspec.trigger_phrase": markup})
    (server.path("models", "loras", "broken.safetensors")).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    server.object_info("LoHaLoader")
    return "shown.safetensors"


def shoot(page: Page, name: str, request: pytest.FixtureRequest) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=Path(SHOTS, f"{name}-{request.node.callspec.id.replace(' ', '')}.png"))


def test_info_on_the_node(page: Page, adapter: str, request: pytest.FixtureRequest):
    page.evaluate(BUILD, adapter)
    text = page.locator("pre.loha-info")
    expect(text).to_contain_text("Run the workflow")
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
    shoot(page, "info", request)


def test_errors_reach_the_user(page: Page, adapter: str, request: pytest.FixtureRequest):
    page.evaluate(BUILD, "broken.safetensors")
    page.evaluate("app.queuePrompt(0)")
    expect_error(page, "not a safetensors file")
    expect(page.get_by_text("broken.safetensors").filter(visible=True).first).to_be_visible()
    shoot(page, "error", request)


def test_what_is_shown_is_not_saved(page: Page, adapter: str):
    """A workflow holds a value per input that has one, and nothing of the texts and curves."""
    counts = page.evaluate("""() => ["LoHaMerge", "LoHaTrainer", "LoHaSave", "LoHaNetwork"].map(type => {
      const node = LiteGraph.createNode(type);
      app.graph.add(node);
      return [node.serialize().widgets_values.length, node.inputs.filter(input => input.widget).length];
    })""")
    assert all(saved == inputs for saved, inputs in counts), counts
