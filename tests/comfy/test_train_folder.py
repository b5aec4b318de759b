"""Train LoHa on a folder: what it makes of a folder, and the whole in a real server."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path

import folder_paths
import pytest
import torch
from PIL import Image

from demo import comfyui, digits, prepare, train_loha, workflows
from demo.comfyui import ComfyUIError
from loha_core import LoHaError, load_adapter

from . import training as t
from .test_training_nodes import watched

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def node(pack):
    return t.node("graph.train_folder")


def pictures(node, *sizes):
    """Sources of these heights and widths."""
    return [node.Source(torch.rand(*size, 3), f"{number}") for number, size in enumerate(sizes)]


# --- what it chooses ------------------------------------------------------------------------------


def test_sizes_are_the_models_or_the_pictures_own(node):
    large, batch = node.chosen_sizes(pictures(node, (1200, 900), (32, 32)), 512, 8)
    assert (large.resolution, large.step, batch) == (512, 64, 1) and large.of(1000, 1000) == (512, 512)
    small, batch = node.chosen_sizes(pictures(node, *[(64, 48)] * 40), 512, 8)
    assert small.of(64, 48) == (64, 48) and batch == 16  # as they are, and several at once
    assert node.chosen_sizes(pictures(node, (500, 500), (400, 300)), 512, 8)[1] == 1
    with pytest.raises(LoHaError, match="1: a picture of 4×64 pixels is smaller than 8×8"):
        node.chosen_sizes(pictures(node, (64, 64), (64, 4)), 512, 8)


def test_the_side_is_that_of_the_kind_of_model(node):
    assert {family: node.native_side(t.models(family).model) for family in ("sd15", "sdxl", "flux")} == {
        "sd15": 512,
        "sdxl": 1024,
        "flux": 1024,
    }


@pytest.fixture
def inside(node, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input" / "cats").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "input" / "link").symlink_to(tmp_path / "secret")
    Image.new("RGB", (8, 8)).save(tmp_path / "input" / "cats" / "a.png")
    return tmp_path / "input"


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc", "link", "cats/../../secret", "a\0b", "gone"])
def test_folders_lie_in_the_input_folder(node, inside, name):
    assert node.input_folder("cats") == inside / "cats"
    with pytest.raises(LoHaError, match="folder is .* input folder"):
        node.input_folder(name)


def test_a_picture_or_caption_that_changes_is_noticed(node, inside):
    seen = [node.LoHaTrainFolder.fingerprint_inputs(folder="cats", steps=1)]
    (inside / "cats" / "a.txt").write_text("a cat")
    seen.append(node.LoHaTrainFolder.fingerprint_inputs(folder="cats", steps=1))
    (inside / "cats" / "10_more").mkdir()
    Image.new("RGB", (8, 8)).save(inside / "cats" / "10_more" / "b.png")
    seen.append(node.LoHaTrainFolder.fingerprint_inputs(folder="cats", steps=2))
    assert len(set(seen)) == 3


# --- the real server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow(server):
    """The example in API format, on few pictures: the node's inputs to change -> the whole."""
    prepare.write_files(server)
    folder = server.path("input", train_loha.folder(digits.TARGET), "")
    for path in sorted(folder.iterdir())[8:]:
        path.unlink()
    prompt = comfyui.to_api(workflows.filled(workflows.TRAIN_FOLDER), server.object_info())

    def make(**inputs):
        job = json.loads(json.dumps(prompt))
        for part in job.values():
            part["inputs"] |= inputs if part["class_type"] == "LoHaTrainFolder" else {}
            if part["class_type"] == "KSampler":
                part["inputs"]["steps"] = 2
        return job

    return make


def test_tooltips_and_help(server):
    description = server.object_info("LoHaTrainFolder")
    text = (REPOSITORY / "web" / "docs" / "LoHaTrainFolder.md").read_text()
    inputs = description["input"]["required"]
    assert len(inputs) == 10 and not description["input"].get("optional")
    assert all(spec[1].get("tooltip") and f"**{name}**" in text for name, spec in inputs.items())
    assert all(description["output_tooltips"])
    assert server.get_bytes("/extensions/ComfyUI-LoHa/docs/LoHaTrainFolder.md").startswith(b"# ")


