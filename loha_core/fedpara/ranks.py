"""What a rank can say and what it costs (FedPara, arXiv 2108.06098, propositions 1 to 3).

``shape`` is a weight's, (o, i, *k), with i the input channels of a group. Flat factors see the matrix (o, i·∏k),
Tucker factors have a core (r, r, *k) in each half.
"""

from __future__ import annotations

from math import ceil, floor, isqrt, prod, sqrt


def parameter_count(shape: tuple[int, ...], rank: int, tucker: bool) -> int:
    """2r(o + i·∏k) numbers of flat factors, 2r(o + i + r·∏k) of Tucker ones (the paper's table 1).

    >>> parameter_count((256, 256), 16, False), parameter_count((256, 256, 3, 3), 16, True)
    (16384, 20992)
    """
    o, i, k = shape[0], shape[1], prod(shape[2:])
    return 2 * rank * (o + i + rank * k) if tucker else 2 * rank * (o + i * k)


def least_rank(shape: tuple[int, ...], tucker: bool) -> int:
    """r_min: the least r at which W can have full rank, with a core in each of its three unfoldings.

    W's rank is r² at most: of flat factors (prop. 2), and with cores of the unfoldings by outputs and by inputs
    (prop. 3). The unfolding by kernel positions, which the paper does not speak of, then has min(r², o)·min(r², i) at
    most. With few channels it decides: in a depthwise convolution at r = 1 all kernels would be alike.

    >>> least_rank((256, 256), False), least_rank((64, 3, 3, 3), True), least_rank((64, 3, 3, 3), False)
    (16, 2, 6)
    >>> least_rank((16, 1, 3, 3), True)
    3
    """
    o, i, k = shape[0], shape[1], prod(shape[2:])
    if not tucker:
        return ceil(sqrt(min(o, i * k)))
    few, many = sorted((o, i))
    return ceil(sqrt(max(few, min(ceil(k / few), many))))


def most_rank(shape: tuple[int, ...], tucker: bool) -> int:
    """r_max: the largest r of no more parameters than the weight has; 0 where even rank 1 has more.

    >>> most_rank((256, 256), False), most_rank((256, 256, 3, 3), True)
    (64, 154)
    """
    o, i, k = shape[0], shape[1], prod(shape[2:])
    if not tucker:
        return prod(shape) // (2 * (o + i * k))
    # 2k·r² + 2(o + i)·r ≤ o·i·k; whole numbers throughout, so that no rounding decides.
    return (isqrt((o + i) ** 2 + 2 * k * prod(shape)) - (o + i)) // (2 * k)


def rank_of(gamma: float, shape: tuple[int, ...], tucker: bool) -> int:
    """r = (1 − γ)·r_min + γ·r_max (section 2.2), rounded to the nearest; 0 where r_max is below r_min."""
    least, most = least_rank(shape, tucker), most_rank(shape, tucker)
    return floor((1 - gamma) * least + gamma * most + 0.5) if least <= most else 0
