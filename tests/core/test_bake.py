"""Baking into checkpoints: against float64, in every kind of names, without a partial file whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loha_core import Adapter, LoHaError, apply_to_checkpoint, load_adapter, save_adapter
from loha_core.blocks import BlockStrength
from loha_core.models.keys import network
from loha_core.models.tensor_file import TensorFile
from loha_core.naming.names import flat
from loha_core.naming.respell import respelled
from loha_core.naming.tables import FAMILIES

from . import families, oracle, samples
from .processes import PATIENCE

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
U = "model.diffusion_model."
SD15 = {
    f"{U}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (6, 7),
    f"{U}output_blocks.2.1.conv.weight": (4, 5, 3, 3),
    f"{U}time_embed.0.weight": (8, 6),
    f"{U}out.0.weight": (8,),
    f"{U}out.0.bias": (8,),
    "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight": (6, 6),
}
SDXL = {
    f"{U}output_blocks.2.2.conv.weight": (4, 5, 3, 3),
    f"{U}label_emb.0.0.weight": (8, 6),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.weight": (8, 6),
    "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight": (18, 6),
    "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_proj.weight": (6, 8),
    "conditioner.embedders.1.model.text_projection": (6, 6),
}
SD3 = {
    f"{U}joint_blocks.1.x_block.attn.qkv.weight": (18, 6),
    f"{U}joint_blocks.1.context_block.mlp.fc1.weight": (8, 6),
    "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1.weight": (8, 6),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (6, 6),
}
FLUX = {
    f"{U}double_blocks.3.img_attn.qkv.weight": (18, 6),
    f"{U}single_blocks.2.linear1.weight": (42, 6),
    f"{U}single_blocks.2.linear2.weight": (6, 30),
}


def state(shapes, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=random).to(dtype) for key, shape in shapes.items()}


# (a file's weights, the name in an adapter, the weight's key, rows of it, transposed)
to_k = f"{U}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
te2 = "conditioner.embedders.1.model."
RES, JOINT = f"{te2}transformer.resblocks.2.", f"{U}joint_blocks.1."
NAMES = [
    (SD15, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", to_k, None),
    (SD15, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", to_k, None),
    (SD15, "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k", to_k, None),
    (SD15, "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", to_k, None),
    (SD15, "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", to_k, None),
    (SD15, "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", to_k, None),
    (SD15, "lora_unet_up_blocks_0_upsamplers_0_conv", f"{U}output_blocks.2.1.conv.weight", None),
    (SD15, "lora_unet_time_embedding_linear_1", f"{U}time_embed.0.weight", None),
    (SD15, "lora_te_text_model_encoder_layers_3_self_attn_q_proj", list(SD15)[-1], None),
    (SD15, "text_encoder.text_model.encoder.layers.3.self_attn.q_proj", list(SD15)[-1], None),
    (SDXL, "lora_unet_up_blocks_0_upsamplers_0_conv", f"{U}output_blocks.2.2.conv.weight", None),
    (SDXL, "lora_unet_add_embedding_linear_1", f"{U}label_emb.0.0.weight", None),
    (SDXL, "lora_te1_text_model_encoder_layers_3_mlp_fc1", list(SDXL)[2], None),
    (SDXL, "lora_te2_text_model_encoder_layers_2_self_attn_k_proj", f"{RES}attn.in_proj_weight", (6, 12)),
    (SDXL, "text_encoder_2.text_model.encoder.layers.2.mlp.fc2", f"{RES}mlp.c_proj.weight", None),
    (SDXL, "lora_te2_text_projection", f"{te2}text_projection", "transposed"),
    (SD3, "lora_unet_joint_blocks_1_x_block_attn_qkv", f"{U}joint_blocks.1.x_block.attn.qkv.weight", None),
    (SD3, "transformer.transformer_blocks.1.attn.to_v", f"{U}joint_blocks.1.x_block.attn.qkv.weight", (12, 18)),
    (SD3, "transformer.transformer_blocks.1.ff_context.net.0.proj", f"{JOINT}context_block.mlp.fc1.weight", None),
    (SD3, "lora_te2_text_model_encoder_layers_3_mlp_fc1", list(SD3)[2], None),
    (SD3, "lora_te3_encoder_block_0_layer_0_SelfAttention_q", list(SD3)[3], None),
    (FLUX, "lora_unet_double_blocks_3_img_attn_qkv", f"{U}double_blocks.3.img_attn.qkv.weight", None),
    (FLUX, "transformer.transformer_blocks.3.attn.to_k", f"{U}double_blocks.3.img_attn.qkv.weight", (6, 12)),
    (FLUX, "lora_transformer_single_transformer_blocks_2_proj_mlp", f"{U}single_blocks.2.linear1.weight", (18, 42)),
    (FLUX, "transformer.single_transformer_blocks.2.proj_out", f"{U}single_blocks.2.linear2.weight", None),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "name", "key", "part"), NAMES, ids=[name for _, name, _, _ in NAMES])
@pytest.mark.parametrize("bare", [False, True], ids=["checkpoint", "bare"])
def test_names(tmp_path, shapes, name, key, part, bare):
    before = {k.removeprefix(U) if bare else k: t for k, t in state(shapes).items()}
    key = key.removeprefix(U) if bare else key
    save_file(before, tmp_path / "m.safetensors")
    view = before[key] if part in (None, "transposed") else before[key][slice(*part)]
    factors = samples.factors(tuple(view.shape), 2)
    apply_to_checkpoint(
        tmp_path / "m.safetensors", [Adapter({name: factors}, source="a")], 0.5, tmp_path / "out.safetensors"
    )
    after = load_file(tmp_path / "out.safetensors")
    change = 0.5 * factors.delta().reshape(view.shape)
    wanted = {k: t.clone() for k, t in before.items()}
    target = wanted[key] if part in (None, "transposed") else wanted[key][slice(*part)]
    target += change.T if part == "transposed" else change
    assert after.keys() == wanted.keys()
    assert all(
        torch.allclose(after[k], t, atol=1e-5) if k == key else torch.equal(after[k], t) for k, t in wanted.items()
    )


def test_a_unet_as_diffusers_writes_it(tmp_path):
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    known = network({key: (6, 7), "up_blocks.0.upsamplers.0.conv.weight": (4, 5, 3, 3)})
    for name in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", NAMES[0][1], NAMES[3][1], NAMES[4][1]):
        assert known.find(name) == key
    assert known.find("lora_unet_output_blocks_2_1_conv") == known.find("lora_unet_output_blocks_2_2_conv") != None  # noqa: E711


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_stack_with_dora_and_lora_in_the_dtype_of_the_weight(tmp_path, dtype):
    before = state(SD15, dtype)
    save_file(before, tmp_path / "m.safetensors", {"format": "pt", "modelspec.hash_sha256": "x", "title": "m"})
    first = samples.parts((6, 7), 2, alpha=0.2)
    second = samples.parts((6, 7), 2, seed=3, dora_axis=0, alpha=0.1)
    lora = {"lora_up.weight": torch.randn(6, 2), "lora_down.weight": torch.randn(2, 7), "alpha": torch.tensor(0.1)}
    norms = {"lora_unet_conv_norm_out.w_norm": torch.ones(8), "lora_unet_conv_norm_out.b_norm": torch.ones(8)}
    name = NAMES[0][1]
    adapters = [
        load_adapter(samples.write(tmp_path / f"{i}.safetensors", {f"{name}.{k}": t for k, t in parts.items()} | more))
        for i, (parts, more) in enumerate(((first, norms), (lora, {}), (second, {})))
    ]
    strengths = [0.5, 2.0, 0.75]
    reports = apply_to_checkpoint(tmp_path / "m.safetensors", adapters, strengths, tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")
    exact = oracle.wide(before[to_k])
    exact = exact + 0.5 * oracle.update({f"m.{k}": t for k, t in first.items()}, "m")
    exact = exact + 2.0 * 0.05 * oracle.wide(lora["lora_up.weight"]) @ oracle.wide(lora["lora_down.weight"])
    # Between two updates a weight is rounded to its dtype.
    change = oracle.update({f"m.{k}": t for k, t in second.items()}, "m")
    exact = oracle.dora(torch.from_numpy(exact), change, second["dora_scale"], 0, 0.75)
    assert oracle.error(after[to_k], exact) < 4 * torch.finfo(dtype).eps
    assert after[to_k].dtype == dtype and len(reports) == 3
    assert torch.allclose(after[f"{U}out.0.weight"].float(), before[f"{U}out.0.weight"].float() + 0.5, rtol=0.1)
    assert torch.allclose(after[f"{U}out.0.bias"].float(), before[f"{U}out.0.bias"].float() + 0.5, rtol=0.1)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["title"] == "m" and "modelspec.hash_sha256" not in metadata
    assert json.loads(metadata["loha_history"])[0]["strengths"] == strengths
    assert list(TensorFile(tmp_path / "out.safetensors")) == list(TensorFile(tmp_path / "m.safetensors"))


def test_other_dtypes_and_empty_tensors_are_copied(tmp_path):
    before = state(SD15) | {"step": torch.tensor(7), "none": torch.zeros(0, 4), "mask": torch.tensor([True, False])}
    save_file(before, tmp_path / "m.safetensors")
    apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 1.0, tmp_path / "deep" / "out.safetensors")
    after = load_file(tmp_path / "deep" / "out.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before if key != to_k)
    assert not torch.equal(after[to_k], before[to_k])


def test_blocks(tmp_path, source):
    te = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    layers = {NAMES[0][1]: samples.factors((6, 7)), te: samples.factors((6, 6))}
    blocks = BlockStrength.parse("SD1.5", "IN=0.5, BASE=0")
    apply_to_checkpoint(source, [Adapter(layers)], 1.0, source.with_name("o.safetensors"), blocks=blocks)
    before, after = load_file(source), load_file(source.with_name("o.safetensors"))
    assert torch.allclose(after[to_k], before[to_k] + 0.5 * layers[NAMES[0][1]].delta(), atol=1e-5)
    assert torch.equal(after[list(SD15)[-1]], before[list(SD15)[-1]])


def test_what_is_not_applied_is_said(source):
    whole = adapter()
    whole.layers["lora_unet_mid_block_nothing"] = samples.factors((3, 3))
    whole.extras["bundle_emb.cat.clip_l"] = torch.ones(2, 3)
    [report] = apply_to_checkpoint(source, [whole], 1.0, source.with_name("o.safetensors"))
    assert set(report.unmatched) == {"lora_unet_mid_block_nothing", "bundle_emb.cat.clip_l"}
    assert len(report.matched["checkpoint"]) == 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    save_file(state(SD15), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def adapter(shape=(6, 7), name=NAMES[0][1], **options):
    return Adapter({name: samples.factors(shape, **options)}, source="a.safetensors")


huge = adapter(alpha=1e38)
BAD = {
    "another base model": ([adapter((6, 8))], 1.0, r"a.safetensors: made for another model.*\(6, 8\).*\(6, 7\)"),
    "nothing fits": ([adapter(name="lora_unet_x")], 1.0, "nothing in this adapter fits .*m.safetensors"),
    "not finite": ([huge], 5.0, r"m.safetensors: .*to_k.weight: \d+ of 42 values are NaN or infinite"),
    "NaN strength": ([adapter()], float("nan"), "a.safetensors: strength is nan"),
    "no adapters": ([], 1.0, "0 adapters and 0 strengths"),
    "too many strengths": ([adapter()], [1.0, 1.0], "1 adapters and 2 strengths"),
    "a wrong difference": (
        [Adapter(adapter().layers, extras={"lora_unet_conv_norm_out.w_norm": torch.ones(9)}, source="a")],
        1.0,
        r"a: lora_unet_conv_norm_out.w_norm is \(9,\)",
    ),
}


@pytest.mark.parametrize(("adapters", "strengths", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_nothing(source, adapters, strengths, message):
    before = source.read_bytes()
    with pytest.raises(LoHaError, match=f"(?s){message}"):
        apply_to_checkpoint(source, adapters, strengths, source.with_name("out.safetensors"))
    assert source.read_bytes() == before and [p.name for p in source.parent.iterdir()] == ["m.safetensors"]


def test_outputs_that_are_refused(source, tmp_path):
    before = source.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    (tmp_path / "old.safetensors").write_bytes(b"old")
    refused = {"old.safetensors": "exists already", "x.ckpt": "name that ends in"}
    refused |= dict.fromkeys(("m.safetensors", "link.safetensors"), "is the checkpoint itself")
    for out, message in ((tmp_path / name, message) for name, message in refused.items()):
        with pytest.raises(LoHaError, match=message):
            apply_to_checkpoint(source, [adapter()], 1.0, out, overwrite=out.name != "old.safetensors")
    assert source.read_bytes() == before and (tmp_path / "old.safetensors").read_bytes() == b"old"
    mine = samples.write(tmp_path / "a.safetensors", samples.module(NAMES[0][1], (6, 7)))
    with pytest.raises(LoHaError, match="is one of the adapters"):
        apply_to_checkpoint(source, [load_adapter(mine)], 1.0, mine, overwrite=True)


def test_a_dry_run_writes_nothing(source):
    [report] = apply_to_checkpoint(source, [adapter()], 1.0, source.with_name("out.safetensors"), dry_run=True)
    assert report.matched["checkpoint"] and not source.with_name("out.safetensors").exists()


def test_an_end_in_between_leaves_nothing(source):
    def stop(done, total, key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_to_checkpoint(source, [adapter()], 1.0, source.with_name("out.safetensors"), progress=stop)
    assert [p.name for p in source.parent.iterdir()] == ["m.safetensors"]


def test_a_disk_that_is_too_small(source, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(LoHaError, match="out.safetensors: needs 0.0 GB, and .* has 0.0 GB left"):
        apply_to_checkpoint(source, [adapter()], 1.0, source.with_name("out.safetensors"))


def test_a_folder_that_may_not_be_read(source, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr("shutil.disk_usage", refuse)
    with pytest.raises(LoHaError, match="out.safetensors: cannot be checked .*Permission denied"):
        apply_to_checkpoint(source, [adapter()], 1.0, source.with_name("out.safetensors"))


def test_a_disk_that_fills_up_while_writing(source):
    """A real refusal by the kernel: files may not grow beyond 600 bytes."""
    code = f"""
