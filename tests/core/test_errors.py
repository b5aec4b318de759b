"""Messages that name what they are about, and the one check of numbers."""

from __future__ import annotations

import math

import pytest

from loha_core import LoHaError
from loha_core.errors import about, check_choice, check_number


@pytest.mark.parametrize("value", [1, 2.5, 10**400, -3])
def test_numbers_within_their_limits_pass(value):
    check_number("x", value)
    check_number("x", abs(value), minimum=1, above=0)


@pytest.mark.parametrize(
    ("value", "limits", "expected"),
    [
        (math.nan, {}, "x is nan; expected a finite number"),
        (math.inf, {"minimum": 0}, "x is inf; expected a finite number from 0"),
        (True, {}, "x is True; expected a finite number"),
        ("1", {}, "x is '1'; expected a finite number"),
        (1.5, {"integer": True}, "x is 1.5; expected a whole number"),
        (0, {"above": 0}, "x is 0; expected a finite number above 0"),
        (1, {"minimum": 0, "below": 1}, "x is 1; expected a finite number from 0 below 1"),
        (3, {"maximum": 2}, "x is 3; expected a finite number up to 2"),
        (10**400, {"maximum": 2, "integer": True}, "expected a whole number up to 2"),
    ],
)
def test_others_are_refused_with_what_was_expected(value, limits, expected):
    with pytest.raises(LoHaError) as error:
        check_number("x", value, **limits)
    assert expected in str(error.value)


def test_about_puts_its_words_in_front_once_and_leaves_other_errors_alone():
    with pytest.raises(LoHaError, match=r"^a\.safetensors: proj: no rank$"), about("a.safetensors", "proj"):
        raise LoHaError("no rank")
    with pytest.raises(KeyError, match="^'k'$"), about("a.safetensors"):
        raise KeyError("k")


@pytest.mark.parametrize("choices", [("a", "b"), {"a": 1, "b": 2}, iter(["a", "b"])])
def test_a_value_that_is_none_of_the_choices_is_refused(choices):
    with pytest.raises(LoHaError, match=r"^x is \['a'\]; expected one of a, b$"):
        check_choice("x", ["a"], choices)
    check_choice("x", "a", ["a", "b"])
