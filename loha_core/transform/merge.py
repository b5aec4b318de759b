"""Several adapters as one: Σ weight·ΔW, or another combination of the updates, written as a LoHa again.

>>> a = Adapter({"lora_unet_proj_in": LoHaFactors(*[torch.ones(4, 1), torch.ones(1, 6)] * 2, alpha=1)})
>>> merged, report = merge([a, a], [0.5, 2.0])
>>> merged.layers["lora_unet_proj_in"].delta()[0, 0], report.error
(tensor(2.5000), 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter import DIFFERENCES, Adapter, join, modules, split, split_other
from ..blocks import BlockStrength
from ..errors import LoHaError
from ..factors import Layer, LoHaFactors, LoRAFactors, same
from ..formats import metadata as provenance
from ..naming import names, spelling
from ..naming.recognise import family_of
from ..naming.respell import like
from . import lowrank, sparse
from .compress import METHODS as _FORMS
from .compress import Factoring, Kind, cast
from .lowrank import flat_shape, product, scaled, size_of
from .report import ErrorReport, LayerError

METHODS = (*_FORMS, *sparse.METHODS, "slerp")

# (how many layers are done, of how many, the name of the next)
Progress = Callable[[int, int, str], object]


class Made(NamedTuple):
    """A new adapter, and how far it is from what was asked for."""

    adapter: Adapter
    report: ErrorReport


class Term(NamedTuple):
    """weight·ΔW of one layer of one adapter."""

    adapter: Adapter
    name: str
    layer: Layer
    weight: float


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | float = 1.0,
    *,
    method: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    factor: str = "svd",
    kind: Kind = "loha",
    density: float = 0.5,
    majority_sign: str = "total",
    blocks: BlockStrength | Sequence[BlockStrength | None] | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Made:
    """Merge LoHa and LoRA layers, layer by layer; one layer of the result is computed at a time.

    A layer that a single adapter has keeps its factors (only alpha takes the weight) under exact, svd and fit where
    its rank is not above the wanted one. Names are spelled as in the first adapter.

    Args:
        weights: one for each adapter, or one for all; may be negative, or 0 to leave an adapter out.
        method: "exact" (Σ weight·ΔW; rank Σr² as one LoHa), "svd" (its best approximation of a rank), "fit" (a true
            LoHa of ``rank``), "ties" (arXiv 2306.01708), "dare" and "dare_ties" (arXiv 2311.03099),
            "magnitude_prune", or "slerp" (two adapters along the arc between their updates).
        rank, energy, max_error: one of them, except for "exact".
        factor: "svd" or "fit" for the methods that say nothing of it themselves.
        kind: "loha", or "lora" for LoRA layers (not with "fit").
        density: share of the elements that pruning keeps, in (0, 1].
        majority_sign: "total" or "frequency", for ties and dare_ties.
        blocks: multipliers of the weights by block and by pattern, for all adapters or for each.
        family: "SD1.5", "SDXL", "Flux" … where names alone don't tell blocks apart; guessed by default.
        dtype: of the factors; float32 by default, float64 if a source is.
        progress: called before each layer with (done, total, name); what it raises ends the merge.

    Raises:
        LoHaError: weights or settings that make no sense, adapters of different models, no layer in common, DoRA or
            LoKr that has no sum, or a result that is not finite.
    """
    weights = _weights(adapters, weights)
    # Fused layers and layers of their parts meet as the first adapter has them.
    adapters = [adapters[0], *(like(adapter, modules(adapters[0])) for adapter in adapters[1:])]
    if method not in METHODS:
        raise LoHaError(f"no method {method!r}; there are {', '.join(METHODS)}")
    form = Factoring(method if method in _FORMS else factor, rank, energy, max_error, kind, dtype, seed)  # type: ignore[arg-type]
    combine = _combiner(method, len(adapters), density, majority_sign, seed)
    layers_of, rest, notes = _aligned(adapters, weights, _strengths(blocks, len(adapters), adapters, family))
    layers: dict[str, Layer] = {}
    report = ErrorReport(notes=[*(f"{a.source}: {note}" for a in adapters for note in a.notes), *notes])
    for done, (name, terms) in enumerate(layers_of.items()):
        if progress is not None:
            progress(done, len(layers_of), name)
        layers[name], entry = _merged(name, terms, combine, form, method in _FORMS)
        report.layers.append(entry)
    if progress is not None:
        progress(len(layers_of), len(layers_of), "")
    details = {"method": method, "weights": weights, "rank": rank, "energy": energy, "max_error": max_error}
    if method not in _FORMS:
        details |= {"factor": factor, "density": density if method in sparse.METHODS else None}
    merged = join(layers, rest, adapters[0])
    merged.metadata = provenance.metadata(adapters, "merge", kind=kind, error=report.error, **details)
    if not merged.layers:
        merged.metadata = provenance.lora_metadata(
            merged.metadata, [f.rank for f in layers.values()], [f.alpha for f in layers.values()]
        )
    merged.source = " + ".join(f"{w:g}·{a.source}" for a, w in zip(adapters, weights, strict=True))
    return Made(merged, report)


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | float) -> list[float]:
    given = list(weights) if isinstance(weights, Sequence) else [weights] * len(adapters)
    if not adapters:
        raise LoHaError("no adapter to merge; give at least one")
    if len(given) != len(adapters):
        raise LoHaError(f"{len(adapters)} adapters and {len(given)} weights; give one weight for each adapter")
    for adapter, weight in zip(adapters, given, strict=True):
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise LoHaError(f"{adapter.source}: its weight is {weight!r}; expected a finite number")
    if not any(given):
        raise LoHaError("all weights are 0, so nothing would be left; give at least one that is not")
    return [float(weight) for weight in given]


Strength = Callable[[str], float]


def _strengths(
    blocks: BlockStrength | Sequence[BlockStrength | None] | None,
    count: int,
    adapters: Sequence[Adapter],
    family: str | None,
) -> list[Strength]:
    """For each adapter: layer name -> multiplier."""
    each = [blocks] * count if blocks is None or isinstance(blocks, BlockStrength) else list(blocks)
    if len(each) != count:
        raise LoHaError(f"{count} adapters and {len(each)} block settings; give one for all or one for each")
    return [block_strength(b, a, family) for b, a in zip(each, adapters, strict=True)]


def block_strength(blocks: BlockStrength | None, adapter: Adapter, family: str | None = None) -> Strength:
    """Layer name -> multiplier, for names as files spell them."""
    if blocks is None:
        return lambda name: 1.0
    known = family or (blocks.layout.family if blocks.layout else spelling.family_of(adapter.layers))
    unet = known if known in spelling.UNETS else spelling.family_of(adapter.layers)
    table = family_of((names.split(name)[1] for name in modules(adapter) if spelling.is_dit(name)), known)
    return lambda name: blocks(spelling.native_key(name, unet, table), name)


def _aligned(
    adapters: Sequence[Adapter], weights: Sequence[float], strengths: Sequence[Strength]
) -> tuple[dict[str, list[Term]], dict[str, Tensor], list[str]]:
    """Layers of one weight together, whatever their spelling, under the first adapter's name for it."""
    parts = [split(adapter) for adapter in adapters]
    _check_common(adapters, [set(map(spelling.identity, layers)) for layers, _ in parts])
    found: dict[tuple[str, str], list[Term]] = {}
    for adapter, (layers, _), weight, strength in zip(adapters, parts, weights, strengths, strict=True):
        for name, layer in layers.items():
            terms = found.setdefault(spelling.identity(name), [])
            # Two spellings of one weight in one file, as some trainers write, count once if they are the same.
            if not any(t.adapter is adapter and same(t.layer, layer) and t.name != name for t in terms):
                terms.append(Term(adapter, name, layer, weight * strength(name)))
    first = list(parts[0][0])
    others = [t.name for terms in found.values() for t in terms[:1] if t.adapter is not adapters[0]]
    spelled = {name: name for name in first} | spelling.spelled_like(first, others)
    layers_of = {}
    for terms in found.values():
        acting = [term for term in terms if term.weight != 0]
        if acting:
            _check_shapes(acting)
            layers_of[spelled[terms[0].name]] = acting
    rest, notes = _others(adapters, [rest for _, rest in parts], weights, strengths)
    return layers_of, rest, notes


