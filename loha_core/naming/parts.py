"""A layer of a fused weight as layers of its parts, and back: exact, and in factors.

Rows of M₁∘M₂ are rows of both halves, so that a part has the whole's rank. The other way, each part gets columns of
its own in w1_a and w2_a: the halves' ranks add up, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import algebra
from ..errors import LoHaError
from ..factors import Layer, LoHaFactors, LoRAFactors


def cut(name: str, layer: Layer, start: int, length: int) -> Layer:
    """Rows ``start`` … ``start + length`` of ΔW.

    Raises:
        LoHaError: there are no such rows, or DoRA whose magnitudes are of the inputs, over all rows.
    """
    if start < 0 or start + length > layer.shape[0]:
        raise LoHaError(f"{name}: rows {start} to {start + length} of an update of shape {layer.shape}")
    return rows_of(name, layer, torch.arange(start, start + length), is_whole=False)


def swapped(layer: Layer) -> Layer:
    """The two halves of ΔW's rows in the other order, where there are twice as many rows as columns.

    Of a scale and a shift some models have the one first, some the other; other weights of that name stay as they are.
    """
    out, inner = layer.shape[:2]
    return rows_of("", layer, torch.arange(out).roll(out // 2), is_whole=True) if out == 2 * inner else layer


def swap_halves(weight: Tensor) -> Tensor:
    """The same for a tensor; ComfyUI takes such a function as the third part of a patch's place."""
    return weight.roll(weight.shape[0] // 2, 0)


def rows_of(name: str, layer: Layer, rows: Tensor, is_whole: bool) -> Layer:
    """These rows of ΔW, in this order; DoRA's magnitudes along the outputs go with them.

    Args:
        is_whole: all rows are among them.

    Raises:
        LoHaError: DoRA along the inputs, and not all rows.
    """
    magnitude = layer.dora_scale
    if magnitude is not None:
        if algebra.dora_axis(magnitude, layer.shape) == 0:
            magnitude = magnitude.reshape(-1, *[1] * (magnitude.dim() - 1))[rows.to(magnitude.device)]
        elif not is_whole:
            raise LoHaError(
                f"{name}: DoRA along the inputs of a fused weight: its magnitudes are of all parts together, so that "
                "it can't be taken apart; keep the names as they are"
            )
    if isinstance(layer, LoRAFactors):
        return replace(layer, up=layer.up[rows.to(layer.up.device)], dora_scale=magnitude)
    axis = 1 if layer.is_tucker else 0
    w1_a, w2_a = (a.index_select(axis, rows.to(a.device)) for a in (layer.w1_a, layer.w2_a))
    return replace(layer, w1_a=w1_a, w2_a=w2_a, dora_scale=magnitude)


def joined(name: str, parts: Sequence[tuple[int, Layer]], height: int) -> Layer:
    """One layer of ``height`` rows, 0 where no part is.

    Args:
        parts: (first row, layer), none over another: their halves would multiply.

    Raises:
        LoHaError: parts that overlap; DoRA of some parts, or along the inputs; Tucker beside flat factors.
    """
    layers = [layer for _, layer in parts]
    ends = 0
    for start, layer in sorted(parts, key=lambda part: part[0]):
        if start < ends:
            raise LoHaError(f"{name}: rows from {start} on are there under two names; which one counts is unknown")
        ends = start + layer.shape[0]
    magnitude = _magnitudes(name, parts, height)
    if any(isinstance(layer, LoHaFactors) for layer in layers):
        return _joined_loha(name, [(start, as_loha(layer)) for start, layer in parts], height, magnitude)
    loras = [(start, layer) for start, layer in parts if isinstance(layer, LoRAFactors)]
    if any(lora.mid is not None for _, lora in loras):
        raise LoHaError(f"{name}: parts with a Tucker core can't be made one layer; keep the names as they are")
    ups, scale = _at_one_scale([lora.up for _, lora in loras], [lora.scale for _, lora in loras])
    up = _block_columns([(start, up.flatten(1)) for (start, _), up in zip(loras, ups, strict=True)], height)
    down = _cat([lora.down for _, lora in loras])
    rank = down.shape[0]
    return LoRAFactors(up.reshape(*up.shape, *[1] * (down.dim() - 2)), down, scale * rank, dora_scale=magnitude)


def _joined_loha(
    name: str, parts: Sequence[tuple[int, LoHaFactors]], height: int, magnitude: Tensor | None
) -> LoHaFactors:
    layers = [layer for _, layer in parts]
    if any(layer.is_tucker for layer in layers):
        raise LoHaError(f"{name}: parts with a Tucker core can't be made one layer; keep the names as they are")
    firsts, scale = _at_one_scale([layer.w1_a for layer in layers], [layer.scale for layer in layers])
    starts = [start for start, _ in parts]
    first = layers[0]
    if all(torch.equal(a.w1_b, first.w1_b) and torch.equal(a.w2_b, first.w2_b) for a in layers):
        # They were one once: cut from a fused layer, and not changed since.
        columns, w1_b, w2_b = _stacked, first.w1_b, first.w2_b
    else:
        columns = _block_columns
        w1_b, w2_b = _cat([a.w1_b for a in layers]), _cat([a.w2_b for a in layers])
    w1_a = columns(list(zip(starts, firsts, strict=True)), height)
    w2_a = columns([(start, layer.w2_a) for start, layer in parts], height)
    return LoHaFactors(w1_a, w1_b, w2_a, w2_b, scale * w1_b.shape[0], dora_scale=magnitude)


def as_loha(layer: Layer) -> LoHaFactors:
    """The same update as a LoHa whose second half is ones; a LoHa as it is."""
    if isinstance(layer, LoHaFactors):
        return layer
    return replace(LoHaFactors.from_product(*layer.product()), dora_scale=layer.dora_scale)


def _magnitudes(name: str, parts: Sequence[tuple[int, Layer]], height: int) -> Tensor | None:
    """DoRA's magnitudes of all rows, from those of the parts."""
    if all(layer.dora_scale is None for _, layer in parts):
        return None
    covered = sum(layer.shape[0] for _, layer in parts)
    by_row = [
        (start, layer.dora_scale.reshape(-1, 1))
        for start, layer in parts
        if layer.dora_scale is not None and algebra.dora_axis(layer.dora_scale, layer.shape) == 0
    ]
    if len(by_row) < len(parts) or covered != height:
        raise LoHaError(
            f"{name}: DoRA can be made one layer only along the outputs and where every part has it; keep the names "
            "as they are"
        )
    return _cat([magnitude for _, magnitude in sorted(by_row, key=lambda pair: pair[0])])


def _at_one_scale(tensors: Sequence[Tensor], scales: Sequence[float]) -> tuple[list[Tensor], float]:
    """Factors that take one scale together, the largest; as they are where the scales are equal."""
    common = max(scales, key=abs)
    if common == 0:
        return list(tensors), 0.0
    return [t if s == common else t.float() * (s / common) for t, s in zip(tensors, scales, strict=True)], common


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def _block_columns(parts: Sequence[tuple[int, Tensor]], height: int) -> Tensor:
    """Each part in rows and columns of its own."""
    like = _cat([tensor.flatten() for _, tensor in parts])
    columns = like.new_zeros(height, sum(tensor.shape[1] for _, tensor in parts))
    column = 0
    for start, tensor in parts:
        columns[start : start + len(tensor), column : column + tensor.shape[1]] = tensor
        column += tensor.shape[1]
    return columns


def _stacked(parts: Sequence[tuple[int, Tensor]], height: int) -> Tensor:
    """Each part in rows of its own."""
    like = _cat([tensor.flatten() for _, tensor in parts])
    rows = like.new_zeros(height, parts[0][1].shape[1])
    for start, tensor in parts:
        rows[start : start + len(tensor)] = tensor
    return rows
