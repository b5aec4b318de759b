"""`python -m loha_core inspect`: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loha_core import Adapter, describe, load_adapter
from loha_core.cli import main

from . import samples
from .processes import PATIENCE

ROOT = Path(__file__).parents[2]
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loha_core", *map(str, arguments)],
        capture_output=True,
        cwd=ROOT,
        encoding="utf-8",
        env=os.environ | environment,
        timeout=PATIENCE,
    )


def test_a_good_file_in_a_process_of_its_own(tmp_path):
    metadata = {"ss_tag_frequency": json.dumps({"5_x": {"cat 猫": 4, "dog": 9}})}
    path = samples.write(tmp_path / "猫.safetensors", samples.DIALECTS["kohya SD1.5"][1], metadata)
    found = run("inspect", path, PYTHONIOENCODING="utf-8")
    assert found.returncode == 0 and not found.stderr
    assert "dialect       lycoris" in found.stdout and "base model    SD 1.x" in found.stdout
    assert "LoHa layers   4 (" in found.stdout and "trigger words dog, cat 猫" in found.stdout
    assert "rank          2 ×4" in found.stdout and "alpha         1 ×4" in found.stdout


def test_a_terminal_that_cannot_show_every_letter(tmp_path):
    metadata = {"ss_tag_frequency": json.dumps({"5_x": {"猫": 4}})}
    path = samples.write(tmp_path / "a.safetensors", samples.module(KEY, (6, 768)), metadata)
    found = run("inspect", path, PYTHONIOENCODING="ascii")
    assert found.returncode == 0 and "trigger words" in found.stdout and "Traceback" not in found.stderr


def test_a_bad_file_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"<html>" * 9)
    found = run("inspect", path)
    assert found.returncode == 1 and not found.stdout
    assert found.stderr.startswith(f"loha: {path}: ") and found.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["destroy", "x"], ["inspect", "x", "--unknown"]], ids=str)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: loha" in capsys.readouterr().err


def test_main_returns_its_status(tmp_path, capsys):
    path = samples.write(tmp_path / "a.safetensors", samples.module(KEY, (6, 768)))
    assert main(["inspect", str(path)]) == 0 and str(path) in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 1 and str(tmp_path) in capsys.readouterr().err


def test_legacy_tucker_is_an_option(tmp_path, capsys):
    path = samples.write(tmp_path / "a.safetensors", samples.module("lora_unet_a", (6, 4, 3, 3), tucker=True))
    assert main(["inspect", "--legacy-tucker", str(path)]) == 0 and "Tucker        1 layers" in capsys.readouterr().out


def test_a_peft_folder(tmp_path, capsys):
    assert main(["inspect", str(samples.write_peft(tmp_path / "style", samples.WRAPPED))]) == 0
    assert "dialect       peft" in capsys.readouterr().out


def line(text: str, label: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(label))
    return found.removeprefix(label).strip()


MODELS = {
    "SD 1.x": ({KEY: (6, 768)}, {}),
    "SD 2.x": ({KEY: (6, 1024)}, {}),
    "SDXL": ({"diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_v": (6, 2048)}, {}),
    "SDXL refiner": ({KEY: (6, 1280)}, {}),
    "cross-attention of width 99": ({KEY: (6, 99)}, {}),
    "Flux": (
        {"diffusion_model.double_blocks.18.img_mod.lin": (6, 4), "diffusion_model.single_blocks.37.linear1": (6, 4)},
        {},
    ),
    "SD3": ({"lora_unet_joint_blocks_0_x_block_mlp_fc1": (6, 4)}, {}),
    "a text encoder (CLIP)": ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj": (6, 4)}, {}),
    "unknown": ({"lora_unet_a": (6, 4)}, {}),
    "sdxl_base_v1-0": ({KEY: (6, 768)}, {"ss_base_model_version": "sdxl_base_v1-0"}),
    "flux-1-dev/lora": ({KEY: (6, 768)}, {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "x"}),
}


@pytest.mark.parametrize(("model", "file"), MODELS.items(), ids=MODELS)
def test_the_likely_base_model(model, file):
    layers, metadata = file
    adapter = Adapter({name: samples.factors(shape) for name, shape in layers.items()}, metadata=metadata)
    assert line(describe(adapter), "base model") == model.strip()


WORDS = {
    "counted over folders": ({"1_a": {"cat": 2, " dog ": 3}, "2_b": {"cat": 2}}, "cat, dog"),
    "a list": (["cat"], None),
    "a word": ("cat", None),
    "null": (None, None),
    "null below": ({"a": None}, None),
    "counts that are no numbers": ({"a": {"cat": "many"}}, None),
    "a count beyond any": ({"a": {"cat": float("inf")}}, None),
    "a count that is none": ({"a": {"cat": float("nan")}}, None),
    "counts that are lists": ({"a": {"cat": [1]}}, None),
}


@pytest.mark.parametrize(("tags", "words"), WORDS.values(), ids=WORDS)
def test_trigger_words_from_the_captions(tags, words):
    adapter = Adapter({KEY: samples.factors((6, 768))}, metadata={"ss_tag_frequency": json.dumps(tags)})
    text = describe(adapter)
    assert ("trigger words" in text) == (words is not None)
    assert words is None or line(text, "trigger words") == words


@pytest.mark.parametrize("tags", ["{", "[" * 100_000, "", '{"a": {"x": 1' + "0" * 5000 + "}}"], ids=len)
def test_captions_that_are_no_json(tags):
    assert "trigger" not in describe(Adapter({KEY: samples.factors((6, 768))}, metadata={"ss_tag_frequency": tags}))


def test_the_trainers_own_trigger_phrase_comes_first():
    metadata = {"modelspec.trigger_phrase": "sks, a cat", "ss_tag_frequency": '{"a": {"dog": 1}}'}
    assert line(describe(Adapter({KEY: samples.factors((6, 768))}, metadata=metadata)), "trigger words") == "sks, a cat"


good = samples.factors((6, 768))
SUSPICIOUS = {
    "untrained": (replace(good, w2_a=torch.zeros(6, 2)), "all zero"),
    "untrained core": (replace(samples.factors((6, 8, 3), tucker=True), t2=torch.zeros(2, 2, 3)), "all zero"),
    "a rank too large": (samples.factors((6, 768), 6), r"rank 6 is no smaller"),
    "a scale too large": (replace(good, alpha=1000.0), "alpha/rank is 500"),
    "8 bits": (replace(good, w2_a=torch.zeros(6, 2).to(torch.float8_e4m3fn)), "all zero"),
}


@pytest.mark.parametrize(("factors", "message"), SUSPICIOUS.values(), ids=SUSPICIOUS)
def test_what_looks_suspicious(factors, message):
    text = describe(Adapter({"good": good, "odd": factors}, notes=["read oddly"]))
    lines = [line for line in text.splitlines() if line.startswith("suspicious")]
    assert len(lines) == 2 and "read oddly" in lines[0] and "odd: " in lines[1] and message in lines[1]


def test_many_suspicious_layers_are_counted():
    untrained = {f"layer {i}": replace(good, w2_a=torch.zeros(6, 2)) for i in range(30)}
    lines = [line for line in describe(Adapter(untrained), limit=3).splitlines() if line.startswith("suspicious")]
    assert len(lines) == 4 and "… and 27 more" in lines[-1]


def test_what_else_the_file_holds(tmp_path):
    tensors = samples.DIALECTS["kohya with LoRA, LoKr, norms"][1] | {"bundle_emb.cat.clip_l": torch.ones(3)}
    text = describe(load_adapter(samples.write(tmp_path / "a.safetensors", tensors)))
    other = line(text, "other")
    assert other.startswith("9 tensors: ") and all(
        part in other
        for part in ("alpha ×2", "lora_up.weight ×1", "lokr_w1 ×1", "w_norm ×1", "not an adapter's key ×1")
    )


def test_every_dialect_can_be_described(tmp_path):
    for number, (dialect, tensors, _) in enumerate(samples.DIALECTS.values()):
        adapter = load_adapter(samples.write(tmp_path / f"{number}.safetensors", tensors))
        text = describe(adapter)
        assert line(text, "dialect") == dialect and f"{adapter.parameter_count():,} parameters" in text


def test_an_adapter_without_loha_layers():
    text = describe(Adapter({}, extras={"a.lora_up.weight": torch.ones(2, 2)}, source="x"))
    assert line(text, "rank") == "none" and line(text, "other") == "1 tensors: lora_up.weight ×1"


def test_text_from_a_file_cannot_forge_lines_or_drive_the_terminal():
    metadata = {"modelspec.trigger_phrase": "cat\nsuspicious    nothing", "modelspec.architecture": "SD\x1b[2J"}
    text = describe(Adapter({"a\x1b[31m": replace(good, alpha=1000.0)}, metadata=metadata))
    assert not any(line.startswith("suspicious    nothing") for line in text.splitlines()) and "\x1b" not in text


# --- merge, resize, convert, extract, bake ---------------------------------------------------------------------------

MID = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture
def files(tmp_path, one_thread):
    """Two adapters of one model, and two checkpoints of it."""
    for number in (1, 2):
        tensors = samples.module(MID, (40, 48), seed=number)
        samples.write(tmp_path / f"{number}.safetensors", tensors, {"ss_network_dim": "2"})
    weight = {"model.diffusion_model.middle_block.1.proj_in.weight": torch.randn(40, 48)}
    samples.write(tmp_path / "base.safetensors", weight)
    change = samples.factors((40, 48), 1).delta()
    samples.write(tmp_path / "tuned.safetensors", {key: t + 0.1 * change for key, t in weight.items()})
    return tmp_path


RUNS = {
    "merge": (["merge", "1", "2", "--weights", "0.5", "-1"], "rank          8 ×1"),
    "merge by svd": (["merge", "1", "2", "--method", "svd", "--rank", "3"], "1 layers, rank 3; relative error 0."),
    "merge by ties": (
        ["merge", "1", "2", "--method", "ties", "--energy", "0.5", "--density", "0.3"],
        "1 layers, rank ",
    ),
    "merge as LoRA": (["merge", "1", "2", "--kind", "lora"], "lora_up.weight ×1"),
    "merge by blocks": (["merge", "1", "2", "--blocks", "MID=0.5", "--rules", "proj_in: 2"], "rank          8 ×1"),
    "resize": (["resize", "1", "--rank", "1"], "1 layers, rank 1; relative error 0."),
    "resize by fit": (["resize", "1", "--rank", "1", "--method", "fit"], "a LoRA of equal size: "),
    "convert to LoRA": (["convert", "1", "--to", "lora", "--rank", "2"], "lora_down.weight ×1"),
    "convert alpha and dtype": (["convert", "1", "--alpha", "2", "--dtype", "fp16"], "float16 ×1"),
    "convert names": (["convert", "1", "--unet", "ldm"], "wrote"),
    "extract": (["extract", "base", "tuned", "--rank", "1"], "1 layers, rank 1; relative error"),
    "bake": (["bake", "base", "1", "2", "--strengths", "0.5", "2.0"], "checkpoint: 1 layers matched"),
}


def arguments(words, folder):
    """Words that name one of the files become its path."""
    plain = {"1", "2", "base", "tuned"}
    paths = (word in plain and not words[i - 1].startswith("--") for i, word in enumerate(words))
    return [str(folder / f"{w}.safetensors") if is_path else w for w, is_path in zip(words, paths, strict=True)]


@pytest.mark.parametrize(("words", "said"), RUNS.values(), ids=RUNS)
def test_every_command_writes_and_says_what(words, said, files, capsys):
    out = files / "out.safetensors"
    call = [*arguments(words, files), "-o", str(out)]
    assert main([*call, "--dry-run"]) == 0
    text = capsys.readouterr()
    assert said.replace("wrote", "was not written") in text.out and "dry run" in text.out and not out.exists()
    assert main(call) == 0 and out.exists()
    text = capsys.readouterr()
    assert said in text.out and f"wrote {out}" in text.out and not text.err
    before = out.read_bytes()
    assert main(call) == 1 and "exists already" in capsys.readouterr().err and out.read_bytes() == before
    assert main([*call, "--force"]) == 0
    if words[0] != "bake" and "--unet" not in words:
        assert load_adapter(out).metadata.get("loha_history")


@pytest.mark.parametrize("words", [words for words, _ in RUNS.values()], ids=RUNS)
def test_no_command_writes_over_its_input(words, files, capsys):
    call = arguments(words, files)
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert main([*call, "-o", call[1], "--force"]) == 1
    assert "never changed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_a_merge_as_a_peft_folder(files):
    out = files / "peft"
    assert main(["merge", *arguments(["1", "2"], files), "-o", str(out), "--format", "peft"]) == 0
    assert load_adapter(out).ranks == {8: 1}


WRONG = {
    "another model": (["merge", "1", "odd"], "different base models"),
    "a weight too many": (["merge", "1", "2", "--weights", "0.5", "0.5", "0.5"], "2 adapters and 3 weights"),
    "a rank for an exact sum": (["merge", "1", "2", "--rank", "3"], "exact"),
    "rank 0": (["resize", "1", "--rank", "0"], "rank is 0"),
    "a bound without a kind": (["convert", "1", "--rank", "3"], "belong to --to"),
    "an unknown block": (["merge", "1", "--blocks", "XX=1"], "no block XX"),
    "no checkpoint": (["extract", "1", "base", "--rank", "1"], "no layer in common"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_a_command_refuses(words, message, files, capsys):
    samples.write(files / "odd.safetensors", samples.module(MID, (40, 50)))
    words = [str(files / "odd.safetensors") if word == "odd" else word for word in words]
    assert main([*arguments(words, files), "-o", str(files / "out.safetensors")]) == 1
    assert message in capsys.readouterr().err and not (files / "out.safetensors").exists()
