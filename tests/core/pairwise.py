"""Few cases in which any two values of independent axes meet, in place of their full product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def rows(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of each axis, such that any two values of two axes stand together in one of them.

    Greedy and the same each time: a row begins with the first pair that has not met and takes for each other axis the
    value that meets most values for the first time. Axes whose values do not go with each other belong into one axis
    of tuples.

    >>> rows("ab", [1, 2], [True, False])
    [('a', 1, True), ('a', 2, False), ('b', 1, False), ('b', 2, True)]
    """
    if len(axes) == 1:
        return [(value,) for value in axes[0]]
    # A pair is two (axis, index of the value); a dict, to keep the order.
    missing = {
        ((i, a), (j, b)): None
        for i, j in combinations(range(len(axes)), 2)
        for a, b in product(range(len(axes[i])), range(len(axes[j])))
    }
    found = []
    while missing:
        row = dict(next(iter(missing)))
        for axis in range(len(axes)):
            if axis not in row:
                gains = [
                    sum(tuple(sorted([(axis, value), other])) in missing for other in row.items())
                    for value in range(len(axes[axis]))
                ]
                row[axis] = gains.index(max(gains))
        for pair in combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        found.append(tuple(axes[axis][row[axis]] for axis in range(len(axes))))
    return found


def pairwise(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` over the `rows` of axes that are named as the test's arguments."""
    table = rows(*axes.values())
    ids = ["-".join(str(getattr(value, "__name__", value)).removeprefix("torch.") for value in row) for row in table]
    return pytest.mark.parametrize(tuple(axes), table, ids=ids)
