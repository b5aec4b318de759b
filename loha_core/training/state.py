"""The files of a run's folder: its state in one safetensors file, replaced in one rename, and its losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LoHaError
from ..formats.container import atomic, read_tensors, write_tensors

STATE, LOSSES = "state.safetensors", "loss.csv"
_KEY = "loha_run"
_TENSOR = "$tensor"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries and lists of tensors, numbers, strings and None.

    Raises:
        LoHaError: a tensor is not finite, or the file cannot be written; the one before is then still there.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_flatten(state, tensors))
    write_tensors(path, tensors, {_KEY: skeleton})


def save_losses(folder: Path, losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()) -> None:
    """Write a table of steps and losses, for people; where there is validation, with a column for its losses.

    Raises:
        LoHaError: it cannot be written.
    """
    with atomic(folder / LOSSES) as temporary:
        held_out = {step: f",{loss!r}" for step, loss in validation}
        none, column = (",", ",validation") if held_out else ("", "")
        rows = "".join(f"{step},{loss!r}{held_out.get(step, none)}\n" for step, loss in enumerate(losses, 1))
        temporary.write_text(f"step,loss{column}\n{rows}", "utf-8")


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        LoHaError: no such file, damaged, or not a run's state.
    """
    tensors, metadata = read_tensors(path)
    try:
        state = _unflatten(json.loads(metadata[_KEY]), tensors)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
    except (KeyError, TypeError, ValueError) as error:
        raise LoHaError(f"{path}: not the state of a training run ({error!r}); start again without resume") from error
    return state


def check_identity(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to resume a run whose data, network or settings are not those that it began with.

    Raises:
        LoHaError: names each difference.
    """
    differences = [
        f"{key} ({then.get(key, 'not set')} then, {now.get(key, 'not set')} now)"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if differences:
        raise LoHaError(
            f"{path}: a run with other settings: {', '.join(differences)}. It can only go on as it began: "
            "set them back, choose another name, or start again without resume."
        )


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that was killed amid a save left behind; safetensors' own files have six letters."""
    for pattern in (f".{STATE}.*.tmp", f".{LOSSES}.*.tmp", ".tmp??????"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON value in which each tensor is a reference. Keys that are numbers, as optimizers have, stay numbers."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {"$items": [[key, _flatten(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_flatten(inner, tensors) for inner in value]
        return parts if isinstance(value, list) else {"$tuple": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no place in a run's state")


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if "$tuple" in value:
        return tuple(_unflatten(inner, tensors) for inner in value["$tuple"])
    return {key: _unflatten(inner, tensors) for key, inner in value["$items"]}
