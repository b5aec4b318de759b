"""The updates of many clients as one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..adapter import Adapter, split_key, split_layers
from ..algebra import compute_dtype
from ..errors import LoHaError, about, check_choice, check_number
from ..factors import LoHaFactors
from ..formats.container import broken_values
from ..formats.grouping import group
from ..transform import lowrank
from ..transform.compress import EXACT, Compression
from ..transform.merge import merge
from ..transform.report import ErrorReport, LayerError, Result
from .nearest import nearest

Method = Literal["factors", "exact"]
Resize = Literal["svd", "fit", "near"]
State = Mapping[str, Tensor]
"""Factors by the key of a file, as ``first.hada_w1_a``; alpha as ``first.alpha``, else the rank (scale 1)."""


def aggregate(
    adapters: Sequence[Adapter | State],
    weights: Sequence[float],
    method: Method = "exact",
    *,
    rank: int | None = None,
    resize: Resize = "svd",
    start: Adapter | State | None = None,
    seed: int = 0,
) -> Result:
    """The weighted mean of the clients' adapters as one LoHa adapter.

    - "factors" is FedAvg of the factors: Ā₁ = Σ pₖ·A₁ₖ and so on, of the clients' own rank. Its update Ā₁B̄₁ ∘ Ā₂B̄₂ is
      not the mean of the updates; the error in the report says how far it is from it.
    - "exact" is the mean of the updates, Σ pₖ·ΔWₖ, written as one LoHa of rank Σ rₖ² (by Khatri–Rao products; never
      more than the weight's shorter side). With ``rank`` or ``start`` it is then resized, and the error says what that
      loses.

    Args:
        adapters: one for each client; adapters, or their tensors by key.
        weights: how many examples each client learned from, or any other weights from 0; they are divided by their sum.
        rank: of the result of "exact", by ``resize``; None leaves it exact. Clients may have different ranks.
        resize: "svd" (the best approximation of that rank; the LoHa's second half is ones), "fit" (a true LoHa,
            whose updates have matrix rank up to rank²) or "near" (the mean of the factors, moved by the least change to
            the mean of the updates as far as their rank allows: a true LoHa that training goes on from as if it had not
            been aggregated).
        start: the LoHa layers that the clients began with, for "near": their ranks and scales are the result's, and
            what a client of a smaller rank lacks is theirs.
        seed: of the random starts of "fit".

    Returns:
        The adapter, and a report with each layer's ‖mean of updates − result‖ / ‖mean of updates‖, and over all layers
        together in ``report.error``. Names, dialect and dtype (of "factors") are the first client's.

    Raises:
        LoHaError: no client, weights that are none, values that are not finite, DoRA, or with "factors" different
            ranks, alphas, layers or kinds of factors; names the client and the key. Or "near" without a start of the
            same layers.
    """
    check_choice("method", method, ("factors", "exact"))
    check_choice("resize", resize, ("svd", "fit", "near"))
    if method == "factors" and (rank is not None or start is not None):
        raise LoHaError("a mean of factors has the clients' own rank; leave rank out, or choose method 'exact'")
    if (resize == "near") != (start is not None) or (resize == "near" and rank is not None):
        raise LoHaError("'near' needs start, whose ranks it keeps, and nothing else does")
    clients = [_client(f"client {index}", adapter) for index, adapter in enumerate(adapters)]
    shares = _shares(clients, weights)
    begun = None if start is None else _client("start", start)
    for each in clients if begun is None else [*clients, begun]:
        _check(each)
    form = EXACT if rank is None or resize == "near" else Compression(resize, rank=rank, seed=seed)
    merged = merge(clients, shares, form)
    if begun is not None:
        result = _near(begun, clients, shares, merged.adapter)
    elif method == "exact":
        return merged
    else:
        result = _mean(clients, shares)
    return Result(result, _distance(result, merged.adapter))


def _client(name: str, adapter: Adapter | State) -> Adapter:
    """With a source that messages can name."""
    with about(name):
        if not isinstance(adapter, Adapter):
            adapter = group(adapter)
    return replace(adapter, source=name + (f" ({adapter.source})" if adapter.source else ""))


def _shares(clients: Sequence[Adapter], weights: Sequence[float]) -> list[float]:
    """Weights of sum 1."""
    if not clients or len(clients) != len(weights):
        raise LoHaError(f"{len(clients)} clients and {len(weights)} weights; expected as many, and at least one")
    for client, weight in zip(clients, weights, strict=True):
        with about(client.source):
            check_number("its weight", weight, minimum=0)
    if not (total := sum(weights)):
        raise LoHaError("all weights are 0; at least one client must have learned from something")
    return [weight / total for weight in weights]


def _check(client: Adapter) -> None:
    """Refuse what no mean can be made of."""
    with about(client.source):
        if not client.layers and not client.extras:
            raise LoHaError("has no layer")
        for name, key, tensor in _tensors(client):
            if key.endswith("dora_scale"):
                raise LoHaError(
                    f"{name} is DoRA, whose update depends on the weight beneath it, so that neither factors nor "
                    "updates have a mean that means anything; train the clients without use_dora"
                )
            if broken := broken_values(tensor):
                raise LoHaError(f"{key}: {broken}; leave this client out")


def _tensors(adapter: Adapter) -> list[tuple[str, str, Tensor]]:
    """(layer, key, tensor) of everything that an adapter holds."""
    factors = [
        (name, f"{name}.{part}", t) for name, layer in adapter.layers.items() for part, t in layer.tensors().items()
    ]
    return factors + [((split_key(key) or (key, ""))[0], key, t) for key, t in adapter.extras.items()]


def _mean(clients: Sequence[Adapter], shares: Sequence[float]) -> Adapter:
    """FedAvg of factors, and of the other tensors beside them."""
    first, *others = clients
    for client in others:
        with about(client.source):
            _check_alike(first, client)
    layers = {}
    for name, layer in first.layers.items():
        same = [client.layers[name].tensors() for client in clients]
        tensors = {part: _weighted([t[part] for t in same], shares) for part in layer.tensors()}
        layers[name] = replace(layer, **tensors)  # type: ignore[arg-type]
    extras = {key: _weighted([client.extras[key] for client in clients], shares) for key in first.extras}
    return replace(first, layers=layers, extras=extras, metadata=dict(first.metadata), source="", notes=[])


def _near(start: Adapter, clients: Sequence[Adapter], shares: Sequence[float], mean: Adapter) -> Adapter:
    """The mean of the factors, in the sizes of the start's, moved to the mean of the updates."""
    means, others = split_layers(mean)
    layers = {}
    for name in dict.fromkeys([*start.layers, *means]):
        with about(start.source, name):
            if name not in start.layers or name not in means:
                raise LoHaError("is a LoHa layer of either the start or the clients; expected the same layers in both")
            begun = start.layers[name]
            laid = [_laid(client.layers.get(name, begun), begun) for client in clients]
            middle = {part: _weighted([t[part] for t in laid], shares) for part in laid[0]}
            u, v = lowrank.product(means[name])
            layers[name] = nearest(replace(begun, **middle), u @ v)  # type: ignore[arg-type]
    return replace(start, layers=layers, extras=others, metadata=dict(mean.metadata), source="", notes=[])


def _laid(layer: LoHaFactors, begun: LoHaFactors) -> dict[str, Tensor]:
    """Factors of the scale and the rank of those that a client began with: columns that it lacks are theirs."""
    if layer.is_tucker != begun.is_tucker or layer.shape != begun.shape:
        forms = [f"{each.shape} {'with' if each.is_tucker else 'without'} a core" for each in (layer, begun)]
        raise LoHaError(f"is {forms[0]}, and {forms[1]} in the start; 'near' needs them alike")
    if not begun.scale:
        raise LoHaError("has alpha 0 in the start, at which no factors make an update")
    same_scale = replace(layer, w1_a=layer.w1_a * (layer.scale / begun.scale), alpha=begun.alpha)
    laid = {part: t.clone() for part, t in begun.tensors().items()}
    for part, tensor in same_scale.tensors().items():
        both = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, laid[part].shape, strict=True))
        laid[part][both] = tensor[both].to(laid[part])
    return laid