def test_it_trains_shows_and_saves(server, workflow):
    job = workflow(steps=4, name="on_a_folder", rank=2)
    prompt_id, how, events = asyncio.run(watched(server, job))
    assert how == "execution_success", server.log()[-2000:]
    while not (entry := server.get(f"/history/{prompt_id}").get(prompt_id)):  # written after the event
        time.sleep(0.05)
    assert ["saved as on_a_folder.safetensors"] in [output.get("text") for output in entry["outputs"].values()]
    assert events[-1][1]["state"] == "done"
    assert events[-1][1]["previews"] == [[step, [f"preview_{step:06d}.png"]] for step in (1, 2, 3, 4)]
    assert {data["node"] for _, data in events} == {"2"}  # the page's own node: its monitor finds the run
    saved = load_adapter(server.path("models", "loras", "on_a_folder.safetensors"))
    assert set(saved.ranks) == {2} and saved.metadata["modelspec.trigger_phrase"] == "a handwritten seven"
    assert saved.metadata["ss_num_train_images"] == "4"


def test_the_full_set_makes_the_same_of_the_same(server, workflow):
    """Of one picture, since ComfyUI's node and ours list a folder in another order."""
    source = server.path("input", train_loha.folder(digits.TARGET), "0000.png")
    for path in (source, source.with_suffix(".txt")):
        shutil.copy(path, server.path("input", "one_picture", path.name))
    server.object_info("LoadImageTextDataSetFromFolder")
    server.queue(workflow(steps=3, name="by_one_node", rank=2, folder="one_picture"))
    full = comfyui.to_api(workflows.filled(workflows.TRAIN), server.object_info())
    run = {"name": "by_parts", "steps": 3, "batch_size": 1, "gradient_checkpointing": True}
    changes = {
        "LoadImageTextDataSetFromFolder": {"folder": "one_picture"},
        "LoHaDataset": {"resolution": 0, "repeats": 1, "trigger_word": "a handwritten seven"},
        "LoHaNetwork": {"rank": 2, "alpha": 2.0, "conv_rank": 2, "conv_alpha": 2.0},
        "LoHaOptimizer": {"warmup_steps": 0},
        "LoHaTrainer": run,
        "LoHaSave": {"filename": "by_parts"},
        "KSampler": {"steps": 2},
    }
    for part in full.values():
        part["inputs"] |= changes.get(part["class_type"], {})
        for name in ("reg_images", "reg_texts"):
            part["inputs"].pop(name, None)
    server.queue(full)
    one, other = (load_adapter(server.path("models", "loras", f"{n}.safetensors")) for n in ("by_one_node", "by_parts"))
    assert t.same(one, other)


def test_cancel_keeps_the_state_and_the_next_run_goes_on(server, workflow):
    _, how, events = asyncio.run(watched(server, workflow(steps=12, name="cancelled_folder"), at_step=2))
    assert how == "execution_interrupted"
    last = events[-1][1]
    assert last["state"] == "cancelled" and last["step"] < 12
    assert not server.path("models", "loras", "cancelled_folder.safetensors").exists()
    _, how, events = asyncio.run(watched(server, workflow(steps=12, name="cancelled_folder")))
    assert how == "execution_success"
    assert events[0][1]["step"] > last["step"] and events[-1][1]["step"] == 12
    assert server.path("models", "loras", "cancelled_folder.safetensors").exists()


def test_what_is_wrong_is_said(server, workflow):
    wrong = {
        "name is '../out'": {"name": "../out"},
        "steps": {"steps": 0},
        "folder": {"folder": "../models"},
        "learning_rate": {"learning_rate": -1.0},
        "training_seed": {"training_seed": -1},
    }
    for message, inputs in wrong.items():
        with pytest.raises(ComfyUIError, match=message):
            server.queue(workflow(**inputs))
    for name in ("model", "clip", "vae"):
        job = workflow()
        [node] = [node for node in job.values() if node["class_type"] == "LoHaTrainFolder"]
        del node["inputs"][name]
        with pytest.raises(ComfyUIError, match=f"Required input is missing.*{name}"):
            server.queue(job)
    empty = server.path("input", "empty_folder", "x").parent
    (empty / "notes.txt").write_text("nothing to see")
    with pytest.raises(ComfyUIError, match="there is no picture in it"):
        server.queue(workflow(folder="empty_folder"))
    (empty / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ComfyUIError, match=r"broken\.png: cannot be read as a picture"):
        server.queue(workflow(folder="empty_folder"))
    shutil.rmtree(empty)
