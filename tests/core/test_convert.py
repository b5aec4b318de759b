"""Resizing, kinds, spellings, alpha, blocks: the same update in another form, and what the form costs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loha_core import (
    Adapter,
    Compression,
    LoHaError,
    bake_blocks,
    change_alpha,
    convert,
    from_lora,
    load_adapter,
    resize,
    respell,
    save_adapter,
    to_dtype,
    to_lora,
    to_lycoris,
    to_peft,
)
from loha_core.adapter import split_layers
from loha_core.blocks import BlockStrength
from loha_core.naming import spelling
from loha_core.naming.unet import to_diffusers, to_ldm, unet_blocks
from loha_core.transform.lowrank import product

from . import oracle, samples

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def update(layer) -> np.ndarray:
    u, v = product(layer)
    return oracle.wide(u) @ oracle.wide(v)


def an_adapter(**options) -> Adapter:
    layers = {
        NAME: samples.factors((24, 30), 4, **options),
        CONV: samples.factors((12, 20, 3, 3), 3, tucker=True, **options),
    }
    return Adapter(layers, metadata={"ss_network_dim": "4", "modelspec.trigger_phrase": "cat"}, source="x")


def file(tmp_path, case="kohya SD1.5", name="a"):
    return load_adapter(samples.write(tmp_path / f"{name}.safetensors", samples.DIALECTS[case][1]))


# --- resize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bound", [{"rank": 2}, {"energy": 0.3}, {"max_error": 0.9}, {"rank": 2, "method": "fit"}], ids=str
)
def test_resize_says_its_error(bound):
    adapter = an_adapter()
    small, report = resize(adapter, Compression(**bound))
    for entry in report.layers:
        real = oracle.error(update(small.layers[entry.name]), update(adapter.layers[entry.name]))
        assert entry.error == pytest.approx(real, abs=1e-5) and entry.rank == small.layers[entry.name].rank
        assert entry.rank <= 2 if "rank" in bound else entry.error <= bound.get("max_error", 0.7**0.5)
    assert 0 < report.error < 1 and "relative error" in report.text()


def test_a_fit_is_the_better_resize():
    _, plain = resize(an_adapter(), Compression(rank=2))
    _, fitted = resize(an_adapter(), Compression("fit", rank=2))
    assert fitted.error < plain.error


def test_what_a_bound_does_not_make_smaller_stays(tmp_path):
    adapter = an_adapter(dtype=torch.float16)
    for bound in ({"rank": 4}, {"rank": 99}, {"energy": 1.0}, {"max_error": 0.0}):
        same, report = resize(adapter, Compression(**bound))
        assert report.error == 0 and same.layers[NAME] is adapter.layers[NAME]
    assert resize(adapter, Compression(rank=2)).adapter.layers[NAME].dtype == torch.float16


def test_a_resized_file_says_its_new_rank(tmp_path):
    small, _ = resize(an_adapter(), Compression(rank=2))
    save_adapter(small, tmp_path / "small.safetensors")
    found = load_adapter(tmp_path / "small.safetensors").metadata
    assert found["ss_network_dim"] == "2" and found["modelspec.trigger_phrase"] == "cat"
    assert json.loads(found["loha_history"])[0]["operation"] == "resize"


def test_dora_keeps_its_magnitudes():
    adapter = an_adapter(dora_axis=0)
    small, _ = resize(adapter, Compression(rank=2))
    assert torch.equal(small.layers[NAME].dora_scale, adapter.layers[NAME].dora_scale)
    lora, _ = to_lora(adapter)
    assert torch.equal(lora.extras[f"{NAME}.dora_scale"], adapter.layers[NAME].dora_scale)
    assert torch.equal(from_lora(lora)[0].layers[NAME].dora_scale, adapter.layers[NAME].dora_scale)


# --- kinds -----------------------------------------------------------------------------------------------------------


def test_loha_to_lora_to_loha_is_the_same_update(tmp_path):
    adapter = an_adapter()
    lora, report = to_lora(adapter)
    assert report.error == 0 and not lora.layers and lora.extras[f"{NAME}.lora_down.weight"].shape == (16, 30)
    assert lora.extras[f"{CONV}.lora_down.weight"].shape == (9, 20, 3, 3)
    save_adapter(lora, tmp_path / "lora.safetensors")
    read = load_adapter(tmp_path / "lora.safetensors")
    assert read.metadata["ss_network_module"] == "networks.lora" and read.metadata["ss_network_dim"] == "16"
    back, _ = from_lora(read)
    assert back.layers.keys() == adapter.layers.keys() and not back.extras
    for name, factors in adapter.layers.items():
        assert oracle.error(update(back.layers[name]), update(factors)) < 1e-6
    fitted, report = from_lora(read, Compression("fit", rank=4))
    assert fitted.layers[NAME].rank == 4 and report.layers[0].lora_error is not None


def test_a_truncated_lora():
    adapter = an_adapter()
    lora, report = to_lora(adapter, Compression(rank=5))
    layers, _ = split_layers(lora)
    for entry in report.layers:
        sigma = np.linalg.svd(update(adapter.layers[entry.name]), compute_uv=False)
        assert entry.error == pytest.approx(np.linalg.norm(sigma[5:]) / np.linalg.norm(sigma), abs=1e-6)
        assert layers[entry.name].rank == 5


def test_the_kernel_of_flat_factors():
    """By the name; or said by the caller."""
    shape = (8, 6, 3, 3)
    flat = Adapter({CONV: samples.factors(shape), NAME: samples.factors((8, 54))})
    lora, _ = to_lora(flat)
    assert lora.extras[f"{CONV}.lora_down.weight"].shape == (4, 6, 3, 3)
    assert lora.extras[f"{NAME}.lora_down.weight"].shape == (4, 54)
    odd, _ = to_lora(flat, shapes={NAME: (8, 18, 3, 1)})
    assert odd.extras[f"{NAME}.lora_down.weight"].shape == (4, 18, 3, 1)


def test_peft_loads_the_lora_of_a_model_in_diffusers_names():
    """Through peft's own LoRA layers: their forward is ours."""
    peft = pytest.importorskip("peft", reason="a peer to measure against: pip install .[peers]")
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(30, 24), "conv1": torch.nn.Conv2d(20, 12, 3)})
    adapter = Adapter({"proj": samples.factors((24, 30), 2), "conv1": samples.factors((12, 20, 3, 3), 2)})
    lora, _ = to_lora(adapter)
    before = {name: module.weight.detach().clone() for name, module in model.items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["proj", "conv1"]))
    state = {
        f"base_model.model.{key}".replace("lora_up", "lora_B").replace("lora_down", "lora_A"): tensor
        for key, tensor in lora.extras.items()
        if not key.endswith("alpha")
    }
    assert not peft.set_peft_model_state_dict(wrapped, state).unexpected_keys
    merged = wrapped.merge_and_unload()
    for name, factors in adapter.layers.items():
        change = (merged[name].weight - before[name]).detach()
        assert oracle.error(change, update(factors)) < 1e-5