def _check_alike(first: Adapter, client: Adapter) -> None:
    mine, theirs = ({key: tuple(t.shape) for _, key, t in _tensors(adapter)} for adapter in (first, client))
    for key in [*mine, *theirs]:
        if mine.get(key) != theirs.get(key):
            found, expected = (shapes.get(key, "not there") for shapes in (theirs, mine))
            raise LoHaError(
                f"{key} is {found}, and {expected} in {first.source}; factors of different ranks, layers or kinds have "
                "no mean. Choose method 'exact'"
            )
    for name, layer in first.layers.items():
        if client.layers[name].alpha != layer.alpha:
            raise LoHaError(
                f"{name} has alpha {client.layers[name].alpha:g}, and {layer.alpha:g} in {first.source}; choose 'exact'"
            )
    for key, tensor in first.extras.items():
        if key.endswith(".alpha") and not torch.equal(tensor, client.extras[key]):
            raise LoHaError(f"{key} differs from {first.source}'s; choose method 'exact'")


def _weighted(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share·tensor, in the first one's dtype; sums in float32 or float64."""
    dtype = compute_dtype(*tensors)
    total = sum(share * t.to(dtype) for share, t in zip(shares, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def _distance(result: Adapter, exact: Adapter) -> ErrorReport:
    """How far each layer's update is from the mean of the updates."""
    errors = []
    layers, means = split_layers(result)[0], split_layers(exact)[0]
    for name, layer in layers.items():
        mean, product = lowrank.product(means[name]), lowrank.product(layer)
        size = lowrank.finite_norm(name, *mean)
        error = lowrank.distance(mean, product) / size if size else 0.0
        errors.append(LayerError(name, layer.rank, mean[0].shape[1], size, error))
    return ErrorReport(errors)
