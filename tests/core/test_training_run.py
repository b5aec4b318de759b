"""`loha train` from a file to an adapter, on every family of diffusers pipelines that it knows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import accelerate
import diffusers

from loha_core import LoHaConfig, LoHaError, load_adapter
from loha_core.cli import main
from loha_core.formats.toml import read_toml
from loha_core.training.config import TrainingConfig
from loha_core.training.data.captions import Captions
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.data.pictures import Sizes
from loha_core.training.diffusers import run
from loha_core.training.diffusers.pipeline import Diffusion, Feed, noising
from loha_core.training.diffusers.preview import Previews
from loha_core.training.diffusers.settings import (
    DataSettings,
    ModelSettings,
    OutputSettings,
    PreviewSettings,
    RunSettings,
    read_settings,
)
from loha_core.training.objectives import Objective
from loha_core.training.optimizers import OptimizerConfig
from loha_core.training.randomness import generator

from ..reduced_families import PIPELINES
from . import pipelines
from .processes import PATIENCE, ended_well

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")

TABLES: dict[str, dict[str, Any]] = {
    "model": {"path": "model"},
    "data": {"folder": "pictures", "resolution": 32, "step": 4, "flip": True},
    "network": {"r": 2, "alpha": 2.0},
    "optimizer": {"lr": 0.01},
    "training": {"steps": 2, "batch_size": 2, "save_every": 0},
    "output": {"folder": "out", "name": "mine"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in pipelines.FAMILIES:
        pipelines.build(family).save_pretrained(folder / family)
    return folder


def project(root: Path, models: Path) -> Any:
    """Pictures in a folder, and what writes a configuration beside them and a model; None takes a key away."""
    shades = Image.linear_gradient("L")
    for number, size in enumerate(((40, 30), (32, 32), (30, 40), (32, 32))):
        folder = root / "pictures" / ("2_cats" if number < 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shades.rotate(90 * number).resize(size).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat, number {number}")

    def write(family: str = "sd15", **changes: dict[str, Any]) -> Path:
        if not (root / "model").exists():
            (root / "model").symlink_to(models / family)
        lines = []
        for name in TABLES | changes:
            lines.append(f"[{name}]")
            values = {key: v for key, v in (TABLES.get(name, {}) | changes.get(name, {})).items() if v is not None}
            lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        path = root / "config.toml"
        path.write_text("\n".join(lines), "utf-8")
        return path

    return write


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {json.dumps(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


@pytest.fixture
def write(tmp_path: Path, models: Path) -> Any:
    return project(tmp_path, models)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """The adapter of the configuration without changes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = run.train(project(tmp_path_factory.mktemp("plain"), models)())
    torch.set_num_threads(threads)
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t for n, f in load_adapter(path).layers.items() for k, t in f.tensors().items()}


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", pipelines.FAMILIES)
@pytest.mark.parametrize("text", [False, True])
def test_every_family_trains(write, family, text, tmp_path):
    path = run.train(write(family, training={"text_encoders": text}))
    assert path == tmp_path / "out" / "mine.safetensors"
    layers = load_adapter(path).layers
    networks = {name.split("_")[1] for name in layers}
    expected = {"sd15": {"te"}, "sdxl": {"te1", "te2"}, "sd3": {"te1", "te2", "te3"}, "flux": {"te1", "te2"}}[family]
    assert {name for name in networks if name.startswith("te")} == (expected if text else set())
    assert networks - expected == {"unet" if family in ("sd15", "sdxl") else "transformer"}
    if text and family == "sd15":
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in layers
    norms = {name: factors.norm() for name, factors in layers.items()}
    # What a family's last encoder layers give is not used by all; nearly all else has moved.
    assert sum(norm > 0 for norm in norms.values()) > 0.8 * len(norms)
    losses = (tmp_path / "out" / "loss.csv").read_text().splitlines()
    assert len(losses) == 3


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_the_loss_is_the_error_of_what_the_pipeline_would_sample_with(family):
    """At a known time: the model's own output against the target, put together here by hand."""
    pipe = pipelines.build(family)
    diffusion = Diffusion(pipe, torch.device("cpu"))
    latent = torch.randn(4, 16, 12, generator=generator("latent"))
    dataset = Dataset([Item(latent, "a cat")], encode=diffusion.encode)
    feed = Feed(diffusion, dataset, Objective(), 1, 7)
    batch = feed.batch(3)
    rng = generator(7, "draw", 3, 0)
    time = Objective().time(rng)
    noise = torch.randn(latent.shape, generator=rng)[None]
    clean = latent[None]
    if family in ("sd15", "sdxl"):
        step = torch.tensor([int(time * 1000)])
        noisy = pipe.scheduler.add_noise(clean, noise, step) if family == "sd15" else None
        scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        noisy = scheduler.add_noise(clean, noise, step)
        target = noise if family == "sd15" else scheduler.get_velocity(clean, noise, step)
        assert batch.timesteps.tolist() == step.tolist()
    else:
        noisy, target = (1 - time) * clean + time * noise, noise - clean
        assert batch.timesteps.item() == pytest.approx(1000 * time)
    torch.testing.assert_close(batch.noisy, noisy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.target, target, atol=1e-5, rtol=1e-5)
    given = {k: v for k, v in dataset.encode("a cat").items()} | {"size": torch.tensor([[32.0, 24, 0, 0, 32, 24]])}
    with torch.no_grad():
        output = diffusion.family.forward(diffusion.model, noisy, batch.timesteps, given)
        torch.testing.assert_close(feed.loss(batch), (output - target).square().mean(), atol=1e-5, rtol=1e-5)


