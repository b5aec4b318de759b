"""Tensors as Flower's records, the bytes of messages, and what is wrong with a reply."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...errors import LoHaError
from ...formats.container import broken_values

try:
    from flwr.app import Array, ArrayRecord, Message
except ImportError as error:  # pragma: no cover
    raise LoHaError(f"Flower is not installed ({error}); pip install 'comfyui-loha[federated]'") from error


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by name as they travel. NumPy has no bfloat16: such values go as float32, which holds them exactly."""
    wide = {key: t.detach().float() if t.dtype == torch.bfloat16 else t.detach() for key, t in tensors.items()}
    return ArrayRecord({key: Array(t.cpu().contiguous().numpy()) for key, t in wide.items()})


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of `to_record`.

    Raises:
        LoHaError: an array that cannot be read.
    """
    tensors = {}
    for key, array in record.items():
        try:
            tensors[key] = torch.from_numpy(array.numpy().copy())
        except (TypeError, ValueError, EOFError) as error:
            raise LoHaError(f"{key} is no array of numbers ({error})") from error
    return tensors


def copy_into(targets: Mapping[str, Tensor], record: ArrayRecord) -> None:
    """Give a model's tensors the values of a record, in the tensors' own dtype and on their device.

    Raises:
        LoHaError: keys or shapes that are not the model's.
    """
    values = to_tensors(record)
    if found := fault(values, targets):
        raise LoHaError(f"the server's arrays are of another model: {found}; server and clients need the same settings")
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(values[key])


def size(messages: Iterable[Message]) -> int:
    """Bytes of the records of messages, keys and NumPy's headers included; those that carry an error have none."""
    return sum(record.count_bytes() for m in messages if m.has_content() for record in m.content.values())


def fault(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str | None:
    """What is wrong with tensors that should have the names and shapes of ``like`` and be finite, or None.

    >>> fault({"w": torch.tensor([1.0, float("nan")])}, {"w": torch.zeros(2)})
    'w: 1 of 2 values are NaN or infinite'
    """
    for key, wanted in like.items():
        if key not in tensors:
            return f"{key} is missing"
        tensor = tensors[key]
        if tensor.shape != wanted.shape:
            return f"{key} is {tuple(tensor.shape)}; expected {tuple(wanted.shape)}"
        if broken := broken_values(tensor):
            return f"{key}: {broken}"
    return next((f"{key} is not among what was sent" for key in tensors if key not in like), None)


def distances(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, float]:
    """‖new − old‖ of each tensor, in float64."""
    return {key: float((tensors[key].double() - old.double()).norm()) for key, old in start.items()}


def total(parts: Mapping[str, float]) -> float:
    """The norm of everything from the norms of its parts."""
    return math.hypot(*parts.values())
