"""LoHa in float64, straight from a file's tensors. Knows nothing of loha_core; numpy does the sums.

The equations are FedPara's (arXiv 2108.06098, propositions 1 and 3) and DoRA's (arXiv 2402.09353, eq. 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def wide(tensor: Tensor) -> np.ndarray:
    """Any dtype to float64; each storage dtype converts exactly."""
    return tensor.detach().to(torch.float64).numpy()


def half(a: np.ndarray, b: np.ndarray, t: np.ndarray | None) -> np.ndarray:
    """M = a·b, or Σ_pq t[p,q,k]·a[p,o]·b[q,i] for any number of kernel axes."""
    if t is None:
        return a.reshape(a.shape[0], -1) @ b.reshape(b.shape[0], -1)
    inner = np.tensordot(b, t, axes=([0], [1]))  # (i, p, *k)
    return np.tensordot(a, inner, axes=([0], [1]))  # (o, i, *k)


def update(tensors: Mapping[str, Tensor], module: str, alpha: float | None = None) -> np.ndarray:
    """alpha/r · scalar · M₁∘M₂ of one module; ``alpha`` where the file holds none (PEFT); r if neither says."""
    part = {key.removeprefix(f"{module}."): wide(t) for key, t in tensors.items() if key.startswith(f"{module}.")}
    m1, m2 = (half(part[f"hada_w{h}_a"], part[f"hada_w{h}_b"], part.get(f"hada_t{h}")) for h in (1, 2))
    rank = part["hada_w1_b"].shape[0]
    if "alpha" in part:
        alpha = part["alpha"].item()
    scale = (rank if alpha is None else alpha) / rank
    return scale * part.get("scalar", np.float64(1)).item() * m1 * m2


def dora(weight: Tensor, delta: np.ndarray, magnitude: Tensor, axis: int, strength: float = 1.0) -> np.ndarray:
    """W + strength·(W' − W), W' = m∘(W+ΔW)/‖W+ΔW‖, the norm over every axis but ``axis``."""
    base = wide(weight)
    adapted = base + delta.reshape(base.shape)
    others = tuple(d for d in range(base.ndim) if d != axis)
    m = wide(magnitude).reshape([-1 if d == axis else 1 for d in range(base.ndim)])
    merged = m * adapted / np.sqrt((adapted**2).sum(axis=others, keepdims=True))
    return base + strength * (merged - base)


def error(found: Tensor | np.ndarray, wanted: np.ndarray) -> float:
    """‖found − wanted‖ / ‖wanted‖ (Frobenius); a wrong count of elements raises."""
    found = wide(found) if isinstance(found, Tensor) else found
    size = np.linalg.norm(wanted)
    assert size > 0, "the oracle's update is zero: nothing would be compared"
    return float(np.linalg.norm(found.reshape(wanted.shape) - wanted) / size)


def modules(tensors: Mapping[str, Tensor] | Sequence[str]) -> list[str]:
    """The LoHa modules of a state dict."""
    return sorted(key.removesuffix(".hada_w1_a") for key in tensors if key.endswith(".hada_w1_a"))
