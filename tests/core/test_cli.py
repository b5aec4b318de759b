"""The command line: what each command says and writes, what each option changes, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loha_core import load_adapter
from loha_core.adapter import split_layers
from loha_core.cli import main, parser
from loha_core.transform.compress import kind_of
from loha_core.transform.lowrank import product

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
    tensors = samples.module("lora_unet_a", (6, 4, 3, 3), tucker=True)
    tensors["lora_unet_a.hada_t2"].zero_()
    path = samples.write(tmp_path / "a.safetensors", tensors)
    assert main(["inspect", str(path)]) == 0 and "all zero" in capsys.readouterr().out
    assert main(["inspect", "--legacy-tucker", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Tucker        1 layers" in text and "all zero" not in text  # t2 is not used


def test_a_peft_folder(tmp_path, capsys):
    assert main(["inspect", str(samples.write_peft(tmp_path / "style", samples.WRAPPED))]) == 0
    assert "dialect       peft" in capsys.readouterr().out


# --- merge, resize, convert, extract, bake ---------------------------------------------------------------------------

MID = "lora_unet_mid_block_attentions_0_proj_in"
CONV = "lora_unet_mid_block_resnets_0_conv1"
FACTORS = samples.parts((40, 48), 5)
ADAPTERS = {
    "1": samples.module(MID, (40, 48), seed=1),
    "2": samples.module(MID, (40, 48), seed=2),
    "big": samples.module(MID, (40, 48), 20),
    "lora": {f"{MID}.lora_up.weight": FACTORS["hada_w1_a"], f"{MID}.lora_down.weight": FACTORS["hada_w1_b"]},
    "tucker": samples.module(CONV, (6, 4, 3, 3), tucker=True),
}
WEIGHTS = {
    "base": ("model.diffusion_model.middle_block.1.proj_in.weight", (40, 48)),
    "convolution": ("model.diffusion_model.middle_block.0.in_layers.2.weight", (6, 4, 3, 3)),
}


@pytest.fixture
def files(tmp_path, one_thread):
    """Adapters of one model, and checkpoints of it before and after tuning."""
    for name, tensors in ADAPTERS.items():
        samples.write(tmp_path / f"{name}.safetensors", tensors, {"ss_network_dim": "2"})
    for name, (key, shape) in WEIGHTS.items():
        weight = torch.randn(shape)
        samples.write(tmp_path / f"{name}.safetensors", {key: weight})
        change = samples.factors((shape[0], weight[0].numel()), 2).delta().reshape(shape)
        samples.write(tmp_path / f"tuned_{name}.safetensors", {key: weight + 0.1 * change})
    return tmp_path


RUNS = {
    "merge": (["merge", "1", "2", "--weights", "0.5", "-1"], "1 layers, rank 8; relative error 0\n"),
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
    "extract": (["extract", "base", "tuned_base", "--rank", "1"], "1 layers, rank 1; relative error"),
    "bake": (["bake", "base", "1", "2", "--strengths", "0.5", "2.0"], "checkpoint: 1 layers matched"),
}


def arguments(words, folder):
    """Words that name one of the files become its path."""
    known = {*ADAPTERS, *WEIGHTS, *(f"tuned_{name}" for name in WEIGHTS)}
    paths = (word in known and not words[i - 1].startswith("--") for i, word in enumerate(words))
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


# What an option changes: conditions on the file that is written without it and the one written with it.


def layers_in(path):
    return split_layers(load_adapter(path))[0]


def layer(path):
    (only,) = layers_in(path).values()
    return only


def update(path):
    """The update of the one layer in a file, or what was added to the one weight of a checkpoint."""
    stored = {} if path.is_dir() else load_file(path)
    for name, (key, _) in WEIGHTS.items():
        if key in stored:
            return stored[key] - load_file(path.parent / f"{name}.safetensors")[key]
    u, v = product(layer(path))
    return (u @ v).float()


def times(factor):
    return lambda plain, changed: torch.allclose(update(changed), factor * update(plain), atol=1e-4)


def another_update(plain, changed):
    return update(plain).shape == update(changed).shape and not torch.allclose(update(plain), update(changed))


def lower_rank(plain, changed):
    lost = float((update(plain) - update(changed)).norm() / update(plain).norm())
    return layer(changed).rank < layer(plain).rank and 0.1 < lost < 0.7


def as_lora(plain, changed):
    return kind_of(layer(changed)) == "lora" != kind_of(layer(plain))


def both_halves(plain, changed):
    """Only a fit's second half is other than ones."""
    return [len(layer(path).w2_a.unique()) > 1 for path in (plain, changed)] == [False, True]


def fewer_elements(plain, changed):
    return (update(changed).abs() > 1e-3).sum() < (update(plain).abs() > 1e-3).sum() / 2