# --- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["kohya SD1.5", "kohya SDXL", "kohya fp16", "kohya bf16", "kohya Tucker"])
def test_lycoris_to_peft_and_back_is_bit_identical(tmp_path, case):
    source = file(tmp_path, case)
    save_adapter(to_peft(source).adapter, tmp_path / "peft", format="peft")
    back, report = to_lycoris(load_adapter(tmp_path / "peft"))
    save_adapter(back, tmp_path / "back.safetensors")
    was, now = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "back.safetensors")
    assert report.error == 0 and was.keys() == now.keys()
    assert all(now[key].dtype == t.dtype and torch.equal(now[key], t) for key, t in was.items())


def test_peft_accepts_what_we_write(tmp_path):
    peft = pytest.importorskip("peft", reason="a peer to measure against: pip install .[peers]")
    names = {"down_blocks.0.attentions.0.proj_in": (24, 30), "down_blocks.0.resnets.0.conv1": (12, 20, 3, 3)}
    layers = {
        f"lora_unet_{n.replace('.', '_')}": samples.factors(s, 2, seed=i) for i, (n, s) in enumerate(names.items())
    }
    ldm, _ = respell(Adapter(layers), "lycoris", "ldm")
    assert "lora_unet_input_blocks_1_0_in_layers_2" in ldm.layers
    save_adapter(to_peft(ldm).adapter, tmp_path / "p", format="peft")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attentions = torch.nn.ModuleList([torch.nn.ModuleDict({"proj_in": torch.nn.Linear(30, 24)})])
            self.resnets = torch.nn.ModuleList([torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(20, 12, 3)})])

    model = torch.nn.Module()
    model.down_blocks = torch.nn.ModuleList([Block()])
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "p" / "unet").merge_and_unload()
    for (name, _), factors in zip(names.items(), layers.values(), strict=True):
        assert oracle.error(merged.get_submodule(name).weight - before[name], update(factors)) < 1e-5


