"""Federated LoHa: clients send the factors of an adapter on a frozen base, and the server takes the mean of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import LoHaError, check_choice
from ...factors import LoHaFactors
from ...formats.grouping import group
from ...transform import lowrank
from ..aggregate import Method, Resize, aggregate
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
            "exact" (the mean of the updates, resized to the rank of what was sent; the error says what that loses).
            With "exact" clients may answer with ranks of their own.
        resize: see `aggregate`.
        settings: of `FactorStrategy` and FedAvg.
    """

    def __init__(self, *, aggregation: Method = "exact", resize: Resize = "fit", **settings: Any) -> None:
        check_choice("aggregation", aggregation, ("factors", "exact"))
        identity = {**settings.pop("identity", {}), "aggregation": aggregation, "resize": resize}
        super().__init__(identity=identity, **settings)
        self.aggregation, self.resize = aggregation, resize

    def combine(self, server_round: int, replies: list[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents = [m.content for m in replies if m.has_content()]
        if not contents:
            return None, None
        states = [to_tensors(next(iter(each.array_records.values()))) for each in contents]
        weights = [float(next(iter(each.metric_records.values()))[self.weighted_by_key]) for each in contents]
        sent = _layers(self._sent)
        rank = max(layer.rank for layer in sent.values()) if self.aggregation == "exact" else None
        result = aggregate(states, weights, self.aggregation, rank=rank, resize=self.resize, seed=server_round)
        error = result.report.error
        self.rounds[-1]["error"] = error
        text = "round %d: the aggregate (%s) is %.2g %% from the mean of the updates"
        LOG.info(text, server_round, self.aggregation, error * 100)
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        adapter = result.adapter
        if self.aggregation == "exact":
            sized = {name: _in_sizes_of(sent[name], layer) for name, layer in adapter.layers.items()}
            adapter = replace(adapter, layers=sized)
        return to_record(to_state(adapter, self._sent)), metrics

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


def to_state(adapter: Adapter, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's factors at scale 1 by the keys of ``like``, and at its ranks: missing columns are zeros.

    Raises:
        LoHaError: a layer that is no LoHa, or of a larger rank.
    """
    state = {}
    for name, wanted in _layers(like).items():
        layer = adapter.layers.get(name)
        if not isinstance(layer, LoHaFactors) or layer.is_tucker != wanted.is_tucker or layer.rank > wanted.rank:
            core = "with" if wanted.is_tucker else "without"
            raise LoHaError(f"{name}: no LoHa of at most rank {wanted.rank}, {core} a core")
        parts = replace(layer, w1_a=layer.w1_a * layer.scale, alpha=layer.rank).tensors()
        for part, old in wanted.tensors().items():
            new = torch.zeros_like(old)
            new[tuple(map(slice, parts[part].shape))] = parts[part]
            state[f"{name}.hada_{part}"] = new
    return {key: state[key] for key in like}


def _in_sizes_of(sent: LoHaFactors, layer: LoHaFactors) -> LoHaFactors:
    """The same update, its factors of the sizes of those that were sent but for the second half's smaller one.

    An update has many factorizations. A young one is small; if all four factors were small with it, no gradient would
    reach any of them. So three keep the size that they began with, as in a LoHa that was never aggregated, and the one
    that began at zero, w2_a or w2_b by the first values, has the rest.
    """
    if layer.is_tucker or not all(bool(t.any()) for t in layer.tensors().values()):
        return layer

    def columns(a: Tensor, b: Tensor) -> Tensor:
        """√(‖b_p‖ / ‖a_p‖) for each p, which makes the two alike; one where there is nothing."""
        ratio = (b.norm(dim=1) / a.norm(dim=0)).sqrt()
        return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)

    first = columns(layer.w1_a, layer.w1_b)
    a1, b1 = layer.w1_a * first, layer.w1_b / first[:, None]
    size = (sent.w1_a.norm() * sent.w1_b.norm() / (a1.norm() * b1.norm())).sqrt()
    size = size if bool(size.isfinite() & (size > 0)) else torch.ones_like(size)
    outside = sent.w2_a.square().mean() >= sent.w2_b.square().mean()  # the one that keeps its size
    norms = layer.w2_a.norm(dim=0) if outside else layer.w2_b.norm(dim=1)  # of an svd's second half, one is not zero
    wanted = (sent.w2_a if outside else sent.w2_b).norm() / norms.count_nonzero() ** 0.5
    second = wanted / norms
    second = torch.where(second.isfinite() & (second > 0), second, 1.0)
    a2, b2 = (
        (layer.w2_a * second, layer.w2_b / second[:, None] / size**2)
        if outside
        else (layer.w2_a / second / size**2, layer.w2_b * second[:, None])
    )
    return replace(layer, w1_a=a1 * size, w1_b=b1 * size, w2_a=a2, w2_b=b2)


def _layers(state: Mapping[str, Tensor]) -> dict[str, LoHaFactors]:
    return group(state).layers