import resource, signal
from loha_core import LoHaError, apply_to_checkpoint
from tests.core.test_bake import adapter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
try:
    apply_to_checkpoint({str(source)!r}, [adapter()], 1.0, {str(source.with_name("out.safetensors"))!r})
except LoHaError as error:
    print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, env=os.environ
    )
    assert "out.safetensors: cannot be written" in found.stdout and "nothing was changed" in found.stdout, found.stderr
    assert [p.name for p in source.parent.iterdir()] == ["m.safetensors"]


def test_a_checkpoint_that_is_none(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"PK" * 99)
    with pytest.raises(LoHaError, match="pickle"):
        apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 1.0, tmp_path / "out.safetensors")


@pytest.mark.parametrize("style", ["kohya", "native", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_bare_checkpoints_of_every_family(tmp_path, family, style):
    """Row 4 of issue 14: by the original's names and by diffusers', every layer finds its weight."""
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in families.weights(family).items()}
    save_file(weights, tmp_path / "bare.safetensors")
    adapter = families.native(family)
    save_adapter(respelled(adapter, style), tmp_path / "adapter.safetensors")
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    [report] = apply_to_checkpoint(tmp_path / "bare.safetensors", [loaded], 0.5, tmp_path / "out.safetensors")
    assert not report.unmatched and len(report.matched["checkpoint"]) == len(loaded.layers)
    baked = load_file(tmp_path / "out.safetensors")
    for name, layer in adapter.layers.items():
        key = next(key for key in weights if f"lora_unet_{flat(key.removesuffix('.weight'))}" == name)
        exact = weights[key].double() + 0.5 * layer.delta(torch.float64)
        assert (baked[key] - exact).norm() <= 1e-6 * exact.norm(), key


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_a_checkpoint_in_diffusers_names(tmp_path, style):
    """A fused layer is cut to the weights that are there."""
    family = FAMILIES["Flux"]
    adapter = families.native(family)
    cut = respelled(adapter, "diffusers")
    names = {name: f"{name.removeprefix('transformer.')}.weight" for name in cut.layers}
    weights = {key: torch.randn(cut.layers[name].shape) for name, key in names.items()}
    save_file(weights, tmp_path / "bare.safetensors")
    loaded = respelled(adapter, style)
    [report] = apply_to_checkpoint(tmp_path / "bare.safetensors", [loaded], 1.0, tmp_path / "out.safetensors")
    assert not report.unmatched
    baked = load_file(tmp_path / "out.safetensors")
    for name, key in names.items():
        exact = weights[key].double() + cut.layers[name].delta(torch.float64)
        assert (baked[key] - exact).norm() <= 1e-6 * exact.norm(), key
