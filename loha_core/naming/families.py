"""A family of diffusion models: what its weights are called in diffusers and in the original code, which ComfyUI keeps.

The two differ in more than words. One weight of the original (``qkv``) is often several of diffusers' (``to_q``,
``to_k``, ``to_v``): each of those is a stretch of its rows, a `Span`. `tables` has a table a family.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from .names import flat, split

# Where a stretch of rows begins or ends, in multiples of a weight's columns (i) and rows (o).
_EDGES = {
    "0": (0.0, 0.0),
    "i": (1.0, 0.0),
    "2i": (2.0, 0.0),
    "3i": (3.0, 0.0),
    "7i": (7.0, 0.0),
    "9i": (9.0, 0.0),
    "o/2": (0.0, 0.5),
    "(i+o)/2": (0.5, 0.5),
    "o": (0.0, 1.0),
}


@dataclass(frozen=True)
class Span:
    """Rows of a weight, ``start:stop``, or its two halves in the other order.

    Args:
        start, stop: (a, b) for a·i + b·o of the weight's shape (o, i, …).
        swapped: the halves change places, where the weight has twice as many rows as columns. Models modulate by a
            scale and a shift, in either order.
    """

    start: tuple[float, float] = (0.0, 0.0)
    stop: tuple[float, float] = (0.0, 1.0)
    swapped: bool = False

    @classmethod
    def parse(cls, text: str) -> Span:
        """From a table: "i:2i", or "swapped"."""
        if text == "swapped":
            return cls(swapped=True)
        start, stop = (_EDGES[edge] for edge in text.split(":"))
        return cls(start, stop)

    def __str__(self) -> str:
        """As tables write it."""
        if self.swapped:
            return "swapped"
        named = {edge: text for text, edge in _EDGES.items()}
        return f"{named[self.start]}:{named[self.stop]}"

    def rows(self, out: int, inner: int) -> tuple[int, int]:
        """(first row, how many) in a weight of this shape."""
        first, last = (round(a * inner + b * out) for a, b in (self.start, self.stop))
        return first, last - first

    def within(self, other: Span | None) -> Span:
        """The same rows, counted from where another stretch begins."""
        if other is None:
            return self
        (a, b), edges = other.start, (self.start, self.stop)
        start, stop = ((x - a, y - b) for x, y in edges)
        return replace(self, start=start, stop=stop)

    def height(self, inner: int, length: int) -> int | None:
        """The rows that the whole weight must have for this stretch to have ``length``; None if any number would do."""
        (a0, b0), (a1, b1) = self.start, self.stop
        return None if b0 == b1 else round((length - (a1 - a0) * inner) / (b1 - b0))


Side = Literal["diffusers", "native"]


class Part(NamedTuple):
    """A weight of diffusers': its dotted name, and which rows of the original's weight it is (None for all)."""

    name: str
    span: Span | None


class Weight(NamedTuple):
    """A weight of the original: its dotted name, and the parts that it is in diffusers."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Size:
    """One of a family's models: how many blocks each list has, and its width."""

    name: str
    blocks: tuple[int, ...]
    width: int | None = None

    def reaches(self, counts: tuple[int, ...]) -> bool:
        """Whether no list has fewer blocks than these."""
        return all(has >= needed for has, needed in zip(self.blocks, counts, strict=True))


class _Row(NamedTuple):
    diffusers: str
    native: str
    span: Span | None