def _check_common(adapters: Sequence[Adapter], modules: Sequence[set[tuple[str, str]]]) -> None:
    for index, own in enumerate(modules):
        elsewhere = set().union(*(m for other, m in enumerate(modules) if other != index))
        if len(modules) > 1 and not own & elsewhere:
            example = next((name for name in adapters[index].layers), "no layer")
            raise LoHaError(
                f"{adapters[index].source}: has no layer in common with the others (it has {example}, …); "
                "they are for different models or parts of a model. Merge adapters of one base model"
            )


def _check_shapes(terms: Sequence[Term]) -> None:
    first = terms[0]
    for term in terms[1:]:
        if flat_shape(term.layer) != flat_shape(first.layer):
            raise LoHaError(
                f"{term.adapter.source}: {term.name} has shape {term.layer.shape}, but {first.adapter.source} has "
                f"{first.layer.shape}; they are for different base models, which cannot be merged"
            )


def _others(
    adapters: Sequence[Adapter],
    rests: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    strengths: Sequence[Strength],
) -> tuple[dict[str, Tensor], list[str]]:
    """What is no low-rank layer: differences add up, embeddings are carried over, anything else must stand alone."""
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    for adapter, rest, weight, strength in zip(adapters, rests, weights, strengths, strict=True):
        for key, tensor in rest.items():
            module, suffix = split_other(key) or (key, "")
            scale = weight * strength(module)
            if suffix in DIFFERENCES:
                if key in found and found[key].shape != tensor.shape:
                    raise LoHaError(
                        f"{adapter.source}: {key} is {tuple(tensor.shape)}, elsewhere {tuple(found[key].shape)}"
                    )
                change = tensor if scale == 1 else tensor.float() * scale
                found[key] = found[key] + change if key in found else change
            elif weight == 0:
                continue
            elif suffix and (scale != 1 or key in found):
                raise LoHaError(
                    f"{adapter.source}: {key} is of a kind that cannot be scaled or summed as a LoHa; "
                    "give this adapter weight 1 and let no other act on that layer, or convert it first"
                )
            elif key not in found:
                found[key] = tensor
                notes.append(f"{key} is taken from {adapter.source} as it is")
            elif not torch.equal(found[key], tensor):
                notes.append(f"{key} of {adapter.source} is left out; another adapter has it, too")
    return found, notes


