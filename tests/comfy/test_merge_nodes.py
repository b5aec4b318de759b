"""Merging, resizing, converting and extracting by the nodes; ComfyUI's own loader reads what comes out."""

from __future__ import annotations

import sys

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

from loha_core import Adapter, LoHaError, LoHaFactors, load_adapter, save_adapter

from . import reduced
from .test_patching import loaded


@pytest.fixture(scope="module")
def models():
    return reduced.build("sd15")


@pytest.fixture(scope="module")
def merge_nodes(pack):
    return sys.modules[f"{pack.__name__}.nodes.graph.merge"]


@pytest.fixture(scope="module")
def extract_nodes(pack):
    return sys.modules[f"{pack.__name__}.nodes.graph.extract"]


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """Three adapters of one model: Tucker LoHas, flat LoHas in half precision, and LoRAs; and their float64 updates."""
    folder = tmp_path_factory.mktemp("adapters")
    first, one = reduced.write(models, "kohya", folder)
    second, two = reduced.write(models, "diffusers", folder, rank=2)
    halved = {k: t.half() if t.dim() else t for k, t in load_file(second).items()}
    save_file(halved, second)
    names = reduced.diffusers_names(models)
    tensors, three = {}, {}
    for number, ((label, key), shape) in enumerate(reduced.layers(models).items()):
        if number % 2:
            continue  # a layer that this adapter lacks
        module = reduced.SPELLINGS["kohya"](names[label, key], key, models)
        up, down = torch.randn(shape[0], 2) * 0.1, torch.randn(2, *shape[1:]) * 0.1
        tensors[f"{module}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (len(shape) - 2))
        tensors[f"{module}.lora_down.weight"], tensors[f"{module}.alpha"] = down, torch.tensor(5.0)
        three[label, key] = 2.5 * (up.double() @ down.double().flatten(1)).reshape(shape)
    third = folder / "lora.safetensors"
    save_file(tensors, third)
    return (first, second, third), (one, two, three)


def run(node, **inputs):
    """A node's outputs; the picture that it shows needs no server."""
    with torch.inference_mode():  # as the graph runs it
        return node.execute(**inputs).args


@pytest.fixture(autouse=True)
def no_preview(monkeypatch, pack):
    """Pictures for the page are written into ComfyUI's temporary folder; here they go nowhere."""
    from comfy_api.latest import ui

    class Nowhere:
        def __init__(self, image, **_):
            self.image = image

        def as_dict(self):
            return {"images": []}

    monkeypatch.setattr(ui, "PreviewImage", Nowhere)


SETTINGS = {"bound": "rank", "rank": 8, "amount": 0.99}


def test_exact_merge_through_the_native_loader(merge_nodes, models, files, tmp_path):
    paths, updates = files
    weights = (0.7, -0.4, 1.3)
    adapters = {f"loha_{n}": load_adapter(path) for n, path in enumerate(paths, 1)}
    scales = {f"weight_{n}": weight for n, weight in enumerate(weights, 1)}
    merged, text, image = run(merge_nodes.LoHaMerge, method="exact", **SETTINGS, **adapters, **scales)
    assert "relative error 0" in text and image.shape[0] == 1 and image.shape[-1] == 3
    save_adapter(merged, tmp_path / "merged.safetensors")
    before = models.weights()
    native = load_file(tmp_path / "merged.safetensors")
    model, clip = comfy.sd.load_lora_for_models(models.model, models.clip, native, 1.0, 1.0)
    with loaded(model, clip.patcher):
        after = models.weights()
    for place, update in updates[0].items():
        others = [(weights[0], update), (weights[2], updates[2].get(place))]
        wanted = sum(w * u for w, u in others if u is not None)
        wanted = wanted + weights[1] * _as_saved(paths[1], place, models, update.shape)
        found = after[place].double() - before[place].double()
        # Rounding of W + ΔW in float32 is the floor of this comparison.
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5, place


def _as_saved(path, place, models, shape):
    """The float64 update of one layer from the tensors that the file holds."""
    module = reduced.SPELLINGS["diffusers"](reduced.diffusers_names(models)[place], place[1], models)
    tensors = {k.removeprefix(f"{module}."): t for k, t in load_file(path).items() if k.startswith(f"{module}.")}
    return reduced.delta64(tensors, tuple(shape))


@pytest.mark.parametrize("method", ["svd", "ties", "dare", "slerp", "magnitude_prune"])
def test_every_method_goes_on_a_model(merge_nodes, modes, models, files, method):
    first, second = (load_adapter(path) for path in files[0][:2])
    inputs = {"loha_1": first, "loha_2": second, "weight_1": 1.0, "weight_2": 0.5}
    merged, text, _ = run(merge_nodes.LoHaMerge, method=method, **SETTINGS, **inputs)
    assert {f.rank for f in merged.layers.values()} <= set(range(1, 9))
    _, _, report = modes.apply(models.model, models.clip, merged, 1.0, 1.0)
    assert not report.unmatched and len(report.matched["MODEL"]) == sum(k[0] == "MODEL" for k in files[1][0])
    assert "relative error" in text


def test_weights_act(merge_nodes, files):
    adapter = load_adapter(files[0][1])
    inputs = {"loha_1": adapter, "loha_2": adapter, "weight_1": 2.0, "weight_2": -0.5}
    merged, *_ = run(merge_nodes.LoHaMerge, method="exact", **SETTINGS, **inputs)
    for name, factors in adapter.layers.items():
        assert torch.allclose(merged.layers[name].delta(), 1.5 * factors.delta(), rtol=1e-4, atol=1e-6)


def test_resize_and_convert(merge_nodes, files):
    adapter = load_adapter(files[0][1])
    resized, text, _ = run(merge_nodes.LoHaResize, loha=adapter, **{**SETTINGS, "rank": 2}, method="svd")
    assert set(resized.ranks) == {2} and "relative error" in text
    lora, *_ = run(merge_nodes.LoHaConvert, loha=adapter, kind="LoRA", rank=0, names="LyCORIS", alpha=0.0, dtype="fp32")
    assert not lora.layers and any(key.endswith("lora_up.weight") for key in lora.extras)
    back, *_ = run(
        merge_nodes.LoHaConvert, loha=lora, kind="LoHa", rank=0, names="ComfyUI", alpha=1.0, dtype="as it is"
    )
    assert set(back.alphas) == {1.0} and all(name.startswith(("diffusion_model.", "text_enc")) for name in back.layers)
    found = dict(zip(adapter.layers, back.layers.values(), strict=True))  # the order stays
    for name, factors in adapter.layers.items():
        update = factors.delta().float().flatten(1)
        assert float((found[name].delta().flatten(1) - update).norm() / update.norm()) < 1e-3, name  # halves


@pytest.mark.parametrize("mode", ["merge", "live"])
def test_extract_gives_back_what_was_put_in(extract_nodes, modes, models, files, mode):
    adapter = load_adapter(files[0][1])
    model, clip, _ = modes.apply(models.model, models.clip, adapter, 0.8, 0.6, mode=mode)
    found, text, _ = run(
        extract_nodes.LoHaExtract, base=models.model, tuned=model, base_clip=models.clip, tuned_clip=clip,
        rank=4, conv_rank=4, method="svd",
    )  # fmt: skip
    assert len(found.layers) == len(adapter.layers)  # rank 2: matrix rank 4
    wanted = {place: (0.8 if place[0] == "MODEL" else 0.6) for place in files[1][1]}
    bound = extract_nodes.Patched("", model, clip)
    assert all(key in bound.shapes() for key in ("diffusion_model.input_blocks.0.0.weight",))
    error = float(text.split("relative error ")[1].split()[0])
    assert error < 1e-3 and len(wanted) == len(found.layers)


def test_nonsense(merge_nodes, extract_nodes, models, files):
    adapter = load_adapter(files[0][1])
    other = Adapter({"lora_unet_nowhere": LoHaFactors(*[torch.ones(4, 1), torch.ones(1, 4)] * 2, alpha=1.0)})
    pair = {"loha_1": adapter, "weight_1": 1.0, "weight_2": 1.0, "method": "svd", **SETTINGS}
    with pytest.raises(LoHaError, match="no layer in common"):
        run(merge_nodes.LoHaMerge, loha_2=other, **pair)
    with pytest.raises(LoHaError, match="weights are 0"):
        run(merge_nodes.LoHaMerge, loha_2=adapter, **{**pair, "weight_1": 0.0, "weight_2": 0.0})
    with pytest.raises(LoHaError, match="expected one of"):
        run(merge_nodes.LoHaMerge, loha_2=adapter, **{**pair, "bound": "size"})
    with pytest.raises(LoHaError, match="nothing to extract"):
        run(extract_nodes.LoHaExtract, base=models.model, tuned=models.model, rank=4, conv_rank=4, method="svd")


def test_cancel_stops_a_merge(merge_nodes, files):
    adapter = load_adapter(files[0][1])
    calls = []

    def hook(done, total, *_, **__):
        calls.append(done)
        comfy.model_management.interrupt_current_processing()

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(merge_nodes.LoHaResize, loha=adapter, **SETTINGS, method="svd")
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    assert len(calls) == 1