@pytest.mark.parametrize("style", spelling.STYLES)
def test_spellings_come_back(tmp_path, style):
    for case in ("kohya SD1.5", "kohya SDXL", "kohya with LoRA, LoKr, norms"):
        source = file(tmp_path, case)
        there, _ = respell(source, style, "ldm" if style == "kohya" else "keep")
        back, _ = respell(there, "lycoris", "diffusers")
        assert back.layers.keys() == source.layers.keys() and back.extras.keys() == source.extras.keys()
        assert list(there.layers) != list(source.layers)


def test_native_names():
    fc1 = "text_model.encoder.layers.0.mlp.fc1"
    names = {
        NAME: "diffusion_model.input_blocks.1.1.proj_in",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"text_encoders.clip_l.transformer.{fc1}",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": f"text_encoders.clip_g.transformer.{fc1}",
    }
    found, _ = respell(Adapter({name: samples.factors((6, 5)) for name in names}), "native", "ldm")
    assert list(found.layers) == list(names.values()) and found.dialect == "native"


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_our_table_is_the_one_that_diffusers_converts_by(family):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils", reason="the reference: pip install .[peers]")
    inner = ["in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection", "in_layers.0", "out_layers.0"]
    attention = ["proj_in", "proj_out", "norm", "transformer_blocks.0.attn2.to_k"]
    keys = []
    for block, diffusers in unet_blocks(family).items():
        if family == "SD1.5" and block.startswith("label_emb"):
            continue  # it has none
        suffixes = inner if "resnets" in diffusers else attention if "attentions" in diffusers else [""]
        keys += [f"{block}.{suffix}".strip(".") for suffix in suffixes]
    config = {"layers_per_block": 2, "class_embed_type": None}
    if family == "SDXL":
        config |= {"addition_embed_type": "text_time"}
    lead = "model.diffusion_model."
    state = {f"{lead}{key}.{end}": torch.tensor(float(i)) for i, key in enumerate(keys) for end in ("weight", "bias")}
    converted = utils.convert_ldm_unet_checkpoint(state, config)
    wanted = {
        round(float(t)): name.removesuffix(".weight") for name, t in converted.items() if name.endswith(".weight")
    }
    for i, key in enumerate(keys):
        flat = key.replace(".", "_")
        assert to_diffusers(flat) == wanted[i].replace(".", "_"), key
        assert to_ldm(to_diffusers(flat), family) == flat


# --- alpha, dtype, blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"alpha": 8.0}, {"scale": 1.0}, {"scale": -0.3}], ids=str)
def test_another_alpha(options):
    adapter = an_adapter()
    lora = to_lora(an_adapter()).adapter
    for source in (adapter, lora):
        changed, report = change_alpha(source, **options)
        mine, other = split_layers(source)[0], split_layers(changed)[0]
        for name, layer in other.items():
            assert layer.alpha == options.get("alpha", options.get("scale", 0) * layer.rank)
            assert oracle.error(update(layer), update(mine[name])) < 1e-6
        assert report.error < 1e-6


def test_alpha_by_a_power_of_two_loses_nothing():
    adapter = Adapter({NAME: samples.factors((24, 30), 4, alpha=1.0, dtype=torch.float16)})
    changed, report = change_alpha(adapter, alpha=4.0)
    assert report.error == 0 and torch.equal(changed.layers[NAME].w1_a, adapter.layers[NAME].w1_a / 4)


def test_dtypes_and_what_they_cost():
    adapter = an_adapter()
    half, report = to_dtype(adapter, torch.float16)
    for entry in report.layers:
        real = oracle.error(update(half.layers[entry.name]), update(adapter.layers[entry.name]))
        assert entry.error == pytest.approx(real, rel=0.05) and half.layers[entry.name].dtype == torch.float16
    assert to_dtype(half, torch.float16).report.error == 0


def test_blocks_written_into_the_factors():
    up = "lora_unet_up_blocks_1_attentions_0_proj_in"
    adapter = an_adapter()
    adapter.layers[up] = samples.factors((24, 30), seed=2)
    adapter.extras["lora_unet_down_blocks_0_resnets_0_norm1.w_norm"] = torch.ones(4)
    baked, _ = bake_blocks(adapter, BlockStrength.parse("SD1.5", "IN=0.5, OUT=0", "conv1: 3"))
    assert set(baked.layers) == {NAME, CONV} and (baked.layers[CONV].alpha, baked.layers[NAME].alpha) == (1.5, 0.5)
    assert torch.equal(baked.layers[CONV].w1_a, adapter.layers[CONV].w1_a)
    assert torch.equal(baked.extras["lora_unet_down_blocks_0_resnets_0_norm1.w_norm"], torch.full((4,), 0.5))
    same, _ = bake_blocks(an_adapter(dora_axis=0), BlockStrength.parse("SD1.5", "OUT=0"))
    assert len(same.layers) == 2


