"""An adapter under other names: its layers cut or joined where the names mean other weights, else as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ..adapter import WRAPPER, Adapter, join_layers, module_names, renamed, split_layers
from ..errors import LoHaError, about
from ..factors import Layer, same
from . import names, parts, spelling
from .families import Family, Side, Span
from .recognise import families_of

# Whose names each style has for a DiT (kohya's trainers wrap the original code's model), and what stands before them.
_STYLES: dict[str, tuple[Side, str]] = {
    "kohya": ("native", "lora_unet_"),
    "native": ("native", "diffusion_model."),
    "diffusers": ("diffusers", "transformer."),
}


class _Step(NamedTuple):
    """What becomes of a layer: it is cut to the rows of ``span``, or placed there in the layer of this name."""

    name: str
    span: Span | None
    is_cut: bool


def respelled(adapter: Adapter, style: str, unet: spelling.UNet = "keep") -> Adapter:
    """The same update under the module names of another style; "keep" changes nothing.

    A DiT's fused layers are cut into those that diffusers has, and joined the other way (see `parts`).

    Args:
        style: "kohya" (``lora_unet_…``; "lycoris" means the same), "diffusers" (``transformer.…``, ``unet.…``) or
            "native" (``diffusion_model.…``, as ComfyUI calls its weights).
        unet: for "kohya", whose names a U-Net's blocks get.

    Raises:
        LoHaError: see `spelling.in_style`; layers that can't be cut or joined; names by which several families mean
            different weights.
    """
    if style == "keep":
        return adapter
    style = spelling.style_of(style, unet)
    paths = _dit_paths(module_names(adapter))
    families = families_of(paths.values())
    renamed_only = [name for name in module_names(adapter) if not families or name not in paths]
    with about(adapter.source):
        new_names = spelling.in_style(renamed_only, style, unet)
    if families:
        side, prefix = _STYLES[style]
        adapter = _on_side(adapter, paths, families, side)
        moved = [name for name in module_names(adapter) if name not in new_names]
        new_names |= {name: prefix + (names.flat(name) if style == "kohya" else name) for name in moved}
    return replace(renamed(adapter, new_names), dialect="lycoris" if style == "kohya" else style)


def like(adapter: Adapter, model: Iterable[str], joining: bool = True) -> Adapter:
    """The adapter with a DiT's layers under the dotted names of the side that ``model``, modules or layers, speaks.

    As it is where both speak alike, or of no family that is known.

    Args:
        joining: False leaves parts of fused weights as they are, for models that take slices.

    Raises:
        LoHaError: as `respelled`.
    """
    model_paths, paths = _dit_paths(model).values(), _dit_paths(module_names(adapter))
    model_families = families_of(model_paths)
    by_side: dict[Side, list[Family]] = defaultdict(list)
    for family in families_of(paths.values()):
        model_side, side = family.side(model_paths), family.side(paths.values())
        if family in model_families and model_side and side and model_side != side:
            by_side[model_side].append(family)
    if len(by_side) > 1:
        raise _ambiguous(adapter.source, [family for families in by_side.values() for family in families])
    for side, families in by_side.items():
        if side == "diffusers" or joining:
            return _on_side(adapter, paths, families, side)
    return adapter


def _dit_paths(modules: Iterable[str]) -> dict[str, str]:
    """The names that are of no U-Net and no text encoder -> their paths, as `names.split` gives them."""
    return {name: names.path_of(name) for name in modules if spelling.is_dit(name)}


def _on_side(adapter: Adapter, paths: Mapping[str, str], families: list[Family], side: Side) -> Adapter:
    """The adapter with the layers in ``paths`` under the dotted names of one side; others keep their names."""
    family, steps = _steps(adapter, paths, families, side)
    one_to_one = {name: to[0].name for name, to in steps.items() if len(to) == 1 and to[0].span is None}
    new_names = {name: name for name in module_names(adapter)} | one_to_one
    if len(set(one_to_one.values())) == len(steps):
        return renamed(adapter, new_names)
    layers, tensors = split_layers(adapter)
    for key in tensors:
        module = next((name for name in steps if key.startswith(f"{name}.")), None)
        if module is not None and module not in one_to_one:
            raise LoHaError(
                f"{adapter.source}: {key} is of a kind that is not cut or joined, and its weight is fused under one "
                "of the two names; keep the names as they are"
            )
    extras = renamed(replace(adapter, layers={}, extras=tensors), new_names).extras
    with about(adapter.source):
        moved = join_layers(_moved_layers(layers, steps, family), extras, adapter)
    what = (
        "layers of parts were joined where its names mean fused weights: the ranks of the parts add up"
        if side == "native"
        else "layers of fused weights were cut into their parts"
    )
    return replace(moved, notes=[*adapter.notes, f"{family.name}: {what}"])


def _steps(
    adapter: Adapter, paths: Mapping[str, str], families: list[Family], side: Side
) -> tuple[Family, dict[str, list[_Step]]]:
    """What becomes of each layer on that side, and the family by whose table.

    Raises:
        LoHaError: a name that no table has, or names by which the families mean different weights.
    """
    by_family: list[tuple[Family, dict[str, list[_Step]]]] = []
    missing = ""
    shapes = {name: layer.shape for name, layer in split_layers(adapter)[0].items() if name in paths}
    for family in families:
        adapter_side = family.side(paths.values())
        fits = (family.fits(paths[name], adapter_side, shape) for name, shape in shapes.items())
        if len(families) > 1 and not all(fits):
            continue
        places = {name: place for name, path in paths.items() if (place := family.place(path, adapter_side))}
        if len(places) == len(paths):
            by_family.append((family, {name: _steps_of(family, side, *place) for name, place in places.items()}))
        else:
            lost = next(name for name in paths if name not in places)
            missing = missing or f"{lost}: what others call it is not known ({family.name}); keep the names as they are"
    if not by_family:
        who = " or ".join(family.name for family in families)
        raise LoHaError(f"{adapter.source}: {missing or f'its shapes are not those of {who}, whose names it has'}")
    if any(steps != by_family[0][1] for _, steps in by_family):
        raise _ambiguous(adapter.source, [family for family, _ in by_family])
    return by_family[0]


def _ambiguous(source: str, families: Iterable[Family]) -> LoHaError:
    who = " and ".join(family.name for family in families)
    return LoHaError(
        f"{source}: its names are those of {who}, by which different weights are meant; keep the names as they are"
    )


def _steps_of(family: Family, side: Side, name: str, span: Span | None) -> list[_Step]:
    """What becomes of a layer on ``span`` of the original's weight ``name``."""
    weight = family.weight(name)
    assert weight is not None, name
    if span is not None and not span.swapped and len(weight.parts) == 1:
        span = None  # the weight has one part, all of it
    if side == "native":
        return [_Step(name, span, False)]
    if same_rows := [part for part in weight.parts if part.span == span]:
        return [_Step(part.name, None, False) for part in same_rows]
    if len(weight.parts) == 1 and span is None:
        [part] = weight.parts
        return [_Step(part.name, part.span if part.span and part.span.swapped else None, True)]
    return [
        _Step(part.name, part.span and part.span.within(span), True)
        for part in weight.parts
        if span is None or (part.span is not None and span.start <= part.span.start and part.span.stop <= span.stop)
    ]


