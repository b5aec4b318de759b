"""What merging must give, in float64, and how far from it correct rounding may lie. Shared by the back ends' tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from loha_core import LoHaFactors

from . import oracle, samples

LAYOUTS = ["plain", "rows of a fused weight", "columns of a fused weight", "every other column", "inputs last"]
HALF = [torch.float16, torch.bfloat16]


@dataclass
class Update:
    """A file's tensors (what the oracle reads), and the same as factors."""

    tensors: dict[str, Tensor]
    axis: int | None
    strength: float

    @property
    def factors(self) -> LoHaFactors:
        found = {key.removeprefix("hada_"): tensor for key, tensor in self.tensors.items()}
        return LoHaFactors(**found)

    def delta(self, absolute: bool = False) -> np.ndarray:
        tensors = {f"m.{k}": t.abs() if absolute else t for k, t in self.tensors.items()}
        return oracle.update(tensors, "m")


def update(shape, rank=2, *, strength=0.5, size=0.5, **options) -> Update:
    tensors = samples.parts(tuple(shape), rank, **options)
    for key in tensors:
        if key.startswith("hada"):
            tensors[key] = tensors[key] * size
    return Update(tensors, options.get("dora_axis"), strength)


def weight(shape, dtype=torch.float32, layout="plain", seed=0) -> Tensor:
    """Random numbers in one of the layouts in which a model's weights come."""
    random = torch.Generator().manual_seed(seed)
    out, inner, *kernel = shape
    new = {
        "plain": lambda: torch.randn(shape, generator=random),
        "rows of a fused weight": lambda: torch.randn(out + 3, inner, *kernel, generator=random),
        "columns of a fused weight": lambda: torch.randn(out, inner + 3, *kernel, generator=random),
        "every other column": lambda: torch.randn(out, 2 * inner, *kernel, generator=random),
        "inputs last": lambda: torch.randn(*kernel, out, inner, generator=random),
    }[layout]().to(dtype)
    if layout == "rows of a fused weight":
        return new[2 : 2 + out]
    if layout == "columns of a fused weight":
        return new[:, 1 : 1 + inner]
    if layout == "every other column":
        return new[:, ::2]
    if layout == "inputs last":
        # (o, k…, i) in memory, as channels_last; for a matrix, its transpose.
        if not kernel:
            return new.T.contiguous().T
        order = (new.dim() - 2, new.dim() - 1, *range(new.dim() - 2))
        return new.permute(order).movedim(1, -1).contiguous().movedim(-1, 1)
    return new


def expected(before: Tensor, updates: list[Update]) -> tuple[np.ndarray, np.ndarray]:
    """The merged weight in float64, and the size of what was added up on the way: float32's error is a part of that."""
    exact = oracle.wide(before)
    size = np.abs(exact)
    for u in updates:
        change, bound = (u.delta(absolute).reshape(exact.shape) for absolute in (False, True))
        if u.axis is None:
            exact, size = exact + u.strength * change, size + abs(u.strength) * bound
            continue
        adapted = exact + change
        ratio = oracle.dora(torch.from_numpy(exact), change, u.tensors["dora_scale"], u.axis) / adapted
        exact = oracle.dora(torch.from_numpy(exact), change, u.tensors["dora_scale"], u.axis, u.strength)
        size = size + abs(u.strength) * (np.abs(ratio) * (size + bound) + size)
    return exact, size


def assert_rounded(found: Tensor, exact: np.ndarray, size: np.ndarray) -> None:
    """Within half a unit in the last place of float64's result, plus float32's error where the sums are float32."""
    info = torch.finfo(found.dtype)
    unit = np.exp2(np.floor(np.log2(np.abs(exact) + 1e-300))) * info.eps
    half = np.maximum(unit, info.smallest_normal * info.eps) / 2
    slack = (1e-12 if found.dtype == torch.float64 else 3e-6) * size
    excess = np.abs(oracle.wide(found) - exact) - half - slack
    assert excess.max() <= 0, f"{excess.max()} beyond half a unit"


@st.composite
def cases(draw, dtypes, most=9):
    """A shape, dtype and layout of a weight, and updates for it: flat, Tucker and DoRA along either axis, mixed."""
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (draw(st.integers(1, most)), draw(st.integers(1, most)), *kernel)
    updates = []
    for index in range(draw(st.integers(1, 3))):
        u = update(
            shape,
            draw(st.integers(1, 5)),
            strength=draw(st.sampled_from([1.0, 0.5, -0.75])),
            tucker=bool(kernel) and draw(st.booleans()),
            dora_axis=draw(st.sampled_from([None, None, 0, 1])),
            alpha=draw(st.sampled_from([1.0, 3.0])),
            seed=draw(st.integers(0, 99)) + 100 * index,
        )
        updates.append(u)
    before = weight(shape, draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 99)))
    return before, updates
