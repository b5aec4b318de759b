"""Every family in every spelling: how many layers we find and how many ComfyUI's own loader does, and the updates.

pytest tests/comfy/test_family_matrix.py -s     prints the table
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from math import prod
from types import SimpleNamespace
from typing import Any

import comfy.lora
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loha_core import Adapter, LoHaFactors, load_adapter, save_adapter
from loha_core.naming.families import Family
from loha_core.naming.names import flat
from loha_core.naming.readers import COMFYUI, unread
from loha_core.naming.respell import respelled

from ..reduced_families import flat_path, weights_of
from .test_families import built, each_family

# Spelling -> whose names, and what becomes of a dotted one.
SPELLINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "kohya": ("kohya", lambda name: f"lora_unet_{flat(name)}"),
    "native": ("native", lambda name: f"diffusion_model.{name}"),
    "diffusers": ("diffusers", lambda name: f"transformer.{name}"),
    "SimpleTuner": ("diffusers", lambda name: f"lycoris_{flat(name)}"),
    "OneTrainer": ("diffusers", lambda name: f"lora_transformer_{flat(name)}"),
    "LyCORIS": ("diffusers", lambda name: f"lora_unet_{flat(name)}"),
    "PEFT": ("diffusers", lambda name: f"base_model.model.{name}"),
    "bare": ("diffusers", lambda name: name),
}
LEADS = {"kohya": "", "native": "diffusion_model.", "diffusers": "transformer."}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[dict[str, dict[str, str]]]:
    found: dict[str, dict[str, str]] = {}
    yield found
    print("\n\nlayers found by us / by ComfyUI's own loader / in the file")
    print(f"{'':<18}" + "".join(f"{spelling:>13}" for spelling in SPELLINGS))
    for family, cells in found.items():
        print(f"{family:<18}" + "".join(f"{cells.get(spelling, ''):>13}" for spelling in SPELLINGS))


def adapter_for(family: Family, model: Any) -> Adapter:
    """A LoHa for all weights of a model that the table has, under kohya's names."""
    layers = {}
    for n, (name, shape) in enumerate(weights_of(model.diffusion_model).items()):
        if family.weight(flat_path(name)):
            rng = torch.Generator().manual_seed(n)
            sizes = (shape[0], 2), (2, prod(shape[1:]))
            a, b = (torch.randn(2, *size, generator=rng) for size in sizes)
            layers[f"lora_unet_{flat(name)}"] = LoHaFactors(a[0], b[0], a[1], b[1], 1.0)
    return Adapter(layers, source=family.name)


def in_spelling(adapter: Adapter, spelling: str) -> Adapter:
    """The adapter as that trainer writes it."""
    style, spelled = SPELLINGS[spelling]
    found = respelled(adapter, style)
    if spelling == "kohya":
        return found
    lead = LEADS[style]
    layers = {spelled(name.removeprefix(lead)): layer for name, layer in found.layers.items()}
    return Adapter(layers, source=adapter.source)


def added(model: Any, patches: Iterator[tuple[Any, Any]]) -> dict[str, Tensor]:
    """Weight -> what all patches together add to it."""
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for target, patch in patches:
        key, place, function = (*([target] if isinstance(target, str) else target), None, None)[:3]
        weight = found.setdefault(key, torch.zeros(shapes[key]))
        found[key] = comfy.lora.calculate_weight([(1.0, patch, 1.0, place, function)], weight, key)
    return found


def by_us(pack: Any, adapter: Adapter, model: Any) -> dict[str, Tensor]:
    patches = sys.modules[f"{pack.__name__}.nodes.host.patches"]
    bound = patches.find(adapter, SimpleNamespace(model=model), None)
    assert not bound.report.unmatched, bound.report.text(5)
    return added(model, ((patch.target, patch.update) for patch in bound.patches["MODEL"]))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert (found[key] - delta).norm() <= 1e-5 * delta.norm(), key


@each_family
def test_every_spelling_is_found_and_saved(pack, family, table, tmp_path):
    """Loaded, saved in each spelling, and loaded again by us and by ComfyUI's own loader."""
    cells: dict[str, list[int]] = {}
    for _, model in built(family):
        own = adapter_for(family, model)
        wanted = by_us(pack, own, model)
        assert len(wanted) == len(own.layers)
        keys = comfy.lora.model_lora_keys_unet(model, {})
        for spelling in SPELLINGS:
            adapter = in_spelling(own, spelling)
            path = tmp_path / f"{spelling}.safetensors"
            save_adapter(adapter, path)
            read = load_adapter(path)
            assert sorted(read.layers) == sorted(name.removeprefix("base_model.model.") for name in adapter.layers)
            assert_same(by_us(pack, read, model), wanted)
            native = [name for name in adapter.layers if name in keys]
            if COMFYUI not in (unread(adapter.layers) or ""):
                assert len(native) == len(adapter.layers), "nothing was said of what it does not find"
            for n, count in enumerate((len(read.layers), len(native), len(adapter.layers))):
                cells.setdefault(spelling, [0, 0, 0])[n] += count
            if native:
                alone = Adapter({name: read.layers.get(name, adapter.layers[name]) for name in native})
                save_adapter(alone, tmp_path / "native.safetensors")
                patches = comfy.lora.load_lora(load_file(tmp_path / "native.safetensors"), keys, log_missing=False)
                assert_same(added(model, patches.items()), by_us(pack, alone, model))
            for style in LEADS if spelling in ("native", "SimpleTuner") else ():  # the others differ in letters alone
                save_adapter(read, tmp_path / "again.safetensors", names=style)
                again = load_adapter(tmp_path / "again.safetensors")
                assert_same(by_us(pack, again, model), wanted)
                if style != "diffusers":
                    assert set(again.layers) <= set(keys), "ComfyUI's own loader finds all of it"
    table[family.name] = {spelling: "/".join(map(str, counts)) for spelling, counts in cells.items()}
    assert all(ours == every >= theirs for ours, theirs, every in cells.values())
