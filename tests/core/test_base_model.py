"""What an adapter was probably made for, by the names and shapes of its layers."""

from __future__ import annotations

from itertools import product

import pytest

from loha_core import Adapter
from loha_core.formats.describe import base_model
from loha_core.naming import names
from loha_core.naming.families import Family, Size
from loha_core.naming.recognise import families_of
from loha_core.naming.tables import FAMILIES

from . import samples

SIZES = [(family, size) for family in FAMILIES.values() for size in family.sizes]


def adapter(layers: list[str], width: int = 8, **metadata: str) -> Adapter:
    factors = samples.factors((6, width))
    return Adapter(dict.fromkeys(layers, factors), metadata=metadata)


def layers(family: Family, counts: tuple[int, ...], side: str) -> list[str]:
    """All names of a side, those of blocks in the first and the last."""
    found = []
    for row in family.rows:
        lists = zip(family.blocks, counts, strict=True)
        count = next((n for (_, module), n in lists if row.native.startswith(f"{module}.")), 1)
        numbers = sorted({0, count - 1}) if count else []
        found += [getattr(row, side).replace(".N.", f".{n}.", 1).replace(".N.", ".0.") for n in numbers]
    return [f"{'transformer.' if side == 'diffusers' else 'diffusion_model.'}{name}" for name in dict.fromkeys(found)]


@pytest.mark.parametrize(("family", "size"), SIZES, ids=[f"{f.name}, {s.name}" for f, s in SIZES])
@pytest.mark.parametrize("side", ["native", "diffusers"])
def test_every_family_and_size_is_named(family, size, side):
    found = base_model(adapter(layers(family, size.blocks, side), size.width or 8)).split(" or ")
    alike = [s for s in family.sizes if (s.blocks, s.width) == (size.blocks, size.width)]
    assert (size.name if len(alike) == 1 else family.name) in found
    # Names that several know, of models with as many blocks: no shape tells them apart.
    assert len(found) <= len(families_of(names.split(name)[1] for name in layers(family, size.blocks, side)))


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families whose attention has the same names, one of them in two sizes."""
    table = "twin_blocks.N.attn.to_q twin_blocks.N.attn.qkv 0:i\n"
    blocks = (("B", "twin_blocks"),)
    sizes = (Size("One 1B", (20,), 32), Size("One 7B", (30,), 64))
    one = Family("One", table + "one_in one_in", blocks=blocks, sizes=sizes)
    other = Family("Other", table + "other_in other_in", blocks=blocks, sizes=(Size("Other", (20,), 32),))
    monkeypatch.setitem(FAMILIES, "One", one)
    monkeypatch.setitem(FAMILIES, "Other", other)


TWINS = {
    "names tell": (["twin_blocks_0_attn_qkv", "one_in"], 8, "One"),
    "names and width tell": (["twin_blocks_0_attn_qkv", "one_in"], 64, "One 7B"),
    "names and blocks tell": (["twin_blocks_29_attn_qkv", "one_in"], 8, "One 7B"),
    "width tells": (["twin_blocks_0_attn_qkv"], 64, "One 7B"),
    "blocks tell": (["twin_blocks_24_attn_qkv"], 8, "One 7B"),
    "nothing tells": (["twin_blocks_19_attn_qkv"], 32, "One 1B or Other"),
    "names disagree": (["twin_blocks_0_attn_qkv", "one_in", "other_in"], 32, "One 1B or Other"),
    "most are unknown": (["twin_blocks_0_attn_qkv", "x_in", "y_in"], 32, "unknown"),
}


@pytest.mark.parametrize(("paths", "width", "found"), TWINS.values(), ids=TWINS)
def test_where_several_know_the_names_numbers_decide(twins, paths, width, found):
    assert base_model(adapter([f"lora_unet_{path}" for path in paths], width)) == found


TEXT = {
    "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj": "CLIP",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "CLIP",
    "text_model.encoder.layers.0.mlp.fc2": "CLIP",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "T5",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo": "T5",
    "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj": "Qwen or Llama type",
    "lora_te_layers_0_mlp_gate_proj": "Qwen or Llama type",
}


@pytest.mark.parametrize(("name", "kind"), TEXT.items(), ids=TEXT)
def test_text_encoders(name, kind):
    assert base_model(adapter([name])) == f"a text encoder ({kind})"


def test_text_encoders_together_and_beside_what_is_none():
    clip = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert base_model(adapter([clip, t5])) == "a text encoder (CLIP, T5)"
    flux = ["lora_unet_double_blocks_18_img_mod_lin", "lora_unet_single_blocks_37_modulation_lin"]
    assert base_model(adapter([clip, t5, *flux])) == "Flux"
    # The DiT of Anima has names like a language model's.
    for prefix, number in product(("diffusion_model.", "lora_unet_", ""), (0, 27)):
        assert "text encoder" not in base_model(adapter([f"{prefix}blocks.{number}.self_attn.q_proj"]))
    assert base_model(adapter(["lora_te_something"])) == base_model(adapter([])) == "unknown"


def test_cross_attention_of_transformers_is_no_u_net_s():
    name = "transformer_blocks.0.attn2.to_k"
    for width in (8, 768):
        found = base_model(adapter([f"transformer.{name}"], width))
        assert "cross-attention" not in found and "SD 1.x" not in found
    assert base_model(adapter([f"unet.down_blocks.0.attentions.0.{name}"], 768)) == "SD 1.x"
    assert base_model(adapter([f"lora_unet_input_blocks_1_1_{name}"], 2048)) == "SDXL"


def test_the_metadata_comes_first():
    assert base_model(adapter(["lora_te_x"], ss_base_model_version="x", **{"modelspec.architecture": "y"})) == "y"
