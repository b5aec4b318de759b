"""Federated LoHa: clients send the factors of an adapter on a frozen base, and the server takes the mean of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ...adapter import Adapter
from ...errors import LoHaError, check_choice
from ...factors import LoHaFactors
from ...formats.grouping import group
from ...transform import lowrank
from ..aggregate import Method, aggregate
from .records import ArrayRecord, Message, fault, to_record, to_tensors
from .strategy import LOG, FactorFedAvg

# The module above says what to install.
# isort: split
from flwr.app import MetricRecord


class AdapterFedAvg(FactorFedAvg):
    """FedAvg of LoHa adapters: of their factors, or of their updates (`aggregate`); ``rounds`` has each round's error.

    Arrays are factors by a file's keys, as ``first.hada_w1_a``, at scale 1 (alpha = rank).

    Args:
        aggregation: "factors" (what FedAvg does; not the mean of the updates, and the error says how far from it) or
            "exact" (their mean, moved to the mean of the updates as far as the rank allows: "near" of `aggregate`; the
            error says what is left). With "exact" clients may answer with ranks of their own.
        settings: of `FactorStrategy` and FedAvg.
    """

    def __init__(self, *, aggregation: Method = "exact", **settings: Any) -> None:
        check_choice("aggregation", aggregation, ("factors", "exact"))
        super().__init__(identity={**settings.pop("identity", {}), "aggregation": aggregation}, **settings)
        self.aggregation = aggregation

    def combine(self, server_round: int, replies: list[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents = [m.content for m in replies if m.has_content()]
        if not contents:
            return None, None
        states = [to_tensors(next(iter(each.array_records.values()))) for each in contents]
        weights = [float(next(iter(each.metric_records.values()))[self.weighted_by_key]) for each in contents]
        near: dict[str, Any] = {"resize": "near", "start": self._sent} if self.aggregation == "exact" else {}
        result = aggregate(states, weights, self.aggregation, **near)
        error = result.report.error
        self.rounds[-1]["error"] = error
        text = "round %d: the aggregate (%s) is %.2g %% from the mean of the updates"
        LOG.info(text, server_round, self.aggregation, error * 100)
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return to_record(_state(result.adapter, self._sent)), metrics

    def fault(self, tensors: Mapping[str, Tensor]) -> str | None:
        if self.aggregation == "factors":
            return super().fault(tensors)
        if found := fault(tensors, tensors):  # their values; ranks may differ
            return found
        try:
            mine = {name: layer.shape for name, layer in _layers(tensors).items()}
        except LoHaError as error:
            return str(error)
        sent = _layers(self._sent)
        for name, layer in sent.items():
            if mine.get(name) != layer.shape:
                return f"{name} is {mine.get(name, 'missing')}; expected an update of {layer.shape}"
        return next((f"{name} is not among what was sent" for name in mine if name not in sent), None)

    def moved(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        old, new = _layers(self._sent), _layers(tensors)
        return {name: lowrank.distance(lowrank.product(new[name]), lowrank.product(old[name])) for name in old}


def _state(adapter: Adapter, keys: Iterable[str]) -> dict[str, Tensor]:
    """An adapter's factors, at scale 1 as they were sent, by `AdapterFedAvg`'s keys."""
    each = {f"{name}.hada_{part}": t for name, layer in adapter.layers.items() for part, t in layer.tensors().items()}
    return {key: each[key] for key in keys}


def _layers(state: Mapping[str, Tensor]) -> dict[str, LoHaFactors]:
    return group(state).layers