def _moved_layers(layers: Mapping[str, Layer], steps: Mapping[str, list[_Step]], family: Family) -> dict[str, Layer]:
    """The layers under their new names, cut or joined."""
    moved: dict[str, Layer] = {}
    pieces: dict[str, list[tuple[str, Span, Layer]]] = defaultdict(list)

    def add(name: str, layer: Layer) -> None:
        if name in moved and not same(moved[name], layer):
            raise LoHaError(f"{name} is there under two names; which one counts is unknown")
        moved[name] = layer

    for name, layer in layers.items():
        # `split_layers` leaves PEFT's wrapper out of a LoRA layer's name.
        for new, span, is_cut in steps.get(name) or steps.get(WRAPPER + name) or [_Step(name, None, False)]:
            if span is None:
                add(new, layer)
            elif span.swapped:
                add(new, parts.swapped(layer))
            elif is_cut:
                add(new, parts.cut(name, layer, *span.rows(*layer.shape[:2])))
            elif not any(span == other and same(layer, twin) for _, other, twin in pieces[new]):
                pieces[new].append((name, span, layer))
    for name, those in pieces.items():
        add(name, _joined(those, family, name))
    return moved


def _joined(pieces: list[tuple[str, Span, Layer]], family: Family, name: str) -> Layer:
    """One layer of the layers of a fused weight's rows, all of them or some."""
    weight = family.weight(name)
    assert weight is not None, name
    first, _, layer = pieces[0]
    inner = layer.shape[1]
    last = max((part.span for part in weight.parts if part.span), key=lambda span: span.stop[::-1])
    heights = {span.height(inner, layer.shape[0]) for _, span, layer in pieces} - {None}
    if last.stop[1] == 0:
        heights.add(round(last.stop[0] * inner))
    if len(heights) != 1:
        raise LoHaError(
            f"{first}: how many rows the whole weight ({name}) has is not known from its parts; keep the names as "
            "they are"
        )
    height = heights.pop() or 0
    for part, span, layer in pieces:
        rows = span.rows(height, inner)[1]
        if layer.shape[:2] != (rows, inner):
            raise LoHaError(f"{part}: a part of shape {layer.shape}; expected {(rows, inner)} of {name}")
    placed = [(span.rows(height, inner)[0], layer) for _, span, layer in pieces]
    return parts.joined(first, placed, height)
