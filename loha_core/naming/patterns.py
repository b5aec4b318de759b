"""Regular expressions from files and users: PEFT's patterns of module names, and those that are checked before use.

Python's `re` backtracks, so that an expression of 20 letters can take hours on a name of 800: it is refused by an upper
bound of the steps that it can take on any name of that length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import LoHaError

try:
    from re import _parser as sre  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as sre

_MAX_LENGTH = 20_000  # letters of an expression
# Letters of the longest name that the bound is for: of a pattern in a file, which may be made to be slow, and of what a
# user writes to search for.
_MAX_NAME, _MAX_SEARCHED = 800, 240
_MAX_STEPS = 1.5e7  # of about 10 ns
_LETTER, _ITEM = 200, 1000  # steps: what it takes to look at one here


class _Reached(NamedTuple):
    """How often the matcher stands between two items of an expression, at most.

    On each of ``paths`` ways through what was before, it comes to ``places`` different places of the name;
    ``repeats`` of unlimited length lie behind it.
    """

    paths: float
    places: float
    repeats: int

    @property
    def times(self) -> float:
        return self.paths * self.places


class _CostsError(LoHaError):
    """Matching may take more steps than are allowed."""


@lru_cache(maxsize=1024)
def checked(pattern: str, *, anywhere: bool = False) -> re.Pattern[str]:
    """The expression, compiled, if it is quick on any name of up to 800 letters (240 where it is searched for).

    >>> checked("(a+)+b")
    Traceback (most recent call last):
    loha_core.errors.LoHaError: '(a+)+b' may take very long to match; use fewer repetitions such as '.*' in it

    Args:
        anywhere: to be searched for; False, to be matched from a name's beginning.

    Raises:
        LoHaError: no regular expression, one that is too long or refers back to a group, or one that may take more
            than about 0.1 s.
    """
    compiled, is_open = _checked(pattern, anywhere, _MAX_SEARCHED if anywhere else _MAX_NAME)
    # A search tries every beginning anyway; `.*` before it would do so from each.
    return re.compile(pattern.removeprefix(".*")) if is_open and anywhere else compiled


@lru_cache(maxsize=8192)  # a configuration may have one for each layer
def path_end(pattern: str) -> re.Pattern[str]:
    """What matches a module's dotted path, or its end behind a dot, as PEFT's rank_pattern does; `checked` first."""
    _, is_open = _checked(pattern, True, _MAX_NAME)
    try:
        # `.*` at the beginning takes what the optional parent would, in a fraction of the steps.
        return re.compile(rf"({pattern})$" if is_open else rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise LoHaError(f"{pattern[:80]!r} is not a regular expression for the end of a path: {error}") from error


def get_pattern_key(patterns: Iterable[str], module: str) -> str:
    """The first pattern that matches ``module`` or the end of its dotted path; ``module`` itself if none does.

    >>> get_pattern_key(["layers.0.q", "q"], "model.layers.0.q")
    'layers.0.q'
    """
    return next((pattern for pattern in patterns if path_end(pattern).match(module)), module)


def _checked(pattern: str, anywhere: bool, longest: int) -> tuple[re.Pattern[str], bool]:
    """The expression, and whether it begins with ``.*``."""
    shown = repr(pattern if len(pattern) <= 80 else f"{pattern[:79]}…")
    if len(pattern) > _MAX_LENGTH:
        raise LoHaError(f"{shown} has {len(pattern)} letters; at most {_MAX_LENGTH} are allowed in one expression")
    try:
        compiled, parsed = re.compile(pattern), sre.parse(pattern)
        first = pattern.startswith(".*") and parsed[0]
        is_open = bool(first and first[0] is sre.MAX_REPEAT and first[1][:2] == (0, sre.MAXREPEAT))
        if compiled.flags & re.MULTILINE or re.search(r"\(\?[a-z]*m[a-z-]*:", pattern):
            raise _CostsError("may match at every line; leave out the flag m")
        start = _Reached(1, longest, 1) if anywhere and not is_open else _Reached(1, 1, 0)
        _sequence(parsed, start, _Budget(longest))
    except _CostsError as error:
        raise LoHaError(f"{shown} {error}") from None
    except (re.error, OverflowError, RecursionError) as error:
        raise LoHaError(f"{shown} is not a regular expression: {error}") from error
    return compiled, is_open


class _Budget:
    """Adds up steps on a name of ``longest`` letters."""

    def __init__(self, longest: int) -> None:
        self.steps, self.longest = 0.0, longest

    def spend(self, steps: float) -> None:
        self.steps += steps
        if self.steps > _MAX_STEPS:
            raise _CostsError("may take very long to match; use fewer repetitions such as '.*' in it")


def _sequence(items: Any, at: _Reached, budget: _Budget) -> _Reached:
    """Where the matcher stands behind ``items``, one after another; what it took is spent."""
    items = list(items)
    while items:
        run = next((n for n, (op, _) in enumerate(items) if op is not sre.LITERAL), len(items))
        if run:
            places = _occurrences([letter for _, letter in items[:run]], budget.longest)
            budget.spend(run * _LETTER + at.paths * sum(min(at.places, count) for count in places))
            at = at._replace(places=min(at.places, places[-1]))
            items = items[run:]
        else:
            (op, argument), *items = items
            at = _item(op, argument, at, items[0] if items else None, budget)
    return at


def _occurrences(word: list[int], longest: int) -> list[float]:
    """How often each beginning of a word can stand in a name: it overlaps itself as its smallest period allows."""
    letters = [chr(letter).casefold() for letter in word]
    borders = [0]
    for letter in letters[1:]:
        border = borders[-1]
        while border and letters[border] != letter:
            border = borders[border - 1]
        borders.append(border + (letters[border] == letter))
    return [max(1.0, longest / (n - border)) for n, border in enumerate(borders, 1)]


def _item(op: Any, argument: Any, at: _Reached, following: Any, budget: _Budget) -> _Reached:
    budget.spend(at.times + _ITEM)
    if op in (sre.MAX_REPEAT, sre.MIN_REPEAT) or str(op) == "POSSESSIVE_REPEAT":
        return _repeat(argument, at, following, budget)
    if op is sre.SUBPATTERN:
        return _sequence(argument[-1], at, budget)
    if op is sre.BRANCH:
        return _any_of([_sequence(option, at, budget) for option in argument[1]])
    if op in (sre.ASSERT, sre.ASSERT_NOT):
        _sequence(argument[1], at, budget)
    elif str(op) == "ATOMIC_GROUP":
        return _sequence(argument, at, budget)
    elif op is sre.AT and argument is sre.AT_BEGINNING:
        return at._replace(places=1)
    elif op in (sre.GROUPREF, sre.GROUPREF_EXISTS):
        raise _CostsError("refers back to a group, which may take very long; spell the group out again")
    return at  # one letter of several, or a place such as the end


def _repeat(argument: Any, at: _Reached, following: Any, budget: _Budget) -> _Reached:
    least, most, item = argument
    if len(item) == 1 and item[0][0] in (sre.ANY, sre.IN, sre.LITERAL, sre.NOT_LITERAL, sre.RANGE):
        count = min(int(most), budget.longest)
        # A run of any letters is passed over at once.
        budget.spend(at.times * count / (16 if item[0][0] is sre.ANY else 1))
        if count > 1 and (letters := _letters(following)) and not any(_may_be(item[0], each) for each in letters):
            return at  # it ends where one of those letters stands, nowhere else
        if count < budget.longest:
            return _Reached(at.times, count - min(least, count) + 1, at.repeats)
        # Of n places in increasing order, one in n! is left.
        return _Reached(at.times / (at.repeats + 1), budget.longest, at.repeats + 1)
    reached = [] if least else [at]
    for count in range(1, min(int(most), budget.longest) + 1):
        at = _sequence(item, at, budget)
        reached += [at] if count >= least else []
    return _any_of(reached or [at])


def _any_of(options: list[_Reached]) -> _Reached:
    places = max(option.places for option in options)
    total = sum(option.times for option in options)
    return _Reached(total / places, places, max(option.repeats for option in options))


def _letters(item: Any) -> list[int]:
    """All letters that an item stands for, if it lists them one by one; else none."""
    if item is None:
        return []
    op, argument = item
    if op is sre.LITERAL:
        return [argument]
    return [letter for _, letter in argument] if op is sre.IN and all(o is sre.LITERAL for o, _ in argument) else []


def _may_be(item: Any, letter: int) -> bool:
    """Whether an item that stands for one letter stands for this one; True where that is not looked into."""
    op, argument = item
    if op is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        return any(_may_be(entry, letter) for entry in argument[negated:]) != negated
    if op in (sre.LITERAL, sre.NOT_LITERAL):
        return (argument == letter) == (op is sre.LITERAL)
    if op is sre.RANGE:
        return bool(argument[0] <= letter <= argument[1])
    if op is sre.CATEGORY and argument in (sre.CATEGORY_DIGIT, sre.CATEGORY_WORD):
        text = chr(letter)
        return text.isdigit() if argument is sre.CATEGORY_DIGIT else text.isalnum() or text == "_"
    return True
