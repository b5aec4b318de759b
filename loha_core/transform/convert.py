"""One adapter in another form: rank, kind, spelling, alpha, dtype. Every function returns a new adapter and a report.

>>> a = Adapter({"lora_unet_proj_in": LoHaFactors(*[torch.ones(4, 1), torch.ones(1, 6)] * 2, alpha=1)})
>>> lora, _ = to_lora(a)
>>> sorted(lora.extras)
['lora_unet_proj_in.alpha', 'lora_unet_proj_in.lora_down.weight', 'lora_unet_proj_in.lora_up.weight']
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..adapter import DIFFERENCES, Adapter, join, split, split_other
from ..blocks import BlockStrength
from ..errors import LoHaError
from ..factors import Layer, LoHaFactors, LoRAFactors
from ..formats import metadata as provenance
from ..naming import names, spelling
from ..naming.respell import respelled
from . import lowrank
from .compress import Factoring, Method, cast
from .lowrank import product, scaled, size_of
from .merge import Made, Progress, block_strength
from .report import ErrorReport, LayerError

Shapes = Mapping[str, tuple[int, ...]]


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    method: Method = "svd",
    seed: int = 0,
    progress: Progress | None = None,
) -> Made:
    """Every LoHa and LoRA layer at a lower rank; a layer that the bound does not make smaller stays bit for bit.

    DoRA's magnitudes stay, and the error is that of ΔW.

    Args:
        rank, energy, max_error: one of them: the rank, the share of ‖ΔW‖² to keep, or the largest relative error.
        method: "svd" (the update's best approximation of that matrix rank) or "fit" (a true LoHa of ``rank``, which
            is never worse, and takes longer; LoRA layers are truncated in any case).

    Raises:
        LoHaError: bounds that make no sense.
    """
    forms = {"loha": Factoring(method, rank, energy, max_error, "loha", seed=seed)}
    forms["lora"] = replace(forms["loha"], method="svd", kind="lora")

    def smaller(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        if rank is not None and layer.rank <= rank:
            return layer, _exactly(name, layer)
        new, entry = _formed(name, layer, forms["lora" if isinstance(layer, LoRAFactors) else "loha"])
        return (new, entry) if new.rank < layer.rank else (layer, _exactly(name, layer))

    details = {"rank": rank, "energy": energy, "max_error": max_error, "method": method}
    return _each(adapter, "resize", smaller, progress, **details)


def to_lora(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> Made:
    """Every LoHa layer as a LoRA layer: exactly, of rank r², or truncated to a bound. DoRA's magnitudes stay.

    Args:
        shapes: layer name -> shape of its weight (o, i, *k). Flat LoHa factors don't tell the kernel; without shapes
            it is 3×3 where the layer's name says so and the size allows it.
    """
    bound = rank is not None or energy is not None or max_error is not None
    form = Factoring("svd" if bound else "exact", rank, energy, max_error, "lora")

    def converted(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        if isinstance(layer, LoRAFactors):
            return layer, _exactly(name, layer)
        return _formed(name, layer, form, (shapes or {}).get(name))

    return _each(adapter, "to LoRA", converted, progress, rank=rank, energy=energy, max_error=max_error)


def from_lora(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    method: Method = "exact",
    seed: int = 0,
    progress: Progress | None = None,
) -> Made:
    """Every LoRA layer as a LoHa layer: exactly (its second half is ones, the rank is the LoRA's), by svd, or fit."""
    form = Factoring(method, rank, energy, max_error, "loha", seed=seed)

    def converted(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        if isinstance(layer, LoHaFactors):
            return layer, _exactly(name, layer)
        return _formed(name, layer, form)

    details = {"rank": rank, "energy": energy, "max_error": max_error, "method": method}
    return _each(adapter, "from LoRA", converted, progress, **details)


def to_dtype(adapter: Adapter, dtype: torch.dtype) -> Made:
    """Factors in another dtype, with what rounding costs.

    Raises:
        LoHaError: no floating dtype, or a value is too large for it.
    """
    if not dtype.is_floating_point:
        raise LoHaError(f"factors are floating point; they cannot be {dtype}")

    def converted(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        if layer.dtype == dtype:
            return layer, _exactly(name, layer)
        return _compared(name, layer, cast(name, layer, dtype))

    return _each(adapter, "dtype", converted, dtype=str(dtype).removeprefix("torch."))


def change_alpha(adapter: Adapter, *, alpha: float | None = None, scale: float | None = None) -> Made:
    """The same update under another alpha, for trainers that hold alpha (or alpha/rank, the scale) fixed.

    What alpha gains, w1_a (a LoRA's up) loses; by a power of two without any rounding.

    Raises:
        LoHaError: not exactly one of alpha and scale, or one that is 0 or not finite.
    """
    if (alpha is None) == (scale is None):
        raise LoHaError("give either alpha or scale (alpha/rank)")
    wanted = alpha if alpha is not None else scale
    if wanted is None or not math.isfinite(wanted) or wanted == 0:
        raise LoHaError(f"alpha or scale is {wanted}; expected a finite number that is not 0")

    def changed(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        new = wanted if alpha is not None else wanted * layer.rank
        factor = layer.alpha / new
        if factor == 1:
            return layer, _exactly(name, layer)
        if isinstance(layer, LoHaFactors):
            return _compared(name, layer, replace(layer, w1_a=layer.w1_a * factor, alpha=new))
        return _compared(name, layer, replace(layer, up=layer.up * factor, alpha=new))

    return _each(adapter, "alpha", changed, alpha=alpha, scale=scale)


def bake_blocks(adapter: Adapter, blocks: BlockStrength, family: str | None = None) -> Made:
    """Block strengths written into the layers, for loaders that know none. Layers of strength 0 are left out.

    Only alpha changes, so that factors stay bit for bit.

    Args:
        family: "SD1.5", "SDXL", "Flux" … where names alone don't tell blocks apart; guessed by default.

    Raises:
        LoHaError: DoRA or another kind that a number cannot scale, or every layer at strength 0.
    """
    strength = block_strength(blocks, adapter, family)
    layers, rest = split(adapter)
    kept = {name: layer for name, layer in layers.items() if strength(name) != 0}
    if not kept:
        raise LoHaError(f"{adapter.source}: every layer has strength 0 in these blocks, so nothing would be left")
    for name, layer in kept.items():
        if layer.dora_scale is not None and strength(name) != 1:
            raise LoHaError(
                f"{adapter.source}: {name} is DoRA, which no factor can scale; its blocks' strength is "
                f"{strength(name):g}, expected 0 or 1. Bake it into a checkpoint instead (loha bake)"
            )
    others = {}
    for key, tensor in rest.items():
        module, suffix = split_other(key) or (key, "")
        by = strength(module) if suffix else 1.0
        if by not in (0.0, 1.0) and suffix not in DIFFERENCES:
            raise LoHaError(f"{adapter.source}: {key} is of a kind that no factor can scale by {by:g}; use 0 or 1")
        if by != 0:
            others[key] = tensor if by == 1 else tensor.float() * by

    def acting(name: str, layer: Layer) -> tuple[Layer, LayerError]:
        return scaled(layer, strength(name)), _exactly(name, layer)

    return _each(join(kept, others, adapter), "bake blocks", acting)


def respell(adapter: Adapter, style: str, unet: spelling.UNet = "keep") -> Made:
    """Other module names, the same update: a DiT's fused layers are cut or joined where the names mean other weights.

    Args:
        style: "kohya" (``lora_unet_…``), "diffusers" (``unet.…``, ``transformer.…``), or "native"
            (``diffusion_model.…``).
        unet: for "kohya", names of a Stable Diffusion U-Net's blocks: as they are, diffusers', or LDM's.

    Raises:
        LoHaError: a module whose name in that style is not known, or a layer that can't be cut or joined.
    """
    made = respelled(adapter, style, unet)
    report = ErrorReport([_exactly(name, layer) for name, layer in split(made)[0].items()], list(made.notes))
    return Made(made, report)


def to_lycoris(adapter: Adapter, unet: spelling.UNet = "keep") -> Made:
    """Names as kohya's and LyCORIS' files have them; ``save_adapter`` writes them as one file."""
    return respell(adapter, "kohya", unet)


def to_peft(adapter: Adapter) -> Made:
    """Names as diffusers' models have them; ``save_adapter(format="peft")`` writes folders that PEFT loads.

    Raises:
        LoHaError: what PEFT's LoHa cannot hold: DoRA, LoRA layers and other tensors.
    """
    for name, layer in adapter.layers.items():
        if layer.dora_scale is not None:
            raise LoHaError(f"{adapter.source}: {name} is DoRA, which PEFT's LoHa cannot hold; stay with LyCORIS")
    if adapter.extras:
        key = next(iter(adapter.extras))
        raise LoHaError(f"{adapter.source}: PEFT's LoHa cannot hold {key}; convert LoRA layers with from_lora first")
    # PEFT's own names may be of any model.
    made = respell(adapter, "keep" if adapter.dialect == "peft" else "diffusers")
    made.adapter.dialect = "peft"
    return made


def _each(
    adapter: Adapter,
    operation: str,
    change: Callable[[str, Layer], tuple[Layer, LayerError]],
    progress: Progress | None = None,
    **details: Any,
) -> Made:
    """Change every layer; what is no low-rank layer is carried over."""
    layers, rest = split(adapter)
    if not layers:
        raise LoHaError(f"{adapter.source}: holds no LoHa or LoRA layer to convert")
    found: dict[str, Layer] = {}
    report = ErrorReport(notes=list(adapter.notes))
    for done, (name, layer) in enumerate(layers.items()):
        if progress is not None:
            progress(done, len(layers), name)
        found[name], entry = change(name, layer)
        report.layers.append(entry)
    if progress is not None:
        progress(len(layers), len(layers), "")
    made = join(found, rest, adapter)
    made.metadata = provenance.metadata([adapter], operation, error=report.error, **details)
    if not made.layers:
        ranks, alphas = [layer.rank for layer in found.values()], [layer.alpha for layer in found.values()]
        made.metadata = provenance.lora_metadata(made.metadata, ranks, alphas)
    return Made(made, report)


def _exactly(name: str, layer: Layer) -> LayerError:
    """The entry of a layer whose update did not change."""
    u, v = product(layer)
    return LayerError(name, layer.rank, u.shape[1], size_of(name, u, v), 0.0)


def _compared(name: str, before: Layer, after: Layer) -> tuple[Layer, LayerError]:
    """The entry of a layer that rounding changed."""
    x, y = product(before), product(after)
    size = size_of(name, *x)
    size_of(name, *y)
    error = lowrank.distance(x, y) / size if size else 0.0
    return after, LayerError(name, after.rank, x[0].shape[1], size, error)


def _formed(name: str, layer: Layer, form: Factoring, shape: tuple[int, ...] | None = None) -> tuple[Layer, LayerError]:
    """The layer through a factoring, in its own dtype, with DoRA's magnitudes."""
    u, v = product(layer)
    form = replace(form, dtype=form.dtype or (layer.dtype if form.method != "exact" else None))
    new, entry = form(name, u, v, shape or _weight_shape(name, layer.shape))
    return (new if layer.dora_scale is None else replace(new, dora_scale=layer.dora_scale)), entry


_CONV_3X3 = re.compile(
    r"(conv1|conv2|conv_in|conv_out|samplers_\d+_conv|in_layers_2|out_layers_3|_op|input_blocks_0_0|^out_2"
    r"|output_blocks_\d+_\d+_conv)$"
)


def _weight_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(o, i, *k), the kernel guessed from the name where flat factors hide it."""
    if len(shape) == 2 and shape[1] % 9 == 0 and _CONV_3X3.search(names.split(name)[1]):
        return (shape[0], shape[1] // 9, 3, 3)
    return shape
