"""The covering that other tests rely on: every pair is there, in far fewer rows than the full product has."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from .pairwise import pairwise, rows


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (2, 2, 2), (4, 5, 5, 3), (8, 3, 4, 4, 4, 4, 4), (1, 6, 1, 2)], ids=str)
def test_any_two_values_meet(sizes):
    axes = [[f"{axis}.{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    table = rows(*axes)
    assert all(value in axis for row in table for axis, value in zip(axes, row, strict=True))
    for i, j in combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in table} == set(product(axes[i], axes[j]))
    largest = sorted(sizes)[-2:]
    assert len(table) <= 2 * largest[0] * largest[-1]


@pairwise(number=[1, 2], options=[{"a": 1}, {}], function=[min, max])
def test_values_of_any_kind_reach_the_test_by_name(number, options, function):
    assert number in (1, 2) and options in ({"a": 1}, {}) and function in (min, max)