@dataclass(frozen=True)
class Family:
    """A table of names.

    Args:
        name: what people call it.
        table: a line for each weight of diffusers': its name, the original's, and the span; N stands for the number of
            a block. Where both have one name it stands alone.
        also: names that others write for the original's weights, read but never written: theirs, the original's.
        blocks: label -> the original's list of blocks, in the order in which the model runs them.
        sizes: its models.
        diffusers: the class in diffusers, "" if there is none.
    """

    name: str
    table: str
    also: str = ""
    blocks: tuple[tuple[str, str], ...] = ()
    sizes: tuple[Size, ...] = ()
    diffusers: str = ""

    @cached_property
    def rows(self) -> tuple[_Row, ...]:
        return tuple(_rows(self.table))

    @cached_property
    def other_rows(self) -> tuple[_Row, ...]:
        return tuple(_rows(self.also))

    @cached_property
    def _by_native(self) -> _Index:
        return _indexed((row.native, row) for row in self.rows)

    @cached_property
    def _others_by_native(self) -> _Index:
        return _indexed((row.native, row) for row in self.other_rows)

    @cached_property
    def _by_part(self) -> _Index:
        return _indexed((row.diffusers, row) for row in (*self.rows, *self.other_rows))

    def weight(self, path: str) -> Weight | None:
        """The weight that the original calls ``path``, dotted or as `names.split` gives it."""
        matches = list(_matching(self._by_native, path))
        return Weight(_filled(matches[0][0].native, matches[0][1]), _parts(matches)) if matches else None

    def others(self, path: str) -> tuple[Part, ...]:
        """What others call the weight that the original calls ``path``."""
        return _parts(_matching(self._others_by_native, path))

    def part(self, path: str) -> tuple[str, Part] | None:
        """(the original's name, the part) that diffusers, or others, call ``path``."""
        for row, numbers in _matching(self._by_part, path):
            return _filled(row.native, numbers), Part(_filled(row.diffusers, numbers), row.span)
        return None

    def knows(self, path: str) -> bool:
        return self.weight(path) is not None or self.part(path) is not None

    def side(self, paths: Iterable[str]) -> Side | None:
        """Whose names ``paths`` are, by the most of those that only one side has; None if none tells."""
        told = [self.weight(path) is None for path in paths if (self.weight(path) is None) != (self.part(path) is None)]
        return ("diffusers" if 2 * sum(told) > len(told) else "native") if told else None

    def fits(self, path: str, side: Side | None, shape: tuple[int, ...]) -> bool:
        """Whether an update of this shape (o, i, …) can be of what ``path`` means, where its rows go by its columns."""
        if (place := self.place(path, side)) is None:
            return False
        name, span = place
        if span is None:
            weight = self.weight(name)
            stops = [part.span.stop for part in weight.parts if part.span] if weight else []
            span = Span((0.0, 0.0), max(stops, key=lambda stop: stop[::-1], default=(0.0, 1.0)))
        return span.height(shape[1], shape[0]) is not None or span.rows(0, shape[1])[1] == shape[0]

    def place(self, path: str, side: Side | None) -> tuple[str, Span | None] | None:
        """(the original's dotted name, the rows of it) that ``path`` means among names of this side."""
        weight, part = self.weight(path), self.part(path)
        if part is not None and (side == "diffusers" or weight is None):
            return part[0], part[1].span
        return None if weight is None else (weight.name, None)

    def counted(self, paths: Iterable[str]) -> tuple[int, ...]:
        """How many blocks of each of the lists ``paths``, of the original, are in."""
        counts = [0] * len(self.blocks)
        for path in paths:
            for n, (_, module) in enumerate(self.blocks):
                if match := re.match(rf"{flat(module)}_(\d+)(?:_|$)", path):
                    counts[n] = max(counts[n], int(match[1]) + 1)
        return tuple(counts)


def each(lists: Iterable[str], block: str) -> str:
    """A table's lines for a block of each of these lists, which ``block`` calls LIST."""
    return "".join(block.replace("LIST", name) for name in lists)


def _rows(table: str) -> Iterator[_Row]:
    for line in table.splitlines():
        words = line.partition("#")[0].split()
        if words:
            diffusers, native, span = [*words, *[""] * (3 - len(words))]
            yield _Row(diffusers, native or diffusers, Span.parse(span) if span else None)


_NUMBER = re.compile(r"(?<=_)(?:\d+|N)(?=_|$)")
# A name with # for its numbers -> rows, and the numbers of each.
_Index = dict[str, list[tuple[_Row, list[str]]]]


def _template(name: str) -> tuple[str, list[str]]:
    """A name as `names.split` has paths, with # for its numbers; and those."""
    path = split(flat(name))[1]
    return _NUMBER.sub("#", path), _NUMBER.findall(path)


def _indexed(rows: Iterable[tuple[str, _Row]]) -> _Index:
    index: _Index = defaultdict(list)
    for name, row in rows:
        template, numbers = _template(name)
        index[template].append((row, numbers))
    return index


def _matching(index: _Index, path: str) -> Iterator[tuple[_Row, list[str]]]:
    """The rows that ``path`` is of, each with the numbers that stand for its N."""
    template, numbers = _template(path)
    for row, places in index.get(template, ()):
        if all(place in ("N", number) for place, number in zip(places, numbers, strict=True)):
            yield row, [number for place, number in zip(places, numbers, strict=True) if place == "N"]


def _parts(rows: Iterable[tuple[_Row, list[str]]]) -> tuple[Part, ...]:
    return tuple(Part(_filled(row.diffusers, numbers), row.span) for row, numbers in rows)


def _filled(name: str, numbers: Iterable[str]) -> str:
    """A row's name with the numbers of its blocks."""
    remaining = iter(numbers)
    return re.sub(r"\bN\b", lambda _: next(remaining), name)
