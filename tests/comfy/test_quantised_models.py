"""A Flux whose layers are held as people's are: what a LoHa does to it, in every mode, beside an fp32 reference."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from torch import nn

from loha_core import Adapter, LoHaFactors

from . import bases, training

HELD = [name for name in ("scaled fp8", "fp8", "nvfp4", "mxfp8", "int8", "GGUF Q8_0", "GGUF Q4_0", "NF4")]
HELD = [name for name in HELD if name in bases.BASES]


def random_factors(shape: tuple[int, int], dora: int | None = None) -> LoHaFactors:
    out, inner = shape
    a, b = torch.randn(2, out, 4) * 0.25, torch.randn(2, 4, inner) * 0.25
    magnitude = None
    if dora is not None:
        magnitude = torch.full([n if d == dora else 1 for d, n in enumerate(shape)], 0.05 * shape[1 - dora] ** 0.5)
    return LoHaFactors(a[0], b[0], a[1], b[1], 8.0, dora_scale=magnitude)


def adapter_for(model: nn.Module) -> Adapter:
    """Fused weights by diffusers' names, in parts; others by their own, every third with DoRA on either axis."""
    torch.manual_seed(3)
    layers = {}
    for n in range(2):
        for part in ("to_q", "to_k", "to_v"):
            layers[f"transformer.transformer_blocks.{n}.attn.{part}"] = random_factors((128, 128))
    linear = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and ".qkv" not in path]
    for n, (path, m) in enumerate((p, m) for p, m in linear if "blocks" in p and "img_attn" not in p):
        dora = {0: 0, 1: 1}.get(n % 6)
        layers[f"diffusion_model.{path}"] = random_factors((m.out_features, m.in_features), dora)
    return Adapter(layers, source="random")


def hold(model: nn.Module, name: str) -> tuple[int, type]:
    """Replace the blocks' linear layers; the given weights become what is held."""
    count, patcher = 0, None
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "blocks" in path and layer.bias is not None:
            base = bases.BASES[name](layer.weight.data.clone(), layer.bias.data)
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, base.layer)
            count, patcher = count + 1, base.patcher
    assert patcher is not None
    return count, patcher


def output(patcher) -> torch.Tensor:
    comfy.model_management.load_models_gpu([patcher])
    torch.manual_seed(5)
    x, context, pooled = torch.randn(1, 16, 16, 16), torch.randn(1, 24, 4096), torch.randn(1, 768)
    with torch.inference_mode():
        return patcher.model.apply_model(
            x, torch.ones(1), c_crossattn=context, y=pooled, guidance=torch.tensor([3.5]), transformer_options={}
        ).double()


@pytest.fixture(scope="module", params=HELD)
def held(request, weights):
    """(a model held so, the fp32 model of the values that it holds)."""
    m, reference = training.models("flux"), training.models("flux")
    inner = m.model.model.diffusion_model
    _, patcher = hold(inner, request.param)
    plain = reference.model.model.diffusion_model
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.copy_(weights.dense(inner.get_submodule(path)))
    return request.param, patcher(m.model.model, bases.CPU, bases.CPU), reference.model, adapter_for(plain)


@pytest.mark.parametrize("mode", ["auto", "live", "merge"])
def test_the_effect_of_a_loha(modes, held, mode, capsys):
    name, patcher, reference, adapter = held
    if (name, mode) == ("NF4", "merge"):
        with pytest.raises(Exception, match="Linear4bit.*set mode to live"):
            modes.apply(patcher, None, adapter, 0.5, 1.0, mode=mode)
        return
    exact_plain, plain = output(reference), output(patcher)
    wanted, _, report = modes.apply(reference, None, adapter, 0.5, 1.0, mode="merge")
    assert not report.unmatched
    exact = output(wanted)
    effect, noise = (exact - exact_plain).norm(), (plain - exact_plain).norm()
    adapted, _, report = modes.apply(patcher, None, adapter, 0.5, 1.0, mode=mode)
    found = output(adapted)
    comfy.model_management.unload_all_models()
    del adapted
    assert torch.equal(output(patcher), plain)
    error = (found - exact).norm()
    with capsys.disabled():
        chosen = next(note for note in report.notes if note.startswith("mode"))
        print(
            f"\n    {name:<12}{chosen:<12} error {error / effect:.1e} of the effect, the base's own rounding of its "
            f"products {noise / effect:.1e}", end="",
        )  # fmt: skip
    assert effect > 0.1 * exact_plain.norm()
    assert error < 0.01 * effect + (2 * noise if mode != "merge" else noise + merged_rounding(name) * exact.norm())


def merged_rounding(name: str) -> float:
    """What is lost where the sum is rounded as the base was; GGUF merges as it unpacks, and loses nothing."""
    return {"GGUF Q8_0": 0.0, "GGUF Q4_0": 0.0, "nvfp4": 0.2, "int8": 0.03}.get(name, 0.06)
