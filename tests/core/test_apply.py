"""add_delta_ with torch alone: every back end against float64, correct rounding, memory, and what it refuses."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loha_core import LoHaError, add_delta_, plan
from loha_core.ops import tiles

from . import samples
from .merging import HALF, LAYOUTS, assert_rounded, cases, expected, update, weight
from .pairwise import pairwise, rows

DTYPES = [torch.float64, torch.float32, *HALF, torch.float8_e4m3fn]


@contextmanager
def small_tiles(tile: int, prepared: int):
    """So that a small weight has several tiles, bands and panels."""
    with mock.patch.multiple(tiles, CPU_TILE=tile, MAX_FACTOR_NUMBERS=prepared):
        yield


def surroundings(view: Tensor) -> Tensor:
    """Everything in the storage that a view lies in, the view itself blanked."""
    copy = view.untyped_storage().clone()
    whole = torch.empty(0, dtype=view.dtype).set_(copy, view.storage_offset(), view.shape, view.stride())
    whole.fill_(0)
    return torch.tensor(copy.tolist(), dtype=torch.uint8)


@given(cases(DTYPES), st.sampled_from(["auto", "tiles", "khatri_rao"]), st.integers(1, 200), st.integers(1, 200))
def test_every_back_end_gives_float64s_result_correctly_rounded(case, backend, tile, prepared):
    before, updates = case
    exact, size = expected(before, updates)
    around = surroundings(before)
    with small_tiles(tile, prepared):
        result = add_delta_(before, [u.factors for u in updates], [u.strength for u in updates], backend=backend)
    assert result is before
    assert_rounded(before, exact, size)
    assert torch.equal(surroundings(before), around)


@pairwise(kernel=[(), (3,), (3, 3), (2, 1, 3)], layout=LAYOUTS, dtype=DTYPES, backend=["auto", "tiles", "khatri_rao"])
def test_a_mixed_stack(kernel, layout, dtype, backend):
    shape = (11, 7, *kernel)
    updates = [
        update(shape, 3, seed=1),
        update(shape, 2, seed=2, dora_axis=0, strength=0.7),
        update(shape, 5, seed=3, tucker=bool(kernel), strength=-0.3),
        update(shape, 2, seed=4, dora_axis=1, tucker=bool(kernel), strength=0.4),
    ]
    before = weight(shape, dtype, layout)
    exact, size = expected(before, updates)
    with small_tiles(40, 64):
        add_delta_(before, [u.factors for u in updates], [u.strength for u in updates], backend=backend)
    assert_rounded(before, exact, size)


REAL = [(1500, 1024), (300, 130, 3, 3)]


@pytest.mark.parametrize(
    ("shape", "dtype", "backend"),
    [(shape, torch.float32, "dense") for shape in REAL]
    + rows(REAL, (torch.float32, *HALF), ("tiles", "khatri_rao", "auto")),
    ids=str,
)
def test_weights_of_a_real_size(shape, dtype, backend):
    u = update(shape, 8)
    before = weight(shape, dtype)
    exact, size = expected(before, [u])
    assert_rounded(add_delta_(before, u.factors, u.strength, backend=backend), exact, size)


@pytest.mark.parametrize("backend", ["tiles", "khatri_rao"])
def test_dora_magnitudes_as_a_vector_and_a_row_of_zeros(backend):
    shape = (6, 4)
    u = update(shape, 2, dora_axis=0, strength=0.5)
    flat = replace(u.factors, dora_scale=u.tensors["dora_scale"].flatten())
    a, b = weight(shape), weight(shape)
    assert torch.equal(add_delta_(a, u.factors, 0.5, backend=backend), add_delta_(b, flat, 0.5, backend=backend))
    nothing = replace(u.factors, w1_a=torch.zeros(6, 2))
    assert torch.equal(add_delta_(torch.zeros(shape), nothing, backend=backend), torch.zeros(shape))


@pytest.mark.parametrize("backend", ["auto", "tiles", "khatri_rao"])
def test_a_vector_is_a_weight_of_one_input(backend):
    before = torch.zeros(5)
    factors = update((5, 1)).factors
    assert torch.allclose(add_delta_(before, factors, backend=backend), factors.delta().flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strength_zero_is_bit_for_bit_nothing(dtype):
    before = weight((5, 3), dtype)
    before[0, 0] = -0.0
    bits, version = before.clone().view(torch.uint8), before._version
    factors = update((5, 3), dora_axis=0).factors
    assert add_delta_(before, [factors, factors], 0.0) is before
    assert torch.equal(before.view(torch.uint8), bits) and before._version == version
    assert add_delta_(before, [], []) is before and before._version == version


@pytest.mark.parametrize("backend", ["auto", "dense", "tiles", "khatri_rao"])
def test_from_a_backup(backend):
    factors = update((40, 30), 3).factors
    backup, target = weight((40, 30)), torch.full((40, 30), torch.nan)
    kept = backup.clone()
    assert add_delta_(target, factors, 0.5, source=backup, backend=backend) is target
    assert torch.equal(backup, kept)
    assert torch.equal(target, add_delta_(kept, factors, 0.5, backend=backend))
    assert torch.equal(add_delta_(target, factors, 0.0, source=backup), backup)


def test_factors_of_another_dtype_than_the_weight():
    u = update((9, 8), 3)
    half = u.factors.to(dtype=torch.float16)
    u.tensors.update({k: t.half() for k, t in u.tensors.items() if k.startswith("hada")})
    for dtype in (torch.float32, torch.float16, torch.float64):
        before = weight((9, 8), dtype)
        exact, size = expected(before, [u])
        assert_rounded(add_delta_(before, half, u.strength), exact, size)


def test_inference_tensors_parameters_and_gradients():
    u = update((12, 10), 2)
    for backend in ("auto", "tiles", "khatri_rao"):
        with torch.inference_mode():
            frozen = weight((12, 10))
            inside = add_delta_(weight((12, 10)), u.factors, 0.5, backend=backend)
        assert torch.equal(add_delta_(frozen, u.factors, 0.5, backend=backend), inside)
        parameter = torch.nn.Parameter(weight((12, 10)))
        trained = replace(u.factors, w1_a=u.factors.w1_a.clone().requires_grad_())
        with torch.inference_mode():
            add_delta_(parameter, trained, 0.25, backend=backend)
        add_delta_(parameter, trained, 0.25, backend=backend)
        assert parameter.grad_fn is None and parameter.requires_grad
        torch.testing.assert_close(parameter.detach(), inside.clone(), rtol=1e-5, atol=1e-6)


def test_nothing_is_written_when_something_does_not_fit():
    before = weight((6, 4, 3, 3))
    kept, good = before.clone(), update((6, 4, 3, 3)).factors
    wrong = [update((6, 5, 3, 3)), update((6, 4, 3)), update((4, 6, 3, 3)), update((6, 4, 9), tucker=True)]
    for bad in wrong[:3]:
        with pytest.raises(LoHaError, match=r"\(6, 4, 3, 3\)"):
            add_delta_(before, [good, bad.factors])
    with pytest.raises(LoHaError, match="dora_scale"):
        add_delta_(before, [good, replace(good, dora_scale=torch.ones(3))])
    with pytest.raises(LoHaError, match="2 updates but 1 strengths"):
        add_delta_(before, [good, good], [1.0])
    with pytest.raises(LoHaError, match="there are: auto, dense, tiles"):
        add_delta_(before, good, backend="fast")
    with pytest.raises(LoHaError, match="'dense'"):
        add_delta_(before, [good, good], backend="dense")
    with pytest.raises(LoHaError, match="source"):
        add_delta_(before, good, source=torch.zeros(6, 4))
    with pytest.raises(LoHaError, match="int64"):
        add_delta_(torch.zeros(6, 4, 3, 3, dtype=torch.int64), good)
    assert torch.equal(before, kept)


# --- memory -------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that lived at once in storages made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known | self.seen:
                    self._add(storage)
        return result

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self.live -= size
            self.seen.discard(key)

        weakref.finalize(storage, gone)


def peak(before: Tensor, updates, backend: str) -> int:
    tiles._kept.memory = None  # the memory of tiles counts, too
    with Peak() as watch:
        add_delta_(before, [u.factors for u in updates], backend=backend)
    return watch.peak


@pytest.mark.parametrize("backend", ["tiles", "khatri_rao"])
@pytest.mark.parametrize(
    ("dora", "dtype"), [(None, torch.float32), (None, torch.float16), (0, torch.float32), (1, torch.float16)], ids=str
)
def test_extra_memory_is_a_few_tiles(backend, dora, dtype):
    shape = (5120, 3072)  # 60 MiB in float32
    assert 0 < peak(torch.zeros(shape, dtype=dtype), [update(shape, 8, dora_axis=dora)], backend) <= 24 << 20


def test_extra_memory_of_an_enormous_rank():
    shape = (1024, 512, 3, 3)
    assert peak(torch.zeros(shape), [update(shape, 512, size=0.01)], "auto") <= 64 << 20
    assert plan((8192, 8192), samples.factors((8192, 8192), 64)).backend == "tiles"


def test_the_watch_sees_what_a_plain_merge_takes():
    with Peak() as watch:
        a = torch.zeros(1024, 1024)
        b = a * 2 + 1
        del a
    assert watch.peak == 12 << 20 and watch.live == 4 << 20
    del b
    assert watch.live == 0


# --- the cost model -----------------------------------------------------------------------------


def test_the_plan_follows_from_the_shape_and_can_be_printed():
    def backend(shape, rank, **options):
        return plan(shape, samples.factors(shape, rank), **options).backend

    assert backend((320, 320), 8) == "dense"
    assert backend((3072, 3072), 4) == "khatri_rao"
    assert backend((3072, 3072), 32) == "tiles"
    assert backend((3072, 3072), 8, dtype=torch.float16) == "tiles"
    # A GPU without Triton multiplies far faster than it reads.
    assert backend((3072, 3072), 12, device="mps") == "khatri_rao"
    mixed = [samples.factors((3072, 3072), 4), samples.factors((3072, 3072), 32)]
    found = plan((3072, 3072), mixed)
    assert found.backend == "khatri_rao+tiles"
    text = str(found)
    assert len(text.splitlines()) == 2 and "MFLOP" in text and "MB" in text
    with pytest.raises(LoHaError, match="weight of shape"):
        plan((4, 4), mixed)


def test_khatri_rao_is_refused_where_its_factors_would_be_too_large():
    text = str(plan((20000, 20000), samples.factors((20000, 20000), 24), device="mps"))
    assert text.startswith("tiles") and "MiB of U and V" in text


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 64), st.booleans())
def test_tiles_cover_a_weight(out, inputs, kernel, rank, matrix):
    with small_tiles(64, 64):
        height, width = tiles.tile_shape(out, inputs * kernel, kernel, rank, torch.device("cpu"), matrix)
    assert 1 <= height <= out and width % kernel == 0 and kernel <= width <= inputs * kernel
    assert height == 1 or height * width <= 2 * 64
