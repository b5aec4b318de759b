"""Strength over the progress of sampling."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loha_core import LoHaError, schedule
from loha_core.schedule import INTERPOLATIONS, Schedule

places = st.integers(0, 1000).map(lambda n: n / 1000)
values = st.floats(-20, 20).map(lambda x: round(x, 3))
frames = st.lists(st.tuples(places, values), min_size=1, max_size=6, unique_by=lambda frame: frame[0])


def test_examples():
    assert doctest.testmod(schedule).failed == 0


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@given(frames=frames, at=places)
def test_a_curve_goes_through_its_keyframes_and_stays_between_them(interpolation, frames, at):
    curve = Schedule.parse("\n".join(f"{place}: {value}" for place, value in frames), interpolation)
    assert curve.keyframes == tuple(sorted(frames))
    assert all(curve(place) == value for place, value in frames)
    before = max((f for f in frames if f[0] <= at), default=min(frames))
    after = min((f for f in frames if f[0] >= at), default=max(frames))
    low, high = sorted((before[1], after[1]))
    assert low - 1e-9 <= curve(at) <= high + 1e-9


def test_interpolations():
    text = "0.2:0, 0.6:1"
    linear, smooth, step = (Schedule.parse(text, kind) for kind in INTERPOLATIONS)
    assert [round(linear(x), 6) for x in (0, 0.2, 0.3, 0.4, 0.6, 1)] == [0, 0, 0.25, 0.5, 1, 1]
    assert [round(smooth(x), 6) for x in (0.2, 0.3, 0.4, 0.5, 0.6)] == [0, 0.15625, 0.5, 0.84375, 1]
    assert [step(x) for x in (0, 0.2, 0.59, 0.6, 1)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_two_keyframes_at_one_place_are_a_jump(interpolation):
    curve = Schedule.parse("0:0, 0.5:0, 0.5:1, 1:1", interpolation)
    assert [curve(x) for x in (0, 0.499, 0.5, 1)] == [0, 0, 1, 1]


def test_it_is_zero_outside_start_and_end_which_both_belong_to_it():
    curve = Schedule.parse("0:1, 1:1", start=0.25, end=0.75)
    assert [curve(x) for x in (0, 0.249, 0.25, 0.5, 0.75, 0.751, 1)] == [0, 0, 1, 1, 1, 0, 0]
    assert [Schedule(start=0.5)(x) for x in (0.4, 0.5, 1)] == [0, 1, 1]  # no keyframes: 1 throughout


def test_ways_to_write_it():
    wanted = ((0.0, 0.0), (0.5, 1.0), (1.0, 0.3))
    for text in ("0:0, 0.5:1, 1:0.3", "1 : 0.3\n# note\n\n0:0;50%: 1", "0:0,\n0.5:1,\n100%:.3,"):
        assert Schedule.parse(text).keyframes == wanted
    assert Schedule.parse("0:0") == Schedule(((0.0, 0.0),)) and hash(Schedule.parse("0:0"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("0:0, 0.5", {}, "keyframe '0.5': expected 'progress: strength', such as 0.5: 1"),
        ("0:0, half:1", {}, "keyframe 'half:1': expected"),
        ("0:0, 20:1", {}, r"keyframe '20:1': progress goes from 0 to 1 \(or 0% to 100%\), found 20"),
        ("-0.1:1", {}, "keyframe '-0.1:1': progress goes from 0 to 1"),
        ("nan:1", {}, "progress goes from 0 to 1"),
        ("0:inf", {}, "keyframe 0:inf: the strength must be a finite number"),
        ("0:1:2", {}, "keyframe '0:1:2': expected"),
        ("", {"start": 0.6, "end": 0.5}, "end_percent 0.5 lies before start_percent 0.6"),
        ("", {"end": 1.5}, "end_percent: progress goes from 0 to 1"),
        ("", {"interpolation": "cubic"}, "no interpolation 'cubic'; there are linear, smooth, step"),
    ],
)
def test_errors(text, options, message):
    with pytest.raises(LoHaError, match=message):
        Schedule.parse(text, **options)
    with pytest.raises(LoHaError, match=r"ordered by progress, found 1, 0"):
        Schedule(((1, 0), (0, 0)))


@given(st.text(alphabet="01.:,;%\n-e# ", max_size=30))
def test_anything_else_is_a_clear_error(text):
    try:
        curve = Schedule.parse(text)
    except LoHaError as error:
        assert str(error)
    else:
        assert isinstance(curve(0.5), float)
