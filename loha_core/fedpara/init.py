"""First values: factors whose product has He's variance."""

from __future__ import annotations

from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from ..algebra import Factors, compute_dtype, halves
from ..errors import LoHaError, check_choice

Fan = Literal["in", "out"]
DEFAULT_FAN: Fan = "in"
# pFedPara: the variance of W₂. As large as the 1 that is added to it: a small W₂ holds all clients to one weight.
LOCAL_VARIANCE = 1.0


def variance(shape: tuple[int, ...], fan: Fan, groups: int = 1) -> float:
    """He's variance of a weight (o, i, *k), 2/fan (arXiv 1502.01852, eq. 10 and 14): fan in i·∏k, fan out o/groups·∏k.

    >>> variance((64, 16, 3, 3), "in"), variance((64, 16), "out")
    (0.013888888888888888, 0.03125)
    """
    check_choice("fan", fan, ("in", "out"))
    return 2 / (prod(shape[1:]) if fan == "in" else shape[0] // groups * prod(shape[2:]))


@torch.no_grad()
def fill_(f: Factors, variance: float, *, personal: bool = False, tanh: bool = False) -> None:
    """Draw factors so that W has this variance. On the meta device nothing happens.

    Var(M₁∘M₂) = Var(M₁)·Var(M₂), as both are independent and around zero; each half gets the root. In pFedPara
    Var(M₁∘(M₂ + 1)) = Var(M₁)·(Var(M₂) + 1).

    Raises:
        LoHaError: tanh, whose values stay below 1, for so few inputs that the variance cannot be reached.
    """
    root = sqrt(variance)
    if tanh and root > 0.9:
        raise LoHaError(f"tanh cannot give a weight the variance {variance:.3g}; it has too few inputs, so skip it")
    if f.w1_a.is_meta:
        return
    first, second = (variance / (1 + LOCAL_VARIANCE), LOCAL_VARIANCE) if personal else (root, root)
    _fill_half(f.w1_a, f.w1_b, f.t1, first)
    _fill_half(f.w2_a, f.w2_b, f.t2, second)
    if tanh:
        for a, m in zip((f.w1_a, f.w2_a), halves(f.to(compute_dtype(*f))), strict=True):
            a.mul_(_before_tanh(m, root))


def _fill_half(a: Tensor, b: Tensor, t: Tensor | None, variance: float) -> None:
    """Normal A and B of one σ, r·σ⁴ = Var(M); or a normal core of M's variance between orthogonal a and b.

    Normal ones around a core would stretch some of its directions and lose others (no choice of the paper's).
    """
    if t is None:
        for factor in (a, b):
            torch.nn.init.normal_(factor, std=(variance / b.shape[0]) ** (1 / 4))
        return
    torch.nn.init.normal_(t, std=sqrt(variance))
    for factor in (a, b):  # (r, n) of the mean square 1/r
        wide = torch.empty_like(factor, dtype=compute_dtype(factor))  # which has a QR on every device
        factor.copy_(torch.nn.init.orthogonal_(wide, gain=sqrt(max(wide.shape) / len(wide))))


def _before_tanh(m: Tensor, mean_square: float) -> float:
    """c with mean tanh²(c·M) = ``mean_square``, by bisection: it grows with c. To about 1e-5."""
    low, high = 0.0, 64.0
    for _ in range(22):
        middle = (low + high) / 2
        if float((m * middle).tanh().square().mean()) < mean_square:
            low = middle
        else:
            high = middle
    return low
