"""float16 by Khatri–Rao: what is within its range comes out right, also between the layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from loha_core import LoHaFactors
from loha_core.ops.autograd import Geometry, LayerSpec
from loha_core.ops.functional import loha_conv, loha_linear
from loha_core.ops.half import KhatriRao

from .test_functional import delta, flat, rand, tucker

SMALLEST, LARGEST = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
MAGNITUDES = st.floats(-4, 4).map(lambda e: 10.0**e)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def in_range(*tensors: torch.Tensor) -> bool:
    """At float16's full precision, as far as their size goes: the typical number is normal and none is too large."""
    return all(
        t.square().mean().sqrt() > 4 * SMALLEST and t.abs().max() < LARGEST / 4 for t in tensors if t is not None
    )


def test_large_activations_stay_finite():
    """W·x is at most 411; x·Vᵀ is beyond 65504 if all of the scale sits in U, and 4 % of y was not finite then."""
    torch.manual_seed(0)
    out, inner, rank = 640, 768, 8
    f = LoHaFactors(
        torch.randn(out, rank) * 0.01, torch.randn(rank, inner) * 1.5, torch.randn(out, rank) * 0.01,
        torch.randn(rank, inner) * 1.5, alpha=1.0,
    )  # fmt: skip
    x = (300 * torch.randn(512, inner)).half()
    weight = (torch.randn(out, inner) * 0.01).half()
    y = loha_linear(x, f, weight=weight, strategy="khatri-rao")
    share = float(y.isfinite().double().mean())
    print(f"finite: {share:.2%}")
    assert share == 1
    expected = x.double() @ (weight.double() + f.delta(dtype=torch.float64)).T
    assert expected.abs().max() < LARGEST and error(y, expected) < 1e-3


KINDS = ["linear", "conv", "tucker", "grouped", "grouped tucker"]


def case(kind: str, seed: int, sizes: list[float], x_size: float):
    """(x, factors' tensors, options of loha_conv), with numbers of these sizes."""
    torch.manual_seed(seed)
    groups = 2 if "grouped" in kind else 1
    tensors = flat(24, 40, 3) if kind == "linear" else tucker(24, 6, (3, 2), 3) if "tucker" in kind else flat(24, 36, 3)
    tensors = [t.detach() * size for t, size in zip(tensors, [*sizes, 1.0, 1.0], strict=False)]
    shape = (16, 40) if kind == "linear" else (2, 6 * groups, 5, 5)
    options = {} if kind == "linear" else {"padding": 1, "stride": (2, 1), "groups": groups}
    return (x_size * torch.randn(shape)).half(), tensors, options


def run(kind, x, tensors, options, weight=None, strategy="khatri-rao"):
    f = LoHaFactors(*tensors[:4], 2.0, *tensors[4:])
    if kind == "linear":
        return loha_linear(x, f, weight=weight, strategy=strategy)
    kernel = {} if weight is not None else {"kernel_size": (3, 2)}
    return loha_conv(x, f, weight=weight, strategy=strategy, **kernel, **options)


def plain(kind, x, update, options):
    return F.linear(x, update) if kind == "linear" else F.conv2d(x, update.view(24, 6, 3, 2), **options)


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 99), sizes=st.lists(MAGNITUDES, min_size=4, max_size=4), x_size=MAGNITUDES, g_size=MAGNITUDES
)
def test_any_size_of_factors_activations_and_gradients(kind, seed, sizes, x_size, g_size):
    x, tensors, options = case(kind, seed, sizes, x_size)
    wide = [t.clone().requires_grad_() for t in tensors]
    exact = x.double().requires_grad_()
    expected = plain(kind, exact, delta(wide, 2.0), options)
    assume(in_range(x.double(), expected.detach()))
    narrow = [t.float().requires_grad_() for t in tensors]
    x.requires_grad_()
    y = run(kind, x, narrow, options)
    assert y.dtype == torch.float16 and error(y.detach(), expected.detach()) < 2e-3
    g = (g_size * torch.randn(y.shape)).half()
    assume(in_range(g.double()))
    wanted = torch.autograd.grad(expected, [exact, *wide], g.double())
    gx, *found = torch.autograd.grad(y, [x, *narrow], g)
    if in_range(wanted[0]):
        assert error(gx, wanted[0]) < 2e-3
    for one, other in zip(found, wanted[1:], strict=True):
        assert one.dtype == torch.float32 and error(one, other) < 3e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_weight", [True, False])
def test_gradcheck(kind, with_weight):
    """The same code in float64."""
    x, tensors, options = case(kind, 0, [1.0] * 4, 1.0)
    x = rand(2, *x.shape[1:])
    tensors = [t.requires_grad_() for t in tensors]
    geometry = Geometry(options["stride"], (1, 1), (1, 1), options["groups"]) if options else None
    spec = LayerSpec((24, 6, 3, 2) if options else (24, 40), geometry, 0.7)
    weight, bias = rand(*spec.shape, grad=False), rand(24, grad=False)
    base = (weight, bias) if with_weight else (None, None)
    blank = [None] * (6 - len(tensors))

    def apply(x, *t):
        return KhatriRao.apply(x, *base, spec, *t, *blank)

    expected = plain(kind, x, delta(tensors, 0.7 * 3), options)
    if with_weight:
        expected = expected + bias.view(-1, *[1] * len(spec.kernel)) + plain(kind, x, weight, options)
    torch.testing.assert_close(apply(x, *tensors), expected)
    assert gradcheck(apply, (x, *tensors), fast_mode=True)


def test_one_sample_that_is_not_finite_leaves_the_others_alone():
    x, tensors, _ = case("linear", 0, [1.0] * 4, 1.0)
    alone = run("linear", x, tensors, {})
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    y = run("linear", x, tensors, {})
    assert not y[:2].isfinite().any() and torch.equal(y[2:], alone[2:])


def test_factors_of_zeros():
    x, tensors, _ = case("linear", 0, [1.0] * 4, 1.0)
    narrow = [t.float().requires_grad_() for t in tensors]
    with torch.no_grad():
        narrow[2].zero_()  # as training begins
    y = run("linear", x, narrow, {})
    y.float().sum().backward()
    assert not y.any() and narrow[2].grad.isfinite().all() and narrow[2].grad.any()
