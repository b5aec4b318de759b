"""What people type into inputs, checked: a prompt that comes by the API may hold anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from loha_core import LoHaError


def known(name: str, value: str, choices: Iterable[str]) -> str:
    """``value``, if the input ``name`` knows it."""
    expected = list(choices)
    if value not in expected:
        raise LoHaError(f"{name} is {value!r}; expected one of {', '.join(expected)}")
    return value


def choice(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    """What ``value`` stands for."""
    return choices[known(name, value, choices)]


def json_object(name: str, text: str, example: str) -> dict[str, Any]:
    """An object written as JSON; no text is an empty one."""
    try:
        found = json.loads(text) if text.strip() else {}
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise LoHaError(f"{name} is {text!r} ({error}); expected JSON such as {example}") from error
    return found
