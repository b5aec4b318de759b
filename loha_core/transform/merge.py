"""Several adapters as one: Σ weight·ΔW, or another combination of the updates, written as a LoHa again.

>>> from loha_core import LoHaFactors
>>> a = Adapter({"lora_unet_proj_in": LoHaFactors(*[torch.ones(4, 1), torch.ones(1, 6)] * 2, alpha=1)})
>>> merged, report = merge([a, a], [0.5, 2.0])
>>> merged.layers["lora_unet_proj_in"].delta()[0, 0], report.error
(tensor(2.5000), 0.0)
>>> merge([a, a], 0.5, Compression(rank=1)).adapter.ranks
Counter({1: 1})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..adapter import DIFFERENCES, Adapter, module_names, split_key, split_layers
from ..blocks import BlockStrength
from ..errors import LoHaError, about, check_number
from ..factors import Layer, same
from ..naming import names, spelling
from ..naming.recognise import family_of
from ..naming.respell import like
from ..naming.unet import UNETS, unet_family
from . import compress, lowrank, sparse
from .compress import EXACT, Compression, kind_of
from .lowrank import flat_shape, product, scaled
from .report import ErrorReport, LayerError, Progress, Result, each_layer, result_of, rounded, unchanged
from .sparse import Sparse

# What a user chooses from: forms of the sum, and other combinations, which `combination` makes.
METHODS = (*compress.METHODS, *sparse.METHODS, "slerp")

Combination = Literal["sum", "slerp"] | Sparse
Strength = Callable[[str], float]  # layer name -> multiplier


class _Source(NamedTuple):
    """An adapter to merge: its low-rank layers, its other tensors, and how strongly they act."""

    adapter: Adapter
    layers: dict[str, Layer]
    others: dict[str, Tensor]
    weight: float
    strength: Strength


class Term(NamedTuple):
    """weight·ΔW of one layer of one adapter."""

    adapter: Adapter
    name: str
    layer: Layer
    weight: float


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | float = 1.0,
    compression: Compression = EXACT,
    *,
    combine: Combination = "sum",
    blocks: BlockStrength | Sequence[BlockStrength | None] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Merge LoHa and LoRA layers, layer by layer; one layer of the result is computed at a time.

    In a sum, a layer that a single adapter has keeps its factors (only alpha takes the weight) if its rank is not above
    the compression's. Names are spelled as in the first adapter.

    Args:
        weights: one for each adapter, or one for all; may be negative, or 0 to leave an adapter out.
        compression: the form of the result: exact (rank Σr² as one LoHa), its best approximation, or a fitted LoHa.
        combine: "sum" (Σ weight·ΔW), "slerp" (two adapters along the arc between their updates), or a `Sparse` for
            TIES, DARE and magnitude pruning.
        blocks: multipliers of the weights by block and by pattern, for all adapters or for each.
        progress: called before each layer with (done, total, name); what it raises ends the merge.

    Raises:
        LoHaError: weights or settings that make no sense, adapters of different models, no layer in common, DoRA or
            LoKr that has no sum, or a result that is not finite.
    """
    if combine not in ("sum", "slerp") and not isinstance(combine, Sparse):
        raise LoHaError(f"combine is {combine!r}; expected 'sum', 'slerp' or a Sparse")
    if combine == "slerp" and len(adapters) != 2:
        raise LoHaError(f"slerp goes from one adapter to another; expected 2 adapters, found {len(adapters)}")
    sources = _sources(adapters, weights, blocks)
    adapters = [source.adapter for source in sources]
    terms = _terms(sources)
    others, notes = _merged_others(sources)
    report = ErrorReport(notes=[*(f"{a.source}: {note}" for a in adapters for note in a.notes), *notes])
    layers, report.layers = each_layer(
        terms, lambda name, of_layer: _merged(name, of_layer, combine, compression), progress
    )
    details = compression.details() | {"weights": [source.weight for source in sources], "kind": compression.kind}
    if combine != "sum":
        details |= {"method": getattr(combine, "method", combine), "density": getattr(combine, "density", None)}
        details["factor"] = compression.method
    result = result_of(layers, others, adapters, report, "merge", **details)
    result.adapter.source = " + ".join(f"{s.weight:g}·{s.adapter.source}" for s in sources)
    return result


def combination(method: str, density: float = 0.5, majority_sign: str = "total", seed: int = 0) -> Combination:
    """The combination under a name out of METHODS."""
    if method in sparse.METHODS:
        return Sparse(method, density, majority_sign, seed)
    if method not in METHODS:
        raise LoHaError(f"no method {method!r}; there are {', '.join(METHODS)}")
    return "slerp" if method == "slerp" else "sum"


# --- sources ---------------------------------------------------------------------------------------------------------


def _sources(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | float,
    blocks: BlockStrength | Sequence[BlockStrength | None] | None,
) -> list[_Source]:
    if not adapters:
        raise LoHaError("no adapter to merge; give at least one")
    each_weight = list(weights) if isinstance(weights, Sequence) else [weights] * len(adapters)
    each_blocks = list(blocks) if isinstance(blocks, Sequence) else [blocks] * len(adapters)
    for what, values in (("weights; give one weight", each_weight), ("block settings; give one", each_blocks)):
        if len(values) != len(adapters):
            raise LoHaError(f"{len(adapters)} adapters and {len(values)} {what} for each adapter, or one for all")
    for adapter, weight in zip(adapters, each_weight, strict=True):
        with about(adapter.source):
            check_number("its weight", weight)
    if not any(each_weight):
        raise LoHaError("all weights are 0, so nothing would be left; give at least one that is not")
    # Fused layers and layers of their parts meet as the first adapter has them.
    adapters = [adapters[0], *(like(adapter, module_names(adapters[0])) for adapter in adapters[1:])]
    return [
        _Source(adapter, *split_layers(adapter), float(weight), block_strength(strengths, adapter))
        for adapter, weight, strengths in zip(adapters, each_weight, each_blocks, strict=True)
    ]


