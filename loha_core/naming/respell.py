"""An adapter under other names: its layers cut or joined where the names mean other weights, else as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..adapter import WRAPPER, Adapter, join, modules, renamed, split
from ..errors import LoHaError
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
# What becomes of a layer: new name, rows, and whether the layer is cut to them or is to stand there.
_Step = tuple[str, Span | None, bool]


def respelled(adapter: Adapter, style: str, unet: spelling.UNet = "keep") -> Adapter:
    """The same update under the module names of another style; "keep" changes nothing.

    A DiT's fused layers are cut into those that diffusers has, and joined the other way (see `parts`).

    Args:
        style: "kohya" (``lora_unet_…``; "lycoris" means the same), "diffusers" (``transformer.…``, ``unet.…``) or
            "native" (``diffusion_model.…``, as ComfyUI calls its weights).
        unet: for "kohya", whose names a U-Net's blocks get.

    Raises:
        LoHaError: see `spelling.respell`; layers that can't be cut or joined; names by which several families mean
            different weights.
    """
    if style == "keep":
        return adapter
    style = spelling.style_of(style, unet)
    paths = _paths(modules(adapter))
    others = {name: name for name in modules(adapter) if name not in paths}
    if families := families_of(paths.values()):
        side, lead = _STYLES[style]
        moved = _moved(adapter, paths, families, side)
        new = {n: lead + (names.flat(n) if style == "kohya" else n) for n in modules(moved) if n not in others}
        found = renamed(moved, new | _names(adapter, others, style, unet))
    else:
        found = renamed(adapter, _names(adapter, modules(adapter), style, unet))
    return replace(found, dialect="lycoris" if style == "kohya" else style)


def _names(adapter: Adapter, layers: Iterable[str], style: str, unet: spelling.UNet) -> dict[str, str]:
    try:
        return spelling.respell(layers, style, unet)
    except LoHaError as error:
        raise LoHaError(f"{adapter.source}: {error}") from None


def like(adapter: Adapter, model: Iterable[str], joining: bool = True) -> Adapter:
    """The adapter with a DiT's layers under the dotted names of the side that ``model``, modules or layers, speaks.

    As it is where both speak alike, or of no family that is known.

    Args:
        joining: False leaves parts of fused weights as they are, for models that take slices.

    Raises:
        LoHaError: as `respelled`.
    """
    wanted, paths = _paths(model).values(), _paths(modules(adapter))
    theirs = families_of(wanted)
    found: dict[Side, list[Family]] = defaultdict(list)
    for family in families_of(paths.values()):
        side, own = family.side(wanted), family.side(paths.values())
        if family in theirs and side and own and side != own:
            found[side].append(family)
    if len(found) > 1:
        raise _ambiguous(adapter.source, [family for families in found.values() for family in families])
    for side, families in found.items():
        if side == "diffusers" or joining:
            return _moved(adapter, paths, families, side)
    return adapter


def _paths(modules: Iterable[str]) -> dict[str, str]:
    """The names that are of no U-Net and no text encoder -> the paths of them, as `names.split` gives them."""
    return {name: names.split(name)[1] for name in modules if spelling.is_dit(name)}


def _moved(adapter: Adapter, paths: Mapping[str, str], families: list[Family], side: Side) -> Adapter:
    """The adapter with the layers in ``paths`` under the dotted names of one side; others keep their names."""
    family, steps = _steps(adapter, paths, families, side)
    simple = {name: to[0][0] for name, to in steps.items() if len(to) == 1 and to[0][1] is None}
    kept = {name: name for name in modules(adapter)}
    if len(set(simple.values())) == len(steps):
        return renamed(adapter, kept | simple)
    layers, rest = split(adapter)
    for key in rest:
        module = next((name for name in steps if key.startswith(f"{name}.")), None)
        if module is not None and module not in simple:
            raise LoHaError(
                f"{adapter.source}: {key} is of a kind that is not cut or joined, and its weight is fused under one "
                "of the two names; keep the names as they are"
            )
    others = renamed(replace(adapter, layers={}, extras=rest), kept | simple)
    made = join(_remade(adapter, layers, steps, family), others.extras, adapter)
    what = (
        "layers of parts were joined where its names mean fused weights: the ranks of the parts add up"
        if side == "native"
        else "layers of fused weights were cut into their parts"
    )
    return replace(made, notes=[*adapter.notes, f"{family.name}: {what}"])


def _steps(
    adapter: Adapter, paths: Mapping[str, str], families: list[Family], side: Side
) -> tuple[Family, dict[str, list[_Step]]]:
    """What becomes of each layer on that side, and the family by whose table.

    Raises:
        LoHaError: a name that no table has, or names by which the families mean different weights.
    """
    found: list[tuple[Family, dict[str, list[_Step]]]] = []
    missing = ""
    shapes = {name: layer.shape for name, layer in split(adapter)[0].items() if name in paths}
    for family in families:
        own = family.side(paths.values())
        if len(families) > 1 and not all(family.fits(paths[name], own, shape) for name, shape in shapes.items()):
            continue
        places = {name: place for name, path in paths.items() if (place := family.place(path, own))}
        if len(places) == len(paths):
            found.append((family, {name: _steps_of(family, side, *place) for name, place in places.items()}))
        else:
            lost = next(name for name in paths if name not in places)
            missing = missing or f"{lost}: what others call it is not known ({family.name}); keep the names as they are"
    if not found:
        who = " or ".join(family.name for family in families)
        raise LoHaError(f"{adapter.source}: {missing or f'its shapes are not those of {who}, whose names it has'}")
    if any(steps != found[0][1] for _, steps in found):
        raise _ambiguous(adapter.source, [family for family, _ in found])
    return found[0]


def _ambiguous(source: str, families: Iterable[Family]) -> LoHaError:
    who = " and ".join(family.name for family in families)
    return LoHaError(
        f"{source}: its names are those of {who}, by which different weights are meant; keep the names as they are"
    )


def _steps_of(family: Family, side: Side, weight: str, span: Span | None) -> list[_Step]:
    """What becomes of a layer on ``span`` of the original's ``weight``."""
    whole = family.weight(weight)
    assert whole is not None, weight
    if span is not None and not span.swapped and len(whole.parts) == 1:
        span = None  # the weight has one part, all of it
    if side == "native":
        return [(weight, span, False)]
    if any(part.span == span for part in whole.parts):
        return [(part.name, None, False) for part in whole.parts if part.span == span]
    if len(whole.parts) == 1 and span is None:
        [part] = whole.parts
        return [(part.name, part.span if part.span and part.span.swapped else None, True)]
    return [(part.name, part.span and part.span.within(span), True) for part in whole.parts if _is_in(part.span, span)]


