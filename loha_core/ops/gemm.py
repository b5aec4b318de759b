"""Matrix products on the CPU at the speed that the CPU has.

torch's float32 products go to MKL, which on AMD's processors runs code for an older instruction set; oneDNN, which
comes with torch and does its convolutions, runs the same code on both makers' processors. Measured on an EPYC,
2·1024·320·320 FLOPs: 1.94 ms by MKL, 0.95 ms by oneDNN. The operator is torch's own, the one that torch.compile uses.
Off with ``torch.backends.mkldnn.flags(enabled=False)``.

Autograd does not record these products: they are for the inside of a Function, or for no_grad.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this the call itself takes longer than the product.
MIN_FLOPS = 1 << 22


def _onednn_linear() -> Any:
    """oneDNN's linear layer, or None where torch has none, or none for this kind of processor."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN = _onednn_linear()


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether ``matmul(a, b)`` would go to oneDNN now."""
    return (
        _ONEDNN is not None
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and 2 * a.shape[0] * a.shape[1] * b.shape[1] >= MIN_FLOPS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_mkldnn_enabled()
    )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) · b (k, n)."""
    return _ONEDNN(a, b.T, None, "none", [], "") if by_onednn(a, b) else a @ b


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y (m, n) += a (m, k) · b (k, n), in place."""
    return y.add_(_ONEDNN(a, b.T, None, "none", [], "")) if by_onednn(a, b) else y.addmm_(a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, i) · weightᵀ (i, o) + bias (o,)."""
    return _ONEDNN(x, weight, bias, "none", [], "") if by_onednn(x, weight.T) else F.linear(x, weight, bias)
