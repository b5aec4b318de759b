"""Every dialect on SD1.5 and SDXL: all layers match, the patched weights are right, unpatching leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import comfy.float
import comfy.lora
import comfy.model_management
import pytest
import torch
from comfy.model_patcher import string_to_seed

from loha_core import load_adapter

from . import reduced

STRENGTHS = {"MODEL": 0.7, "CLIP": -0.4}


@contextmanager
def loaded(*patchers) -> Iterator[None]:
    """Loaded and patched by ComfyUI's own memory management; afterwards unloaded and unpatched."""
    comfy.model_management.load_models_gpu(list(patchers), force_patch_weights=True, force_full_load=True)
    try:
        yield
    finally:
        comfy.model_management.unload_all_models()


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request):
    return reduced.build(request.param)


@pytest.mark.parametrize("dialect", reduced.SPELLINGS)
def test_every_layer_of_every_dialect(modes, family, dialect, tmp_path):
    path, wanted = reduced.write(family, dialect, tmp_path)
    before = family.weights()
    adapter = load_adapter(path)
    assert len(adapter.layers) == len(wanted)
    model, clip, report = modes.apply(
        family.model, family.clip, adapter, STRENGTHS["MODEL"], STRENGTHS["CLIP"], mode="merge"
    )
    assert not report.unmatched
    assert {label: len(found) for label, found in report.matched.items()} == {
        label: sum(1 for where, _ in wanted if where == label) for label in ("MODEL", "CLIP")
    }
    with loaded(model, clip.patcher):
        after = family.weights()
        for (label, key), update in wanted.items():
            expected = before[label, key].double() + STRENGTHS[label] * update
            error = (after[label, key].double() - expected).norm() / expected.norm()
            assert error < 1e-6, f"{label} {key}: {error}"
        untouched = before.keys() - wanted.keys()
        assert all(torch.equal(before[place], after[place]) for place in untouched)
    restored = family.weights()
    assert all(torch.equal(before[place], restored[place]) for place in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_rounding_to_the_weights_dtype(modes, name, dtype, tmp_path):
    """W + ΔW, rounded once, as ComfyUI rounds."""
    models = reduced.build(name, dtype)
    path, wanted = reduced.write(models, "kohya", tmp_path)
    before = models.weights()
    model, clip, _ = modes.apply(models.model, models.clip, load_adapter(path), 1.0, 1.0, mode="merge")
    with loaded(model, clip.patcher):
        after = models.weights()
    for (label, key), update in wanted.items():
        base, found = before[label, key], after[label, key]
        assert found.dtype == base.dtype == dtype
        exact = base.double() + update
        # ComfyUI rounds: to nearest, or for fp8 stochastically from a seed that the key gives.
        rounded = comfy.float.stochastic_rounding(exact.float(), dtype, seed=string_to_seed(key))
        # float32 arithmetic tips a value over a rounding boundary once in a while.
        assert (rounded.float() == found.float()).float().mean() > 0.998, f"{label} {key}"
        slack = 2**-21 * (base.double().abs() + update.abs())
        step = exact.abs().clamp_min(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
        assert bool(((found.double() - rounded.double()).abs() <= step + slack).all()), key
    restored = models.weights()
    for place, weight in before.items():
        assert torch.equal(weight.flatten().view(torch.uint8), restored[place].flatten().view(torch.uint8)), place


def test_stacked_loaders_add_up(modes, family, tmp_path):
    path, wanted = reduced.write(family, "kohya", tmp_path)
    before = family.weights()
    adapter = load_adapter(path)
    once, _, _ = modes.apply(family.model, None, adapter, 0.5, 1.0, mode="merge")
    twice, _, _ = modes.apply(once, None, adapter, 0.25, 1.0, mode="merge")
    with loaded(twice):
        after = family.weights()
    for (label, key), update in wanted.items():
        expected = before[label, key].double() + (0.75 * update if label == "MODEL" else 0)
        assert (after[label, key].double() - expected).norm() <= 1e-6 * expected.norm()


def test_a_stack_is_one_patch_per_weight(modes, family, tmp_path):
    """Also where DoRA is among them, whose order counts; what another node put in between keeps its place."""
    paths = []
    for rank in (2, 3):
        (tmp_path / str(rank)).mkdir()
        paths.append(reduced.write(family, "kohya", tmp_path / str(rank), rank)[0])
    adapters = [load_adapter(path) for path in paths]
    name, factors = next(iter(adapters[1].layers.items()))
    adapters[1].layers[name] = replace(factors, dora_scale=torch.rand(factors.shape[0], 1) + 0.5)
    strengths, model, clip = (0.7, -0.4, 0.3), family.model, family.clip
    for adapter, strength in zip((*adapters, adapters[0]), strengths, strict=True):
        model, clip, _ = modes.apply(model, clip, adapter, strength, strength, mode="merge")
    assert model.patches and {len(entries) for entries in model.patches.values()} == {1}
    assert {len(entries) for entries in clip.patcher.patches.values()} == {1} and not family.model.patches
    for key, [entry] in model.patches.items():
        weight = family.weights()["MODEL", key].float()
        each = [(s, modes.patches.LoHaPatch(set(), ((1.0, *f),)), 1.0, None, None) for s, *f in entry[1].weights]
        assert [row[0] for row in entry[1].weights] == list(strengths)
        together = comfy.lora.calculate_weight([entry], weight.clone(), key)
        assert torch.allclose(together, comfy.lora.calculate_weight(each, weight.clone(), key), rtol=1e-5, atol=1e-6)

    other = modes.apply(family.model, None, adapters[0], 1.0, 0.0, mode="merge")[0]
    other.add_patches({key: ("diff", (torch.zeros(1),)) for key in other.patches})
    other = modes.apply(other, None, adapters[1], 1.0, 0.0, mode="merge")[0]
    assert {len(entries) for entries in other.patches.values()} == {3}


def test_without_clip_the_report_says_so(modes, family, tmp_path):
    path, wanted = reduced.write(family, "kohya", tmp_path)
    model, clip, report = modes.apply(family.model, None, load_adapter(path), 1.0, 1.0, mode="merge")
    assert clip is None and model is not family.model
    assert len(report.unmatched) == sum(1 for label, _ in wanted if label == "CLIP")
    assert set(report.unmatched.values()) == {"belongs to the CLIP, and none is connected"}


def test_strength_zero_returns_what_came_in(modes, family, tmp_path):
    path, _ = reduced.write(family, "kohya", tmp_path)
    model, clip, _ = modes.apply(family.model, family.clip, load_adapter(path), 0.0, 0.0, mode="merge")
    assert model is family.model and clip is family.clip
