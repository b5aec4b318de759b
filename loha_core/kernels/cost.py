"""Which back end merges an update fastest: the cost model.

Per element of W, an update of rank r costs

    tiles        4r FLOPs for both products;  the products are written and read, W read and written
    khatri_rao   2r² FLOPs in one addmm;      W read and written;  r² numbers per row and column for U and V

and a byte costs as much as BALANCE floating-point operations. Where the two cross (r ≈ 5 on a CPU for a large
matrix, lower for a small one, far higher on a GPU) follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Backend = Literal["tiles", "khatri_rao", "triton"]

# FLOP/s of a matrix product over bytes/s of an element-wise operation that finds its operands in cache.
# CPU: measured, 190 GFLOP/s on 120 GB/s. GPU: a data sheet's float32, 60 TFLOP/s on 3 TB/s.
BALANCE = {"cpu": 1.6, "cuda": 20.0}
# U and V of khatri_rao are memory beside the weight; past this, tiles.
KHATRI_RAO_BYTES = 32 << 20


class Cost(NamedTuple):
    flops: float
    bytes: float
    balance: float

    @property
    def total(self) -> float:
        """In FLOPs."""
        return self.flops + self.balance * self.bytes

    def __str__(self) -> str:
        return f"{self.flops / 1e6:.1f} MFLOP + {self.bytes / 1e6:.1f} MB = {self.total / 1e6:.1f}"


@dataclass(frozen=True)
class Plan:
    """Which back end a merge takes, update by update, and why. ``print`` it.

    Attributes:
        backends: one for each update of the stack.
        why: one line for each update.
    """

    backends: tuple[Backend, ...]
    why: tuple[str, ...]

    @property
    def backend(self) -> str:
        return "+".join(dict.fromkeys(self.backends))

    def __str__(self) -> str:
        return "\n".join(f"{backend}: {why}" for backend, why in zip(self.backends, self.why, strict=True))


def tiles(out: int, n: int, rank: int, device: str, size: int) -> Cost:
    """Both products of a tile, multiplied into W; ``size`` is the bytes of a number."""
    return Cost(4.0 * rank * out * n, 6.0 * size * out * n, _balance(device, size))


def khatri_rao(out: int, n: int, rank: int, device: str, size: int) -> Cost:
    """W.addmm_(U, V): U and V are made (one write, one read), W is read and written."""
    traffic = 2.0 * size * (out * n + rank**2 * (out + n))
    return Cost(2.0 * rank**2 * out * n, traffic, _balance(device, size))


def choose(out: int, n: int, rank: int, device: str, size: int) -> Backend:
    """The cheaper of the two that run anywhere."""
    if rank**2 * (out + n) * size > KHATRI_RAO_BYTES:
        return "tiles"
    cheaper = khatri_rao(out, n, rank, device, size).total < tiles(out, n, rank, device, size).total
    return "khatri_rao" if cheaper else "tiles"


def explain(out: int, n: int, rank: int, device: str, size: int) -> str:
    """The comparison that ``choose`` makes, in words."""
    a, b = khatri_rao(out, n, rank, device, size), tiles(out, n, rank, device, size)
    spare = rank**2 * (out + n) * size
    limit = f"; U and V take {spare >> 20} MiB, too many" if spare > KHATRI_RAO_BYTES else ""
    return f"{out}x{n}, rank {rank}: khatri_rao {a}, tiles {b} (1 byte = {a.balance:g} FLOP){limit}"


def _balance(device: str, size: int) -> float:
    # Twice the bytes a number is half the FLOPs a second.
    return BALANCE.get(device, BALANCE["cuda"]) * 4 / size