def block_strength(blocks: BlockStrength | None, adapter: Adapter) -> Strength:
    """Layer name -> multiplier, for names as files spell them."""
    if blocks is None:
        return lambda name: 1.0
    family = blocks.layout.family if blocks.layout else unet_family(adapter.layers)
    unet = family if family in UNETS else unet_family(adapter.layers)
    table = family_of((names.split(name)[1] for name in module_names(adapter) if spelling.is_dit(name)), family)
    return lambda name: blocks(spelling.native_key(name, unet, table), name)


def _terms(sources: Sequence[_Source]) -> dict[str, list[Term]]:
    """Layers of one weight together, whatever their spelling, under the first adapter's name for it."""
    _check_common(sources)
    by_weight: dict[tuple[str, str], list[Term]] = {}
    for adapter, layers, _, weight, strength in sources:
        for name, layer in layers.items():
            terms = by_weight.setdefault(spelling.identity(name), [])
            # Two spellings of one weight in one file, as some trainers write, count once if they are the same.
            if not any(t.adapter is adapter and same(t.layer, layer) and t.name != name for t in terms):
                terms.append(Term(adapter, name, layer, weight * strength(name)))
    first = list(sources[0].layers)
    others = [t.name for terms in by_weight.values() for t in terms[:1] if t.adapter is not sources[0].adapter]
    spelled = {name: name for name in first} | spelling.spelled_like(first, others)
    by_name = {}
    for terms in by_weight.values():
        acting = [term for term in terms if term.weight != 0]
        if acting:
            _check_shapes(acting)
            by_name[spelled[terms[0].name]] = acting
    return by_name


def _check_common(sources: Sequence[_Source]) -> None:
    modules_of = [set(map(spelling.identity, source.layers)) for source in sources]
    for index, source in enumerate(sources):
        elsewhere = set().union(*modules_of[:index], *modules_of[index + 1 :])
        if len(sources) > 1 and not modules_of[index] & elsewhere:
            example = next(iter(source.adapter.layers), "no layer")
            raise LoHaError(
                f"{source.adapter.source}: has no layer in common with the others (it has {example}, …); "
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


# --- tensors that are no low-rank layers -----------------------------------------------------------------------------


def _merged_others(sources: Sequence[_Source]) -> tuple[dict[str, Tensor], list[str]]:
    """Differences add up; a tensor of another kind is taken from the first adapter that has it."""
    merged: dict[str, Tensor] = {}
    notes: list[str] = []
    for source in sources:
        for key, tensor in source.others.items():
            with about(source.adapter.source):
                _merge_other(source, key, tensor, merged, notes)
    return merged, notes


def _merge_other(source: _Source, key: str, tensor: Tensor, merged: dict[str, Tensor], notes: list[str]) -> None:
    module, suffix = split_key(key) or (key, "")
    scale = source.weight * source.strength(module)
    if suffix in DIFFERENCES:
        change = tensor if scale == 1 else tensor.float() * scale
        if key in merged and merged[key].shape != tensor.shape:
            raise LoHaError(f"{key} is {tuple(tensor.shape)}, elsewhere {tuple(merged[key].shape)}")
        merged[key] = merged[key] + change if key in merged else change
    elif source.weight == 0:
        return
    elif suffix and (scale != 1 or key in merged):
        raise LoHaError(
            f"{key} is of a kind that cannot be scaled or summed as a LoHa; "
            "give this adapter weight 1 and let no other act on that layer, or convert it first"
        )
    elif key not in merged:
        merged[key] = tensor
        notes.append(f"{key} is taken from {source.adapter.source} as it is")
    elif not torch.equal(merged[key], tensor):
        notes.append(f"{key} of {source.adapter.source} is left out; another adapter has it, too")


# --- layers ----------------------------------------------------------------------------------------------------------


def _merged(name: str, terms: list[Term], combine: Combination, form: Compression) -> tuple[Layer, LayerError]:
    """One layer of the result."""
    _check_dora(terms)
    term = terms[0]
    fits = kind_of(term.layer) == form.kind and (form.rank is None or term.layer.rank <= form.rank)
    if term.layer.dora_scale is not None or (combine == "sum" and len(terms) == 1 and fits):
        layer = scaled(term.layer, term.weight)
        if form.dtype is None or form.dtype == layer.dtype:
            return layer, unchanged(name, layer)
        after = compress.cast(name, layer, form.dtype)
        return after, rounded(name, layer, after)
    products, weights = [product(t.layer) for t in terms], [t.weight for t in terms]
    if isinstance(combine, Sparse):
        u, v = combine.apply(name, products, weights)
    else:
        u, v = _sum(products, slerp(products, weights) if combine == "slerp" else weights)
    return form.compress(name, u, v, max((t.layer.shape for t in terms), key=len))


def _check_dora(terms: Sequence[Term]) -> None:
    """Refuse DoRA unless it is alone and of weight 1."""
    dora = next((term for term in terms if term.layer.dora_scale is not None), None)
    if dora is not None and (len(terms) > 1 or dora.weight != 1):
        why = f"weight {dora.weight:g}" if len(terms) == 1 else f"{len(terms)} adapters act on it"
        raise LoHaError(
            f"{dora.adapter.source}: {dora.name} is DoRA, and {why}. DoRA's update depends on the base weight, so that "
            "only a lone one at weight 1 can be merged; bake it into a checkpoint instead (loha bake)"
        )


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
