"""The tables of names against diffusers' classes: every weight is known, under its own name, and no line is dead."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from loha_core.naming.families import Family
from loha_core.naming.tables import FAMILIES

from ..reduced_families import REDUCED, Reduced, dead, flat_path, is_one_of, tile, variants, weights_of

diffusers = pytest.importorskip("diffusers", reason="its classes are the reference: pip install .[peers]")

IN_DIFFUSERS = [family for family in FAMILIES.values() if family.diffusers]
each_family = pytest.mark.parametrize("family", IN_DIFFUSERS, ids=lambda family: family.name)


@cache
def built(family: Family) -> list[tuple[Reduced, dict[str, tuple[int, ...]]]]:
    """The family's models, and the weights of its class in diffusers for each."""
    with torch.device("meta"):
        return [
            (reduced, weights_of(getattr(diffusers, reduced.kind or family.diffusers)(**reduced.diffusers)))
            for reduced in variants(family.name)
        ]


def test_every_family_has_a_reduced_model() -> None:
    assert set(REDUCED) == set(FAMILIES)


@each_family
def test_every_weight_is_known_and_leads_back_to_its_name(family: Family) -> None:
    for reduced, shapes in built(family):
        weights = [name for name in shapes if not is_one_of(name, reduced.only_diffusers)]
        found = {name: family.part(flat_path(name)) for name in weights}
        assert {name: part and part[1].name for name, part in found.items()} == {name: name for name in weights}


@each_family
def test_every_line_is_found_in_the_class(family: Family) -> None:
    modules = {name for _, shapes in built(family) for name in shapes}
    only_native = tuple(pattern for reduced, _ in built(family) for pattern in reduced.only_native)
    assert not dead({row.diffusers for row in family.rows if not is_one_of(row.native, only_native)}, modules)


@each_family
def test_parts_cover_the_original_weight_once_and_have_their_own_shapes(family: Family) -> None:
    for _, weights in built(family):
        parts: dict[str, list[str]] = {}
        for name in weights:
            if found := family.part(flat_path(name)):
                parts.setdefault(found[0], []).append(name)
        for native, names in parts.items():
            check_parts(family, native, {name: weights[name] for name in names})


def check_parts(family: Family, native: str, shapes: dict[str, tuple[int, ...]]) -> None:
    [rest] = {shape[1:] for shape in shapes.values()}
    weight = family.weight(flat_path(native))
    assert weight is not None and weight.name == native
    spans = {part.name: part.span for part in weight.parts if part.name in shapes}
    assert set(spans) == set(shapes), f"{native}: the table leads from it to other parts"
    if None in spans.values():
        assert len(spans) == 1
        return
    needed = {span.height(rest[0], shapes[name][0]) for name, span in spans.items() if span} - {None}
    height = needed.pop() if needed else sum(shape[0] for shape in shapes.values())
    assert not needed and height is not None, f"{native}: its parts need different heights"
    rows = {name: span.rows(height, rest[0]) for name, span in spans.items() if span}
    assert {name: length for name, (_, length) in rows.items()} == {name: shape[0] for name, shape in shapes.items()}
    assert tile(list(rows.values()), height)
