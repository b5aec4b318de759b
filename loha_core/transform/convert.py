"""One adapter in another form: rank, kind, spelling, alpha, dtype. Every function returns a new adapter and a report.

>>> a = Adapter({"lora_unet_proj_in": LoHaFactors(*[torch.ones(4, 1), torch.ones(1, 6)] * 2, alpha=1)})
>>> lora, _ = to_lora(a)
>>> sorted(lora.extras)
['lora_unet_proj_in.alpha', 'lora_unet_proj_in.lora_down.weight', 'lora_unet_proj_in.lora_up.weight']
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..adapter import DIFFERENCES, Adapter, split_key, split_layers
from ..blocks import BlockStrength
from ..errors import LoHaError, about, check_number
from ..factors import Layer, LoHaFactors
from ..naming import names, spelling
from ..naming.respell import respelled
from .compress import EXACT, Compression, Kind, cast, check_dtype, kind_of
from .lowrank import product, scaled
from .merge import block_strength
from .report import ErrorReport, LayerError, Progress, Result, each_layer, result_of, rounded, unchanged

Shapes = Mapping[str, tuple[int, ...]]
Change = Callable[[str, Layer], tuple[Layer, LayerError]]


def convert(
    adapter: Adapter,
    *,
    blocks: BlockStrength | None = None,
    compression: Compression | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    names: str = "keep",
    unet: spelling.UNet = "keep",
    progress: Progress | None = None,
) -> Result:
    """The steps that are asked for, in this order; the report is that of the step of the largest error.

    Args:
        blocks: see `bake_blocks`.
        compression: of the kind to which layers of the other kind are converted (`to_lora`, `from_lora`).
        alpha, scale: see `change_alpha`.
        dtype: see `to_dtype`.
        names, unet: see `respell`; "peft" is `to_peft`.

    Raises:
        LoHaError: as the steps do.
    """
    steps: list[Callable[[Adapter], Result]] = []
    if blocks is not None:
        steps.append(lambda a: bake_blocks(a, blocks))
    if compression is not None:
        steps.append(lambda a: _to_kind(a, compression, progress=progress))
    if alpha is not None or scale is not None:
        steps.append(lambda a: change_alpha(a, alpha=alpha, scale=scale))
    if dtype is not None:
        steps.append(lambda a: to_dtype(a, dtype))
    if names == "peft":
        steps.append(to_peft)
    elif (names, unet) != ("keep", "keep"):
        steps.append(lambda a: respell(a, names, unet))
    result = Result(adapter, ErrorReport())
    for step in steps:
        result = result.then(step)
    return result


def resize(adapter: Adapter, compression: Compression, *, progress: Progress | None = None) -> Result:
    """Every LoHa and LoRA layer at a lower rank; a layer that the bound does not make smaller stays bit for bit.

    Layers keep their kind. DoRA's magnitudes stay, and the error is that of ΔW.

    Args:
        compression: "svd" (the update's best approximation of that matrix rank) or "fit" (a true LoHa of its rank,
            which is never worse, and takes longer; LoRA layers are truncated in any case).
    """
    forms: dict[Kind, Compression] = {"loha": compression, "lora": replace(compression, method="svd", kind="lora")}

    def smaller(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        if compression.rank is None or layer.rank > compression.rank:
            compressed, error = _compressed(name, layer, forms[kind_of(layer)])
            if compressed.rank < layer.rank:
                return compressed, error
        return layer, unchanged(name, layer)

    return _each(adapter, "resize", smaller, progress, **compression.details())


def to_lora(
    adapter: Adapter,
    compression: Compression = EXACT,
    *,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> Result:
    """Every LoHa layer as a LoRA layer: exactly, of rank r², or truncated to a bound. DoRA's magnitudes stay.

    Args:
        shapes: layer name -> shape of its weight (o, i, *k). Flat LoHa factors don't tell the kernel; without shapes
            it is 3×3 where the layer's name says so and the size allows it.
    """
    return _to_kind(adapter, replace(compression, kind="lora"), shapes, progress)


def from_lora(adapter: Adapter, compression: Compression = EXACT, *, progress: Progress | None = None) -> Result:
    """Every LoRA layer as a LoHa layer: exactly (its second half is ones, the rank is the LoRA's), by svd, or fit."""
    return _to_kind(adapter, replace(compression, kind="loha"), progress=progress)


def _to_kind(
    adapter: Adapter, compression: Compression, shapes: Shapes | None = None, progress: Progress | None = None
) -> Result:
    """Layers of the other kind in the compression's."""

    def converted(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        if kind_of(layer) == compression.kind:
            return layer, unchanged(name, layer)
        return _compressed(name, layer, compression, (shapes or {}).get(name))

    operation = "to LoRA" if compression.kind == "lora" else "from LoRA"
    return _each(adapter, operation, converted, progress, **compression.details())


def to_dtype(adapter: Adapter, dtype: torch.dtype) -> Result:
    """Factors in another dtype, and the error of rounding to it.

    Raises:
        LoHaError: no floating dtype, or a value is too large for it.
    """
    check_dtype(dtype)

    def converted(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        if layer.dtype == dtype:
            return layer, unchanged(name, layer)
        after = cast(name, layer, dtype)
        return after, rounded(name, layer, after)

    return _each(adapter, "dtype", converted, dtype=str(dtype).removeprefix("torch."))


def change_alpha(adapter: Adapter, *, alpha: float | None = None, scale: float | None = None) -> Result:
    """The same update under another alpha, for trainers that hold alpha (or alpha/rank, the scale) fixed.

    What alpha gains, w1_a (a LoRA's up) loses; by a power of two without any rounding.

    Raises:
        LoHaError: not exactly one of alpha and scale, or one that is 0 or not finite.
    """
    if (alpha is None) == (scale is None):
        raise LoHaError("give either alpha or scale (alpha/rank)")
    for name, value in (("alpha", alpha), ("scale", scale)):
        if value is not None:
            check_number(name, value)
        if value == 0:
            raise LoHaError(f"{name} is 0; expected a finite number that is not 0")

    def changed(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        new = alpha if alpha is not None else (scale or 0.0) * layer.rank
        factor = layer.alpha / new
        if factor == 1:
            return layer, unchanged(name, layer)
        after: Layer
        if isinstance(layer, LoHaFactors):
            after = replace(layer, w1_a=layer.w1_a * factor, alpha=new)
        else:
            after = replace(layer, up=layer.up * factor, alpha=new)
        return after, rounded(name, layer, after)

    return _each(adapter, "alpha", changed, alpha=alpha, scale=scale)


def bake_blocks(adapter: Adapter, blocks: BlockStrength) -> Result:
    """Block strengths written into the layers, for loaders that know none. Layers of strength 0 are left out.

    Only alpha changes, so that factors stay bit for bit.

    Raises:
        LoHaError: DoRA or another kind that a number cannot scale, or every layer at strength 0.
    """
    strength = block_strength(blocks, adapter)
    layers, others = split_layers(adapter)
    acting = {name: layer for name, layer in layers.items() if strength(name) != 0}
    with about(adapter.source):
        if not acting:
            raise LoHaError("every layer has strength 0 in these blocks, so nothing would be left")
        for name, layer in acting.items():
            if layer.dora_scale is not None and strength(name) != 1:
                raise LoHaError(
                    f"{name} is DoRA, which no factor can scale; its blocks' strength is "
                    f"{strength(name):g}, expected 0 or 1. Bake it into a checkpoint instead (loha bake)"
                )
        scaled_others = {}
        for key, tensor in others.items():
            module, suffix = split_key(key) or (key, "")
            factor = strength(module) if suffix else 1.0
            if factor not in (0.0, 1.0) and suffix not in DIFFERENCES:
                raise LoHaError(f"{key} is of a kind that no factor can scale by {factor:g}; use 0 or 1")
            if factor != 0:
                scaled_others[key] = tensor if factor == 1 else tensor.float() * factor

    def with_strength(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        return scaled(layer, strength(name)), unchanged(name, layer)

    baked, errors = each_layer(acting, with_strength)
    return result_of(baked, scaled_others, [adapter], ErrorReport(errors, list(adapter.notes)), "bake blocks")


def respell(adapter: Adapter, style: str, unet: spelling.UNet = "keep") -> Result:
    """Other module names, the same update: a DiT's fused layers are cut or joined where the names mean other weights.

    Args:
        style: "kohya" (``lora_unet_…``), "diffusers" (``unet.…``, ``transformer.…``), or "native"
            (``diffusion_model.…``).
        unet: for "kohya", names of a Stable Diffusion U-Net's blocks: as they are, diffusers', or LDM's.

    Raises:
        LoHaError: a module whose name in that style is not known, or a layer that can't be cut or joined.
    """
    renamed = respelled(adapter, style, unet)
    layers = [unchanged(name, layer) for name, layer in split_layers(renamed)[0].items()]
    return Result(renamed, ErrorReport(layers, list(renamed.notes)))


def to_lycoris(adapter: Adapter, unet: spelling.UNet = "keep") -> Result:
    """Names as kohya's and LyCORIS' files have them; ``save_adapter`` writes them as one file."""
    return respell(adapter, "kohya", unet)


def to_peft(adapter: Adapter) -> Result:
    """Names as diffusers' models have them; ``save_adapter(format="peft")`` writes folders that PEFT loads.

    Raises:
        LoHaError: what PEFT's LoHa cannot hold: DoRA, LoRA layers and other tensors.
    """
    with about(adapter.source):
        for name, layer in adapter.layers.items():
            if layer.dora_scale is not None:
                raise LoHaError(f"{name} is DoRA, which PEFT's LoHa cannot hold; stay with LyCORIS")
        if adapter.extras:
            key = next(iter(adapter.extras))
            raise LoHaError(f"PEFT's LoHa cannot hold {key}; convert LoRA layers with from_lora first")
    # PEFT's own names may be of any model.
    result = respell(adapter, "keep" if adapter.dialect == "peft" else "diffusers")
    result.adapter.dialect = "peft"
    return result


def _each(adapter: Adapter, operation: str, change: Change, progress: Progress | None = None, **details: Any) -> Result:
    """Change every layer; tensors that are no low-rank layer are carried over."""
    layers, others = split_layers(adapter)
    if not layers:
        raise LoHaError(f"{adapter.source}: holds no LoHa or LoRA layer to convert")
    changed, errors = each_layer(layers, change, progress)
    report = ErrorReport(errors, list(adapter.notes))
    return result_of(changed, others, [adapter], report, operation, **details)


def _compressed(
    name: str, layer: Layer, form: Compression, shape: tuple[int, ...] | None = None
) -> tuple[Layer, LayerError]:
    """The layer compressed, in its own dtype unless another is asked for, with DoRA's magnitudes."""
    form = replace(form, dtype=form.dtype or (layer.dtype if form.method != "exact" else None))
    new, error = form.compress(name, *product(layer), shape or _weight_shape(name, layer.shape))
    return (new if layer.dora_scale is None else replace(new, dora_scale=layer.dora_scale)), error


_CONV_3X3 = re.compile(
    r"(conv1|conv2|conv_in|conv_out|samplers_\d+_conv|in_layers_2|out_layers_3|_op|input_blocks_0_0|^out_2"
    r"|output_blocks_\d+_\d+_conv)$"
)


def _weight_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(o, i, *k), the kernel guessed from the name where flat factors hide it."""
    if len(shape) == 2 and shape[1] % 9 == 0 and _CONV_3X3.search(names.split(name)[1]):
        return (shape[0], shape[1] // 9, 3, 3)
    return shape
