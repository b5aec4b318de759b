"""The GPU's kernel, run on the CPU by Triton's interpreter (TRITON_INTERPRET=1, set in conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from loha_core import LoHaError, add_delta_
from loha_core.ops import triton as triton_merge

from .merging import HALF, LAYOUTS, assert_rounded, cases, expected, update, weight
from .pairwise import pairwise
from .processes import PATIENCE


def merged(before, updates, **options):
    factors, strengths = [u.factors for u in updates], [u.strength for u in updates]
    return add_delta_(before, factors, strengths, backend="triton", **options)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The interpreter runs tile by tile in Python: small tiles give several of them on a small weight."""
    monkeypatch.setattr(triton_merge, "BLOCK_O", 16)
    monkeypatch.setattr(triton_merge, "BLOCK_N", 32)


@settings(max_examples=40)
@given(cases([torch.float32, *HALF], most=24))
def test_float64s_result_correctly_rounded(case):
    before, updates = case
    if len(updates) > 1 and any(u.axis is not None for u in updates):
        updates = updates[:1]
    exact, size = expected(before, updates)
    assert_rounded(merged(before, updates), exact, size)


@pairwise(kernel=[(), (3,), (3, 3), (2, 1, 3)], layout=LAYOUTS, dtype=[torch.float32, *HALF])
def test_a_stack_of_several_ranks(kernel, layout, dtype):
    shape = (37, 7, *kernel)
    updates = [
        update(shape, 3, seed=1),
        update(shape, 20, seed=2, tucker=bool(kernel), strength=-0.3, size=0.2),
        update(shape, 16, seed=3, strength=0.2, size=0.2),
    ]
    before = weight(shape, dtype, layout)
    exact, size = expected(before, updates)
    around = before._version
    assert_rounded(merged(before, updates), exact, size)
    assert before._version == around + 1


@pairwise(kernel=[(), (3, 3)], axis=[0, 1], layout=["plain", "inputs last"], dtype=[torch.float32, *HALF])
def test_dora(kernel, axis, layout, dtype):
    shape = (37, 11, *kernel)
    updates = [update(shape, 5, dora_axis=axis, tucker=bool(kernel), strength=0.7)]
    before = weight(shape, dtype, layout)
    exact, size = expected(before, updates)
    assert_rounded(merged(before, updates), exact, size)


def test_factors_in_half_precision_and_from_a_backup():
    u = update((20, 40), 4)
    u.tensors.update({key: t.half() for key, t in u.tensors.items()})
    backup, target = weight((20, 40)), torch.full((20, 40), torch.nan, dtype=torch.bfloat16)
    kept = backup.clone()
    exact, size = expected(backup, [u])
    assert_rounded(merged(target, [u], source=backup), exact, size)
    assert torch.equal(backup, kept)


def test_a_row_of_zeros_stays_zero():
    u = update((6, 4), 2, dora_axis=0)
    nothing = replace(u.factors, w1_a=torch.zeros(6, 2))
    assert torch.equal(add_delta_(torch.zeros(6, 4), nothing, backend="triton"), torch.zeros(6, 4))


def test_inference_mode():
    u = update((20, 40), 4)
    outside = merged(weight((20, 40)), [u])
    with torch.inference_mode():
        frozen = weight((20, 40))
    assert torch.equal(merged(frozen, [u]), outside)


def test_what_it_does_not_take_is_refused_before_anything_is_written():
    plain, dora = update((6, 4)), update((6, 4), dora_axis=0)
    before = weight((6, 4))
    kept = before.clone()
    with pytest.raises(LoHaError, match="DoRA within a stack"):
        merged(before, [plain, dora])
    with pytest.raises(LoHaError, match="float8"):
        merged(before.to(torch.float8_e4m3fn), [plain])
    strange = torch.randn(2, 2, 3, 3).permute(0, 2, 1, 3)[:, :, :, ::2]
    with pytest.raises(LoHaError, match="strides"):
        merged(strange, [update(tuple(strange.shape))])
    assert torch.equal(before, kept)


def test_it_is_found_to_work_here():
    assert triton_merge.is_available(torch.device("cpu"))


def test_a_merge_on_the_cpu_never_imports_triton():
    code = (
        "import sys, torch; from loha_core import LoHaFactors, add_delta_;"
        "t = torch.ones(4, 4); add_delta_(torch.ones(4, 4), LoHaFactors(t, t, t, t, 1.0));"
        "assert 'loha_core.ops.triton' not in sys.modules and 'triton' not in sys.modules"
    )
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean, timeout=PATIENCE)
