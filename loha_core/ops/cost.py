"""Which back end merges an update fastest: the cost model.

Per element of W, an update of rank r costs

    tiles        4r FLOPs for both products;  the products are written and read, W read and written
    whole        the same as a single tile with nothing to prepare: one plain update on a small weight
    khatri_rao   2r² FLOPs in one addmm;      W read and written;  r² numbers per row and column for U and V
    triton       4r FLOPs;                    W read and written;  on a GPU always the cheapest

A byte costs as much as BALANCE floating-point operations, and what a back end prepares as much as PREPARATION.
Where tiles and khatri_rao cross (r ≈ 5 on a CPU for a large weight, lower for a small one, far higher on a GPU)
follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Backend = Literal["whole", "tiles", "khatri_rao", "triton"]

# FLOP/s of a matrix product over bytes/s of an element-wise operation that finds its operands in cache.
# CPU: measured on 2 cores, 190 GFLOP/s over 96 GB/s. GPU: a data sheet's float32, 60 TFLOP/s over 3 TB/s.
BALANCE = {"cpu": 2.0, "cuda": 20.0}
# FLOPs in the time before the first of them: 40 µs for U and V, 50 µs for tiles. Measured on the same CPU.
PREPARATION: dict[Backend, float] = {"whole": 0.0, "khatri_rao": 8e6, "tiles": 10e6}
# The most numbers in a weight that is merged whole: its two products are the memory that takes.
WHOLE = 1 << 20
# The most bytes that U and V may take.
KHATRI_RAO_BYTES = 32 << 20


class Cost(NamedTuple):
    """``total`` is in FLOPs: what else they could have been."""

    backend: Backend
    flops: float
    bytes: float
    total: float
    extra: int = 0

    def __str__(self) -> str:
        limit = f", but {self.extra >> 20} MiB of U and V" if self.extra > KHATRI_RAO_BYTES else ""
        work = f"{self.flops / 1e6:.1f} MFLOP, {self.bytes / 1e6:.1f} MB"
        return f"{self.backend} {self.total / 1e6:.1f} ({work}){limit}"


class Choice(NamedTuple):
    """One update's back end, and what was compared."""

    backend: Backend
    costs: tuple[Cost, ...] = ()

    def __str__(self) -> str:
        if not self.costs:
            return f"{self.backend}: factors in, one read and one write of W"
        return f"{self.backend}: cost in MFLOP: " + "; ".join(map(str, self.costs))


@dataclass(frozen=True)
class Plan:
    """How a merge is done, update by update, and why: ``print`` it."""

    choices: tuple[Choice, ...]

    @property
    def backend(self) -> str:
        return "+".join(dict.fromkeys(choice.backend for choice in self.choices))

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices))


@lru_cache(maxsize=4096)  # a model has few shapes and very many layers
def choose(out: int, n: int, rank: int, device: str, size: int, plain: bool) -> Choice:
    """The cheapest back end that runs anywhere.

    Args:
        out, n: rows of W and the rest of it.
        device: "cpu", "cuda", …
        size: bytes of a number while computing, 4 or 8.
        plain: this flat update is all there is to do, in one dtype.
    """
    # Twice the bytes a number is half the FLOPs a second.
    balance = BALANCE.get(device, BALANCE["cuda"]) * 4 / size
    whole = plain and out * n <= WHOLE
    flops, traffic = 4.0 * rank * out * n, 6.0 * size * out * n
    name: Backend = "whole" if whole else "tiles"
    products = Cost(name, flops, traffic, flops + balance * traffic + PREPARATION[name])

    extra = rank**2 * (out + n) * size
    flops, traffic = 2.0 * rank**2 * out * n, 2.0 * (size * out * n + extra)
    single = Cost("khatri_rao", flops, traffic, flops + balance * traffic + PREPARATION["khatri_rao"], extra)

    best = single if single.total < products.total and extra <= KHATRI_RAO_BYTES else products
    return Choice(best.backend, (products, single))
