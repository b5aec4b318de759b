"""Extraction: what was put between two checkpoints comes out of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loha_core import Adapter, LoHaError, apply_to_checkpoint, extract, load_adapter, save_adapter
from loha_core.adapter import split_layers
from loha_core.models.keys import modules
from loha_core.models.tensor_file import TensorFile
from loha_core.transform.lowrank import product

from . import oracle, samples

pytestmark = pytest.mark.usefixtures("one_thread")

LEAD = "model.diffusion_model."
BASE = {
    f"{LEAD}input_blocks.1.1.proj_in.weight": (128, 96, 1, 1),
    f"{LEAD}input_blocks.1.0.in_layers.2.weight": (96, 80, 3, 3),
    f"{LEAD}output_blocks.2.1.conv.weight": (90, 70, 3, 3),
    f"{LEAD}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (128, 200),
    f"{LEAD}out.2.weight": (4, 64, 3, 3),
    f"{LEAD}input_blocks.1.0.in_layers.0.weight": (64,),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (160, 120),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (50, 64),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
}
LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in": (128, 96),
    "lora_unet_down_blocks_0_resnets_0_conv1": (96, 80, 3, 3),
    "lora_unet_up_blocks_0_upsamplers_0_conv": (90, 70, 3, 3),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (128, 200),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (160, 120),
}


def tensors(seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return {key: (torch.randn(shape, generator=random) * 0.05).to(dtype) for key, shape in BASE.items()}


@pytest.fixture
def base(tmp_path):
    save_file(tensors(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def tuned(base, rank=3, size=0.1):
    """The base with a known LoHa in it."""
    layers = {name: samples.factors(shape, rank, seed=i, alpha=size) for i, (name, shape) in enumerate(LAYERS.items())}
    out = base.with_name("tuned.safetensors")
    apply_to_checkpoint(base, [Adapter(layers, source="known")], 1.0, out, overwrite=True)
    return out, layers


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_known_loha_comes_back(base, rank):
    path, layers = tuned(base, rank)
    found, report = extract(base, path, rank=rank)
    assert found.layers.keys() == layers.keys() and report.error < 1e-3
    for name, factors in layers.items():
        shape = factors.shape[0]
        wanted = oracle.wide(factors.delta(torch.float64)).reshape(shape, -1)
        assert oracle.error(found.layers[name].delta(), wanted) < 1e-3, name
        assert found.layers[name].rank == rank
    assert any("equal in both models" in note for note in report.notes)


def test_a_known_loha_comes_back_from_half_precision(tmp_path):
    """As far as rounding lets it: the errors that are reported are real."""
    before = tensors(dtype=torch.float16)
    save_file(before, tmp_path / "base.safetensors")
    path, layers = tuned(tmp_path / "base.safetensors", 2, size=0.05)
    found, report = extract(tmp_path / "base.safetensors", path, rank=2)
    after = TensorFile(path)
    for entry in report.layers:
        key = modules(after.shapes())[entry.name]
        change = (after[key].double() - before[key].double()).flatten(1)
        real = oracle.error(found.layers[entry.name].delta(), oracle.wide(change))
        assert entry.error == pytest.approx(real, rel=1e-2)
        clean = oracle.wide(layers[entry.name].delta()).reshape(change.shape)
        assert oracle.error(found.layers[entry.name].delta(), clean) < 0.02


@pytest.mark.parametrize("kind", ["loha", "lora"])
def test_svd_is_the_best_of_its_rank(base, kind):
    path, _ = tuned(base)
    found, report = extract(base, path, rank=4, method="svd", kind=kind)
    layers, _ = split_layers(found)
    before, after = TensorFile(base), TensorFile(path)
    for entry in report.layers:
        key = modules(after.shapes())[entry.name]
        change = oracle.wide((after[key] - before[key]).flatten(1))
        sigma = np.linalg.svd(change, compute_uv=False)
        u, v = product(layers[entry.name])
        real = np.linalg.norm(oracle.wide(u) @ oracle.wide(v) - change)
        assert real <= np.linalg.norm(sigma[4:]) * (1 + 1e-4)
        assert entry.error == pytest.approx(real / np.linalg.norm(change), rel=1e-3)
    if kind == "lora":
        assert found.extras["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (4, 80, 3, 3)
        assert found.extras["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"].shape == (128, 4, 1, 1)


def test_what_is_no_loha_is_fitted_and_compared(base):
    other = base.with_name("other.safetensors")
    save_file({key: t + 0.01 * torch.randn(t.shape) for key, t in tensors().items()}, other)
    found, report = extract(base, other, rank=4, only="attn2|fc1")
    assert len(found.layers) == 2 and report.lora_error is not None
    for entry in report.layers:
        assert 0.3 < entry.error < 1 and 0.3 < (entry.lora_error or 0) < 1


def test_ranks_of_convolutions_and_small_layers(base):
    other = base.with_name("other.safetensors")
    save_file({key: t + 0.01 * torch.randn(t.shape) for key, t in tensors().items()}, other)
    found, _ = extract(base, other, rank=6, conv_rank=2, method="svd")
    ranks = {name: f.rank for name, f in found.layers.items()}
    assert ranks["lora_unet_down_blocks_0_resnets_0_conv1"] == ranks["lora_unet_conv_out"] == 2
    assert ranks["lora_unet_down_blocks_0_attentions_0_proj_in"] == 6
    without, _ = extract(base, other, rank=6, conv_rank=0, method="svd")
    assert not any("conv" in name for name in without.layers) and without.layers
    capped, _ = extract(base, other, rank=6, method="svd")
    assert capped.layers["lora_unet_conv_out"].rank == 4


def test_what_is_adapted_and_what_is_not():
    names = modules({key: shape for key, shape in BASE.items()})
    assert set(names) == {*LAYERS, "lora_unet_conv_out"}


def test_checkpoints_of_two_dialects(base):
    """The tuned one as diffusers writes a U-Net."""
    path, layers = tuned(base)
    found = TensorFile(path)
    unet = {
        "down_blocks.0.attentions.0.proj_in.weight": f"{LEAD}input_blocks.1.1.proj_in.weight",
        "up_blocks.0.upsamplers.0.conv.weight": f"{LEAD}output_blocks.2.1.conv.weight",
    }
    save_file(
        {new: found[old].flatten(2).squeeze(2) if "proj" in new else found[old] for new, old in unet.items()},
        base.with_name("unet.safetensors"),
    )
    made, _ = extract(base, base.with_name("unet.safetensors"), rank=3, method="svd")
    assert set(made.layers) == {name for name in layers if "proj_in" in name or "upsamplers" in name}


def test_in_memory_and_from_file_are_the_same(base):
    path, _ = tuned(base)
    one, _ = extract(base, path, rank=2, method="svd")
    two, _ = extract(tensors(), {key: TensorFile(path)[key] for key in TensorFile(path)}, rank=2, method="svd")
    assert all(torch.equal(one.layers[n].w1_a, f.w1_a) for n, f in two.layers.items()) and len(one.layers) == 5


def test_saving_what_was_extracted(base):
    path, layers = tuned(base)
    made, report = extract(base, path, rank=3, only="attn2", dtype=torch.float16)
    save_adapter(made, base.with_name("a.safetensors"))
    read = load_adapter(base.with_name("a.safetensors"))
    assert read.metadata["ss_network_dim"] == "3" and '"base": "base.safetensors"' in read.metadata["loha_history"]
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert read.layers[name].dtype == torch.float16 and report.error < 2e-3
    assert oracle.error(read.layers[name].delta(), oracle.wide(layers[name].delta())) < 2e-3


def changed(**replacements):
    return tensors() | {key: tensor for key, tensor in replacements.items()}


KEY = f"{LEAD}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
BAD = {
    "another base": (
        lambda: changed(**{KEY: torch.ones(128, 201)}),
        {},
        rf"{KEY} is \(128, 201\), .* it is \(128, 200\)",
    ),
    "NaN": (
        lambda: changed(**{KEY: torch.full((128, 200), float("nan"))}),
        {},
        f"tuned.*{KEY} has values that are NaN",
    ),
    "nothing differs": (tensors, {}, "no layer differs"),
    "nothing in common": (lambda: {"x.weight": torch.ones(3, 3)}, {}, "have no layer in common"),
    "rank 0": (tensors, {"rank": 0}, "rank is 0"),
    "a fitted LoRA": (tensors, {"kind": "lora"}, "fit makes LoHa"),
    "no expression": (tensors, {"only": "("}, "not a regular expression"),
}


@pytest.mark.parametrize(("make", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(base, make, options, message):
    path = base.with_name("tuned.safetensors")
    save_file(make(), path)
    with pytest.raises(LoHaError, match=message):
        extract(base, path, **{"rank": 2} | options)


def test_files_that_are_none(base):
    with pytest.raises(LoHaError, match="no such file"):
        extract(base, base.with_name("missing.safetensors"), rank=2)
    broken = base.with_name("broken.safetensors")
    broken.write_bytes(base.read_bytes()[:-1000])
    with pytest.raises(LoHaError, match="broken.safetensors: not a readable safetensors file"):
        extract(base, broken, rank=2)


def test_a_file_that_changes_or_goes_away_while_it_is_read(base):
    file, key = TensorFile(base), next(iter(BASE))
    base.write_bytes(base.read_bytes()[:600])
    with pytest.raises(LoHaError, match=r"base\.safetensors: .*weight: the file ends within this tensor"):
        [file[key] for key in BASE]
    base.unlink()
    with pytest.raises(LoHaError, match=rf"base\.safetensors: {key}: cannot be read"):
        file[key]
