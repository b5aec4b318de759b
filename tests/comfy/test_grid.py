"""Grids: a batch with a strength for each picture is as many single runs, and the picture that shows them."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from types import ModuleType
from typing import Any
from urllib.parse import urlencode

import comfy.sample
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image

from demo import comfyui, workflows
from loha_core import LoHaError, load_adapter, save_adapter

from . import reduced

STRENGTHS = "-5, 0…10 x 6, 15"


@pytest.fixture(scope="module")
def grid(pack: ModuleType) -> ModuleType:
    return sys.modules[f"{pack.__name__}.nodes.graph.grid"]


@pytest.fixture(scope="module")
def axes(pack: ModuleType) -> ModuleType:
    return sys.modules[f"{pack.__name__}.nodes.graph.axes"]


@pytest.fixture(scope="module")
def models() -> reduced.Models:
    return reduced.build("sd15", narrow=True)


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory) -> list[Any]:
    """Two, on all layers; kept small, for a diffusion model that runs away says nothing."""
    found = []
    for rank, dialect in ((2, "kohya"), (3, "kohya-ldm")):
        path, _ = reduced.write(models, dialect, tmp_path_factory.mktemp("adapters"), rank)
        adapter = load_adapter(path)
        adapter.source = f"rank {rank}"
        found.append(adapter)
    return found


def conditioning(models: reduced.Models, seed: int) -> Any:
    width = models.model.model.model_config.unet_config["context_dim"]
    return [[torch.randn(1, 77, width, generator=torch.Generator().manual_seed(seed)), {}]]


def sampled(models: reduced.Models, model: Any, latent: dict[str, Any], sampler: str = "euler") -> torch.Tensor:
    """As KSampler does."""
    noise = comfy.sample.prepare_noise(latent["samples"], 7, latent.get("batch_index"))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 3, 2.0, sampler, "normal", conditioning(models, 1), conditioning(models, 2),
            latent["samples"], noise_mask=latent.get("noise_mask"), disable_pbar=True, seed=7,
        )  # fmt: skip


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def empty(count: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(count, 4, 8, 8)}


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde", "ddpm"])
def test_a_batch_of_eight_strengths_is_eight_single_runs(grid, modes, models, adapters, sampler):
    planned = {"model": models.model, "latent": empty(), "loha_1": adapters[0], "strengths": STRENGTHS}
    [model], [latent], plan, report = grid.LoHaGrid.execute(**planned).result
    assert plan.columns == ["-5", "0", "2", "4", "6", "8", "10", "15"] and plan.rows == [()]
    assert plan.title == "rank 2" and "1 rows of 8 pictures, sampled by 8" in report
    found = sampled(models, model, latent, sampler)
    for picture, strength in zip(found, map(float, plan.columns), strict=True):
        single, _, _ = modes.apply(models.model, None, adapters[0], strength, 0.0, mode="live")
        assert error(picture, sampled(models, single, empty(), sampler)[0]) < 1e-5
    assert error(found[0], found[7]) > 0.02


def test_rows_are_adapters_with_blocks_for_each_picture_of_the_latent(grid, modes, models, adapters):
    blocks = sys.modules["loha_core.blocks"].BlockStrength.parse(None, "OUT=0.5")
    latent = empty(2) | {"batch_index": [4, 1], "noise_mask": torch.rand(2, 1, 8, 8)}
    outputs = grid.LoHaGrid.execute(
        models.model, latent, "0.3; 10", block_settings="no middle: MID=0\nINALL", at_once=5,
        loha_1=adapters[0], loha_2=adapters[1], blocks_1=blocks,
    )  # fmt: skip
    chosen, latents, plan, _ = outputs.result
    assert [len(each["samples"]) for each in latents] == [5, 5, 5, 5, 4]
    assert (plan.row_axis, plan.title, len(plan.rows), plan.count) == ("adapter, blocks, picture", "", 12, 24)
    assert plan.rows[0] == ("rank 2", "no middle", "picture 1") and plan.rows[11] == ("rank 3", "blocks 1", "picture 2")
    found = torch.cat([sampled(models, *each, "euler_ancestral") for each in zip(chosen, latents, strict=True)])
    settings = ["MID=0", "ALL=0, BASE=1, IN=1", "OUT=0.5"]
    for row in (0, 3, 5, 7, 10):
        strength = type(blocks).parse(None, settings[row // 2 % 3])
        single, _, _ = modes.apply(models.model, None, adapters[row // 6], 10.0, 0.0, mode="live", blocks=strength)
        wanted = sampled(models, single, latent, "euler_ancestral")
        assert error(found[2 * row + 1], wanted[row % 2]) < 1e-5, row


def test_every_slot_is_a_row(grid, models, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    save_adapter(adapters[0], tmp_path / "loha" / "mine" / "step_000002.safetensors")
    of_blocks = [sys.modules["loha_core.blocks"].BlockStrength.parse(None, f"OUT=0.{n}") for n in (1, 2, 3)]
    slots = {f"loha_{n}": adapters[n % 2] for n in range(1, 7)}
    assert list(slots) == ["loha_1", "loha_2", "loha_3", "loha_4", "loha_5", "loha_6"]
    blocks = dict(zip(("blocks_1", "blocks_2", "blocks_3"), of_blocks, strict=True))
    *_, plan, _ = grid.LoHaGrid.execute(models.model, empty(), "1", run="mine", **slots, **blocks).result
    assert len(plan.rows) == 7 * 3 and plan.rows[-1] == ("step 2", "blocks 3")
    assert plan.rows[0] == ("rank 3 (1)", "blocks 1") and plan.rows[16] == ("rank 2 (3)", "blocks 2")
    shown = grid.LoHaGridImage.execute(images=[torch.rand(len(plan.rows), 8, 8, 3)], plan=[plan], size=[32])
    assert shown.args[0].shape[1] > len(plan.rows) * 32
    with pytest.raises(LoHaError, match="2 plans are connected"):
        grid.LoHaGridImage.execute(images=[], plan=[plan, plan], size=[0])


def test_one_at_once_may_be_merged(grid, models, adapters):
    planned = {"model": models.model, "latent": empty(), "loha_1": adapters[0], "strengths": "5, 10"}
    [whole], [latent], *_ = grid.LoHaGrid.execute(**planned).result
    models_, latents, *_ = grid.LoHaGrid.execute(**planned, at_once=1).result
    found = torch.cat([sampled(models, *each) for each in zip(models_, latents, strict=True)])
    assert error(found, sampled(models, whole, latent)) < 1e-5


def test_memory_says_how_many_are_sampled_at_once(grid, models, adapters, monkeypatch):
    import comfy.model_management

    need = models.model.memory_required([2, 4, 8, 8])
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [])
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda device: models.model.model_size() + 3.9 * need
    )
    planned = {"model": models.model, "latent": empty(), "loha_1": adapters[0], "strengths": STRENGTHS}
    _, latents, *_ = grid.LoHaGrid.execute(**planned).result
    assert [len(each["samples"]) for each in latents] == [3, 3, 2]


def test_rows_of_a_training_run_are_its_saved_steps(axes, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(LoHaError, match="run is 'seven', and output/loha has no such folder; there is none yet"):
        axes.saved_steps("seven")
    folder = tmp_path / "loha" / "seven"
    (folder / "state").mkdir(parents=True)
    with pytest.raises(LoHaError, match="has saved no adapter yet"):
        axes.saved_steps("seven")
    for name in ("step_000100", "step_000020", "seven"):
        save_adapter(adapters[0], folder / f"{name}.safetensors")
    found = axes.adapters([], "", " seven ")
    assert [label for label, _ in found] == ["step 20", "step 100", "end"]
    assert found[1][1].source == "seven, step 100" and found[1][1].layers.keys() == adapters[0].layers.keys()
    before = axes.fingerprint("", "seven")
    save_adapter(adapters[1], folder / "step_000200.safetensors")
    assert axes.fingerprint("", "seven") != before
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "loha" / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("../elsewhere", "link", "..", ".", "a\0b", "eight"):
        with pytest.raises(LoHaError, match="there are link, seven"):
            axes.saved_steps(name)
    (folder / "step_000300.safetensors").symlink_to(tmp_path / "x")
    with pytest.raises(LoHaError, match="a saved step is a link"):
        axes.saved_steps("seven")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0, 0.5,1", [0, 0.5, 1]),
        ("-1…1 x 5", [-1, -0.5, 0, 0.5, 1]),
        ("-1..1 × 3; 2", [-1, 0, 1, 2]),
        ("0 to 0.3*4\n−2", [0, 0.1, 0.2, 0.3, -2]),
    ],
)
def test_strengths_are_numbers_or_ranges(axes, text, values):
    assert axes.strengths(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "strengths has 0 numbers; write 1 to 100, such as 0, 0.5, 1 or -1…1 x 8"),
        ("strong", "cannot read 'strong'; write numbers or a range, such as 0, 0.5, 1 or -1…1 x 8"),
        ("0…1", "cannot read '0…1'"),
        ("0…1 x 1", "asks for 1; expected 2 to 100"),
        ("0…1 x 99999999999999999999", "expected 2 to 100"),
        ("nan", "strengths is nan; expected a finite number"),
        ("0…1e999 x 3", "strengths is inf; expected a finite number"),
        ("0…1 x 100, 7", "strengths has 101 numbers"),
    ],
)
def test_strengths_that_cannot_be_understood(axes, text, message):
    with pytest.raises(LoHaError) as raised:
        axes.strengths(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "there is no adapter to try: connect loha_1, or name files or a run"),
        ({"files": "gone.safetensors"}, "no such adapter in ComfyUI's loras folders"),
        ({"loha_1": 0, "block_settings": "SOME"}, "block_settings, line 'SOME'"),
        ({"loha_1": 0, "strengths": "0…1 x 100", "latent": 20}, "100 strengths × 1 adapters × 1 block settings × 20"),
    ],
)
def test_plans_that_make_no_sense(grid, models, adapters, inputs, message):
    planned = {"model": models.model, "latent": 1, "strengths": "1"} | inputs
    planned |= {name: adapters[value] for name, value in planned.items() if name == "loha_1"}
    with pytest.raises(LoHaError) as raised:
        grid.LoHaGrid.execute(**planned | {"latent": empty(planned["latent"])})
    assert message in str(raised.value)


def test_the_picture_has_every_picture_in_its_place(grid):
    from_plan = grid.GridPlan("style", "strength", ["0", "1"], "adapter", [("first",), ("second",), ("third",)])
    colours = [torch.tensor([r, g, 0.5]).expand(16, 24, 3) for r in (0.0, 0.5, 1.0) for g in (0.25, 0.75)]
    batches = [torch.stack(colours[:4]), torch.stack(colours[4:])]
    image = grid.draw(from_plan, [picture for batch in batches for picture in batch], 48)
    assert image.dtype == torch.float32 and image.shape[-1] == 3
    places = []
    for colour in colours:
        rows, columns = ((image[0] - colour[0, 0]).abs().amax(-1) < 0.01).nonzero().unbind(1)
        assert len(rows) == 48 * 32
        places.append((int(rows.min()), int(columns.min())))
    top, left = places[0]
    assert places == [(top + 38 * row, left + 54 * column) for row in range(3) for column in range(2)]
    frames = [picture * 0 for picture in colours for _ in range(3)]
    frames[1::3] = colours
    assert torch.equal(grid.draw(from_plan, frames, 48), image)
    with pytest.raises(LoHaError, match="5 pictures for a grid of 3×2 = 6"):
        grid.draw(from_plan, colours[:5], 48)
    with pytest.raises(LoHaError, match="the grid would be .* set size to a smaller one than 16000"):
        grid.draw(from_plan, colours, 16000)


def test_the_picture_carries_the_workflow_with_its_seed_and_prompt(ready: comfyui.Server):
    """In a real server, by any sampler node, in chunks."""
    workflow = workflows.filled(workflows.GRID)
    prompt = comfyui.to_api(workflow, ready.object_info())
    by_class = {node["class_type"]: key for key, node in prompt.items()}
    prompt[by_class["KSampler"]]["inputs"] |= {"steps": 2, "seed": 41}
    prompt[by_class["LoHaGrid"]]["inputs"] |= {"at_once": 7, "strengths": "0, 1, 0", "files": "second.safetensors"}
    prompt["report"] = {"class_type": "PreviewAny", "inputs": {"source": [by_class["LoHaGrid"], 3]}}
    outputs = ready.queue(prompt)["outputs"]
    assert "8 rows of 3 pictures, sampled by 7 + 7 + 7 + 3" in outputs["report"]["text"][0]
    for key in (by_class["LoHaGridImage"], by_class["SaveImage"]):
        [shown] = outputs[key]["images"]
        picture = Image.open(BytesIO(ready.get_bytes("/view?" + urlencode(shown))))
        carried = json.loads(picture.info["prompt"])
        assert carried[by_class["KSampler"]]["inputs"]["seed"] == 41
        assert any(node["inputs"].get("text") == "a handwritten seven" for node in carried.values())
    tiles = np.asarray(picture.convert("RGB")).astype(int)
    top, left = tiles.shape[0] - 14 - 8 * 102 + 6, tiles.shape[1] - 14 - 3 * 102 + 6
    row = [tiles[top : top + 96, left + 102 * column :][:, :96] for column in range(3)]
    assert np.abs(row[0] - row[2]).max() <= 1 and np.abs(row[0] - row[1]).max() > 20
