"""The equations against float64: DoRA and its axis; Khatri–Rao column by column."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loha_core import algebra

from . import oracle, samples

SHAPES = [(6, 4), (4, 4), (6, 4, 3), (6, 4, 3, 3), (4, 4, 3, 3), (5, 4, 2, 3, 2), (1, 7), (7, 1)]


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dora_divides_by_the_norm_of_the_adapted_weight(shape, axis):
    # DESIGN §11.1: not by ‖W‖.
    tensors = samples.module("m", shape, dora_axis=axis, dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    magnitude = tensors["m.dora_scale"]
    f = samples.factors(shape, dora_axis=axis, dtype=torch.float64)
    found = algebra.dora(weight, f.delta().reshape(shape), magnitude)
    assert oracle.error(found, oracle.dora(weight, oracle.update(tensors, "m"), magnitude, axis)) <= 1e-13


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dora_norm_keeps_the_other_axes(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        others = tuple(d for d in range(len(shape)) if d != axis)
        wanted = np.sqrt((oracle.wide(weight) ** 2).sum(axis=others, keepdims=True))
        assert oracle.error(algebra.dora_norm(weight, axis), wanted) <= 1e-6


def test_dora_keeps_an_all_zero_row_at_zero():
    weight = torch.randn(3, 4)
    weight[1] = 0
    merged = algebra.dora(weight, torch.zeros(3, 4), torch.ones(3, 1))
    assert merged[1].abs().max() == 0 and bool(torch.isfinite(merged).all())


@pytest.mark.parametrize(
    ("magnitude", "weight", "axis"),
    [
        ((6, 1), (6, 4), 0),
        ((1, 4), (6, 4), 1),
        ((6,), (6, 4), 0),
        ((4,), (6, 4), 1),
        ((6, 1, 1, 1), (6, 4, 3, 3), 0),
        ((1, 4, 1, 1), (6, 4, 3, 3), 1),
        ((5, 1), (5, 5), 0),
        ((1, 5), (5, 5), 1),
        ((5,), (5, 5), 0),
        ((1, 5, 1), (5, 5, 3), 1),
        ((6, 1), (6,), 0),
    ],
    ids=str,
)
def test_the_axis_is_in_the_magnitudes_shape(magnitude, weight, axis):
    assert algebra.dora_axis(torch.ones(magnitude), weight) == axis


def test_magnitudes_of_neither_axis_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 1\) fits neither axis of a weight \(6, 4\)"):
        algebra.dora_axis(torch.ones(3, 1), (6, 4))


def test_columnwise_pairs_every_row_with_every_row():
    x, y = torch.randn(2, 5), torch.randn(3, 5)
    product = algebra.columnwise(x, y)
    assert product.shape == (6, 5)
    for p in range(2):
        for q in range(3):
            assert torch.equal(product[3 * p + q], x[p] * y[q])


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2), (2, 3, 2)], ids=str)
def test_tucker_takes_any_number_of_kernel_axes(kernel):
    random = torch.Generator().manual_seed(0)
    t, a, b = (torch.randn(s, dtype=torch.float64, generator=random) for s in ((2, 2, *kernel), (2, 5), (2, 4)))
    wanted = np.zeros((5, 4, *kernel))
    for p in range(2):
        for q in range(2):
            wanted += np.multiply.outer(np.outer(a[p], b[q]), t[p, q].numpy())
    assert oracle.error(algebra.tucker(t, a, b), wanted) <= 1e-14
