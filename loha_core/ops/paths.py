"""Which way of applying a LoHa is cheaper: the cost model.

Two ways give the same result (DESIGN §4): *khatri-rao* multiplies the activations by the rank-r² factors U and V,
*rebuild* makes ΔW and applies it to the activations together with W. Their costs cross somewhere around rank 16, but
where depends on the layer, so nobody should hard-code it:

>>> print(estimate(out=1280, inner=1280, rank=8, tokens=1024))
khatri-rao     1.0 GFLOP      8 MB
rebuild        3.6 GFLOP    105 MB
-> khatri-rao
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from ..errors import LoHaError

Path = Literal["khatri-rao", "rebuild"]

# What one byte to or from memory costs, in floating-point operations: a machine's FLOP/s over its bytes/s.
# A desktop core does ~50 GFLOP/s on 8 GB/s; a GPU in float32 ~50 TFLOP/s on 3 TB/s.
BALANCE = {"cpu": 6.0, "cuda": 16.0}


@dataclass(frozen=True)
class Estimate:
    """Arithmetic and memory traffic of both ways, for one layer and one step.

    Attributes:
        flops, bytes: by path.
        balance: FLOPs that a byte is worth on this machine.
    """

    flops: dict[Path, float]
    bytes: dict[Path, float]
    balance: float

    def cost(self, path: Path) -> float:
        """In FLOP equivalents."""
        return self.flops[path] + self.balance * self.bytes[path]

    @property
    def best(self) -> Path:
        return "khatri-rao" if self.cost("khatri-rao") <= self.cost("rebuild") else "rebuild"

    def __str__(self) -> str:
        rows = [f"{p:<12} {self.flops[p] / 1e9:5.1f} GFLOP {self.bytes[p] / 1e6:6.0f} MB" for p in get_args(Path)]
        return "\n".join([*rows, f"-> {self.best}"])


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
    passes = 3 if training else 1  # each product is one more in the backward for x, and one for the factors

    if tucker:
        # 1×1 down, core, 1×1 up; the core has r⁴·k entries.
        applied = 2 * n * q * (inner * groups + q * k * groups + o)
        build = q * q * k + q * (inner + o)
        halves = 2 * (2 * rank * rank * i + 2 * rank * o * i)
    else:
        applied = 2 * n * q * (i * groups + o)
        build = q * (i * groups + o)
        halves = 2 * (2 * rank * o * i)
    low: float = passes * applied
    # U and V: written and read in the forward; again in the backward, where their gradients pass by too.
    low_bytes = itemsize * ((10 if training else 2) * build + (6 if training else 2) * n * q * groups)

    full: float = halves * (4 if training else 1)
    if training:
        full += 2 * n * o * i  # the weight's gradient
    if not fused:
        full += 2 * n * o * i * (2 if training else 1)
    full_bytes = itemsize * (16 if training else 5) * o * i
    balance = BALANCE.get(device, BALANCE["cuda"])
    return Estimate({"khatri-rao": low, "rebuild": full}, {"khatri-rao": low_bytes, "rebuild": full_bytes}, balance)


def check_path(path: str) -> None:
    """Raises LoHaError unless ``path`` is "auto" or names a way."""
    if path != "auto" and path not in get_args(Path):
        raise LoHaError(f"path is {path!r}; expected 'auto', {' or '.join(map(repr, get_args(Path)))}")