def test_flux_tokens_are_the_pipeline_s():
    pipe = pipelines.build("flux")
    noisy = torch.randn(2, 4, 8, 12)
    seen = {}

    class Model:
        config = pipe.transformer.config

        def __call__(self, tokens: torch.Tensor, **rest: Any) -> Any:
            seen.update(rest, tokens=tokens)
            return type("Output", (), {"sample": tokens})

    diffusion = Diffusion(pipe, torch.device("cpu"))
    given = {"text": torch.zeros(2, 5, 32), "pooled": torch.zeros(2, 32)}
    assert torch.equal(diffusion.family.forward(Model(), noisy, torch.tensor([500.0, 250.0]), given), noisy)
    assert torch.equal(seen["tokens"], pipe._pack_latents(noisy, 2, 4, 8, 12))
    assert torch.equal(seen["img_ids"], pipe._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32))
    assert seen["timestep"].tolist() == [0.5, 0.25]


def test_it_learns(write, tmp_path):
    """One picture, one caption: at the same noise the loss falls."""
    for extra in (tmp_path / "pictures").rglob("[1-3].*"):
        extra.unlink()
    training = {"steps": 30, "batch_size": 4}
    path = write(data={"flip": False, "resolution": 16}, network={"r": 4}, optimizer={"lr": 0.02}, training=training)
    run.train(path)
    losses = [float(line.split(",")[1]) for line in (tmp_path / "out" / "loss.csv").read_text().splitlines()[1:]]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_the_same_file_gives_the_same_adapter_and_goes_on_where_it_was(write, tmp_path):
    config = {"optimizer": {"schedule": "constant"}, "network": {"rank_dropout": 0.2}}
    whole = run.train(write(**config, output={"folder": "whole"}))
    again = run.train(write(**config, output={"folder": "again"}))
    assert same(whole, again)
    run.train(write(**config, training={"steps": 1}, output={"folder": "parts"}))
    parts = run.train(write(**config, output={"folder": "parts"}))
    assert same(whole, parts)
    other = run.train(write(**config, training={"seed": 1}, output={"folder": "other"}))
    assert not same(whole, other)


def test_a_run_goes_on_only_with_what_it_began_with(write):
    run.train(write())
    with pytest.raises(LoHaError, match="a run with other settings: data"):
        run.train(write(data={"trigger": "sks"}))
    with pytest.raises(LoHaError, match="network"):
        run.train(write(network={"r": 3}))
    run.train(write(network={"r": 3}, output={"resume": False}))


