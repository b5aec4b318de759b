"""oneDNN's products: right for every layout that autograd hands over, and off where they must be."""

from __future__ import annotations

import pytest
import torch

from loha_core.ops import gemm

LAYOUTS = {
    "plain": lambda m, n: torch.randn(m, n),
    "transposed": lambda m, n: torch.randn(n, m).T,
    "one number": lambda m, n: torch.randn(()).expand(m, n),
    "one row": lambda m, n: torch.randn(1, n).expand(m, n),
    "one column": lambda m, n: torch.randn(m, 1).expand(m, n),
    "every other": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "a slice": lambda m, n: torch.randn(m + 3, n + 5)[3:, 5:],
}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_layouts(left, right):
    a, b, bias = LAYOUTS[left](256, 130), LAYOUTS[right](130, 140), torch.randn(140)
    with torch.no_grad():
        exact, size = a.double() @ b.double(), float(a.double().norm() * b.double().norm())
        y = torch.randn(256, 140)
        for found, wanted in (
            (gemm.matmul(a, b), exact),
            (gemm.linear(a, b.T, bias), exact + bias),
            (gemm.addmm_(y.clone(), a, b), exact + y),
        ):
            assert (found - wanted).norm() <= 1e-6 * (size + float(wanted.norm()))


def test_left_to_torch_where_it_must_be():
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    assert not gemm.by_onednn(a, b)  # autograd could not see it
    with torch.no_grad():
        available = gemm.by_onednn(a, b)
        assert not gemm.by_onednn(a.double(), b.double()) and not gemm.by_onednn(a[:8], b)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not gemm.by_onednn(a, b)
    assert available == (gemm._ONEDNN is not None)
