"""Real sampling in the real server: what the strength does, what it costs, and every example workflow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from demo import comfyui, workflows

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / "example_workflows").glob("*.json"))


@pytest.fixture
def draw(ready):
    """Pictures of the loader's example workflow with other values of its nodes' inputs, as (n, h, w, 3) integers."""
    workflow = workflows.filled(workflows.LOADER)
    prompt = comfyui.to_api(workflow, ready.object_info())
    [loader] = [key for key, node in prompt.items() if node["class_type"] == "LoHaLoader"]
    [sampler] = [key for key, node in prompt.items() if node["class_type"] == "KSampler"]

    def run(node: dict | None = None, sampler_inputs: dict | None = None, **inputs) -> np.ndarray:
        job = json.loads(json.dumps(prompt))
        job[sampler]["inputs"] |= {"steps": 4} | (sampler_inputs or {})
        job[loader]["inputs"] |= inputs
        if node is not None:
            kept = {name: job[loader]["inputs"][name] for name in ("model", "clip", "lora_name")}
            job[loader] = {**node, "inputs": kept | node["inputs"]}
            job = {key: n for key, n in job.items() if n["class_type"] != "PreviewAny"}
        return ready.images(ready.queue(job)).astype(int)

    return run


def native(strength_model: float, strength_clip: float) -> dict:
    return {
        "class_type": "LoraLoader",
        "inputs": {"strength_model": strength_model, "strength_clip": strength_clip},
    }


def test_strength_changes_the_picture_as_the_native_loader_does(draw):
    plain = draw(strength_model=0.0, strength_clip=0.0)
    assert np.abs(draw(native(0.0, 0.0)) - plain).max() == 0
    for strengths in ((0.7, 0.0), (-0.5, 0.4)):
        wanted = draw(native(*strengths))
        assert np.abs(wanted - plain).max() > 20
        for mode in ("merge", "live", "auto"):
            found = draw(mode=mode, strength_model=strengths[0], strength_clip=strengths[1])
            assert np.abs(found - wanted).max() <= 1, mode
    assert np.abs(draw(strength_model=0.0, strength_clip=0.0) - plain).max() == 0


def test_a_new_strength_loads_nothing(ready, draw):
    """What ComfyUI's log says of loading, between two prompts that differ in the strength alone."""

    def loads(mode: str, strength: float) -> list[str]:
        before = len(ready.log())
        draw(mode=mode, strength_model=strength, strength_clip=strength)
        return re.findall(r"Requested to load \S+|loaded completely.*|loaded partially.*", ready.log()[before:])

    loads("live", 0.31)
    assert not any("completely" in line or "partially" in line for line in loads("live", 0.32))
    assert not any("completely" in line or "partially" in line for line in loads("live", -0.33))
    loads("merge", 0.31)
    assert any("completely" in line for line in loads("merge", 0.32))  # the log does say it when it happens


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde", "uni_pc", "lcm"])
def test_every_sampler(draw, sampler):
    settings = {"sampler_name": sampler}
    merged = draw(sampler_inputs=settings, mode="merge", strength_model=0.6)
    alive = draw(sampler_inputs=settings, mode="live", strength_model=0.6)
    assert np.abs(merged - alive).max() <= 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_run(ready, path):
    prompt = comfyui.to_api(workflows.filled(path), ready.object_info())
    quick = {
        "KSampler": {"steps": 2},
        "LoHaTrainer": {"steps": 2, "batch_size": 2, "name": "example", "resume": False},
        "LoHaSave": {"filename": "example"},
    }
    for node in prompt.values():
        node["inputs"] |= quick.get(node["class_type"], {})
    entry = ready.queue(prompt)
    assert entry["status"]["status_str"] == "success"
    assert any(output.get("images") for output in entry["outputs"].values())


def test_every_node_is_in_an_example(ready):
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text())["nodes"]}
    ours = {name for name, info in ready.object_info().items() if info["category"].startswith("LoHa")}
    assert ours and ours <= used
