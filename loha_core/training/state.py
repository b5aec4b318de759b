"""A run's state in one safetensors file, replaced in one rename: there is always a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LoHaError
from ..formats.container import read_tensors, write_tensors

_KEY = "loha_run"
_TENSOR = "$tensor"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries and lists of tensors, numbers, strings and None.

    Raises:
        LoHaError: a tensor is not finite, or the file cannot be written; the one before is then still there.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(state, tensors))
    write_tensors(path, tensors, {_KEY: skeleton})


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        LoHaError: no such file, damaged, or no run's state.
    """
    tensors, metadata = read_tensors(path)
    try:
        found = _put_together(json.loads(metadata[_KEY]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise LoHaError(f"{path}: not the state of a training run ({error!r}); start again without resume") from error
    if not isinstance(found, dict):
        raise LoHaError(f"{path}: not the state of a training run; start again without resume")
    return found


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON value in which each tensor is a reference. Keys that are numbers, as optimizers have, stay numbers."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {"$items": [[key, _take_apart(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_take_apart(inner, tensors) for inner in value]
        return parts if isinstance(value, list) else {"$tuple": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no place in a run's state")


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if "$tuple" in value:
        return tuple(_put_together(inner, tensors) for inner in value["$tuple"])
    return {key: _put_together(inner, tensors) for key, inner in value["$items"]}
