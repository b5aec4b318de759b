"""Impact: exact norms, what pictures lose without a part, and the adapter without the least of them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loha_core import Adapter, LoHaError, LoHaFactors, load_adapter
from loha_core.blocks import block_of_key

from . import reduced
from .test_grid import conditioning, empty, error, sampled

SETTINGS = {"steps": 2, "cfg": 2.0, "sampler_name": "euler_ancestral", "scheduler": "normal"}


@pytest.fixture(scope="module")
def graph(pack: ModuleType) -> ModuleType:
    return sys.modules[f"{pack.__name__}.nodes.graph.impact"]


@pytest.fixture(scope="module")
def host(pack: ModuleType) -> ModuleType:
    return sys.modules[f"{pack.__name__}.nodes.host.impact"]


@pytest.fixture(scope="module")
def models() -> reduced.Models:
    return reduced.build("sd15", narrow=True)


@pytest.fixture(scope="module")
def written(models, tmp_path_factory) -> Any:
    """A file with LoHas, flat and Tucker, and the float64 update of each weight."""
    return reduced.write(models, "kohya", tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def adapter(written) -> Adapter:
    return load_adapter(written[0])


def run(graph: ModuleType, models: reduced.Models, adapter: Adapter, **changes: Any) -> Any:
    inputs = {"parts": "blocks", "keep": 0.5, "strength": 10.0, "seeds": 2, "first_seed": 7} | SETTINGS | changes
    prompts = {"positive": conditioning(models, 1), "negative": conditioning(models, 2)}
    connected = {"model": models.model, "loha": adapter, "latent": empty()} | prompts
    return graph.LoHaImpact.execute(**connected, **inputs)


@pytest.mark.parametrize("loaded", [False, True], ids=["", "while it is merged into the model"])
def test_norms_are_those_of_the_float64_updates(host, modes, models, written, adapter, loaded):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    weights = models.weights()
    if loaded:
        merged, _, _ = modes.apply(models.model, None, adapter, 1.0, 0.0, mode="merge")
        comfy.model_management.load_models_gpu([merged])
    found = host.layer_norms(models.model, adapter)
    comfy.model_management.unload_all_models()
    assert {layer.key for layer in found} == {key for label, key in written[1] if label == "MODEL"}
    for layer in found:
        assert layer.update == pytest.approx(float(written[1]["MODEL", layer.key].norm()), rel=1e-6)
        assert layer.weight == pytest.approx(float(weights["MODEL", layer.key].double().norm()), rel=1e-9)
    wanted = np.hypot(*(layer.update for layer in found[:2])) / np.hypot(*(layer.weight for layer in found[:2]))
    assert host.relative(found[:2]) == pytest.approx(wanted)


def test_norms_of_other_kinds_of_layers(host, models):
    key = "diffusion_model.input_blocks.1.1.proj_in"
    shape = models.model.model.state_dict()[f"{key}.weight"].shape
    up, down, diff = torch.randn(shape[0], 3), torch.randn(3, shape[1]), torch.randn(shape[0])
    extras = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.diff_b": diff}
    lokr = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(shape[0] // 2, shape[0] // 2)}
    extras |= {f"{key.replace('_in', '_out')}.{name}": tensor for name, tensor in lokr.items()}
    found = {layer.key: layer.update for layer in host.layer_norms(models.model, Adapter({}, extras))}
    assert found[f"{key}.weight"] == pytest.approx(float((up.double() @ down.double()).norm()), rel=1e-6)
    assert found[f"{key}.bias"] == pytest.approx(float(diff.norm()))
    assert found[f"{key.replace('_in', '_out')}.weight"] is None


def test_many_knock_outs_at_once_are_as_many_single_runs(graph, host, modes, models, adapter):
    out = run(graph, models, adapter)
    ranked = out.ui["parts"]
    assert [impact for _, impact, _, _ in ranked] == sorted((impact for _, impact, _, _ in ranked), reverse=True)
    latents = {}
    for seed in (7, 8):
        for name, off in (("none", "-"), ("all", ""), ("IN01", "IN01"), ("OUT02", "OUT02"), ("BASE", "BASE")):

            def blocks(key: str, _: str, off: str = off) -> float:
                block = block_of_key(key)
                return float(off != "" and off != (f"{block[0]}{block[1]:02d}" if block else "BASE"))

            model, _, _ = modes.apply(models.model, None, adapter, 10.0, 0.0, mode="live", blocks=blocks)
            latents[seed, name] = _sampled(models, model, seed)
    total = lambda name: sum(float((latents[s, name] - latents[s, "none"]).square().sum()) for s in (7, 8))  # noqa: E731
    impacts = {name: impact for name, impact, _, _ in ranked}
    for name in ("IN01", "OUT02", "BASE"):
        assert impacts[name] == pytest.approx((total(name) / total("all")) ** 0.5, rel=1e-3), name
    assert impacts["OUT02"] > 0.01


def _sampled(models: reduced.Models, model: Any, seed: int) -> torch.Tensor:
    import comfy.sample

    noise = comfy.sample.prepare_noise(empty()["samples"], seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 2, 2.0, "euler_ancestral", "normal", conditioning(models, 1), conditioning(models, 2),
            empty()["samples"], disable_pbar=True, seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize("parts", ["blocks", "kinds of layers", "kinds in each block"])
def test_the_pruned_adapter_is_the_adapter_at_the_block_strengths(graph, modes, models, adapter, parts):
    out = run(graph, models, adapter, parts=parts, seeds=1)
    blocks, pruned, text, image = out.result
    kept = {name for name, _, _, is_kept in out.ui["parts"] if is_kept}
    others = len(out.ui["parts"]) - ("BASE" in kept)
    assert len(kept - {"BASE"}) == round(0.5 * others) and (parts != "blocks" or "BASE" in kept)
    texts = {name for name in adapter.layers if name.startswith("lora_te")}
    assert texts < pruned.layers.keys() < adapter.layers.keys()
    assert '"prune"' in pruned.metadata["loha_history"]
    whole, _, _ = modes.apply(models.model, None, adapter, 10.0, 0.0, blocks=blocks)
    part, _, _ = modes.apply(models.model, None, pruned, 10.0, 0.0)
    all_of_it, _, _ = modes.apply(models.model, None, adapter, 10.0, 0.0)
    found = sampled(models, part, empty())
    assert error(found, sampled(models, whole, empty())) < 1e-6
    assert error(found, sampled(models, all_of_it, empty())) > 1e-5
    assert all(name in text for name in kept) and image.shape[-1] == 3
    # What it says to type is the same.
    typed = text.partition("To type in LoHa Block Strength:\n")[2]
    vector, rules = (typed, "") if parts == "blocks" else ("", typed)
    again = type(blocks).parse(list(models.model.model.state_dict()), vector, rules)
    assert all(again(key) == blocks(key) for key in models.model.model.state_dict())


def test_a_part_that_does_nothing_comes_last(graph, models, written):
    tensors = load_file(written[0])
    adapter = load_adapter(written[0])
    off = {name for name in adapter.layers if "down_blocks_1" in name}
    for name in off:
        f = adapter.layers[name]
        adapter.layers[name] = LoHaFactors(**f.tensors() | {"w1_a": f.w1_a * 0}, alpha=f.alpha)
    assert off and tensors
    ranked = run(graph, models, adapter, seeds=1).ui["parts"]
    assert {name for name, impact, norm, _ in ranked if impact == norm == 0} == {"IN03", "IN04"}
    assert [name for name, *_ in ranked[-2:]] == ["IN03", "IN04"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.0}, "at strength 0 it changes nothing; try another strength"),
        ({"parts": "halves"}, "parts is 'halves'; expected one of"),
        ({"keep": 0.0}, "keep is 0"),
        ({"keep": float("nan")}, "keep is nan"),
    ],
)
def test_inputs_that_make_no_sense(graph, models, adapter, changes, message):
    with pytest.raises(LoHaError, match=message):
        run(graph, models, adapter, seeds=1, **changes)


def test_an_adapter_of_another_model_is_refused(graph, models):
    other = Adapter({"lora_unet_nowhere": LoHaFactors(*[torch.ones(4, 1), torch.ones(1, 6)] * 2, alpha=1)})
    with pytest.raises(LoHaError, match="nothing in this file fits the model"):
        run(graph, models, other)
