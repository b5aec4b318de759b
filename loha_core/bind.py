"""Adapter + the names a model knows its weights by -> which factors go to which weight, and what did not fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from . import algebra, names
from .adapter import Adapter
from .errors import LoHaError
from .factors import LoHaFactors

# A weight's key, or (key, (axis, start, length)[, function]) for a slice of a fused weight, as ComfyUI writes it.
Target = Any


class Network:
    """One network's weights and the names that files may call them by.

    Args:
        targets: a file's module name (in any spelling) -> weight; several names may lead to one weight.
        shapes: weight key -> shape.
    """

    def __init__(self, targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        # ComfyUI's tables also name weights that a particular model lacks.
        targets = {name: target for name, target in targets.items() if weight_key(target) in self.shapes}
        self._exact = _unambiguous((names.flat(name), target) for name, target in targets.items())
        self._paths = _unambiguous((names.split(name), target) for name, target in targets.items())
        self._components = sorted({component for component, _ in self._paths}, key=lambda c: (c != "unet", c))

    def find(self, name: str) -> Target | None:
        """The weight that a file's module name means, or None."""
        exact = self._exact.get(names.flat(name.removeprefix(names.WRAPPER)))
        if exact is not None:
            return exact
        component, path = names.split(name)
        candidates = [component, ""] if component else self._components
        return next((t for c in candidates if (t := self._paths.get((c, path))) is not None), None)

    def shape(self, target: Target) -> tuple[int, ...]:
        """The shape of a target: of the weight, or of the slice of it."""
        if isinstance(target, str):
            return tuple(self.shapes[target])
        shape = list(self.shapes[weight_key(target)])
        if len(target) > 1 and target[1] is not None:
            axis, _, length = target[1]
            shape[axis] = length
        return tuple(shape)


def weight_key(target: Target) -> str:
    """The key of the weight that a target is, or is a slice of."""
    return target if isinstance(target, str) else target[0]


def _unambiguous(pairs: Iterable[tuple[Any, Target]]) -> dict[Any, Target | None]:
    """As a dictionary; two weights behind one shortened name are None, since neither may be guessed."""
    found: dict[Any, Target | None] = {}
    for key, target in pairs:
        found[key] = target if found.get(key, target) == target else None
    return found


@dataclass
class Report:
    """What a binding found, in a form to show to people."""

    source: str
    dialect: str
    matched: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unmatched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self, limit: int | None = None) -> str:
        """Plain text; ``limit`` bounds how many unmatched keys are listed."""
        lines = [f"{self.source} ({self.dialect})"]
        lines += [f"  {network}: {len(found)} layers matched" for network, found in self.matched.items()]
        if self.unmatched:
            lines.append(f"  not applied: {len(self.unmatched)}")
            lines += [f"    {key}: {reason}" for key, reason in list(self.unmatched.items())[:limit]]
            if limit is not None and len(self.unmatched) > limit:
                lines.append(f"    … and {len(self.unmatched) - limit} more")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class Binding:
    """Per network, in the file's order: (name in the file, weight, update). Two updates of one weight add up."""

    layers: dict[str, list[tuple[str, Target, LoHaFactors]]]
    report: Report


def bind(adapter: Adapter, networks: Mapping[str, Network], absent: Iterable[str] = ()) -> Binding:
    """Find each layer's weight in the first network that has it.

    Args:
        networks: label (such as "UNet") -> network.
        absent: labels of networks that could have been given; used to explain what did not match.

    Raises:
        LoHaError: a layer's shape does not fit its weight: the file belongs to another model, and applying part
            of it would be wrong.
    """
    report = Report(adapter.source, adapter.dialect, notes=list(adapter.notes))
    layers: dict[str, list[tuple[str, Target, LoHaFactors]]] = {label: [] for label in networks}
    acting: dict[tuple[str, Target], list[LoHaFactors]] = defaultdict(list)
    misfits: list[str] = []
    for name, factors in adapter.layers.items():
        for label, network in networks.items():
            target = network.find(name)
            if target is None:
                continue
            if problem := misfit(factors, network.shape(target)):
                misfits.append(f"{name}: {problem}")
                break
            if any(_equal(factors, other) for other in acting[label, target]):
                report.notes.append(f"{name} repeats another key for the same weight; applied once")
            else:
                acting[label, target].append(factors)
                layers[label].append((name, target, factors))
            report.matched[label].append(name)
            break
        else:
            report.unmatched[name] = reason(name, networks, absent)
    if misfits:
        shown = "\n  ".join(misfits[:5]) + (f"\n  … and {len(misfits) - 5} more" if len(misfits) > 5 else "")
        raise LoHaError(
            f"{adapter.source}: made for another model: {len(misfits)} of {len(adapter.layers)} layers have shapes "
            f"that do not fit.\n  {shown}\nNothing was applied. Choose the checkpoint family that it was trained on."
        )
    return Binding(layers, report)


def reason(name: str, networks: Iterable[str], absent: Iterable[str]) -> str:
    """Why a key found no weight."""
    is_text = names.split(name)[0].startswith("te") or name.startswith("text_encoders.")
    missing = [label for label in absent if is_text == (label == "CLIP")]
    if missing:
        return f"belongs to the {missing[0]}, and none is connected"
    return f"no such layer in the {' or '.join(networks)}"


def misfit(factors: LoHaFactors, shape: tuple[int, ...]) -> str | None:
    """Why factors cannot act on a weight of this shape, or None."""
    out, inner = shape[0] if shape else 1, shape[1:]
    found = factors.shape
    fits = found[0] == out and prod(found[1:]) == prod(inner)
    if factors.is_tucker:
        # PEFT drops an axis of 1 from a kernel.
        kernel, wanted = ([k for k in axes if k != 1] for axes in (found[2:], inner[1:]))
        fits = fits and found[1] == (inner[0] if inner else 1) and kernel == wanted
    if not fits:
        return f"an update of shape {found} for a weight of shape {tuple(shape)}"
    if factors.dora_scale is not None:
        try:
            algebra.dora_axis(factors.dora_scale, shape)
        except ValueError as error:
            return str(error)
    return None


def _equal(x: LoHaFactors, y: LoHaFactors) -> bool:
    mine, other = x.tensors(), y.tensors()
    return x.alpha == y.alpha and mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
