"""Where alpha comes from when a file holds no alpha tensors; and that nobody takes a scale without saying so."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loha_core import Compression, LoHaConfig, LoHaError, LoHaModel, load_adapter, merge, resize
from loha_core.cli import main

from . import oracle, samples

PROJ = "down_blocks.0.attentions.0.proj_in"
KEY = "transformer.transformer_blocks.0.attn.to_q"
UNSAID = "nothing says the alpha"


def without_alpha(tensors):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}


def load(tmp_path, tensors, metadata=None):
    return load_adapter(samples.write(tmp_path / "a.safetensors", tensors, metadata))


def written_by_diffusers(metadata):
    return {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)}


# --- nobody guesses in silence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", samples.DIALECTS)
def test_a_scale_is_never_guessed_in_silence(tmp_path, case):
    tensors = without_alpha(samples.DIALECTS[case][1])
    adapter = load(tmp_path, tensors)
    assert [note for note in adapter.notes if UNSAID in note and "scale 1" in note]
    assert all(abs(f.scale) == 1 for n, f in adapter.layers.items() if f"{n}.scalar" not in tensors)


@pytest.mark.parametrize("config", [None, {"peft_type": "LOHA", "r": 2}], ids=["no configuration", "without alpha"])
def test_nor_by_the_reader_of_peft(tmp_path, config):
    for part, tensors in (("unet", samples.WRAPPED), ("text_encoder", samples.WRAPPED_TEXT)):
        samples.write(tmp_path / "both" / part / "adapter_model.safetensors", tensors)
        if config is not None:
            (tmp_path / "both" / part / "adapter_config.json").write_text(json.dumps(config))
    paths = [tmp_path / "both" / "unet" / "adapter_model.safetensors"] if config is None else [tmp_path / "both"]
    for path in paths:
        assert any(UNSAID in note for note in load_adapter(path).notes)


def test_the_layers_that_are_meant_are_counted(tmp_path):
    tensors = samples.module("lora_unet_a", (6, 4)) | samples.module("lora_unet_b", (6, 4), alpha=None)
    (note,) = load(tmp_path, tensors).notes
    assert "1 of 2 layers (lora_unet_b, …)" in note


def test_whoever_works_on_such_a_file_hands_the_note_on(tmp_path, capsys):
    path = samples.write(tmp_path / "a.safetensors", without_alpha(samples.DIALECTS["kohya SD1.5"][1]))
    adapter = load_adapter(path)
    for report in (merge([adapter, adapter]).report, resize(adapter, Compression(rank=1)).report):
        assert any(UNSAID in note for note in report.notes)
    for words in (["resize", "--rank", "1"], ["convert", "--alpha", "4"], ["convert", "--dtype", "fp16"], ["merge"]):
        assert main([words[0], str(path), *words[1:], "-o", str(tmp_path / "b.safetensors"), "--force"]) == 0
        assert UNSAID in capsys.readouterr().out, words
    with pytest.warns(UserWarning) as warned:
        LoHaModel.from_pretrained(_net(), path)
    assert any(UNSAID in str(warning.message) for warning in warned)


def _net() -> nn.Module:
    net = nn.Module()
    net.down_blocks = nn.ModuleList([nn.Module()])
    net.down_blocks[0].attentions = nn.ModuleList([nn.Module()])
    net.down_blocks[0].attentions[0].proj_in = nn.Linear(samples.WIDTH, samples.WIDTH)
    return net


# --- diffusers' metadata ---------------------------------------------------------------------------------------------


def test_what_diffusers_saves_of_a_peft_loha(tmp_path):
    """Row 5 of issue 14: ``transformer.….hada_w1_a``, no alpha tensors, and the configuration in the header."""
    peft = pytest.importorskip("peft", reason="a peer to measure against: pip install .[peers]")
    diffusers = pytest.importorskip("diffusers", reason="a peer to measure against: pip install .[peers]")
    sizes = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "caption_projection_dim": 8}
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        **sizes, sample_size=8, in_channels=4, joint_attention_dim=6, pooled_projection_dim=6, pos_embed_max_size=8
    )
    patterns = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 7.0}}
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["to_q", "to_k"], init_weights=False, **patterns)
    before = {name: module.weight.detach().clone() for name, module in model.named_modules() if _is_target(name)}
    model.add_adapter(config)
    state = peft.get_peft_model_state_dict(model)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict()
    )
    (file,) = tmp_path.glob("*.safetensors")
    adapter = load_adapter(file)
    assert not adapter.notes and adapter.dialect == "diffusers" and len(adapter.layers) == len(before) == 2
    for name, factors in adapter.layers.items():
        layer = model.get_submodule(name.removeprefix("transformer."))
        assert factors.alpha == (7 if name.endswith("to_k") else 6)
        assert oracle.error(factors.delta(), layer.get_delta_weight("default").detach().numpy()) < 1e-6


def _is_target(name: str) -> bool:
    return name.endswith(("to_q", "to_k"))


PACKED = {
    "of its own network": ({"transformer.alpha": 6, "text_encoder.alpha": 1}, 6),
    "LoRA's word for it": ({"transformer.lora_alpha": 6}, 6),
    "by pattern": ({"transformer.alpha": 1, "transformer.alpha_pattern": {"^transformer_blocks.0.attn.to_q": 6}}, 6),
    "of one network alone": ({"alpha": 6, "r": 2}, 6),
    "of another network": ({"unet.alpha": 6}, None),
    "nothing about alpha": ({"transformer.r": 2}, None),
}


@pytest.mark.parametrize(("metadata", "alpha"), PACKED.values(), ids=PACKED)
def test_alpha_in_diffusers_metadata(tmp_path, metadata, alpha):
    adapter = load(tmp_path, samples.module(KEY, (6, 4), alpha=None), written_by_diffusers(metadata))
    assert adapter.layers[KEY].alpha == (alpha or 2) and bool(adapter.notes) == (alpha is None)


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 100_000], ids=len)
def test_metadata_that_is_no_json_says_nothing(tmp_path, text):
    adapter = load(tmp_path, samples.module(KEY, (6, 4), alpha=None), {"lora_adapter_metadata": text})
    assert adapter.layers[KEY].scale == 1 and adapter.notes


def test_an_alpha_tensor_counts_before_metadata(tmp_path):
    said = written_by_diffusers({"transformer.alpha": 6}) | {"ss_network_dim": "2", "ss_network_alpha": "9"}
    assert load(tmp_path, samples.module(KEY, (6, 4), alpha=5.0), said).layers[KEY].alpha == 5


def test_patterns_that_could_hang_the_reader_are_refused(tmp_path):
    said = written_by_diffusers({"transformer.alpha": 1, "transformer.alpha_pattern": {"(a+)+": 6}})
    with pytest.raises(LoHaError, match="lora_adapter_metadata: alpha_pattern: .* may take very long"):
        load(tmp_path, samples.module(KEY, (6, 4), alpha=None), said)


# --- kohya's metadata ------------------------------------------------------------------------------------------------

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
ARGS = json.dumps({"algo": "loha", "conv_dim": "4", "conv_alpha": 1})
KOHYA = {
    "alpha": (LINEAR, {"ss_network_dim": "2", "ss_network_alpha": "6.0"}, 6),
    "a float as text": (LINEAR, {"ss_network_dim": "2.0", "ss_network_alpha": "0.5"}, 0.5),
    "of another rank": (LINEAR, {"ss_network_dim": "8", "ss_network_alpha": "6"}, None),
    "dynamic": (LINEAR, {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}, None),
    "none": (LINEAR, {"ss_network_dim": "2", "ss_network_alpha": "None"}, None),
    "a convolution": (CONV, {"ss_network_dim": "8", "ss_network_alpha": "6", "ss_network_args": ARGS}, None),
    "a convolution of the same rank": (
        CONV,
        {
            "ss_network_dim": "2",
            "ss_network_alpha": "6",
            "ss_network_args": json.dumps({"conv_dim": 2, "conv_alpha": 1}),
        },
        1,
    ),
}


@pytest.mark.parametrize(("name", "metadata", "alpha"), KOHYA.values(), ids=KOHYA)
def test_alpha_in_kohyas_metadata(tmp_path, name, metadata, alpha):
    adapter = load(tmp_path, samples.module(name, (6, 4), alpha=None), metadata)
    assert adapter.layers[name].alpha == (2 if alpha is None else alpha) and bool(adapter.notes) == (alpha is None)


# --- PEFT's keys and configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["base_model.model.", "transformer.", "unet.", ""])
@pytest.mark.parametrize("name", ["default", "my_style", "weight", "0"])
def test_keys_that_carry_the_adapters_name(tmp_path, wrapper, name):
    """A state_dict of PEFT's model, as it is."""
    plain = samples._at(wrapper, ".", alpha=None)
    adapter = load(tmp_path, {f"{key}.{name}": tensor for key, tensor in plain.items()})
    again = load_adapter(samples.write(tmp_path / "b.safetensors", plain))
    assert adapter.layers.keys() == again.layers.keys() and not adapter.extras
    assert all(torch.equal(f.delta(), again.layers[key].delta()) for key, f in adapter.layers.items())


