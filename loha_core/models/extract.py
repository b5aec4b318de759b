"""A LoHa out of two checkpoints: what fine-tuning did to each weight, as factors; one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter import Adapter
from ..bind import Target, weight_key
from ..errors import LoHaError
from ..factors import Layer
from ..naming.patterns import checked
from ..transform import lowrank
from ..transform.compress import Compression, Kind, Method
from ..transform.lowrank import product
from ..transform.report import ErrorReport, LayerError, Progress, Result, each_layer, result_of
from .checkpoint import Checkpoint, StateDict
from .keys import part_of
from .tensor_file import TensorFile

_OVERSAMPLING = 16  # columns beyond the rank in the randomised range finder
_MIN_CHANGE = 1e-6  # of the weight's size; a smaller one is rounding


class _Pair(NamedTuple):
    """One layer's weight in both checkpoints."""

    base: Target
    tuned: Target


def extract(
    base: str | Path | Checkpoint | Mapping[str, Tensor],
    tuned: str | Path | Checkpoint | Mapping[str, Tensor],
    *,
    rank: int,
    conv_rank: int | None = None,
    method: Method = "fit",
    kind: Kind = "loha",
    only: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """tuned − base, layer by layer, as a LoHa (or, for comparison, a LoRA) of a rank.

    The range of each difference is found by random projections (Halko, Martinsson and Tropp, arXiv 0909.4061,
    alg. 4.4); what is fitted is the difference within it, and the error is that of the whole difference.

    Args:
        base, tuned: .safetensors files, state dicts or other checkpoints (see `Checkpoint`); their keys may be of
            different dialects, and their weights quantised, each in its own format (see `quantised`).
        rank: of linear layers, and of convolutions unless ``conv_rank`` says otherwise; 0 there leaves them out.
        method: "fit" for a true LoHa, "svd" for the best approximation of matrix rank ``rank``.
        kind: "loha", or "lora" with method "svd".
        only: a regular expression; layers whose name (as in kohya's files) it is not found in are left out.
        dtype: of the factors; float32 by default.

    Raises:
        LoHaError: weights of different shapes (another base model), nothing in common, nothing that differs, values
            that are not finite, a weight in a format that is not known; names the file and the key.
    """
    form = Compression(method, rank=rank, kind=kind, dtype=dtype, seed=seed)
    conv_form = form if conv_rank is None else replace(form, rank=conv_rank) if conv_rank else None
    before, after = _checkpoint(base), _checkpoint(tuned)
    pairs, notes = _pairs(before, after, only)
    equal: list[str] = []

    def extracted(name: str, pair: _Pair) -> tuple[Layer, LayerError] | None:
        layer_form = conv_form if _is_conv(_shape(before, pair.base)) else form
        if layer_form is None:
            return None
        change, base_norm = _difference(before, after, pair)
        if float(change.norm()) <= _MIN_CHANGE * base_norm:
            equal.append(name)
            return None
        return _extracted(name, change, layer_form)

    layers, errors = each_layer(pairs, extracted, progress)
    if not layers:
        raise LoHaError(f"{after.path}: no layer differs from {before.path}; there is nothing to extract")
    if equal:
        notes.append(f"{len(equal)} layers are equal in both models and left out")
    files = {"base": Path(before.path).name, "tuned": Path(after.path).name}
    report = ErrorReport(errors, notes)
    result = result_of(layers, {}, [Adapter({})], report, "extract", rank=rank, method=method, **files)
    result.adapter.source = f"{after.path} − {before.path}"
    return result


def _checkpoint(model: str | Path | Checkpoint | Mapping[str, Tensor]) -> Checkpoint:
    if isinstance(model, (str, Path)):
        return TensorFile(model)
    return StateDict(model) if isinstance(model, Mapping) else model


def _pairs(base: Checkpoint, tuned: Checkpoint, only: str | None) -> tuple[dict[str, _Pair], list[str]]:
    """The layers to extract, by name, and notes about others."""
    pattern = checked(only or "", anywhere=True)
    base_layers, tuned_layers = base.modules(), tuned.modules()
    common = {name: _Pair(base_layers[name], tuned_layers[name]) for name in tuned_layers if name in base_layers}
    if not common:
        raise LoHaError(
            f"{tuned.path} and {base.path} have no layer in common ({next(iter(tuned_layers), 'none')}, … and "
            f"{next(iter(base_layers), 'none')}, …); they are different kinds of models"
        )
    for name, pair in common.items():
        for model, target in zip((base, tuned), pair, strict=True):
            if pattern.search(name):
                model.check(weight_key(target))
        _check_shapes(base, tuned, pair)
    missing = len(tuned_layers) - len(common)
    notes = [f"{missing} layers of {tuned.path} are not in the base"] if missing else []
    pairs = {name: pair for name, pair in common.items() if pattern.search(name)}
    for number, model in enumerate((base, tuned)):
        if formats := model.formats.summary({weight_key(pair[number]) for pair in pairs.values()}):
            notes.append(f"quantised weights in {model.path}: {formats}; their rounding is part of the difference")
    return pairs, notes


def _check_shapes(base: Checkpoint, tuned: Checkpoint, pair: _Pair) -> None:
    """Refuse weights of different shapes; nothing is known of those that cannot be read."""
    key = weight_key(pair.tuned)
    if weight_key(pair.base) in base.formats.unreadable or key in tuned.formats.unreadable:
        return
    shapes = _shape(base, pair.base), _shape(tuned, pair.tuned)
    # A 1×1 convolution and a linear layer are one thing under two names.
    if shapes[0][0] != shapes[1][0] or torch.Size(shapes[0]).numel() != torch.Size(shapes[1]).numel():
        raise LoHaError(
            f"{tuned.path}: {key} is {shapes[1]}, in {base.path} it is {shapes[0]}; "
            "they have different base models. Choose the checkpoint that this one was tuned from"
        )


def _shape(model: Checkpoint, target: Target) -> tuple[int, ...]:
    shape = tuple(model.shapes()[weight_key(target)])
    return shape if isinstance(target, str) or target[1] is None else (target[1][2], *shape[1:])


def _is_conv(shape: tuple[int, ...]) -> bool:
    return torch.Size(shape[2:]).numel() > 1


def _difference(before: Checkpoint, after: Checkpoint, pair: _Pair) -> tuple[Tensor, float]:
    """tuned − base of one layer, as the base's weight is shaped, in float32; and ‖base‖."""
    base, tuned = (_weight(model, target) for model, target in zip((before, after), pair, strict=True))
    return tuned.reshape(base.shape) - base, float(torch.linalg.vector_norm(base))


def _weight(model: Checkpoint, target: Target) -> Tensor:
    """A layer's weight in float32, on the CPU."""
    weight = part_of(model[weight_key(target)], target).detach().cpu().float()
    if not bool(torch.isfinite(weight).all()):
        raise LoHaError(f"{model.path}: {weight_key(target)} has values that are NaN or infinite; it is broken")
    return weight


def _extracted(name: str, change: Tensor, form: Compression) -> tuple[Layer, LayerError]:
    """One layer out of its difference, which is overwritten."""
    shape, matrix = tuple(change.shape), change.flatten(1)
    rank = min(form.rank or 1, *matrix.shape)
    form = replace(form, rank=rank)
    columns = (rank**2 if form.method == "fit" else rank) + _OVERSAMPLING
    size = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    u, v = lowrank.range_of(matrix, max(columns, 2 * rank), seed=form.seed)
    beyond = float(torch.linalg.vector_norm(torch.addmm(matrix, u, v, alpha=-1), dtype=torch.float64))
    layer, entry = form.compress(name, u, v, shape)
    left, right = product(layer)
    matrix.addmm_(left.float(), right.float(), alpha=-1)
    error = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) / size
    lora_error = entry.lora_error
    if lora_error is not None:
        # What lies beyond the range is orthogonal to it.
        lora_error = (beyond**2 + (lora_error * entry.size) ** 2) ** 0.5 / size
    return layer, replace(entry, size=size, exact_rank=min(matrix.shape), error=error, lora_error=lora_error)
