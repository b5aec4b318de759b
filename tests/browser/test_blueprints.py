"""Subgraph blueprints: each is added from the node library, shows its widgets, and does what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from safetensors import safe_open

from demo import workflows
from demo.comfyui import REPOSITORY

from .conftest import OWN_WIDGETS_ON_SUBGRAPHS

FOLDER = REPOSITORY / "subgraphs"
FILES = {"first": workflows.LOHA, "second": workflows.OTHER}
# What each gets in place of its defaults, to be quick, and the output that is looked at.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "Compare two LoHas": (
        FILES | {"prompt": "a handwritten seven", "strength_2": 0.5, "steps": 2, "seed": 7},
        "image",
    ),
    "Merge two LoHas": (FILES | {"weight_2": -0.5, "rank": 4, "filename": "blueprint_merged"}, "image"),
}
# The values that they begin with; of the files, whichever is the first.
BEGIN = {
    "Compare two LoHas": ["", 1, "", 1, "", "", 0, 20, 7, "euler", "normal"],
    "Merge two LoHas": ["", 1, "", 1, "svd", 64, "merged"],
}

# What a user would connect it to, and a look at one of its outputs.
CONNECT = """([values, output]) => {
  const made = app.graph._nodes[0];
  const add = type => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    return node;
  };
  const checkpoint = add("CheckpointLoaderSimple");
  const latent = add("EmptyLatentImage");
  for (const side of ["width", "height"]) latent.widgets.find(w => w.name === side).value = 32;
  const outside = { model: [checkpoint, 0], clip: [checkpoint, 1], vae: [checkpoint, 2], latent: [latent, 0] };
  for (const [name, [node, slot]] of Object.entries(outside)) {
    const input = made.inputs.findIndex(i => i.name === name);
    if (input >= 0) node.connect(slot, made, input);
  }
  made.connect(made.outputs.findIndex(o => o.name === output), add("PreviewImage"), 0);
  for (const [name, value] of Object.entries(values)) made.widgets.find(w => w.name === name).value = value;
  return app.graphToPrompt().then(prompt => prompt.output);
}"""


def test_the_server_lists_them(ready):
    found = ready.get("/global_subgraphs").values()
    ours = {entry["name"] for entry in found if entry["info"]["node_pack"] == "custom_nodes.ComfyUI-LoHa"}
    assert ours == {path.stem for path in FOLDER.glob("*.json")} == RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_added_from_the_library_it_runs(page: Page, ready, name: str, shoot):
    page.keyboard.press("n")  # the node library
    page.locator(".sidebar-content-container input").first.fill(name)
    page.locator(".sidebar-content-container").get_by_role("treeitem").filter(has_text=name).last.click()
    if not page.evaluate(OWN_WIDGETS_ON_SUBGRAPHS):
        page.mouse.click(800, 300)  # these front ends leave the place to a second click
    page.wait_for_function("app.graph._nodes.length === 1")
    values, output = RUNS[name]
    [saved] = json.loads((FOLDER / f"{name}.json").read_text())["nodes"]
    widgets = [socket["name"] for socket in saved["inputs"] if "widget" in socket]
    first = ready.object_info("LoHaLoader")["input"]["required"]["lora_name"][1]["options"][0]
    begin = dict(zip(widgets, BEGIN[name], strict=True)) | dict.fromkeys(FILES, first)
    assert page.evaluate("app.graph._nodes[0].widgets.map(w => [w.name, w.value])") == [list(p) for p in begin.items()]
    if name.startswith("Compare"):  # two strengths, by the names that the blueprint gave them
        strengths = [widget for widget in widgets if widget.startswith("strength")]
        if page.evaluate(OWN_WIDGETS_ON_SUBGRAPHS):
            expect(page.locator(".loha-label:visible")).to_have_text(strengths)
        else:
            kinds = "app.graph._nodes[0].widgets.filter(w => w.type === 'number').map(w => w.label ?? w.name)"
            assert set(strengths) < set(page.evaluate(kinds))
    shoot(f"blueprint-{name.split()[0].lower()}")

    prompt = page.evaluate(CONNECT, [values, output])
    entry = ready.queue(prompt)
    inside = {node["class_type"]: node["inputs"] for node in prompt.values()}
    [shown] = [o["images"] for key, o in entry["outputs"].items() if prompt[key]["class_type"] == "PreviewImage"]
    picture = ready.images({"outputs": {"": {"images": shown}}})[0]
    if name.startswith("Compare"):
        assert [n["inputs"]["steps"] for n in prompt.values() if n["class_type"] == "KSampler"] == [2, 2, 2]
        thirds = [picture[:, start : start + 32].astype(int) for start in (0, 40, 80)]
        assert picture.shape[1] == 112
        assert all(abs(a - b).max() > 20 for a, b in zip(thirds, thirds[1:] + thirds[:1], strict=True))
        return
    assert picture.std() > 5
    assert inside["LoHaSave"]["filename"] == "blueprint_merged"
    [text] = [o["text"][0] for key, o in entry["outputs"].items() if prompt[key]["class_type"] == "LoHaSave"]
    file = ready.path("models", "loras", text.removeprefix("saved as "))
    with safe_open(file, "pt") as adapter:
        ranks = {adapter.get_slice(key).get_shape()[1] for key in adapter.keys() if key.endswith("w1_a")}
        file.unlink()
    assert ranks == {values["rank"]}
