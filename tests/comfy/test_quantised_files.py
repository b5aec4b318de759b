"""Quantised files through ComfyUI's own loaders, and city96's where GGUF_PACK names his pack: a small SD1.5 UNet."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.supported_models
import gguf
import pytest
import torch
from torch import Tensor

from loha_core import load_adapter
from loha_core.models.extract import extract
from loha_core.naming.unet import to_diffusers

from . import bases, reduced

UNET = reduced._UNET | {
    "model_channels": 320,
    "channel_mult": (1,),
    "num_res_blocks": [1],
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
}
FORMS = ["scaled fp8", *(["fp8", "int8_tensorwise", "nvfp4"] if bases.IS_NEW else [])]
FORMS += ["Q8_0", "Q4_0"] if bases._gguf_pack() else []


@pytest.fixture(scope="module")
def weights_of_a_unet() -> dict[str, Tensor]:
    config = comfy.supported_models.SD15(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    torch.manual_seed(0)
    return {k: torch.randn(v.shape) * 0.05 for k, v in model.diffusion_model.state_dict().items()}


def is_packed(key: str, weight: Tensor) -> bool:
    """ComfyUI reads the width of the context from the keys of attn2, which nobody packs for that."""
    return weight.dim() == 2 and "transformer_blocks" in key and "attn2.to_k" not in key


def quantised(sd: dict[str, Tensor], form: str, folder: Path):
    """(a loaded patcher, the values that it holds)."""
    stored, held = {}, dict(sd)
    for key, weight in sd.items():
        path = key.removesuffix(".weight")
        if not is_packed(key, weight):
            stored[key] = weight
        elif form == "scaled fp8":
            scale = weight.abs().max() / 448
            stored[key], stored[f"{path}.scale_weight"] = (weight / scale).to(torch.float8_e4m3fn), scale
            held[key] = stored[key].float() * scale
        elif form in ("Q8_0", "Q4_0"):
            kind = getattr(gguf.GGMLQuantizationType, form)
            stored[key] = (gguf.quants.quantize(weight.numpy(), kind), kind)
            held[key] = torch.from_numpy(gguf.quants.dequantize(stored[key][0], kind).copy())
        else:
            name = {"fp8": "float8_e4m3fn"}.get(form, form)
            base = bases.quantised(name)(weight, torch.zeros(len(weight)))
            stored |= {f"{path}.{n}": t for n, t in base.layer.weight.state_dict("weight").items()}
            stored[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
            held[key] = base.held
    if form in ("Q8_0", "Q4_0"):
        return by_city96(stored, folder / f"{form}.gguf"), held
    if form == "scaled fp8":
        stored["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    prefixed = {f"model.diffusion_model.{key}": value for key, value in stored.items()}
    return comfy.sd.load_diffusion_model_state_dict(prefixed, model_options={"dtype": None}), held


def by_city96(stored, path: Path):
    import folder_paths

    writer = gguf.GGUFWriter(str(path), "sd1")
    for key, value in stored.items():
        data, kind = value if isinstance(value, tuple) else (value.numpy(), None)
        writer.add_tensor(key, data, raw_dtype=kind)
        if value is not data and isinstance(value, Tensor) and value.dim() > 2:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder_paths.add_model_folder_path("diffusion_models", str(path.parent))
    folder_paths.add_model_folder_path("unet_gguf", str(path.parent))
    loader = sys.modules["gguf_pack.nodes"].UnetLoaderGGUF()
    return loader.load_unet(path.name)[0]


def output(patcher) -> Tensor:
    comfy.model_management.load_models_gpu([patcher])
    torch.manual_seed(5)
    y = patcher.model.apply_model(
        torch.randn(1, 4, 16, 16), torch.ones(1), c_crossattn=torch.randn(1, 77, 768), transformer_options={}
    )
    return y.double()


@torch.inference_mode()  # as a graph runs
@pytest.mark.parametrize("form", FORMS)
def test_a_file(modes, weights_of_a_unet, form, tmp_path, capsys):
    patcher, held = quantised(weights_of_a_unet, form, tmp_path)
    reference = comfy.sd.load_diffusion_model_state_dict(
        {f"model.diffusion_model.{key}": value for key, value in held.items()}, model_options={"dtype": torch.float32}
    )
    models = reduced.Models("sd15", reference, None)
    adapter = load_adapter(reduced.write(models, "kohya-ldm", tmp_path)[0])
    exact_plain, plain = output(reference), output(patcher)
    merged, _, report = modes.apply(reference, None, adapter, 1.0, 1.0, mode="merge")
    assert not report.unmatched
    exact = output(merged)
    del merged
    effect, noise = (exact - exact_plain).norm(), (plain - exact_plain).norm()
    errors = {}
    for mode in ("auto", "live", "merge"):
        adapted, _, report = modes.apply(patcher, None, adapter, 1.0, 1.0, mode=mode)
        errors[mode] = float((output(adapted) - exact).norm() / effect)
        del adapted
    with capsys.disabled():
        shown = ", ".join(f"{mode} {error:.1e}" for mode, error in errors.items())
        print(f"\n    {form:<16} error as a share of the effect: {shown}; the base's own {noise / effect:.1e}", end="")
    assert effect > 0.01 * exact_plain.norm()
    assert max(errors["auto"], errors["live"]) < 0.01 + 2 * float(noise / effect)
    assert errors["merge"] < 0.01 + 2 * float(noise / effect) + (0 if form.startswith("Q") else 0.5)
    assert torch.equal(output(patcher), plain)
    comfy.model_management.unload_all_models()
    extraction(modes, patcher, adapter)


def extraction(modes, patcher, adapter) -> None:
    """What the node Extract LoHa finds between a quantised model and itself with a LoHa of rank 3, of matrix rank 9."""
    Patched = sys.modules["ComfyUI-LoHa.nodes.graph.extract"].Patched
    for mode in ("live", "merge"):
        adapted, _, _ = modes.apply(patcher, None, adapter, 0.5, 1.0, mode=mode)
        models = Patched("base", patcher, None), Patched("tuned", adapted, None)
        found = extract(*models, rank=9, method="svd", only="attn1_to_(q|k)").adapter.layers
        assert len(found) == 2 * 4
        for name, factors in found.items():
            native = next(other for other in adapter.layers if to_diffusers(other[10:]) == name[10:])
            wanted = 0.5 * adapter.layers[native].delta()
            assert (factors.delta() - wanted).norm() < 0.01 * wanted.norm()