def _is_in(part: Span | None, span: Span | None) -> bool:
    return span is None or (part is not None and span.start <= part.start and part.stop <= span.stop)


def _remade(
    adapter: Adapter, layers: Mapping[str, Layer], steps: Mapping[str, list[_Step]], family: Family
) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    pieces: dict[str, list[tuple[str, Span, Layer]]] = defaultdict(list)

    def add(name: str, layer: Layer) -> None:
        if name in found and not same(found[name], layer):
            raise LoHaError(f"{adapter.source}: {name} is there under two names; which one counts is unknown")
        found[name] = layer

    for name, layer in layers.items():
        # `split` leaves PEFT's wrapper out of a LoRA layer's name.
        for new, span, is_cut in steps.get(name) or steps.get(WRAPPER + name) or [(name, None, False)]:
            if span is None:
                add(new, layer)
            elif span.swapped:
                add(new, parts.swapped(layer))
            elif is_cut:
                add(new, parts.cut(f"{adapter.source}: {name}", layer, *span.rows(*layer.shape[:2])))
            elif not any(span == other and same(layer, twin) for _, other, twin in pieces[new]):
                pieces[new].append((name, span, layer))
    for name, those in pieces.items():
        add(name, _joined(adapter.source, those, family, name))
    return found


def _joined(source: str, pieces: list[tuple[str, Span, Layer]], family: Family, weight: str) -> Layer:
    """One layer of the layers of a fused weight's rows, all of them or some."""
    whole = family.weight(weight)
    assert whole is not None, weight
    inner = pieces[0][2].shape[1]
    last = max((part.span for part in whole.parts if part.span), key=lambda span: span.stop[::-1])
    heights = {span.height(inner, layer.shape[0]) for _, span, layer in pieces} - {None}
    if last.stop[1] == 0:
        heights.add(round(last.stop[0] * inner))
    if len(heights) != 1:
        raise LoHaError(
            f"{source}: {pieces[0][0]}: how many rows the whole weight ({weight}) has is not known from its parts; "
            "keep the names as they are"
        )
    height = heights.pop() or 0
    for name, span, layer in pieces:
        rows = span.rows(height, inner)[1]
        if layer.shape[:2] != (rows, inner):
            raise LoHaError(f"{source}: {name}: a part of shape {layer.shape}; expected {(rows, inner)} of {weight}")
    placed = [(span.rows(height, inner)[0], layer) for _, span, layer in pieces]
    return parts.joined(f"{source}: {pieces[0][0]}", placed, height)
