"""Which family names are of: every table knows its own, on both sides, and shares no more than it must."""

from __future__ import annotations

import doctest
import time

import pytest

from loha_core.naming import names, recognise
from loha_core.naming.families import Family, Size
from loha_core.naming.recognise import counts_of, families_of, native_path, size_of
from loha_core.naming.tables import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def paths(family: Family, side: str, block: int = 3) -> list[str]:
    """All names of a side, in one block of each list."""
    found = (getattr(row, side).replace(".N.", f".{block}.") for row in family.rows)
    return [names.split(names.flat(name))[1] for name in found]


def test_examples():
    assert doctest.testmod(recognise).failed == 0


@every_family
@pytest.mark.parametrize("side", ["native", "diffusers"])
def test_a_family_is_among_those_that_its_names_are_of(family, side):
    found = families_of(paths(family, side))
    assert family in found
    for other in found:
        assert all(other.knows(path) for path in paths(family, side)), other.name


@every_family
def test_names_of_prefixed_files_and_names_that_no_table_has(family):
    own = [names.split(f"lora_unet_{path}")[1] for path in paths(family, "native")]
    assert family in families_of(own)
    assert family in families_of(own + [f"another_{n}" for n in range(len(set(own)))])
    assert families_of(own[:1] + [f"another_{n}" for n in range(2)]) == []
    assert families_of([]) == families_of(["encoder_layers_0_mlp_fc1"]) == []


@every_family
def test_the_number_of_a_block_and_repetitions_say_nothing(family):
    own = paths(family, "native")
    assert families_of(own) == families_of([*own, *own, *paths(family, "native", 17)])


@every_family
def test_the_sizes(family):
    assert all(len(size.blocks) == len(family.blocks) for size in family.sizes)
    for size in family.sizes:
        alike = [s for s in family.sizes if (s.blocks, s.width) == (size.blocks, size.width)]
        assert size_of(family, size.blocks, size.width) == (size if len(alike) == 1 else None)


def test_the_size_of_an_adapter_that_does_not_reach_the_last_block():
    two = Family("x", "", blocks=(("B", "blocks"),), sizes=(Size("small", (30,), 1536), Size("large", (40,), 5120)))
    small, large = two.sizes
    assert [size_of(two, (count,)) for count in (30, 40, 35, 12, 41)] == [small, large, large, None, None]
    assert [size_of(two, (12,), width) for width in (1536, 5120, 7)] == [small, large, None]


def test_blocks_are_counted_on_both_sides():
    flux = FAMILIES["Flux"]
    assert counts_of(flux, ["double_blocks_18_img_attn_qkv", "single_blocks_4_linear1", "time_in_in_layer"]) == (19, 5)
    assert counts_of(flux, ["transformer_blocks_6_attn_to_q", "single_transformer_blocks_37_proj_mlp"]) == (7, 38)
    assert native_path(flux, "single_transformer_blocks_37_proj_mlp") == "single_blocks_37_linear1"
    assert native_path(flux, "joint_blocks_0_x_block_attn_qkv") is None


def test_a_large_file_takes_no_time():
    many = [f"double_blocks_{n}_img_mlp_{m}" for n in range(500) for m in range(4)]
    start = time.perf_counter()
    assert FAMILIES["Flux"] in families_of(many)
    assert time.perf_counter() - start < 1