WRITTEN = {
    "--format peft": lambda plain, changed: changed.is_dir() and load_adapter(changed).dialect == "peft",
    "--names native": lambda plain, changed: list(layers_in(changed)) == ["diffusion_model.middle_block.1.proj_in"],
    "--dtype fp16": lambda plain, changed: layer(changed).dtype == torch.float16 != layer(plain).dtype,
}
BLOCKS = {"--blocks MID=0.5": times(0.5), "--rules proj_in:2": times(2)}
LEGACY = {"--legacy-tucker": another_update}
OPTIONS = {  # words without the option -> the option -> what it changes; of two values the last counts
    "merge 1 2": {
        "--weights 2": times(2),
        "--kind lora": as_lora,
        "--method svd --rank 3": lower_rank,
        "--method svd --energy 0.7": lower_rank,
        "--method svd --max-error 0.5": lower_rank,
        **WRITTEN,
        **BLOCKS,
    },
    "merge 1 2 --method slerp --rank 2": {"--factor fit": both_halves},
    "merge 1 2 --method magnitude_prune --max-error 0": {"--density 0.1": fewer_elements},
    "merge 1 2 --method ties --max-error 0": {"--majority-sign frequency": another_update},
    "merge 1 2 --method dare --max-error 0": {"--seed 1": another_update},
    "merge tucker": LEGACY,
    "resize 1 --rank 2": WRITTEN,
    "resize big --rank 20": {"--rank 9": lower_rank},
    "resize big --energy 1": {"--energy 0.7": lower_rank},
    "resize big --max-error 0": {"--max-error 0.5": lower_rank},
    "resize big --rank 2": {"--method fit": both_halves},
    "resize tucker --rank 1": LEGACY,
    "convert 1": {
        "--to lora": as_lora,
        "--alpha 5": lambda plain, changed: layer(changed).alpha == 5 and times(1)(plain, changed),
        "--scale 3": lambda plain, changed: layer(changed).scale == 3 and times(1)(plain, changed),
        "--unet ldm": lambda plain, changed: list(layers_in(changed)) == ["lora_unet_middle_block_1_proj_in"],
        **WRITTEN,
        **BLOCKS,
    },
    "convert lora --to loha": {"--rank 3": lower_rank, "--energy 0.7": lower_rank, "--max-error 0.5": lower_rank},
    "convert lora --to loha --rank 2": {"--method fit": both_halves},
    "convert tucker": LEGACY,
    "extract base tuned_base --rank 2": {
        "--rank 1": lower_rank,
        "--method svd": another_update,
        "--method svd --kind lora": as_lora,
        **WRITTEN,
    },
    "extract convolution tuned_convolution --rank 2": {"--conv-rank 1": lower_rank},
    "bake base 1": {"--strengths 0.5": times(0.5), **BLOCKS},
    "bake convolution tucker": LEGACY,
}
ROWS = {f"{words} {option}": (words, option) for words, options in OPTIONS.items() for option in options}


@pytest.mark.parametrize(("words", "option"), ROWS.values(), ids=ROWS)
def test_every_option_does_something(words, option, files):
    outputs = files / "plain.safetensors", files / ("changed" if "peft" in option else "changed.safetensors")
    for text, out in zip((words, f"{words} {option}"), outputs, strict=True):
        assert main([*arguments(text.split(), files), "-o", str(out)]) == 0
    assert OPTIONS[words][option](*outputs)


@pytest.mark.parametrize("words", ["merge 1 2", "convert 1", "bake base 1"])
def test_a_family_has_blocks_of_its_own(words, files, capsys):
    call = [*arguments(words.split(), files), "--blocks", "OUT11=0.5", "-o", str(files / "out.safetensors")]
    assert main([*call, "--family", "SDXL"]) == 1 and "OUT11" in capsys.readouterr().err
    assert main([*call, "--family", "SD1.5"]) == 0


def test_every_option_is_in_a_test():
    tested = {("merge", "--family"), ("convert", "--family"), ("bake", "--family"), ("inspect", "--legacy-tucker")}
    lists = [words for words, _ in (*RUNS.values(), *WRONG.values())] + [row.split() for row in ROWS]
    tested |= {(words[0], word) for words in lists for word in words if word.startswith("-")}
    tested |= {(words[0], option) for words in lists for option in ("-o", "--force", "--dry-run")}
    (commands,) = (action.choices for action in parser()._actions if action.dest == "command")
    untested = {
        (name, *action.option_strings)
        for name, command in commands.items()
        for action in command._actions
        if action.option_strings and action.dest != "help"
        if not any((name, option) in tested for option in action.option_strings)
    }
    assert not untested


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
    "only other layers": (["extract", "base", "tuned_base", "--rank", "1", "--only", "attn"], "nothing to extract"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_a_command_refuses(words, message, files, capsys):
    samples.write(files / "odd.safetensors", samples.module(MID, (40, 50)))
    words = [str(files / "odd.safetensors") if word == "odd" else word for word in words]
    assert main([*arguments(words, files), "-o", str(files / "out.safetensors")]) == 1
    assert message in capsys.readouterr().err and not (files / "out.safetensors").exists()
