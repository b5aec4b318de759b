"""Every dialect on SD1.5 and SDXL: all layers match, the patched weights are right, unpatching leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.float
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
def test_every_layer_of_every_dialect(bridge, family, dialect, tmp_path):
    path, wanted = reduced.write(family, dialect, tmp_path)
    before = family.weights()
    adapter = load_adapter(path)
    assert len(adapter.layers) == len(wanted)
    model, clip, report = bridge.apply(
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
def test_rounding_to_the_weights_dtype(bridge, name, dtype, tmp_path):
    """W + ΔW, rounded once, as ComfyUI rounds."""
    models = reduced.build(name, dtype)
    path, wanted = reduced.write(models, "kohya", tmp_path)
    before = models.weights()
    model, clip, _ = bridge.apply(models.model, models.clip, load_adapter(path), 1.0, 1.0, mode="merge")
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


def test_stacked_loaders_add_up(bridge, family, tmp_path):
    path, wanted = reduced.write(family, "kohya", tmp_path)
    before = family.weights()
    adapter = load_adapter(path)
    once, _, _ = bridge.apply(family.model, None, adapter, 0.5, 1.0, mode="merge")
    twice, _, _ = bridge.apply(once, None, adapter, 0.25, 1.0, mode="merge")
    with loaded(twice):
        after = family.weights()
    for (label, key), update in wanted.items():
        expected = before[label, key].double() + (0.75 * update if label == "MODEL" else 0)
        assert (after[label, key].double() - expected).norm() <= 1e-6 * expected.norm()


def test_without_clip_the_report_says_so(bridge, family, tmp_path):
    path, wanted = reduced.write(family, "kohya", tmp_path)
    model, clip, report = bridge.apply(family.model, None, load_adapter(path), 1.0, 1.0, mode="merge")
    assert clip is None and model is not family.model
    assert len(report.unmatched) == sum(1 for label, _ in wanted if label == "CLIP")
    assert set(report.unmatched.values()) == {"belongs to the CLIP, and none is connected"}


def test_strength_zero_returns_what_came_in(bridge, family, tmp_path):
    path, _ = reduced.write(family, "kohya", tmp_path)
    model, clip, _ = bridge.apply(family.model, family.clip, load_adapter(path), 0.0, 0.0, mode="merge")
    assert model is family.model and clip is family.clip