def test_a_run_goes_on_only_with_the_model_it_began_with(write, tmp_path):
    """Another one at the same place; a finished run's adapter would come out for it."""
    pipe = pipelines.build("sd15")
    for folder in ("model", "other"):
        pipe.save_pretrained(tmp_path / folder)
        pipe.unet.conv_norm_out.weight.data.add_(0.1)
    run.train(write())
    (tmp_path / "model").rename(tmp_path / "away")
    (tmp_path / "other").rename(tmp_path / "model")
    with pytest.raises(LoHaError, match="a run with other settings: base model"):
        run.train(write())


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"flip": False}},
        {"data": {"resolution": 16}},
        {"data": {"aspect_buckets": False}},
        {"data": {"step": 16}},
        {"data": {"repeats": 2}},
        {"data": {"trigger": "sks"}},
        {"data": {"shuffle": True}},
        {"data": {"caption_dropout": 0.9}},
        {"data": {"tag_dropout": 0.9}},
        {"data": {"regularisation": "pictures/2_cats", "regularisation_weight": 0.1}},
        {"data": {"masks": "masks"}},
        {"network": {"target_modules": ["to_q"]}},
        {"network": {"use_dora": True}},
        {"network": {"init_weights": True}},
        {"optimizer": {"name": "adafactor"}},
        {"optimizer": {"warmup_steps": 2}},
        {"training": {"steps": None, "epochs": 1}},
        {"training": {"gradient_accumulation_steps": 2}},
        {"training": {"batch_size": 1}},
        {"training": {"timesteps": "logit-normal"}},
        {"training": {"loss_type": "huber"}},
        {"training": {"min_snr_gamma": 0.5}},
        {"training": {"noise_offset": 0.5}},
        {"training": {"mixed_precision": "bf16"}},
        {"training": {"ema_decay": 0.9}},
        {"training": {"timesteps": "heavy-tail"}},
        {"training": {"timesteps": "beta"}},
        {"training": {"min_timestep": 0.4}},
        {"training": {"max_timestep": 0.6}},
        {"training": {"resolution_shift": True}},
        {"data": {"masks": "masks"}, "training": {"masked_preservation": 1.0}},
        {"network": {"rank_pattern": {"to_q": 4}}},
        {"network": {"alpha_pattern": {"to_q": 4}}},
        {"optimizer": {"lr_pattern": {"to_q": 0.5}}},
        {"model": {"dtype": "bf16"}},
        {"model": {"component": "other"}},
        {"output": {"dtype": "bf16"}},
    ],
    ids=str,
)
def test_each_key_does_something(write, plain, changes, tmp_path):
    if changes.get("data", {}).get("masks"):
        for picture in (tmp_path / "pictures").rglob("*.png"):
            mask = Image.linear_gradient("L").resize(Image.open(picture).size)
            place = tmp_path / "masks" / picture.relative_to(tmp_path / "pictures")
            place.parent.mkdir(parents=True, exist_ok=True)
            mask.save(place)
    write()  # the model is there
    if "component" in changes.get("model", {}):
        torch.manual_seed(5)
        unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
        for parameter in unet.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        unet.save_pretrained(tmp_path / "other")
    assert not same(plain, run.train(write(**changes)))


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_previews_show_what_would_be_saved_and_leave_no_trace(write, family, tmp_path):
    """The pictures are the pipeline's own with the saved adapter, from one noise, and the run is the one without."""
    preview = {"prompts": ["a cat", "a dog"], "every": 1, "steps": 2, "cfg": 2.0, "seed": 3}
    training = {"ema_decay": 0.5, "save_every": 1}
    plain = run.train(write(family, training=training))
    shown = run.train(write(family, training=training, preview=preview, output={"folder": "shown"}))
    assert same(plain, shown)
    for file in ("state.safetensors", "loss.csv"):
        assert (plain.parent / file).read_bytes() == (shown.parent / file).read_bytes()
    pictures = {path.name: Image.open(path) for path in shown.parent.glob("*.png")}
    assert sorted(pictures) == [f"mine-00000{step}-{number}.png" for step in (1, 2) for number in (1, 2)]
    assert len({picture.tobytes() for picture in pictures.values()}) == 4


@pytest.mark.parametrize("family", [*pipelines.FAMILIES, *PIPELINES])
def test_every_family_shows_previews(family, tmp_path):
    diffusion = Diffusion(pipelines.build(family), torch.device("cpu"))
    layers = diffusion.networks(LoHaConfig(2, 2.0, init_weights=False), False)["model"].values()
    size = diffusion.latent(torch.rand(32, 32, 3)).shape[-2:]
    settings = PreviewSettings(["a cat", "a dog"], steps=2, cfg=3.0, seed=1)
    previews, before = Previews(diffusion, settings, size, tmp_path, "name"), torch.get_rng_state()
    scheduler = diffusion.pipe.scheduler
    with torch.no_grad():
        one, again = list(previews.pictures()), list(previews.pictures())
        for layer in layers:
            layer._disabled = True
        base = list(previews.pictures())
    assert [each.size for each in one] == [(32, 32)] * 2 and one[0].tobytes() != one[1].tobytes()
    assert [each.tobytes() for each in one] == [each.tobytes() for each in again]
    assert one[0].tobytes() != base[0].tobytes()
    assert torch.equal(torch.get_rng_state(), before) and diffusion.pipe.scheduler is scheduler


