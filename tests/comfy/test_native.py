"""Side by side with ComfyUI's own LoRA loader: the same on plain files; right where it is not (DESIGN §11)."""

from __future__ import annotations

import json
import logging

import comfy.lora
import comfy.sd
import pytest
import torch
from comfy.weight_adapter import LoHaAdapter
from safetensors.torch import load_file, save_file

from loha_core import LoHaFactors, load_adapter

from . import reduced
from .test_patching import loaded


@pytest.fixture
def say(capsys):
    """Print through pytest's capture: these figures are the point of the test."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="")

    return line


def relative(found, exact) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def native_patch(tensors):
    """What ComfyUI's loader makes of one module's tensors."""
    return comfy.lora.load_lora({f"x.{k}": v for k, v in tensors.items()}, {"x": "w.weight"}, log_missing=False)


def patched(patch, weight, strength=1.0, function=None):
    return comfy.lora.calculate_weight([(strength, patch, 1.0, None, function)], weight.clone(), "w.weight")


@pytest.fixture
def ours(patches):
    """Our patch for one module's tensors, from a file, as the nodes make it."""

    def make(tensors, tmp_path):
        save_file({f"lora_unet_w.{k}": v.contiguous() for k, v in tensors.items()}, tmp_path / "one.safetensors")
        [factors] = load_adapter(tmp_path / "one.safetensors").layers.values()
        return patches.LoHaPatch.from_factors(factors)

    return make


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_plain_files_give_what_the_native_loader_gives(modes, name, tmp_path, say):
    models = reduced.build(name)
    path, wanted = reduced.write(models, "kohya-ldm", tmp_path)
    native, native_clip = comfy.sd.load_lora_for_models(models.model, models.clip, load_file(path), 0.8, 0.6)
    model, clip, _ = modes.apply(models.model, models.clip, load_adapter(path), 0.8, 0.6, mode="merge")
    with loaded(native, native_clip.patcher):
        theirs = models.weights()
    with loaded(model, clip.patcher):
        mine = models.weights()
    worst = max(relative(mine[place], theirs[place].double()) for place in wanted)
    say(f"{name}: {len(wanted)} weights, largest difference to the native loader {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_dora(ours, axis, strength, tmp_path, say):
    torch.manual_seed(0)
    weight = torch.randn(24, 16, 3, 3) * 0.05  # the update's own size
    tensors = reduced.random_layer(tuple(weight.shape), 3, "kohya")
    magnitude = torch.rand([n if d == axis else 1 for d, n in enumerate(weight.shape)]) + 0.5
    adapted = weight.double() + reduced.delta64(tensors, tuple(weight.shape))
    norm = torch.linalg.vector_norm(adapted, dim=[d for d in range(4) if d != axis], keepdim=True)
    exact = torch.lerp(weight.double(), magnitude.double() * adapted / norm, strength)
    tensors["dora_scale"] = magnitude
    mine = relative(patched(ours(tensors, tmp_path), weight, strength), exact)
    theirs = relative(patched(native_patch(tensors)["w.weight"], weight, strength), exact)
    say(f"DoRA on axis {axis}, strength {strength}: ours {mine:.1e}, native {theirs:.1e}")
    assert mine < 1e-6
    assert axis == 1 or theirs > 1e-2  # when this fails, ComfyUI has been mended


@pytest.mark.parametrize("kernel", [(5,), (3, 3), (3, 2, 2)], ids=["Conv1d", "Conv2d", "Conv3d"])
def test_tucker(ours, kernel, tmp_path, say):
    torch.manual_seed(0)
    weight = torch.randn(12, 8, *kernel)
    tensors = {"alpha": torch.tensor(2.0)}
    for half in "12":
        tensors |= {f"hada_t{half}": torch.randn(4, 4, *kernel)}
        tensors |= {f"hada_w{half}_a": torch.randn(4, 12), f"hada_w{half}_b": torch.randn(4, 8)}
    halves = [
        torch.einsum("pq...,po,qi->oi...", *(tensors[f"hada_{n}"].double() for n in (f"t{h}", f"w{h}_a", f"w{h}_b")))
        for h in "12"
    ]
    exact = weight.double() + 0.5 * halves[0] * halves[1]
    mine = relative(patched(ours(tensors, tmp_path), weight), exact)
    try:
        theirs = f"{relative(patched(native_patch(tensors)['w.weight'], weight), exact):.1e}"
    except RuntimeError as error:
        theirs = f"raises: {str(error)[:60]}"
    say(f"Tucker, {len(kernel)} kernel axes: ours {mine:.1e}, native {theirs}")
    assert mine < 1e-6
    assert (len(kernel) == 2) == (not theirs.startswith("raises"))


def test_onetrainer_convolution(ours, tmp_path, say):
    torch.manual_seed(0)
    weight = torch.randn(12, 8, 3, 3)
    tensors = reduced.random_layer(tuple(weight.shape), 4, "onetrainer")
    exact = weight.double() + reduced.delta64(tensors, tuple(weight.shape))
    mine = relative(patched(ours(tensors, tmp_path), weight), exact)
    with pytest.raises(RuntimeError) as native:
        patched(native_patch(tensors)["w.weight"], weight)
    say(f"OneTrainer's 4-D factors: ours {mine:.1e}, native raises: {str(native.value)[:60]}")
    assert mine < 1e-6


def test_peft_folder(modes, tmp_path, say):
    models = reduced.build("sd15")
    path, wanted = reduced.write(models, "peft", tmp_path)
    before = models.weights()
    model, clip, _ = modes.apply(models.model, models.clip, load_adapter(path), 1.0, 1.0, mode="merge")
    with loaded(model, clip.patcher):
        after = models.weights()
    mine = max(relative(after[place], before[place].double() + update) for place, update in wanted.items())
    tensors = load_file(path / "unet" / "adapter_model.safetensors")
    native, _ = comfy.sd.load_lora_for_models(models.model, None, tensors, 1.0, 1.0)
    say(f"PEFT folder: ours {mine:.1e} on {len(wanted)} weights; native patches {len(native.patches)} weights")
    assert mine < 1e-6 and not native.patches
    # A name that the native loader does match shows its second error: alpha is not in a PEFT file, so it takes 1.
    module, scale = "diffusion_model.input_blocks.0.0", json.loads((path / "unet/adapter_config.json").read_text())
    pieces = {k.partition(".hada_")[2]: v for k, v in tensors.items() if "conv_in." in k}
    native_patches = comfy.lora.load_lora({f"x.hada_{k}": v for k, v in pieces.items()}, {"x": f"{module}.weight"})
    weight = before["MODEL", f"{module}.weight"]
    exact = weight.double() + wanted["MODEL", f"{module}.weight"]
    off = relative(patched(native_patches[f"{module}.weight"], weight), exact)
    say(f"the same factors by the native adapter: error {off:.1e} (scale 1 for {scale['alpha'] / scale['r']})")
    assert off > 1e-2


def test_a_wrong_shape_is_an_error_not_a_log_line(modes, tmp_path, say, caplog):
    weight = torch.randn(12, 8)
    tensors = reduced.random_layer((12, 9), 4, "kohya")
    with caplog.at_level(logging.ERROR):
        silent = patched(native_patch(tensors)["w.weight"], weight)
    assert torch.equal(silent, weight) and "loha" in caplog.text
    say(f"wrong shape: native leaves the weight as it is and logs '{caplog.messages[0][:50]}'; ours raises")
    models = reduced.build("sd15")
    path, _ = reduced.write(models, "kohya", tmp_path)
    broken = load_file(path)
    key = next(k for k in broken if k.endswith("attn2_to_k.hada_w1_b"))
    for half in "12":
        name = key.replace("w1_b", f"w{half}_b")
        broken[name] = torch.randn(broken[name].shape[0], 2048)
    save_file(broken, path)
    with pytest.raises(ValueError, match=r"made for another model: 1 of \d+ layers(.|\n)*attn2_to_k") as raised:
        modes.apply(models.model, models.clip, load_adapter(path), 1.0, 1.0, mode="merge")
    assert "768" in str(raised.value) and "2048" in str(raised.value)
    assert not models.model.patches and not models.clip.patcher.patches


def test_reordered_weights(patches):
    """ComfyUI swaps the halves of some weights on the way (adaLN); the update and DoRA's magnitudes go with them."""

    def swap(x):
        return torch.cat(x.chunk(2, dim=0)[::-1])

    torch.manual_seed(0)
    weight, shape = torch.randn(12, 8), (12, 8)
    tensors = reduced.random_layer(shape, 3, "kohya")
    update = swap(reduced.delta64(tensors, shape))
    factors = {k.removeprefix("hada_"): v for k, v in tensors.items()}
    patch = patches.LoHaPatch.from_factors(LoHaFactors(**factors))
    assert relative(patched(patch, weight, 0.7, swap), weight.double() + 0.7 * update) < 1e-6
    magnitude = torch.rand(12, 1) + 0.5
    patch = patches.LoHaPatch.from_factors(LoHaFactors(**factors, dora_scale=magnitude))
    adapted = weight.double() + update
    exact = torch.lerp(weight.double(), swap(magnitude).double() * adapted / adapted.norm(dim=1, keepdim=True), 0.7)
    assert relative(patched(patch, weight, 0.7, swap), exact) < 1e-6


def test_slices_of_fused_weights(patches):
    """ComfyUI hands us a view of a fused weight (Flux's q, k, v); only that view may change."""
    torch.manual_seed(0)
    weight = torch.randn(24, 8)
    tensors = reduced.random_layer((8, 8), 3, "kohya")
    patch = patches.LoHaPatch.from_factors(LoHaFactors(**{k.removeprefix("hada_"): v for k, v in tensors.items()}))
    result = comfy.lora.calculate_weight([(1.0, patch, 1.0, (0, 8, 8), None)], weight.clone(), "w.weight")
    exact = weight.double()
    exact[8:16] += reduced.delta64(tensors, (8, 8))
    assert relative(result, exact) < 1e-6
    assert torch.equal(result[:8], weight[:8]) and torch.equal(result[16:], weight[16:])


@pytest.mark.parametrize("named", [False, True], ids=["plain tuples", "NamedTuples"])
def test_newer_comfyui_can_rebuild_the_patch(patches, named):
    """0.33 moves adapters as type(a)(a.loaded_keys, moved a.weights), and walks tuples for the tensors in them."""

    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.clone()
        if not isinstance(value, tuple):
            return value
        items = map(moved, value)
        return type(value)(*items) if named and hasattr(value, "_fields") else tuple(items)

    both = [
        patches.LoHaPatch.from_factors(LoHaFactors(**{k.removeprefix("hada_"): v for k, v in tensors.items()}))
        for tensors in (reduced.random_layer((6, 5), rank, "kohya") for rank in (2, 3))
    ]
    patch = patches.LoHaPatch(set(), both[0].scaled(0.7) + both[1].scaled(-0.4))
    again = type(patch)(patch.loaded_keys, moved(patch.weights))
    assert isinstance(patch.weights, tuple) and not isinstance(patch, LoHaAdapter)
    assert [term.strength for term in again.weights] == [0.7, -0.4]
    weight = torch.randn(6, 5)
    assert torch.equal(patched(patch, weight), patched(again, weight)) and not torch.equal(
        patched(again, weight), weight
    )
