"""Parts of an output that a layer can make of a part of its input: tokens, or windows of a convolution.

A layer with an adapter in a region runs once on what lies outside, without the adapter, and once on what lies inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import weights

Box = tuple[slice, slice]


@dataclass(frozen=True)
class Tokens:
    """Of (b, n, c), these of the n."""

    index: Tensor
    is_whole: bool  # the share is 1 on all of them

    def __len__(self) -> int:
        return len(self.index)

    def of_input(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    def put_(self, y: Tensor, output: Tensor) -> None:
        y.index_copy_(1, self.index, output.to(y.dtype))

    def add_(self, y: Tensor, output: Tensor, share: Tensor) -> None:
        """Add ``output`` of this part, times its share, to an output of all."""
        y.index_add_(1, self.index, (share.index_select(1, self.index) * output).to(y.dtype))


@dataclass(frozen=True)
class Window:
    """Of (b, c, h, w), a box of the output, and the larger one of the input and output that it is cut from."""

    inner: Box
    outer: Box
    is_whole: bool

    def __len__(self) -> int:
        rows, columns = self.inner
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def of_input(self, x: Tensor) -> Tensor:
        return _box(x, self.outer)

    def _cropped(self, output: Tensor) -> Tensor:
        (rows, columns), (top, left) = self.inner, (self.outer[0].start, self.outer[1].start)
        return output[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    def put_(self, y: Tensor, output: Tensor) -> None:
        _box(y, self.inner).copy_(self._cropped(output))

    def add_(self, y: Tensor, output: Tensor, share: Tensor) -> None:
        """Add ``output`` of this part, times its share, to an output of all."""
        _box(y, self.inner).add_((_box(share, self.inner) * self._cropped(output)).to(y.dtype))


def _box(t: Tensor, box: Box) -> Tensor:
    return t[..., box[0], box[1]]


Part = Tokens | Window


@dataclass(frozen=True)
class Cut:
    """How a layer's output is cut.

    Attributes:
        shape: of all of the output.
        count: its tokens or cells, of one row.
        reach: how far a convolution sees, in rows and columns; None of tokens.
    """

    shape: tuple[int, ...]
    count: int
    reach: tuple[int, int] | None

    def part(self, share: Tensor) -> Part:
        """The least part with all of the output that has a share; (1 or b, n, 1) or (1 or b, 1, h, w), 0 … 1."""
        if self.reach is None:
            index = (share > 0).any(dim=0).flatten().nonzero().flatten()
            return Tokens(index, bool((share.index_select(1, index) == 1).all()))
        wanted = (share > 0).any(dim=0)[0]
        inner, outer = [], []
        for axis in (0, 1):
            found = wanted.any(dim=1 - axis).nonzero().flatten()
            first, end = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)
            inner.append(slice(first, end))
            reach, size = self.reach[axis], wanted.shape[axis]
            outer.append(slice(max(0, first - reach), min(size, end + reach)))
        box = (inner[0], inner[1])
        return Window(box, (outer[0], outer[1]), bool((_box(share, box) == 1).all()))


def cut_of(module: nn.Module, x: Tensor) -> Cut | None:
    """How the module's output of x can be cut; None if each of its values depends on more of x, or it is not known."""
    m: Any = module
    if weights.is_linear(module) and x.dim() == 3:
        return Cut((*x.shape[:-1], m.out_features), x.shape[1], None)
    if not (weights.is_convolution(module) and isinstance(module, nn.Conv2d) and x.dim() == 4):
        return None
    if m.padding_mode != "zeros" or isinstance(m.padding, str) or set(m.stride) != {1}:
        return None
    reach = tuple(d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True))
    if any(2 * p != r for p, r in zip(m.padding, reach, strict=True)):
        return None
    return Cut((len(x), m.out_channels, *x.shape[2:]), x.shape[2] * x.shape[3], (m.padding[0], m.padding[1]))
