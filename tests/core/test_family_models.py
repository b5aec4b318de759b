"""A file in ComfyUI's names on diffusers' own models: by `LoHaModel`, and through a PEFT folder by PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import prod

import pytest
import torch
from torch import Tensor, nn

from loha_core import Adapter, LoHaFactors, LoHaLayer, LoHaModel, load_adapter, save_adapter, to_peft
from loha_core.naming.families import Family
from loha_core.naming.respell import respelled
from loha_core.naming.tables import FAMILIES

from ..reduced_families import Reduced, flat_path, is_one_of, variants, weights_of

diffusers = pytest.importorskip("diffusers", reason="its classes are the reference: pip install .[peers]")
peft = pytest.importorskip("peft", reason="it is a reference: pip install .[peers]")

pytestmark = pytest.mark.usefixtures("one_thread")

IN_DIFFUSERS = [family for family in FAMILIES.values() if family.diffusers]


def built(family: Family, reduced: Reduced) -> nn.Module:
    torch.manual_seed(0)
    return getattr(diffusers, reduced.kind or family.diffusers)(**reduced.diffusers)


def adapter_for(family: Family, reduced: Reduced, model: nn.Module) -> Adapter:
    """A LoHa for every weight that the table has and that PEFT can adapt, in diffusers' names."""
    layers = {}
    adaptable = {
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    for n, (name, shape) in enumerate(weights_of(model).items()):
        if name in adaptable and not is_one_of(name, reduced.only_diffusers) and family.part(flat_path(name)):
            rng = torch.Generator().manual_seed(n)
            a, b = (torch.randn(2, *size, generator=rng) for size in ((shape[0], 2), (2, prod(shape[1:]))))
            layers[f"transformer.{name}"] = LoHaFactors(a[0], b[0], a[1], b[1], 3.0)
    return Adapter(layers, source=family.name)


def assert_same(found: Mapping[str, Tensor], wanted: Adapter) -> None:
    deltas = {name.removeprefix("transformer."): layer.delta() for name, layer in wanted.layers.items()}
    assert sorted(found) == sorted(deltas)
    for name, delta in deltas.items():
        assert (found[name].reshape(delta.shape) - delta).norm() <= 1e-5 * delta.norm(), name


@pytest.mark.parametrize("family", IN_DIFFUSERS, ids=lambda family: family.name)
def test_a_file_of_comfyuis_acts_on_diffusers_models(family: Family, tmp_path) -> None:
    for reduced in variants(family.name):
        if not reduced.diffusers:
            continue
        model = built(family, reduced)
        wanted = adapter_for(family, reduced, model)
        native = respelled(wanted, "kohya")
        assert not [name for name in native.layers if not name.startswith("lora_unet_")]
        save_adapter(native, tmp_path / "native.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = LoHaModel.from_pretrained(model, tmp_path / "native.safetensors")
        layers = {n: m for n, m in ours.model.named_modules() if isinstance(m, LoHaLayer)}
        assert_same({name: layer.get_delta_weight("default") for name, layer in layers.items()}, wanted)
        folder = tmp_path / "folder"
        save_adapter(to_peft(load_adapter(tmp_path / "native.safetensors")).adapter, folder, format="peft")
        theirs = peft.PeftModel.from_pretrained(built(family, reduced), folder / "transformer")
        found = {
            name: module.get_delta_weight("default")
            for name, module in theirs.base_model.model.named_modules()
            if isinstance(module, peft.tuners.loha.LoHaLayer)
        }
        assert_same(found, wanted)
