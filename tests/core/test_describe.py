"""What `describe` says of an adapter: its base model, trigger words, and what looks suspicious."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from loha_core import Adapter, describe, load_adapter

from . import samples

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


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