def test_a_peft_models_own_state_dict(tmp_path):
    peft = pytest.importorskip("peft", reason="a peer to measure against: pip install .[peers]")
    model = peft.get_peft_model(_net(), peft.LoHaConfig(r=2, alpha=6, target_modules=["proj_in"], init_weights=False))
    save_file({k: v for k, v in model.state_dict().items() if "hada" in k}, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.layers[PROJ].alpha == 6 and not adapter.notes and not adapter.extras


def test_several_adapters_in_one_file_are_refused_by_name(tmp_path):
    tensors = {f"{key}.{name}": t.clone() for key, t in samples.WRAPPED.items() for name in ("default", "other")}
    with pytest.raises(LoHaError, match=r"a\.safetensors: holds 2 adapters, default, other.*selected_adapters"):
        load(tmp_path, tensors)
    with pytest.raises(LoHaError, match="with and without default"):
        load(tmp_path, samples.WRAPPED | {f"{key}.default": t.clone() for key, t in samples.WRAPPED.items()})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("field", ["alpha", "lora_alpha"])
def test_a_configuration_that_other_hands_have_written(tmp_path, encoding, field):
    samples.write_peft(tmp_path, {k: t for k, t in samples.WRAPPED.items() if PROJ in k})
    text = json.dumps({"peft_type": "LOHA", "r": 2, field: 6})
    (tmp_path / "adapter_config.json").write_bytes(text.encode(encoding))
    assert load_adapter(tmp_path).layers[PROJ].alpha == 6
    assert LoHaConfig.from_pretrained(tmp_path).alpha == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LoHaModel.from_pretrained(_net(), tmp_path)
    assert model.to_adapter().layers[PROJ].alpha == 6
    assert load_file(tmp_path / "adapter_model.safetensors")
