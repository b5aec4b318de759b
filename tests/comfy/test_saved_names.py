"""What we load and save again, ComfyUI's own loader finds as it did before: as many layers, the same updates."""

from __future__ import annotations

import sys

import comfy.lora
import pytest
import torch
from safetensors.torch import load_file, save_file

from loha_core import load_adapter, save_adapter

from . import reduced

PREFIXES = ("transformer.", "diffusion_model.", "lycoris_", "lora_transformer_", "lora_unet_")


@pytest.fixture(scope="module", params=["flux", "sd3"])
def model(request):
    return reduced.build(request.param).model.model


def native(model, path):
    """Weight -> what ComfyUI's own loader would add to it; two slices of a weight are two entries."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(load_file(path), keys, log_missing=False)
    state = model.state_dict()
    found = {}
    for target, patch in patches.items():
        key, place = (target, None) if isinstance(target, str) else (target[0], target[1])
        weight = torch.zeros(state[key].shape)
        function = target[2] if not isinstance(target, str) and len(target) > 2 else None
        found[key, place] = comfy.lora.calculate_weight([(1.0, patch, 1.0, place, function)], weight, key)
    return found


def write(model, prefix, path):
    """A LoHa for every name of that kind that the native loader knows, on matrices."""
    torch.manual_seed(0)
    state, tensors = model.state_dict(), {}
    for name, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        key = target if isinstance(target, str) else target[0]
        shape = list(state[key].shape) if key in state else []  # ComfyUI's table names more than this model has
        if name.startswith(prefix) and len(shape) == 2 and "linear1_qkv" not in name:
            if not isinstance(target, str) and target[1] is not None:
                shape[target[1][0]] = target[1][2]
            tensors |= {f"{name}.{k}": t for k, t in reduced.random_layer(tuple(shape), 2, "diffusers").items()}
    save_file(tensors, path)


def steps(pack):
    merging = sys.modules[f"{pack.__name__}.nodes.graph.merge"]
    return {
        "saved": lambda a: a,
        "merged": lambda a: merging.merge([a, a], [0.5, 0.5]).adapter,
        "converted": lambda a: merging.convert(a, alpha=8.0).adapter,
        "as a LoRA": lambda a: merging.convert(a, compression=merging.Compression("exact", kind="lora")).adapter,
    }


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("step", ["saved", "merged", "converted", "as a LoRA"])
def test_the_native_loader_finds_what_it_found(pack, model, prefix, step, tmp_path):
    write(model, prefix, tmp_path / "in.safetensors")
    before = native(model, tmp_path / "in.safetensors")
    save_adapter(steps(pack)[step](load_adapter(tmp_path / "in.safetensors")), tmp_path / "out.safetensors")
    after = native(model, tmp_path / "out.safetensors")
    assert before and before.keys() == after.keys()
    for place, update in before.items():
        assert float((after[place] - update).norm() / update.norm()) < 1e-5, place
