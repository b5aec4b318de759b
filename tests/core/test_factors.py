"""The value type against float64, and what it refuses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loha_core import LoHaError, LoHaFactors, algebra

from . import oracle, samples

# Half precision rounds on storage only: the sums are in float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}

kernels = st.lists(st.integers(1, 3), max_size=3)
weights = st.builds(lambda o, i, k: (o, i, *k), st.integers(1, 9), st.integers(1, 9), kernels)


@st.composite
def cases(draw):
    """(weight shape, options of samples.parts)"""
    shape = draw(weights)
    return shape, {
        "rank": draw(st.integers(1, 5)),
        "tucker": len(shape) > 2 and draw(st.booleans()),
        "alpha": draw(st.sampled_from([1.0, 0.5, -3.0, 16.0])),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "seed": draw(st.integers(0, 2**16)),
    }


def wanted(shape, options):
    return oracle.update(samples.module("m", shape, **options), "m")


@given(cases())
def test_delta_is_the_float64_update(case):
    shape, options = case
    f = samples.factors(shape, **options)
    delta = f.delta()
    canonical = shape if options["tucker"] else (shape[0], int(np.prod(shape[1:])))
    assert tuple(delta.shape) == f.shape == canonical
    assert delta.dtype == (torch.float64 if options["dtype"] == torch.float64 else torch.float32)
    assert oracle.error(delta, wanted(shape, options)) <= TOLERANCE[options["dtype"]] * 4


@given(cases())
def test_khatri_rao_is_exactly_as_much(case):
    shape, options = case
    f = samples.factors(shape, **options)
    u, v, core = f.khatri_rao(dtype=torch.float64)
    square = options["rank"] ** 2
    assert (core is not None) == options["tucker"]
    assert u.shape == (shape[0], square) and v.shape[0] == square
    if core is None:
        rebuilt = oracle.wide(u) @ oracle.wide(v)
    else:
        assert core.shape == (square, square, *shape[2:])
        rebuilt = np.einsum("oP,PQ...,Qi->oi...", *map(oracle.wide, (u, core, v)))
    assert oracle.error(rebuilt, wanted(shape, options)) <= 1e-13


@given(cases())
def test_norm_is_frobenius(case):
    shape, options = case
    assert samples.factors(shape, **options).norm() == pytest.approx(np.linalg.norm(wanted(shape, options)), rel=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that an operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("rank", [3, 12], ids=["by Gram matrices", "by stripes"])
@pytest.mark.parametrize(("shape", "tucker"), [((512, 96), False), ((64, 96, 3, 3), False), ((64, 96, 3, 3), True)])
def test_norm_needs_no_full_update(monkeypatch, shape, tucker, rank):
    monkeypatch.setattr(algebra, "STRIPE", 8192)
    f = samples.factors(shape, rank=rank, tucker=tucker, dtype=torch.float64)
    with Largest() as largest:
        found = f.norm()
    assert found == pytest.approx(np.linalg.norm(wanted(shape, {"rank": rank, "tucker": tucker})), rel=1e-12)
    assert 0 < largest.elements < torch.Size(shape).numel() / 3


@pytest.mark.parametrize("stored", TOLERANCE)
@pytest.mark.parametrize("asked", TOLERANCE)
def test_delta_in_any_dtype_is_the_update_rounded_once(stored, asked):
    options = {"rank": 4, "dtype": stored}
    delta = samples.factors((16, 12, 3), **options).delta(asked)
    assert delta.dtype == asked
    assert oracle.error(delta, wanted((16, 12, 3), options)) <= max(torch.finfo(asked).eps, TOLERANCE[asked] / 1e3)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_factors_are_storage_too(dtype):
    tensors = {key: t.to(dtype) for key, t in samples.parts((6, 5), alpha=None).items()}
    f = LoHaFactors(**{key.removeprefix("hada_"): t for key, t in tensors.items()}, alpha=2)
    assert oracle.error(f.delta(), oracle.update({f"m.{k}": t for k, t in tensors.items()}, "m")) <= 1e-6


def test_factors_of_mixed_dtypes():
    tensors = samples.parts((6, 5))
    tensors["hada_w1_a"] = tensors["hada_w1_a"].half()
    tensors["hada_w2_b"] = tensors["hada_w2_b"].bfloat16()
    f = LoHaFactors(**{key.removeprefix("hada_"): t for key, t in tensors.items()})
    assert oracle.error(f.delta(), oracle.update({f"m.{k}": t for k, t in tensors.items()}, "m")) <= 1e-6


@pytest.mark.parametrize("alpha", [3, 3.0, torch.tensor(3.0), torch.tensor([3], dtype=torch.int32), np.float32(3)])
def test_alpha_may_be_any_number(alpha):
    f = replace(samples.factors((4, 4), 2), alpha=alpha)
    assert (f.alpha, f.scale, f.rank) == (3.0, 1.5, 2) and type(f.alpha) is float


def test_factors_are_frozen():
    f = samples.factors((4, 4))
    with pytest.raises(FrozenInstanceError):
        f.alpha = 2.0


def test_delta_leaves_the_factors_alone():
    f = samples.factors((4, 3, 2), tucker=True, dtype=torch.float32)
    before = {name: t.clone() for name, t in f.tensors().items()}
    f.delta(), f.khatri_rao(), f.norm()
    assert all(torch.equal(t, before[name]) for name, t in f.tensors().items())


def test_delta_is_differentiable():
    f = samples.factors((5, 4, 2), tucker=True, dtype=torch.float64)
    names = list(f.tensors())
    leaves = [t.requires_grad_() for t in f.tensors().values()]
    assert torch.autograd.gradcheck(lambda *t: replace(f, **dict(zip(names, t, strict=True))).delta(), leaves)


def test_to_and_parameter_count():
    f = samples.factors((6, 5, 3), rank=2, tucker=True, dora_axis=0)
    assert f.parameter_count() == 2 * (2 * 6 + 2 * 5 + 4 * 3) + 6
    moved = f.to(dtype=torch.float64)
    assert {t.dtype for t in moved.tensors().values()} == {torch.float64} and moved.alpha == f.alpha


flat, tucker = samples.factors((6, 5), 2), samples.factors((6, 5, 3), 2, tucker=True)
ones = torch.ones
BAD = {
    "w1_a has three axes": (flat, {"w1_a": ones(6, 2, 1)}, r"w1_a \(6, 2, 1\)"),
    "w2_b has one axis": (flat, {"w2_b": ones(5)}, r"w2_b \(5,\)"),
    "w1_b is a number": (flat, {"w1_b": torch.tensor(1.0)}, r"w1_b \(\)"),
    "ranks of a half differ": (flat, {"w1_b": ones(3, 5)}, r"w1_a \(6, 2\) and w1_b \(3, 5\)"),
    "rank zero": (flat, {"w1_a": ones(6, 0), "w1_b": ones(0, 5)}, r"w1_a \(6, 0\)"),
    "no outputs": (flat, {"w1_a": ones(0, 2), "w2_a": ones(0, 2)}, r"shape \(0, 5\)"),
    "no inputs": (flat, {"w1_b": ones(2, 0), "w2_b": ones(2, 0)}, r"shape \(6, 0\)"),
    "outputs differ": (flat, {"w2_a": ones(7, 2)}, r"\(6, 5\) and \(7, 5\)"),
    "inputs differ": (flat, {"w2_b": ones(2, 4)}, r"\(6, 5\) and \(6, 4\)"),
    "ranks of the halves differ": (flat, {"w2_a": ones(6, 3), "w2_b": ones(3, 5)}, "ranks: 2 and 3"),
    "t2 missing": (tucker, {"t2": None}, "t1 and t2"),
    "t1 missing": (tucker, {"t1": None}, "t1 and t2"),
    "t1 has no kernel": (tucker, {"t1": ones(2, 2)}, r"t1 is \(2, 2\)"),
    "t2 has another rank": (tucker, {"t2": ones(3, 2, 3)}, r"t2 is \(3, 2, 3\)"),
    "kernels differ": (tucker, {"t2": ones(2, 2, 4)}, r"\(6, 5, 3\) and \(6, 5, 4\)"),
    "an empty kernel": (tucker, {"t1": ones(2, 2, 0), "t2": ones(2, 2, 0)}, r"shape \(6, 5, 0\)"),
    "Tucker in flat layout": (flat, {"t1": ones(2, 2, 3), "t2": ones(2, 2, 3)}, r"w1_a \(6, 2\)"),
    "dora_scale of neither axis": (flat, {"dora_scale": ones(4)}, r"dora_scale \(4,\) fits neither 6 outputs"),
    "dora_scale empty": (flat, {"dora_scale": ones(0)}, "dora_scale"),
    "dora_scale and Tucker": (tucker, {"dora_scale": ones(3)}, "dora_scale"),
    "integers": (flat, {"w2_a": ones(6, 2, dtype=torch.int32)}, "w2_a has dtype torch.int32"),
    "alpha NaN": (flat, {"alpha": float("nan")}, "alpha is nan"),
    "alpha infinite": (flat, {"alpha": torch.tensor(float("inf"))}, "alpha is inf"),
    "alpha of two numbers": (flat, {"alpha": ones(2)}, "alpha"),
    "alpha too large": (flat, {"alpha": 10**400}, "alpha"),
    "alpha None": (flat, {"alpha": None}, "alpha"),
}


@pytest.mark.parametrize(("start", "change", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_by_name(start, change, message):
    with pytest.raises(LoHaError, match=message):
        replace(start, **change)
