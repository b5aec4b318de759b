"""A client's side of a round: what it gets, what it keeps to itself, what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import LoHaError, about
from ...formats.container import read_tensors, write_tensors
from .records import ArrayRecord, Message, copy_into, fault, to_record

# The module above says what to install.
# isort: split
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

LOCAL = "loha-local"


def receive(message: Message, tensors: Mapping[str, Tensor]) -> ConfigRecord:
    """Give ``tensors``, a model's global ones, the values that the server sent; returns the round's configuration.

    Raises:
        LoHaError: not one record of arrays and one of settings, or arrays of another model.
    """
    arrays, configs = message.content.array_records, message.content.config_records
    if len(arrays) != 1 or len(configs) != 1:
        raise LoHaError(f"{len(arrays)} records of arrays and {len(configs)} of settings; expected one each")
    copy_into(tensors, next(iter(arrays.values())))
    return next(iter(configs.values()))


def answer(
    message: Message, tensors: Mapping[str, Tensor] | None, examples: int, scores: Mapping[str, float]
) -> Message:
    """The reply with tensors (none after an evaluation), how many examples they were learnt from, and scores."""
    metrics = MetricRecord({"num-examples": examples, **{name: float(value) for name, value in scores.items()}})
    content: dict[str, ArrayRecord | MetricRecord] = {"metrics": metrics}
    if tensors is not None:
        content["arrays"] = to_record(tensors)
    return Message(content=RecordDict(content), reply_to=message)


def recall(context: Context, tensors: Mapping[str, Tensor], path: Path | None = None) -> bool:
    """Give ``tensors`` the values that `keep` kept on this node in an earlier round; False where there are none.

    Args:
        path: where `keep` also wrote them. A run's Context ends with it; a file lasts until a resumed run.

    Raises:
        LoHaError: a damaged file, or tensors of another model.
    """
    if LOCAL in context.state:
        copy_into(tensors, context.state.array_records[LOCAL])
        return True
    if path is None or not path.is_file():
        return False
    values, _ = read_tensors(path)
    with about(path):
        if found := fault(values, tensors):
            raise LoHaError(f"the local state of another model: {found}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(values[key])
    return True


def keep(context: Context, tensors: Mapping[str, Tensor], path: Path | None = None) -> None:
    """Keep ``tensors`` on this node until its next round; they are in no message.

    Raises:
        LoHaError: the file cannot be written, or a value is not finite.
    """
    context.state[LOCAL] = to_record(tensors)
    if path is not None:
        write_tensors(path, tensors, {})


def proximal(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """½·Σ‖w − w₀‖², FedProx's term before it is multiplied by μ (arXiv 1812.06127, eq. 2): a scalar."""
    return 0.5 * torch.stack([(tensors[key] - old).square().sum() for key, old in start.items()]).sum()