Combiner = Callable[[str, Sequence[tuple[Tensor, Tensor]], Sequence[float]], tuple[Tensor, Tensor]]


def _combiner(method: str, count: int, density: float, majority_sign: str, seed: int) -> Combiner:
    """(name, products, weights) -> the product that stands for all."""
    if method in _FORMS:
        return lambda name, products, weights: _sum(products, weights)
    if method == "slerp":
        if count != 2:
            raise LoHaError(f"slerp goes from one adapter to another; expected 2 adapters, found {count}")
        return lambda name, products, weights: _sum(products, slerp(products, weights))
    return sparse.Sparse(method, density, majority_sign, seed)


def _sum(products: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if any(u.dtype == torch.float64 for u, _ in products) else torch.float32
    u = torch.cat([u.to(dtype) * weight for (u, _), weight in zip(products, weights, strict=True)], 1)
    return lowrank.collapse(u, torch.cat([v.to(dtype) for _, v in products]))


def slerp(products: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> list[float]:
    """Coefficients of two updates on the arc between them, at t = w₂/(w₁+w₂), times w₁+w₂.

    The direction turns at an even rate (Shoemake 1985), and the length goes from one update's to the other's in a
    straight line. As the result is a weighted sum, nothing o×i is needed. Updates along one line are interpolated
    linearly; so is a layer that only one adapter has.

    Raises:
        LoHaError: weights that are negative.
    """
    if any(weight < 0 for weight in weights):
        raise LoHaError(f"slerp needs weights from 0, found {', '.join(f'{w:g}' for w in weights)}")
    if len(products) == 1:
        return list(weights)
    (u1, v1), (u2, v2) = ((u.double(), v.double()) for u, v in products)
    n1, n2 = lowrank.norm(u1, v1), lowrank.norm(u2, v2)
    total = sum(weights)
    t = weights[1] / total
    cosine = float(((u1.T @ u2) * (v1 @ v2.T)).sum()) / (n1 * n2) if n1 and n2 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return list(weights)
    length = total * ((1 - t) * n1 + t * n2) / math.sin(angle)
    return [length * math.sin((1 - t) * angle) / n1, length * math.sin(t * angle) / n2]


def _merged(
    name: str, terms: Sequence[Term], combine: Combiner, form: Factoring, is_sum: bool
) -> tuple[Layer, LayerError]:
    """One layer of the result."""
    if lone := _kept(name, terms, form, is_sum):
        return lone
    weights = [term.weight for term in terms]
    u, v = combine(name, [product(term.layer) for term in terms], weights)
    shape = max((term.layer.shape for term in terms), key=len)
    return form(name, u, v, shape)


def _kept(name: str, terms: Sequence[Term], form: Factoring, is_sum: bool) -> tuple[Layer, LayerError] | None:
    """A layer that can stay as it is but for alpha, or None.

    Raises:
        LoHaError: DoRA that does not stand alone at weight 1.
    """
    term = terms[0]
    is_dora = any(t.layer.dora_scale is not None for t in terms)
    if is_dora and not (len(terms) == 1 and term.weight == 1):
        who = next(t for t in terms if t.layer.dora_scale is not None)
        why = f"weight {who.weight:g}" if len(terms) == 1 else f"{len(terms)} adapters act on it"
        raise LoHaError(
            f"{who.adapter.source}: {who.name} is DoRA, and {why}. DoRA's update depends on the base weight, so that "
            "only a lone one at weight 1 can be merged; bake it into a checkpoint instead (loha bake)"
        )
    fits = isinstance(term.layer, LoHaFactors if form.kind == "loha" else LoRAFactors)
    within = form.rank is None or term.layer.rank <= form.rank
    if not is_dora and not (is_sum and len(terms) == 1 and fits and within):
        return None
    layer = scaled(term.layer, term.weight)
    size = size_of(name, *product(layer))
    entry = LayerError(name, layer.rank, layer.rank**2 if isinstance(layer, LoHaFactors) else layer.rank, size, 0.0)
    if form.dtype is None or form.dtype == layer.dtype:
        return layer, entry
    layer = cast(name, layer, form.dtype)
    gone = lowrank.distance(product(scaled(term.layer, term.weight)), product(layer))
    return layer, replace(entry, error=gone / size if size else 0.0)
