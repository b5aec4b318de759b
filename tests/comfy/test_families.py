"""The tables of names against ComfyUI's models, and against the names that ComfyUI itself reads for them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from loha_core.naming.families import Family, Span
from loha_core.naming.names import path_of
from loha_core.naming.tables import FAMILIES

from ..reduced_families import Reduced, dead, flat_path, is_one_of, stretches, tile, variants, weights_of

import comfy.lora  # isort: skip
import comfy.supported_models  # isort: skip
import comfyui_version  # isort: skip

VERSION = tuple(int(number) for number in re.findall(r"\d+", comfyui_version.__version__))
# The first version that is known to have it.
NEWER = {"Krea 2": (0, 33), "Anima": (0, 33), "ACE-Step 1.5": (0, 33)}
# Settings that newer ones find in files too, and older ones do not know.
NEWER_SETTINGS = {"txt_ids_dims", "meanflow_sum", "vec_in_dim"}

# Those that ask for a number while they are built.
NEEDS_NUMBERS = {"ACEStep15"}

# Names that ComfyUI reads beyond the tables, by family. It reads Flux's for Flux.2 and the other way round; in our
# tables they tell one from the other.
_OF_FLUX2 = (r".*single_transformer_blocks.\d+.attn.(to_qkv_mlp_proj|to_out)",)
_OF_FLUX = (
    r".*transformer_blocks.\d+.ff(_context)?.net.(0.proj|2)",
    r".*single_transformer_blocks.\d+.(attn.to_[qkv]|proj_mlp|proj_out)",
    r".*time_text_embed.(timestep|guidance)_embedder.*",
)
# And Z-Image's for Lumina 2, whose queries, keys and values are of different heights: it takes other rows for them.
_OF_Z_IMAGE = (r".*attention.to_.*", r".*all_(final_layer|x_embedder).*")
MORE_IN_COMFYUI: dict[str, tuple[str, ...]] = {
    "Flux": _OF_FLUX2,
    "Chroma": _OF_FLUX2,
    "Flux.2": _OF_FLUX,
    "Lumina 2": _OF_Z_IMAGE,
}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


class Place(NamedTuple):
    """Which rows of which of the original's weights a name means."""

    native: str
    start: int
    length: int
    swapped: bool


def built(family: Family) -> list[tuple[Reduced, Any]]:
    """The family's models that ComfyUI has, on no device."""
    if VERSION < NEWER.get(family.name, ()):
        pytest.skip(f"this ComfyUI is older than {family.name}")
    return models_of(family.name)


@cache
def models_of(family: str) -> list[tuple[Reduced, Any]]:
    return [(reduced, model_of(*reduced.comfyui)) for reduced in variants(family) if reduced.comfyui is not None]


def model_of(kind: str, settings: dict[str, Any], device: torch.device | None = None) -> Any:
    device = device or torch.device("cpu" if kind in NEEDS_NUMBERS else "meta")
    while True:
        config = getattr(comfy.supported_models, kind)(dict(settings))
        try:
            return config.get_model({}, "", device=device)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in NEWER_SETTINGS or unknown[1] not in settings:
                raise
            settings = {name: value for name, value in settings.items() if name != unknown[1]}


@each_family
def test_every_weight_is_known_under_its_name(family: Family) -> None:
    for reduced, model in built(family):
        weights = [name for name in weights_of(model.diffusion_model) if not is_one_of(name, reduced.only_native)]
        found = {name: family.weight(flat_path(name)) for name in weights}
        assert {name: weight and weight.name for name, weight in found.items()} == {name: name for name in weights}


@each_family
def test_every_line_is_found_in_the_model(family: Family) -> None:
    modules = {name for _, model in built(family) for name in weights_of(model.diffusion_model)}
    only_diffusers = tuple(pattern for reduced in variants(family.name) for pattern in reduced.only_diffusers)
    assert not dead({row.native for row in family.rows if not is_one_of(row.diffusers, only_diffusers)}, modules)


@each_family
def test_parts_cover_every_weight_once(family: Family) -> None:
    for reduced, model in built(family):
        for name, shape in weights_of(model.diffusion_model).items():
            if not is_one_of(name, reduced.only_native):
                assert tile(list(stretches(family, name, shape).values()), shape[0]), name


@each_family
def test_comfyui_means_the_same_by_diffusers_names(family: Family) -> None:
    more = MORE_IN_COMFYUI.get(family.name, ())
    for reduced, model in built(family):
        weights = weights_of(model.diffusion_model)
        for key, target in comfy.lora.model_lora_keys_unet(model, {}).items():
            place = place_in_comfyui(target, weights)
            if place is None or is_one_of(place.native, reduced.only_native):
                continue
            ours = places(family, key, weights)
            assert ours == (set() if is_one_of(key, more) else {place}), key


def place_in_comfyui(target: str | tuple[Any, ...], weights: dict[str, tuple[int, ...]]) -> Place | None:
    """None if it is no weight that the model has."""
    key, rows, change = (*([target] if isinstance(target, str) else target), None, None)[:3]
    native = key.removeprefix("diffusion_model.").removesuffix(".weight")
    if native not in weights or not key.endswith(".weight"):
        return None
    _, start, length = rows or (0, 0, weights[native][0])
    return Place(native, start, length, change is not None)


def places(family: Family, name: str, weights: dict[str, tuple[int, ...]]) -> set[Place]:
    """What the table says of a name, of either side."""
    path = path_of(name)
    rows: list[tuple[str, Span | None]] = []
    if whole := family.weight(path):
        rows.append((whole.name, None))
    if part := family.part(path):
        rows.append((part[0], part[1].span))
    return {place_of(native, span, weights[native]) for native, span in rows if native in weights}


def place_of(native: str, span: Span | None, shape: tuple[int, ...]) -> Place:
    start, length = span.rows(*shape[:2]) if span else (0, shape[0])
    return Place(native, start, length, span is not None and span.swapped and shape[0] == 2 * shape[1])