def test_a_preview_is_the_pipeline_s_picture_with_what_was_saved(write, tmp_path):
    from peft import PeftModel

    preview = {"prompts": "a dog", "every": 2, "steps": 2, "cfg": 2.0, "seed": 3}
    path = run.train(write(preview=preview, output={"format": "peft"}, training={"ema_decay": 0.5}))
    shown = Image.open(tmp_path / "out" / "mine-000002-1.png")
    pipe = pipelines.build("sd15")
    options = {"height": shown.height, "width": shown.width, "num_inference_steps": 2, "guidance_scale": 2.0}
    plain = pipe("a dog", **options, generator=torch.Generator().manual_seed(3)).images[0]
    pipe.unet = PeftModel.from_pretrained(pipe.unet, path / "unet").eval()
    tuned = pipe("a dog", **options, generator=torch.Generator().manual_seed(3)).images[0]
    assert plain.tobytes() != shown.tobytes()
    difference = [abs(a - b) for a, b in zip(tuned.tobytes(), shown.tobytes(), strict=True)]
    assert max(difference) <= 1


def test_tensorboard_has_the_curves(write, tmp_path):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    split = {"data": {"validation_share": 0.5}, "output": {"tensorboard": True}}
    run.train(write(**split, training={"steps": 3, "validate_every": 2}))
    run.train(write(**split, training={"steps": 5, "validate_every": 2}))
    found = board.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    found.Reload()
    rows = [line.split(",") for line in (tmp_path / "out" / "loss.csv").read_text().splitlines()[1:]]
    curves = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert curves.keys() == {"loss", "lr", "gradient norm", "validation loss"}
    assert curves["loss"] == [(int(step), pytest.approx(float(loss), rel=1e-6)) for step, loss, _ in rows]
    held_out = [(int(step), pytest.approx(float(loss), rel=1e-6)) for step, _, loss in rows if loss]
    assert curves["validation loss"] == held_out and len(held_out) == 2


def test_without_tensorboard_the_extra_is_named(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LoHaError, match=r"pip install 'comfyui-loha\[tensorboard\]'"):
        run.train(write(output={"tensorboard": True}))


def test_gradient_checkpointing_changes_nothing_but_memory(write, plain):
    checkpointed = run.train(write(training={"gradient_checkpointing": True}))
    one, other = tensors(plain), tensors(checkpointed)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_peft_folders_and_saves_on_the_way(write, tmp_path):
    """What peft itself reads from the folders acts as it did in training."""
    from peft import PeftModel

    path = run.train(write(training={"save_every": 1, "text_encoders": True}, output={"format": "peft"}))
    assert path == tmp_path / "out" / "mine"
    assert load_adapter(path).layers.keys() == load_adapter(tmp_path / "out" / "mine-000001").layers.keys()
    pipe = pipelines.build("sd15")
    for part, count in (("unet", 71), ("text_encoder", 18)):
        model = PeftModel.from_pretrained(getattr(pipe, part), path / part)
        found = {name: p for name, p in model.named_parameters() if "hada_w1_a" in name}
        assert len(found) == count
        mine = load_adapter(path / part).layers
        for name, factors in mine.items():
            assert torch.equal(found[f"base_model.model.{name}.hada_w1_a.default"], factors.w1_a)


# --- several processes --------------------------------------------------------------------------


def launched(program: str, cache: Path, kind: str = "--multi_gpu") -> subprocess.CompletedProcess[str]:
    # Without --multi_gpu there is one process, whatever the number; without a GPU they share the CPU.
    launch = f"accelerate.commands.launch {kind} --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, "-m", *launch.split(), *"--dynamo_backend no --main_process_port 0".split()]
    command += ["-m", *program.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, env=environment)


