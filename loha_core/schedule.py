"""Strength over the progress of sampling."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass

from .errors import LoHaError

INTERPOLATIONS = ("linear", "smooth", "step")


@dataclass(frozen=True)
class Schedule:
    """A curve through keyframes: progress of sampling (0 = start, 1 = done) -> multiplier of the strength.

    Before the first keyframe and after the last their values hold. Two keyframes at one place are a jump; the later
    one holds at the place itself. Outside ``start`` … ``end`` (both included) the value is 0, whatever the keyframes.

    Args:
        keyframes: (progress, value), ordered by progress. None at all means 1 throughout.
        interpolation: "linear"; "smooth", which leaves and enters keyframes level (3x² − 2x³); or "step", where each
            value holds until the next keyframe.

    Raises:
        LoHaError: progress outside 0…1 or not in order, a value that is not finite, or an end before the start.

    >>> Schedule.parse("0:0, 0.5:1")(0.25)
    0.5
    """

    keyframes: tuple[tuple[float, float], ...] = ()
    interpolation: str = "linear"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for label, place in (("start_percent", self.start), ("end_percent", self.end)):
            _check_place(place, label)
        if self.end < self.start:
            raise LoHaError(f"end_percent {self.end:g} lies before start_percent {self.start:g}")
        if self.interpolation not in INTERPOLATIONS:
            raise LoHaError(f"no interpolation {self.interpolation!r}; there are {', '.join(INTERPOLATIONS)}")
        for place, value in self.keyframes:
            _check_place(place, f"keyframe {place:g}:{value:g}")
            if not math.isfinite(value):
                raise LoHaError(f"keyframe {place:g}:{value:g}: the strength must be a finite number")
        places = [place for place, _ in self.keyframes]
        if places != sorted(places):
            raise LoHaError(f"keyframes must be ordered by progress, found {', '.join(f'{p:g}' for p in places)}")

    def __call__(self, percent: float) -> float:
        """The multiplier at this progress of sampling, in 0…1."""
        if not self.start <= percent <= self.end:
            return 0.0
        if not self.keyframes:
            return 1.0
        after = bisect_right(self.keyframes, percent, key=lambda frame: frame[0])
        if after == 0 or after == len(self.keyframes):
            return self.keyframes[max(after - 1, 0)][1]
        (place0, value0), (place1, value1) = self.keyframes[after - 1 : after + 1]
        if self.interpolation == "step":
            return value0
        x = (percent - place0) / (place1 - place0)
        if self.interpolation == "smooth":
            x = x * x * (3 - 2 * x)
        return value0 * (1 - x) + value1 * x

    @classmethod
    def parse(cls, text: str, interpolation: str = "linear", start: float = 0.0, end: float = 1.0) -> Schedule:
        """From "progress: strength" pairs, separated by commas or on lines of their own, in any order.

        Progress is written as 0.5 or as 50%. Lines that begin with # are ignored; no pairs mean 1 throughout.

        Raises:
            LoHaError: says which pair is wrong.
        """
        lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
        entries = (entry.strip() for line in lines for entry in re.split(r"[,;]", line))
        frames = [_keyframe(entry) for entry in entries if entry]
        return cls(tuple(sorted(frames, key=lambda frame: frame[0])), interpolation, start, end)


def _check_place(place: float, where: str) -> None:
    if not 0 <= place <= 1:
        raise LoHaError(f"{where}: progress goes from 0 to 1 (or 0% to 100%), found {place:g}")


def _keyframe(entry: str) -> tuple[float, float]:
    place, colon, value = (text.strip() for text in entry.partition(":"))
    try:
        if not colon:
            raise ValueError
        progress = float(place[:-1]) / 100 if place.endswith("%") else float(place)
        frame = (progress, float(value))
    except ValueError:
        raise LoHaError(
            f"keyframe {entry!r}: expected 'progress: strength', such as 0.5: 1 for full strength half way"
        ) from None
    _check_place(progress, f"keyframe {entry!r}")
    return frame
