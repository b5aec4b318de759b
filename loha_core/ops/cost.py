"""The cost model: by which strategy to apply a LoHa to activations, by which back end to merge it into a weight.

Work is FLOPs and bytes, and a byte costs the FLOPs that the machine could do while it moves (`BALANCE`). Merging walks
tiles that stay in a CPU's cache; a layer's forward streams activations, U, V and ΔW through memory, where a byte costs
three times as much. On a GPU one number serves both. In float32 it follows that

- applying goes by U and V up to a rank that grows with the layer and falls with the tokens: for 1280×1280 and 1024
  tokens up to 16 in training and 6 in a forward alone, on a GPU up to 18 and 11;
- merging goes by one product U·V up to rank 5, less for a small weight, where preparing counts as much as the work; on
  a GPU without Triton up to 13.

>>> print(estimate(out=1280, inner=1280, rank=8, tokens=1024))
khatri-rao: cost in MFLOP: khatri-rao 1055.4 (1006.6 MFLOP, 8.1 MB); rebuild 4194.3 (3565.2 MFLOP, 104.9 MB)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple, get_args

from ..errors import LoHaError

# Two ways to apply, with the same result (DESIGN §4): the activations times U and V, or ΔW applied with W.
Strategy = Literal["khatri-rao", "rebuild"]
Backend = Literal["dense", "tiles", "khatri_rao", "triton"]


class Balance(NamedTuple):
    """FLOP/s over bytes/s of what lies in cache, and of what lies in memory."""

    cache: float
    memory: float


# CPU: 190 GFLOP/s over 96 GB/s in cache, measured on 2 cores; 50 GFLOP/s over 8 GB/s of memory for one of a desktop's.
# GPU: a data sheet's float32, 60 TFLOP/s over 3 TB/s.
BALANCE = {"cpu": Balance(2.0, 6.0), "cuda": Balance(20.0, 20.0)}
# FLOPs in the time before a back end's first one: 40 µs for U and V, 50 µs for tiles. Measured on the same CPU.
PREPARATION: dict[Backend, float] = {"dense": 0.0, "khatri_rao": 8e6, "tiles": 10e6}
# A weight of so many numbers is merged without tiles: its two products are the memory that takes.
MAX_DENSE_NUMBERS = 1 << 20
# For U and V together.
MAX_KHATRI_RAO_BYTES = 32 << 20


def balance(device: str) -> Balance:
    return BALANCE.get(device, BALANCE["cuda"])


class Cost(NamedTuple):
    """What one way costs: ``total`` is in FLOPs, those included that its bytes and its preparation are worth."""

    way: str
    flops: float
    bytes: float
    total: float
    factor_bytes: int = 0

    def __str__(self) -> str:
        limit = f", but {self.factor_bytes >> 20} MiB of U and V" if self.factor_bytes > MAX_KHATRI_RAO_BYTES else ""
        work = f"{self.flops / 1e6:.1f} MFLOP, {self.bytes / 1e6:.1f} MB"
        return f"{self.way} {self.total / 1e6:.1f} ({work}){limit}"


def _explained(chosen: str, costs: tuple[Cost, ...]) -> str:
    return f"{chosen}: cost in MFLOP: {'; '.join(map(str, costs))}"


# --- applying to activations --------------------------------------------------------------------


class Estimate(NamedTuple):
    """One layer and one step by both strategies."""

    khatri_rao: Cost
    rebuild: Cost

    @property
    def best(self) -> Strategy:
        return "khatri-rao" if self.khatri_rao.total <= self.rebuild.total else "rebuild"

    def __str__(self) -> str:
        return _explained(self.best, self)


def estimate(
    out: int,
    inner: int,
    rank: int,
    tokens: int,
    kernel: tuple[int, ...] = (),
    *,
    groups: int = 1,
    tucker: bool = False,
    training: bool = True,
    fused: bool = True,
    itemsize: int = 4,
    device: str = "cpu",
) -> Estimate:
    """Costs of one forward, and one backward when ``training``, beyond the base layer's own.

    Args:
        out: o, output channels.
        inner: i, input channels per group.
        tokens: n, rows of the output: batch × sequence, or batch × output pixels.
        kernel: sizes of the kernel; empty for a linear layer.
        fused: ΔW can be added to W, so that the base's own product serves both.
    """
    k, q = prod(kernel), rank * rank
    n, o, i = tokens, out, inner * k
    if tucker:
        # 1×1 down, core, 1×1 up; the core has r⁴·k entries.
        applied = 2 * n * q * (inner * groups + q * k * groups + o)
        built = q * q * k + q * (inner + o)
        halves = 2 * (2 * rank * rank * i + 2 * rank * o * i)
    else:
        applied = 2 * n * q * (i * groups + o)
        built = q * (i * groups + o)
        halves = 2 * (2 * rank * o * i)

    # Each product is one more in the backward for x, and one for the factors.
    low = float(applied * (3 if training else 1))
    # U and V: written and read in the forward; again in the backward, where their gradients pass by too.
    low_bytes = itemsize * ((10 if training else 2) * built + (6 if training else 2) * n * q * groups)

    full = float(halves * (4 if training else 1))
    if training:
        full += 2 * n * o * i  # the weight's gradient
    if not fused:
        full += 2 * n * o * i * (2 if training else 1)
    full_bytes = itemsize * (16 if training else 5) * o * i
    byte = balance(device).memory
    return Estimate(
        Cost("khatri-rao", low, low_bytes, low + byte * low_bytes),
        Cost("rebuild", full, full_bytes, full + byte * full_bytes),
    )


def check_strategy(strategy: str) -> None:
    """Raises LoHaError unless ``strategy`` is "auto" or one of `Strategy`."""
    if strategy != "auto" and strategy not in get_args(Strategy):
        names = " or ".join(map(repr, get_args(Strategy)))
        raise LoHaError(f"strategy is {strategy!r}; expected 'auto', {names}")


# --- merging into a weight ----------------------------------------------------------------------


class Choice(NamedTuple):
    """One update's back end, and what was compared."""

    backend: Backend
    costs: tuple[Cost, ...] = ()

    def __str__(self) -> str:
        if not self.costs:
            return f"{self.backend}: factors in, one read and one write of W"
        return _explained(self.backend, self.costs)


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
def choose_backend(out: int, n: int, rank: int, device: str, itemsize: int, plain: bool) -> Choice:
    """The cheapest back end that runs anywhere; Triton, where there is a GPU for it, is always cheaper.

    Tiles, or both products at once where the weight is small: 4·o·n·r FLOPs; products written and read, W too.
    U·V in one addmm: 2·o·n·r² FLOPs; U, V and W written and read.

    Args:
        out, n: rows and columns of W, a kernel's entries being columns.
        device: "cpu", "cuda", …
        itemsize: bytes of a number while computing, 4 or 8.
        plain: this flat update is all there is to do, in one dtype.
    """
    byte = balance(device).cache * 4 / itemsize  # twice the bytes a number is half the FLOPs a second
    name: Backend = "dense" if plain and out * n <= MAX_DENSE_NUMBERS else "tiles"
    flops, traffic = 4.0 * rank * out * n, 6.0 * itemsize * out * n
    products = Cost(name, flops, traffic, flops + byte * traffic + PREPARATION[name])

    uv_bytes = rank**2 * (out + n) * itemsize
    flops, traffic = 2.0 * rank**2 * out * n, 2.0 * (itemsize * out * n + uv_bytes)
    single = Cost("khatri_rao", flops, traffic, flops + byte * traffic + PREPARATION["khatri_rao"], uv_bytes)
    is_single = single.total < products.total and uv_bytes <= MAX_KHATRI_RAO_BYTES
    return Choice("khatri_rao" if is_single else name, (products, single))
