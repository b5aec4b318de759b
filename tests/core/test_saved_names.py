"""Names on the way out: a file keeps its own, and another spelling is either right or refused."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loha_core import Adapter, Compression, LoHaConfig, LoHaError, LoHaModel, load_adapter, merge, resize, save_adapter
from loha_core.cli import main
from loha_core.naming import spelling
from loha_core.transform.convert import change_alpha, to_dtype, to_lora, to_peft

from . import samples

# A name of each family in each spelling that the field has for it.
DITS = {
    "Flux, diffusers": [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.3.proj_mlp",
    ],
    "Flux, native": ["diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.3.linear1"],
    "Flux, kohya": ["lora_unet_double_blocks_0_img_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1"],
    "Flux, OneTrainer": ["lora_transformer_transformer_blocks_0_attn_to_q"],
    "Flux, SimpleTuner": ["lycoris_transformer_blocks_0_attn_to_q"],
    "SD3, diffusers": ["transformer.transformer_blocks.0.attn.add_k_proj", "transformer.context_embedder"],
    "SD3, native": ["diffusion_model.joint_blocks.0.x_block.attn.qkv"],
    "Z-Image, native": ["diffusion_model.layers.0.attention.to_q", "diffusion_model.noise_refiner.0.feed_forward.w1"],
    "Qwen-Image": ["transformer.transformer_blocks.0.img_mlp.net.0.proj"],
    "Wan, SimpleTuner": ["lycoris_blocks_0_attn1_to_q", "lycoris_blocks_0_ffn_net_0_proj"],
    "Wan, native": ["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"],
    "Wan, musubi": ["lora_unet_blocks_0_self_attn_q"],
    "HunyuanVideo": ["transformer.double_blocks.0.img_attn_qkv", "transformer.single_blocks.0.modulation.linear"],
    "nobody's": ["lora_unet_my_own_blocks_0_first_thing", "lora_unet_my_own_blocks_0_second_thing"],
    "a text encoder of its own": ["text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj"],
    "Cascade": ["lora_prior_unet_down_blocks_0_1_channelwise_0", "lora_prior_te_text_projection"],
}
FILES = {case: names for case, names in DITS.items()} | {
    case: list(dict.fromkeys(key.rpartition(".")[0] for key in tensors if ".hada_" in key))
    for case, (_, tensors, _) in samples.DIALECTS.items()
}


# Rows of the weights that are several in another spelling, for 24 columns.
TALL = {"qkv": 72, "linear1": 168, "proj_mlp": 96}


def adapter_of(names, **options) -> Adapter:
    rows = [next((rows for part, rows in TALL.items() if name.endswith(part)), 24) for name in names]
    layers = {
        n: samples.factors((r, 24), 2, seed=i, **options) for i, (n, r) in enumerate(zip(names, rows, strict=True))
    }
    return Adapter(layers)


def written(tmp_path, adapter, **options) -> list[str]:
    """Names of the modules in the file that comes of saving."""
    save_adapter(adapter, tmp_path / "out.safetensors", **options)
    return sorted({key.rpartition(".")[0] for key in load_file(tmp_path / "out.safetensors") if ".hada_" in key})


WAYS = {
    "as it is": lambda a: a,
    "merged": lambda a: merge([a, a], [0.5, 0.5], Compression(rank=2)).adapter,
    "resized": lambda a: resize(a, Compression(rank=1)).adapter,
    "another alpha": lambda a: change_alpha(a, alpha=8.0).adapter,
    "another dtype": lambda a: to_dtype(a, torch.float16).adapter,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", FILES)
def test_a_file_keeps_its_names(tmp_path, case, way):
    """Row 1 of issue 14: whoever found the layers before finds them after."""
    names = FILES[case]
    save_adapter(adapter_of(names), tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors")
    assert sorted(adapter.layers) == sorted(names)
    assert written(tmp_path, WAYS[way](adapter)) == sorted(names)


def test_layers_of_other_kinds_keep_theirs_too(tmp_path):
    lora = to_lora(adapter_of(DITS["Flux, diffusers"])).adapter
    save_adapter(lora, tmp_path / "out.safetensors")
    found = {key.partition(".lora_")[0] for key in load_file(tmp_path / "out.safetensors") if ".lora_" in key}
    assert found == set(DITS["Flux, diffusers"])


# --- another spelling ------------------------------------------------------------------------------------------------

SIDES = {  # what a spelling's names look like
    "kohya": re.compile(r"lora_(unet|te\d?)_\w+"),
    "diffusers": re.compile(r"(unet|transformer|text_encoder(_\d)?)\.[\w.]+"),
    "native": re.compile(r"(diffusion_model|text_encoders)\.[\w.]+"),
}
FOREIGN = {  # blocks that a spelling never has
    "kohya": ("single_transformer", "lora_unet_transformer_blocks"),
    "diffusers": ("double_blocks", "joint_blocks", "input_blocks", "output_blocks"),
    "native": ("down_blocks", "up_blocks", "mid_block", "single_transformer"),
}
# Both sides have diffusers' name.
ONE_NAME = ("Qwen-Image", "Cascade")


@pytest.mark.parametrize("style", spelling.STYLES)
@pytest.mark.parametrize("case", FILES)
def test_another_spelling_is_right_or_refused(tmp_path, case, style):
    """Row 2 of issue 14: what is asked for is what is in the file."""
    adapter = adapter_of(FILES[case])
    try:
        found = written(tmp_path, adapter, names=style)
    except LoHaError as error:
        told = any(name in str(error) for name in FILES[case]) and "known" in str(error)
        assert told or "by which different weights are meant" in str(error)
        assert not (tmp_path / "out.safetensors").exists()
        return
    assert all(SIDES[style].fullmatch(name) for name in found)
    assert not [name for name in found if any(part in name for part in FOREIGN[style])] or case in ONE_NAME


WANTED = {
    ("kohya SD1.5", "native"): "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    ("kohya SD1.5", "diffusers"): "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    ("diffusers UNet", "kohya"): "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    ("kohya SDXL", "native"): "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    ("Flux, kohya", "native"): "diffusion_model.double_blocks.0.img_attn.qkv",
    ("Flux, native", "kohya"): "lora_unet_single_blocks_3_linear1",
    ("SD3, native", "kohya"): "lora_unet_joint_blocks_0_x_block_attn_qkv",
    ("Flux, SimpleTuner", "diffusers"): "transformer.transformer_blocks.0.attn.to_q",
    ("Flux, OneTrainer", "diffusers"): "transformer.transformer_blocks.0.attn.to_q",
    ("Wan, native", "kohya"): "lora_unet_blocks_0_ffn_0",
    ("Wan, native", "diffusers"): "transformer.blocks.0.ffn.net.0.proj",
    ("Wan, SimpleTuner", "kohya"): "lora_unet_blocks_0_ffn_0",
    ("Wan, SimpleTuner", "native"): "diffusion_model.blocks.0.self_attn.q",
    ("Flux, native", "diffusers"): "transformer.single_transformer_blocks.3.proj_mlp",
    ("HunyuanVideo", "native"): "diffusion_model.single_blocks.0.modulation.lin",
    ("HunyuanVideo", "kohya"): "lora_unet_double_blocks_0_img_attn_qkv",
    ("HunyuanVideo", "diffusers"): "transformer.transformer_blocks.0.attn.to_k",
    ("Qwen-Image", "kohya"): "lora_unet_transformer_blocks_0_img_mlp_net_0_proj",
    ("Cascade", "diffusers"): "transformer.down_blocks.0.1.channelwise.0",
}


@pytest.mark.parametrize(("case", "style"), WANTED)
def test_the_other_name(tmp_path, case, style):
    assert WANTED[case, style] in written(tmp_path, adapter_of(FILES[case]), names=style)


UNKNOWN = [
    ("nobody's", "native"),
    ("nobody's", "diffusers"),
    ("a text encoder of its own", "kohya"),
]


@pytest.mark.parametrize(("case", "style"), UNKNOWN)
def test_what_is_not_known_is_refused_by_name(tmp_path, case, style, capsys):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_adapter(adapter_of(FILES[case]), path)
    assert main(["convert", str(path), "--names", style, "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert "in.safetensors: " in said and any(name in said for name in FILES[case]) and not out.exists()


@pytest.mark.parametrize("command", ["convert", "merge", "resize --rank 1"])
def test_the_command_line_writes_what_it_says(tmp_path, command, capsys):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_adapter(adapter_of(FILES["kohya SD1.5"]), path)
    name, *rest = command.split()
    for style, dialect in (("native", "native"), ("diffusers", "diffusers"), ("kohya", "lycoris"), ("keep", "lycoris")):
        assert main([name, str(path), *rest, "--names", style, "-o", str(out), "--force"]) == 0
        said = capsys.readouterr().out
        assert f"dialect       {dialect}" in said and load_adapter(out).dialect == dialect


# --- PEFT, and a model's own modules ---------------------------------------------------------------------------------


def test_peft_folders_become_what_single_file_readers_know(tmp_path, capsys):
    wanted = {
        "unet": ("down_blocks.0.resnets.0.conv1", "lora_unet_down_blocks_0_resnets_0_conv1"),
        "text_encoder": ("text_model.encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        "text_encoder_2": ("text_model.encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "transformer": ("layers.0.attention.to_q", "transformer.layers.0.attention.to_q"),
    }
    for part, (name, _) in wanted.items():
        samples.write_peft(tmp_path / "in" / part, samples.module(f"base_model.model.{name}", (6, 4), alpha=None))
    names = sorted(name for _, name in wanted.values())
    assert written(tmp_path, load_adapter(tmp_path / "in")) == names
    assert main(["resize", str(tmp_path / "in"), "--rank", "1", "-o", str(tmp_path / "b.safetensors")]) == 0
    assert (
        "dialect       lycoris" in capsys.readouterr().out
        and sorted(load_adapter(tmp_path / "b.safetensors").layers) == names
    )


def test_a_transformers_peft_folder_keeps_its_dots(tmp_path):
    name = "blocks.0.attn1.to_q"
    samples.write_peft(tmp_path / "in", samples.module(f"base_model.model.{name}", (6, 4), alpha=None))
    adapter = load_adapter(tmp_path / "in")
    assert written(tmp_path, adapter) == [f"transformer.{name}"]
    save_adapter(load_adapter(tmp_path / "out.safetensors"), tmp_path / "again", format="peft")
    assert list(load_adapter(tmp_path / "again").layers) == [f"transformer.{name}"]


def test_a_module_with_a_line_in_its_name_survives_peft(tmp_path):
    """It was saved as ``my.linear``, which no model has."""
    net = nn.ModuleDict({"my_linear": nn.Linear(6, 4), "x": nn.ModuleDict({"a_b": nn.Linear(6, 4)})})
    model = LoHaModel(net, LoHaConfig(r=2, target_modules=["my_linear", "a_b"]))
    save_adapter(model.to_adapter(), tmp_path / "peft", format="peft")
    assert list(load_adapter(tmp_path / "peft").layers) == ["my_linear", "x.a_b"]
    assert list(to_peft(model.to_adapter()).adapter.layers) == ["my_linear", "x.a_b"]


def test_flat_names_whose_dots_are_not_known_do_not_become_peft(tmp_path):
    with pytest.raises(LoHaError, match="lycoris_blocks_0_ffn_net_0_proj: which of its '_'"):
        save_adapter(adapter_of(["lycoris_blocks_0_ffn_net_0_proj"]), tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
