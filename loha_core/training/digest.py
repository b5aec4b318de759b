"""A hash of nested values, to tell whether a resumed run has the data and the model that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from safetensors.torch import save
from torch import Tensor


def digest(*values: Any) -> str:
    """A hash of nested tensors, numbers and strings: 32 hexadecimal digits, the same in every process."""
    state = hashlib.blake2b(digest_size=16)
    _update(values, state.update)
    return state.hexdigest()


def _update(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, Tensor):
        update(save({"": value.detach().cpu().contiguous()}))  # dtype, shape and numbers
    elif isinstance(value, (list, tuple, dict)):
        update(f"{type(value).__name__} {len(value)}".encode())
        for child in value.items() if isinstance(value, dict) else value:
            _update(child, update)
    elif value is None or isinstance(value, (str, int, float)):
        update(f"{type(value).__name__} {value!r};".encode())
    else:  # hooks and other objects: an address would differ in each process
        update(type(value).__name__.encode())