def test_all_steps_at_once():
    """Blocks, kind, alpha, dtype, names; the report is the worst step's."""
    adapter = an_adapter()
    adapter.notes = ["read oddly"]
    everything, report = convert(
        adapter,
        blocks=BlockStrength.parse("SD1.5", "IN=0.5"),
        compression=Compression(rank=2, kind="lora"),
        alpha=4.0,
        dtype=torch.float16,
        names="native",
        unet="ldm",
    )
    layers, _ = split_layers(everything)
    assert list(layers) == ["diffusion_model.input_blocks.1.1.proj_in", "diffusion_model.input_blocks.1.0.in_layers.2"]
    alone = to_lora(adapter, Compression(rank=2))
    assert report.error == pytest.approx(alone.report.error, rel=1e-3) and report.notes == ["read oddly"]
    for layer, before in zip(layers.values(), split_layers(alone.adapter)[0].values(), strict=True):
        assert (layer.rank, layer.alpha, layer.dtype) == (2, 4.0, torch.float16)
        assert oracle.error(update(layer), 0.5 * update(before)) < 1e-3
    steps = ["bake blocks", "to LoRA", "alpha", "dtype"]
    assert [entry["operation"] for entry in json.loads(everything.metadata["loha_history"])] == steps


def test_no_step_changes_nothing():
    adapter = an_adapter()
    same, report = convert(adapter)
    assert same is adapter and not report.layers and report.error == 0


def test_steps_that_lose_nothing_report_the_last():
    lora, report = convert(
        an_adapter(), blocks=BlockStrength.parse("SD1.5", "IN=0.5"), compression=Compression("exact", kind="lora")
    )
    assert (
        [entry.rank for entry in report.layers] == [layer.rank for layer in split_layers(lora)[0].values()] == [16, 9]
    )


lora_extras = {f"{NAME}.lora_up.weight": torch.ones(2, 2), f"{NAME}.lora_down.weight": torch.ones(2, 2)}
BAD = {
    "rank 0": (lambda a: resize(a, Compression(rank=0)), "rank is 0"),
    "no bound": (lambda a: resize(a, Compression()), "one of rank, energy and max_error"),
    "fit without a rank": (lambda a: resize(a, Compression("fit", energy=0.5)), "give rank"),
    "an integer dtype": (lambda a: to_dtype(a, torch.int32), "floating point"),
    "too large for half": (lambda a: to_dtype(change_alpha(a, alpha=1e-6).adapter, torch.float16), "beyond 65504"),
    "no alpha": (lambda a: change_alpha(a), "either alpha or scale"),
    "alpha 0": (lambda a: change_alpha(a, alpha=0.0), "is not 0"),
    "NaN alpha": (lambda a: change_alpha(a, alpha=float("nan")), "is nan"),
    "blocks all 0": (lambda a: bake_blocks(a, BlockStrength.parse("SD1.5", "ALL=0")), "nothing would be left"),
    "an unknown spelling": (lambda a: respell(a, "x"), "no spelling 'x'"),
    "native names with another's blocks": (lambda a: respell(a, "native", "diffusers"), "ldm's blocks in a U-Net"),
    "nothing to convert": (lambda a: resize(Adapter({}, source="x"), Compression(rank=1)), "x: holds no LoHa or LoRA"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises(LoHaError, match=message):
        call(an_adapter())


def test_what_peft_cannot_hold():
    with pytest.raises(LoHaError, match=r"x: .*proj_in is DoRA"):
        to_peft(an_adapter(dora_axis=0))
    with pytest.raises(LoHaError, match=r"x: PEFT's LoHa cannot hold .*lora_up.*from_lora"):
        to_peft(Adapter({CONV: samples.factors((6, 5))}, extras=lora_extras, source="x"))


def test_dora_cannot_be_scaled_by_blocks():
    with pytest.raises(LoHaError, match=r"x: .*proj_in is DoRA.* 0.5, expected 0 or 1"):
        bake_blocks(an_adapter(dora_axis=0), BlockStrength.parse("SD1.5", "IN=0.5"))


def test_two_names_that_become_one():
    f = samples.factors((6, 5))
    with pytest.raises(LoHaError, match="would both become"):
        respell(Adapter({NAME: f, "unet.down_blocks.0.attentions.0.proj_in": f}), "lycoris")
