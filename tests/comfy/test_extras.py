"""What is not LoHa in a file goes through ComfyUI's own adapters, and nothing is dropped in silence."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loha_core import LoHaError, load_adapter

from . import reduced
from .test_patching import loaded

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
BLOCK = "diffusion_model.input_blocks.1.1.transformer_blocks.0"


@pytest.fixture(scope="module")
def models():
    return reduced.build("sd15")


def mixed(width: int) -> dict[str, torch.Tensor]:
    """LoHa on to_q, LoRA on to_k, LoKr on to_v, a norm's weight and bias, a bias, an embedding, and nonsense."""
    torch.manual_seed(3)
    tensors = {f"{ATTENTION}_to_q.{k}": v for k, v in reduced.random_layer((width, width), 3, "kohya").items()}
    tensors |= {
        f"{ATTENTION}_to_k.lora_up.weight": torch.randn(width, 2),
        f"{ATTENTION}_to_k.lora_down.weight": torch.randn(2, width),
        f"{ATTENTION}_to_k.alpha": torch.tensor(1.0),
        f"{ATTENTION}_to_v.lokr_w1": torch.randn(2, 2),
        f"{ATTENTION}_to_v.lokr_w2": torch.randn(width // 2, width // 2),
        f"{BLOCK}.norm1.w_norm": torch.randn(width),
        f"{BLOCK}.norm1.b_norm": torch.randn(width),
        f"{ATTENTION}_to_out_0.diff_b": torch.randn(width),
        "bundle_emb.mydog.string_to_param": torch.randn(2, 768),
        "something.else": torch.randn(2),
    }
    return tensors


def test_every_kind_is_applied_or_named(modes, models, tmp_path):
    before = models.weights()
    width = before["MODEL", f"{BLOCK}.attn1.to_q.weight"].shape[0]
    tensors = mixed(width)
    save_file(tensors, tmp_path / "mixed.safetensors")
    model, _, report = modes.apply(
        models.model, None, load_adapter(tmp_path / "mixed.safetensors"), 0.5, 1.0, mode="merge"
    )
    with loaded(model):
        after = models.weights()
    change = {key: (after["MODEL", key] - w).double() for (label, key), w in before.items() if label == "MODEL"}

    def close(key, update):
        exact = 0.5 * update.double()
        assert (change[f"{BLOCK}.{key}"] - exact).norm() < 1e-5 * exact.norm(), key

    close(
        "attn1.to_q.weight",
        reduced.delta64({k.rpartition(".")[2]: v for k, v in tensors.items() if "to_q" in k}, (width, width)),
    )
    up, down = (tensors[f"{ATTENTION}_to_k.lora_{which}.weight"].double() for which in ("up", "down"))
    close("attn1.to_k.weight", up @ down / 2)
    close("attn1.to_v.weight", torch.kron(*(tensors[f"{ATTENTION}_to_v.lokr_w{n}"].double() for n in (1, 2))))
    close("norm1.weight", tensors[f"{BLOCK}.norm1.w_norm"])
    close("norm1.bias", tensors[f"{BLOCK}.norm1.b_norm"])
    close("attn1.to_out.0.bias", tensors[f"{ATTENTION}_to_out_0.diff_b"])
    assert sum(bool(delta.any()) for delta in change.values()) == 6
    assert set(report.unmatched) == {"bundle_emb.mydog.string_to_param", "something.else"}
    assert "embeddings folder" in report.text() and "not the key of any adapter" in report.text()


@pytest.mark.parametrize(
    "suffixes",
    [
        {".lora_up.weight": (64, 2), ".lora_down.weight": (2, 99)},
        {".lokr_w1": (2, 2), ".lokr_w2": (5, 7)},
        {".diff": (3, 3)},
    ],
    ids=["LoRA", "LoKr", "diff"],
)
def test_wrong_shapes_of_other_adapters_are_errors_too(modes, models, suffixes, tmp_path):
    tensors = {f"{ATTENTION}_to_k{suffix}": torch.randn(shape) for suffix, shape in suffixes.items()}
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(LoHaError, match="made for another model.*attn1_to_k.*Nothing was applied"):
        modes.apply(models.model, models.clip, load_adapter(tmp_path / "wrong.safetensors"), 1.0, 1.0, mode="merge")
    assert not models.model.patches


def test_a_file_of_which_nothing_matches_is_an_error(modes, models, tmp_path):
    save_file(
        {f"lora_unet_nowhere_7.{k}": v for k, v in reduced.random_layer((8, 8), 2, "kohya").items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(LoHaError, match="nothing in this file fits(.|\n)*lora_unet_nowhere_7: no such layer"):
        modes.apply(models.model, models.clip, load_adapter(tmp_path / "x.safetensors"), 1.0, 1.0, mode="merge")


def test_an_sdxl_file_on_sd15(modes, models, tmp_path):
    path, _ = reduced.write(reduced.build("sdxl"), "kohya", tmp_path)
    with pytest.raises(LoHaError, match="made for another model"):
        modes.apply(models.model, models.clip, load_adapter(path), 1.0, 1.0, mode="merge")
    assert not models.model.patches and not models.clip.patcher.patches


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strength_must_be_finite(modes, models, strength, tmp_path):
    path, _ = reduced.write(models, "kohya", tmp_path)
    with pytest.raises(LoHaError, match="strength_model is (nan|inf); expected a finite number"):
        modes.apply(models.model, models.clip, load_adapter(path), strength, 1.0, mode="merge")
