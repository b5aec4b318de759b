"""The one exception of this project, and how its messages come to name what they are about."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class LoHaError(ValueError):
    """Something a user can act on: names the file and key, what was found and expected, and what to do."""


@contextmanager
def about(*what: object) -> Iterator[None]:
    """Put ``what`` (a file, a key) in front of the message of a LoHaError from inside, so that no raise repeats it.

    >>> with about("a.safetensors", "proj"):
    ...     raise LoHaError("no rank")
    Traceback (most recent call last):
    loha_core.errors.LoHaError: a.safetensors: proj: no rank
    """
    try:
        yield
    except LoHaError as error:
        raise type(error)(": ".join([*map(str, what), str(error)])) from error.__cause__


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    integer: bool = False,
) -> None:
    """Refuse what is no finite number within ``minimum`` … ``maximum`` (included) and ``above`` … ``below`` (excluded).

    >>> check_number("rank", 0, minimum=1, integer=True)
    Traceback (most recent call last):
    loha_core.errors.LoHaError: rank is 0; expected a whole number from 1

    Raises:
        LoHaError: names the value and what was expected.
    """
    kind = int if integer else (int, float)
    # A whole number may be too large for a float; it is finite.
    if isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value)):
        low = (minimum is None or value >= minimum) and (above is None or value > above)
        high = (maximum is None or value <= maximum) and (below is None or value < below)
        if low and high:
            return
    limits = [
        f"{word} {limit:g}"
        for word, limit in (("from", minimum), ("above", above), ("up to", maximum), ("below", below))
        if limit is not None
    ]
    expected = " ".join([f"a {'whole' if integer else 'finite'} number", *limits])
    raise LoHaError(f"{name} is {value!r}; expected {expected}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of ``choices``.

    Raises:
        LoHaError: names the value and the choices.
    """
    expected = list(choices)
    if value not in expected:
        raise LoHaError(f"{name} is {value!r}; expected one of {', '.join(expected)}")


def check_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names that are none of ``known``.

    Raises:
        LoHaError: names the first of them, and what is near it or all that is known.
    """
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
            raise LoHaError(f"unknown {what} {name!r}; {hint}")