def test_two_processes_give_what_one_gives_and_go_on(write, tmp_path):
    def config(folder: str, size: int = 4, steps: int = 2) -> Path:
        # A larger rate would show AdamW's sign of gradients that are zero but for rounding.
        training = {"steps": steps, "batch_size": size}
        return write(training=training, optimizer={"lr": 0.001}, output={"folder": folder})

    alone, half = (tensors(run.train(config(f"alone{size}", size))) for size in (4, 2))
    for steps in (1, 2):
        found = launched(f"loha_core train {config('shared', steps=steps)}", tmp_path)
        assert ended_well(found), found.stderr[-3000:]
        assert found.stderr.count("saved ") == found.stderr.count("on 2 processes") == 1
    assert found.stderr.count("going on from step 1") == 1
    shared = tensors(tmp_path / "shared" / "mine.safetensors")
    assert alone.keys() == shared.keys()
    furthest = [max(float((a[name] - shared[name]).abs().max()) for name in shared) for a in (alone, half)]
    assert furthest[0] < 1e-4 < 1e-3 < furthest[1]  # 1.2e-5 and 5.9e-3 seen; AdamW makes much of rounding


FSDP = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_sharded_model_gives_what_a_whole_one_gives(write, tmp_path, family):
    """FSDP2: each process holds half of the frozen weights, and all of the factors."""

    def config(folder: str) -> Path:
        training = {"batch_size": 4, "gradient_checkpointing": True, "text_encoders": family == "sdxl"}
        return write(family, training=training, optimizer={"lr": 0.001}, output={"folder": folder})

    alone = tensors(run.train(config("alone")))
    found = launched(f"tests.core.sharded train {config('shared')}", tmp_path, FSDP)
    assert ended_well(found) and found.stderr.count("saved ") == 1, found.stderr[-3000:]
    shared = tensors(tmp_path / "shared" / "mine.safetensors")
    assert alone.keys() == shared.keys()
    assert max(float((alone[name] - shared[name]).abs().max()) for name in shared) < 1e-5
    held = re.search(r"holds (\d+) of (\d+) frozen numbers", found.stderr)
    assert held is not None
    assert int(held[1]) == pytest.approx(int(held[2]) / 2, rel=0.05)


def test_the_first_version_of_fsdp_is_refused(write, monkeypatch):
    # Accelerate makes it on a GPU only.
    first = SimpleNamespace(distributed_type=accelerate.DistributedType.FSDP, is_fsdp2=False, num_processes=2)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: first)
    with pytest.raises(LoHaError, match="launch with --fsdp_version 2"):
        run.train(write())


