"""A LoHa out of two checkpoints: what fine-tuning did to each weight, as factors; one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..adapter import Adapter, join
from ..bind import Target, weight_key
from ..errors import LoHaError
from ..factors import Layer
from ..formats import metadata as provenance
from ..transform import lowrank
from ..transform.compress import Factoring, Kind, Method
from ..transform.lowrank import product
from ..transform.merge import Made, Progress
from ..transform.report import ErrorReport, LayerError
from .quantised import Survey, kind_of, survey
from .tensor_file import Weights, modules, part_of

_OVERSAMPLED = 16  # columns beyond the rank in the randomised range finder
_NOISE = 1e-6  # a change that is smaller than this share of the weight is rounding


class Model(Protocol):
    """What is needed of a model: a `Weights` file, or anything that gives its tensors by key.

    One that also has ``modules()``, layer name -> key, names its layers itself; one with a ``survey`` says which
    weights are quantised. Its weights are what layers multiply by.
    """

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def __getitem__(self, key: str) -> Tensor: ...


@dataclass
class InMemory:
    """A state dict as a `Model`; quantised weights as what they mean."""

    tensors: Mapping[str, Tensor]
    path: str = "the model"
    survey: Survey = field(init=False)

    def __post_init__(self) -> None:
        self.survey = survey({key: kind_of(tensor) for key, tensor in self.tensors.items()}, self.tensors.__getitem__)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.survey.shapes

    def __getitem__(self, key: str) -> Tensor:
        return self.survey.dense(self.path, key, lambda part: self.tensors[part].detach())


def extract(
    base: str | Path | Model | Mapping[str, Tensor],
    tuned: str | Path | Model | Mapping[str, Tensor],
    *,
    rank: int,
    conv_rank: int | None = None,
    method: Method = "fit",
    kind: Kind = "loha",
    only: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Made:
    """tuned − base, layer by layer, as a LoHa (or, for comparison, a LoRA) of a rank.

    The range of each difference is found by random projections (Halko, Martinsson and Tropp, arXiv 0909.4061,
    alg. 4.4); what is fitted is the difference within it, and the error is that of the whole difference.

    Args:
        base, tuned: .safetensors files, models (see `Model`) or state dicts; their keys may be of different dialects,
            and their weights quantised, each in its own format (see `quantised`).
        rank: of linear layers, and of convolutions unless ``conv_rank`` says otherwise; 0 there leaves them out.
        method: "fit" for a true LoHa, "svd" for the best approximation of matrix rank ``rank``.
        kind: "loha", or "lora" with method "svd".
        only: a regular expression; layers whose name (as in kohya's files) it is not found in are left out.
        dtype: of the factors; float32 by default.

    Raises:
        LoHaError: weights of different shapes (another base model), nothing in common, nothing that differs, values
            that are not finite, a weight in a format that is not known; names the file and the key.
    """
    form = Factoring(method, rank=rank, kind=kind, dtype=dtype, seed=seed)
    conv = form if conv_rank is None else replace(form, rank=conv_rank) if conv_rank else None
    models = _model(base), _model(tuned)
    pairs, notes = _pairs(*models, only)
    layers: dict[str, Layer] = {}
    report = ErrorReport(notes=notes)
    equal = 0
    for done, (name, targets) in enumerate(pairs.items()):
        if progress is not None:
            progress(done, len(pairs), name)
        wanted = conv if _is_conv(models[0], targets[0]) else form
        if wanted is None:
            continue
        change, reference = _difference(name, models, targets)
        if float(change.norm()) <= _NOISE * reference:
            equal += 1
            continue
        layers[name], entry = _extracted(name, change, wanted)
        report.layers.append(entry)
    if progress is not None:
        progress(len(pairs), len(pairs), "")
    if not layers:
        raise LoHaError(f"{_path(models[1])}: no layer differs from {_path(models[0])}; there is nothing to extract")
    if equal:
        report.notes.append(f"{equal} layers are equal in both models and left out")
    made = join(layers, {}, Adapter({}, source=f"{_path(models[1])} − {_path(models[0])}"))
    names = {"base": Path(_path(models[0])).name, "tuned": Path(_path(models[1])).name}
    made.metadata = provenance.metadata([Adapter({})], "extract", rank=rank, method=method, error=report.error, **names)
    if not made.layers:
        ranks, alphas = [layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()]
        made.metadata = provenance.lora_metadata(made.metadata, ranks, alphas)
    return Made(made, report)


def _model(model: str | Path | Model | Mapping[str, Tensor]) -> Model:
    if isinstance(model, (str, Path)):
        return Weights(model)
    return InMemory(model) if isinstance(model, Mapping) else model


def _path(model: Model) -> str:
    return str(getattr(model, "path", "the model"))


def _pairs(base: Model, tuned: Model, only: str | None) -> tuple[dict[str, tuple[Target, Target]], list[str]]:
    """Layers that both models have, by name."""
    try:
        wanted = re.compile(only or "")
    except re.error as error:
        raise LoHaError(f"{only!r} is not a regular expression: {error}") from error
    mine, other = _modules(base), _modules(tuned)
    common = [name for name in other if name in mine]
    if not common:
        raise LoHaError(
            f"{_path(tuned)} and {_path(base)} have no layer in common ({next(iter(other), 'none')}, … and "
            f"{next(iter(mine), 'none')}, …); they are different kinds of models"
        )
    surveys = [getattr(model, "survey", Survey()) for model in (base, tuned)]
    for name in common:
        keys = [weight_key(target) for target in (mine[name], other[name])]
        if wanted.search(name):
            for model, found, key in zip((base, tuned), surveys, keys, strict=True):
                found.check(_path(model), key)
        if any(key in found.refused for found, key in zip(surveys, keys, strict=True)):
            continue
        shapes = [_shape(model, target) for model, target in ((base, mine[name]), (tuned, other[name]))]
        # A 1×1 convolution and a linear layer are one thing under two names.
        if shapes[0][0] != shapes[1][0] or torch.Size(shapes[0]).numel() != torch.Size(shapes[1]).numel():
            raise LoHaError(
                f"{_path(tuned)}: {weight_key(other[name])} is {shapes[1]}, in {_path(base)} it is {shapes[0]}; "
                "they have different base models. Choose the checkpoint that this one was tuned from"
            )
    missing = len(other) - len(common)
    notes = [f"{missing} layers of {_path(tuned)} are not in the base"] if missing else []
    pairs = {name: (mine[name], other[name]) for name in common if wanted.search(name)}
    for number, model in enumerate((base, tuned)):
        if formats := surveys[number].formats({weight_key(pair[number]) for pair in pairs.values()}):
            notes.append(f"quantised weights in {_path(model)}: {formats}; their rounding is part of the difference")
    return pairs, notes


def _modules(model: Model) -> Mapping[str, Target]:
    """Layers by name: a model that knows its own names is asked for them."""
    own = getattr(model, "modules", None)
    return own() if own is not None else modules(model.shapes())


def _shape(model: Model, target: Target) -> tuple[int, ...]:
    shape = tuple(model.shapes()[weight_key(target)])
    if isinstance(target, str) or target[1] is None:
        return shape
    return (target[1][2], *shape[1:])


def _is_conv(model: Model, target: Target) -> bool:
    return torch.Size(_shape(model, target)[2:]).numel() > 1


def _difference(name: str, models: tuple[Model, Model], targets: tuple[Target, Target]) -> tuple[Tensor, float]:
    """tuned − base of one layer, as the weight is shaped, in float32; and ‖base‖."""
    base, tuned = (part_of(m[weight_key(t)], t).detach().cpu() for m, t in zip(models, targets, strict=True))
    size = float(torch.linalg.vector_norm(base.float()))
    change = tuned.float().reshape(base.shape) - base.float()
    if not bool(torch.isfinite(change).all()):
        bad = 0 if bool(torch.isfinite(base.float()).all()) else 1
        where = _path(models[1 - bad])
        raise LoHaError(f"{where}: {weight_key(targets[1 - bad])} has values that are NaN or infinite; it is broken")
    return change, size


def _extracted(name: str, change: Tensor, form: Factoring) -> tuple[Layer, LayerError]:
    """One layer out of its difference, which is overwritten."""
    shape, whole = tuple(change.shape), change.flatten(1)
    rank = min(form.rank or 1, *whole.shape)
    form = replace(form, rank=rank)
    columns = (rank**2 if form.method == "fit" else rank) + _OVERSAMPLED
    size = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
    u, v = lowrank.range_of(whole, max(columns, 2 * rank), seed=form.seed)
    beyond = float(torch.linalg.vector_norm(torch.addmm(whole, u, v, alpha=-1), dtype=torch.float64))
    layer, entry = form(name, u, v, shape)
    left, right = product(layer)
    whole.addmm_(left.float(), right.float(), alpha=-1)
    error = float(torch.linalg.vector_norm(whole, dtype=torch.float64)) / size
    lora = entry.lora_error
    if lora is not None:
        # What lies beyond the range is orthogonal to it.
        lora = (beyond**2 + (lora * entry.size) ** 2) ** 0.5 / size
    return layer, replace(entry, size=size, exact_rank=min(whole.shape), error=error, lora_error=lora)