def test_a_batch_that_cannot_be_split(write, monkeypatch, capsys):
    two = SimpleNamespace(distributed_type=accelerate.DistributedType.MULTI_CPU, num_processes=2)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: two)
    assert main(["train", str(write(training={"batch_size": 3}))]) == 1
    assert "batch_size is 3, for all 2 processes together: make it a multiple of 2" in capsys.readouterr().err


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"resolutoin": 3}}, r"\[data\]: unknown key 'resolutoin'; did you mean resolution\?"),
        ({"training": {"step": 3}}, r"\[training\]: unknown key 'step'; did you mean steps"),
        ({"training": {"preview_every": 3}}, "unknown key 'preview_every'"),
        ({"preview": {"prompts": []}}, r"\[preview\]: prompts is empty"),
        ({"preview": {"prompts": "a cat", "every": 0}}, r"\[preview\]: every is 0"),
        ({"network": {"rank_pattern": {"attn9.to_q": 4}}}, r"\[network\]: rank_pattern: 'attn9.to_q' matches no layer"),
        ({"network": {"alpha_pattern": {"to_w": 4}}}, r"\[network\]: alpha_pattern: 'to_w' matches no layer"),
        ({"optimizer": {"lr_pattern": {"to_w": 4}}}, "lr_pattern: 'to_w' matches no layer"),
        ({"training": {"masked_preservation": 1.0}}, "no picture has a mask"),
        ({"network": {"rnak": 3}}, r"\[network\]: unknown key 'rnak'"),
        ({"network": {"r": 0}}, r"\[network\]: r is 0; expected a whole number from 1"),
        ({"training": {"steps": "many"}}, r"\[training\]: steps is 'many'; expected a whole number"),
        ({"training": {"steps": True}}, "expected a whole number"),
        ({"training": {"steps": 0}}, "steps is 0"),
        ({"training": {"batch_size": 0}}, "batch_size is 0; expected a whole number from 1"),
        ({"data": {"flip": 1}}, r"\[data\]: flip is 1; expected true or false"),
        ({"data": {"caption_dropout": 3}}, "caption_dropout is 3"),
        ({"data": {"folder": None}}, r"\[data\]: folder is missing"),
        ({"data": {"folder": "nowhere"}}, "nowhere: there is no such folder"),
        ({"data": {"step": 3}}, r"\[data\]: step is 3; for this model, use a multiple of 2"),
        ({"data": {"resolution": 2}}, "resolution of 2 is less than the step"),
        ({"optimizer": {"name": "adam"}}, "no optimizer 'adam'"),
        ({"optimizer": {"lr_text": "x"}}, r"\[optimizer\]"),
        ({"model": {"dtype": "int8"}}, r"\[model\]: dtype is 'int8'; expected one of fp32"),
        ({"model": {"path": "pictures"}}, "no diffusers folder"),
        ({"model": {"component": "pictures"}}, "diffusers cannot load it"),
        ({"output": {"name": "../x"}}, r"\[output\]: name is '../x'"),
        ({"output": {"format": "zip"}}, r"\[output\]: format is 'zip'"),
        ({"output": {"format": "peft"}, "network": {"use_dora": True}}, "cannot hold the DoRA"),
        ({"network": {"target_modules": ["to_w"]}}, "match nothing"),
        ({"optimizer": {"lr": 1e30}}, "Lower the learning rate"),
    ],
)
def test_mistakes_stop_early_with_a_sentence(write, changes, message, capsys):
    path = write(**changes)
    with pytest.raises(LoHaError, match=message):
        run.train(path)
    assert main(["train", str(path)]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("loha: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", r"config\.toml: cannot be read as TOML"),
        ("model = 3", "model is a value; expected a table"),
        ("[modle]", r"unknown table 'modle'; did you mean model\?"),
        ("[model]\npath = 'x'\n[data]\nfolder = 'y'", r"\[output\]: folder is missing"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(LoHaError, match=message):
        read_settings(tmp_path / "config.toml")
    with pytest.raises(LoHaError, match="nothing.toml: cannot be read"):
        read_settings(tmp_path / "nothing.toml")


def test_a_corrupt_picture_stops_before_the_model_is_loaded(write, tmp_path):
    (tmp_path / "pictures" / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(LoHaError, match=r"x\.jpg: cannot be read as a picture"):
        run.train(write(model={"path": "nowhere"}))


def test_what_cannot_be_trained_says_so(models):
    with pytest.raises(LoHaError, match="cannot be trained with; DDIMScheduler can"):
        noising(diffusers.KarrasVeScheduler())
    pipe = pipelines.build("sd15")
    pipe.unet = pipe.vae
    with pytest.raises(LoHaError, match="has a AutoencoderKL; expected a UNet2DConditionModel"):
        Diffusion(pipe, torch.device("cpu"))
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipelines.build("sd15").components, requires_safety_checker=False
    )
    with pytest.raises(LoHaError, match="Img2ImgPipeline cannot be trained; these can: StableDiffusionPipeline, "):
        Diffusion(other, torch.device("cpu"))


@pytest.mark.parametrize("missing", ["diffusers", "accelerate"])
def test_without_the_extra_it_is_named(write, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from loha_core.cli import main\n"
    code += f"sys.exit(main(['train', {str(write())!r}]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert found.returncode == 1 and f"needs {missing}: pip install 'comfyui-loha[train]'" in found.stderr


def test_ctrl_c_keeps_what_was_learnt(write, plain, monkeypatch, capsys, tmp_path):
    def interrupt(self: Any, event: Any) -> None:
        if event.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.OutputWriter, "_print_progress", interrupt)
    assert main(["train", str(write())]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", str(write())]) == 0
    assert same(plain, tmp_path / "out" / "mine.safetensors")


def test_the_example_has_every_key_with_its_default():
    path = ROOT / "examples" / "train.toml"
    tables = read_toml(path)
    settings = read_settings(path)
    kinds = {
        "model": [ModelSettings],
        "data": [DataSettings, Sizes, Captions],
        "optimizer": [OptimizerConfig],
        "training": [TrainingConfig, Objective, RunSettings],
        "output": [OutputSettings],
    }
    chosen = {"path", "folder", "resolution", "schedule", "preview_every", "lr_text", "options", "lr_pattern"}
    for table, classes in kinds.items():
        known = {each.name: each.default for kind in classes for each in fields(kind)}
        assert tables[table].keys() == known.keys() - {
            "preview_every",
            "lr_text",
            "options",
            "lr_pattern",
            "preservation",
        }
        assert all(tables[table][name] == known[name] for name in tables[table].keys() - chosen)
    assert settings.network == LoHaConfig(8, 8.0, init_weights="balanced") and settings.root == path.parent
