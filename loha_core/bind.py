"""Adapter + the names a model knows its weights by -> which factors go to which weight, and what did not fit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .adapter import WRAPPER, Adapter
from .errors import LoHaError
from .factors import LoHaFactors, same, shape_mismatch
from .naming import names
from .naming.families import Span
from .naming.parts import swap_halves, swapped
from .naming.recognise import known_weights

Target = str | tuple[Any, ...]
"""A weight's key; for a slice of a fused weight (key, (axis, start, length)), for one that is stored in another order
(key, None, function): as ComfyUI writes them.
"""


class Network:
    """One network's weights and the names that files may call them by.

    Args:
        targets: a file's module name (in any spelling) -> weight; several names may lead to one weight.
        shapes: weight key -> shape.
    """

    def __init__(self, targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        by_tables = dict(_by_tables(self.shapes))
        # ComfyUI's tables also name weights that a particular model lacks, and have some of their slices wrong.
        targets = {
            name: target
            for name, target in targets.items()
            if weight_key(target) in self.shapes and names.split(name)[1] not in by_tables
        }
        self._exact = _unambiguous((names.flat(name), target) for name, target in targets.items())
        self._paths = _unambiguous((names.split(name), target) for name, target in targets.items())
        self._paths |= {("unet", path): target for path, target in by_tables.items()}
        self._text = _unambiguous(_of_text_encoders(self.shapes))
        self._components = sorted({component for component, _ in self._paths}, key=lambda c: (c != "unet", c))

    def find(self, name: str) -> Target | None:
        """The weight that a file's module name means, or None."""
        exact = self._exact.get(names.flat(name.removeprefix(WRAPPER)))
        if exact is not None:
            return exact
        component, path = names.split(name)
        candidates = [component, ""] if component else self._components
        target = next((t for c in candidates if (t := self._paths.get((c, path))) is not None), None)
        return self._text.get(path.removeprefix("model_")) if target is None and component.startswith("te") else target

    def shape(self, target: Target) -> tuple[int, ...]:
        """The shape of a target: of the weight, or of the slice of it."""
        if isinstance(target, str):
            return tuple(self.shapes[target])
        shape = list(self.shapes[weight_key(target)])
        if len(target) > 1 and target[1] is not None:
            axis, _, length = target[1]
            shape[axis] = length
        return tuple(shape)


def _by_tables(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Target]]:
    """(path, weight or slice of it) for every name that the tables of a DiT's family have for its weights."""
    for key, family, weight in known_weights(key for key, shape in shapes.items() if len(shape) > 1):
        for name, span in (*weight.parts, *family.others(weight.name)):
            yield names.split(name)[1], _target(key, span, shapes[key])


# ComfyUI's keys of T5's, Llama's or Qwen's weights. CLIP's are left out: several of its kind have the same paths.
_TEXT_ENCODER = re.compile(r"(?!clip_)\w+\.transformer\.(?:model\.)?(.+)\.weight")


def _of_text_encoders(shapes: Iterable[str]) -> Iterator[tuple[str, Target]]:
    """(path, weight): trainers count a model's encoders differently, but what is within them has one name."""
    for key in shapes:
        if match := _TEXT_ENCODER.fullmatch(key):
            yield names.flat(match[1]), key


def _target(key: str, span: Span | None, shape: tuple[int, ...]) -> Target:
    if span is None or len(shape) < 2:
        return key
    if span.swapped:
        return (key, None, swap_halves) if shape[0] == 2 * shape[1] else key
    rows = span.rows(*shape[:2])
    return key if rows == (0, shape[0]) else (key, (0, *rows))


def weight_key(target: Target) -> str:
    """The key of the weight that a target is, or is a slice of."""
    return target if isinstance(target, str) else target[0]


def _unambiguous(pairs: Iterable[tuple[Any, Target]]) -> dict[Any, Target | None]:
    """As a dictionary; two weights behind one shortened name are None, since neither may be guessed."""
    targets: dict[Any, Target | None] = {}
    for key, target in pairs:
        targets[key] = target if targets.get(key, target) == target else None
    return targets


@dataclass
class Report:
    """Which layers of an adapter were matched to weights, to show to people.

    Attributes:
        matched: network -> names of its layers in the file.
        unmatched: names of the other layers -> why.
        notes: what else a user should know.
    """

    source: str
    dialect: str
    matched: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unmatched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self, limit: int | None = None) -> str:
        """Plain text; ``limit`` bounds how many unmatched keys are listed."""
        lines = [f"{self.source} ({self.dialect})"]
        lines += [f"  {network}: {len(layers)} layers matched" for network, layers in self.matched.items()]
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
    applied: dict[tuple[str, Target], list[LoHaFactors]] = defaultdict(list)
    mismatches: list[str] = []
    for name, factors in adapter.layers.items():
        for label, network in networks.items():
            target = network.find(name)
            if target is None:
                continue
            if not isinstance(target, str) and len(target) > 2 and target[2] is swap_halves:
                reordered, target = swapped(factors), target[0]
                assert isinstance(reordered, LoHaFactors)
                factors = reordered
            if mismatch := shape_mismatch(factors, network.shape(target)):
                mismatches.append(f"{name}: {mismatch}")
                break
            if any(same(factors, other) for other in applied[label, target]):
                report.notes.append(f"{name} repeats another key for the same weight; applied once")
            else:
                applied[label, target].append(factors)
                layers[label].append((name, target, factors))
            report.matched[label].append(name)
            break
        else:
            report.unmatched[name] = why_unmatched(name, networks, absent)
    if mismatches:
        shown = "\n  ".join(mismatches[:5]) + (f"\n  … and {len(mismatches) - 5} more" if len(mismatches) > 5 else "")
        raise LoHaError(
            f"{adapter.source}: made for another model: {len(mismatches)} of {len(adapter.layers)} layers have shapes "
            f"that do not fit.\n  {shown}\nNothing was applied. Choose the checkpoint family that it was trained on."
        )
    return Binding(layers, report)


def why_unmatched(name: str, networks: Iterable[str], absent: Iterable[str]) -> str:
    """Why a key found no weight."""
    is_text = names.split(name)[0].startswith("te") or name.startswith("text_encoders.")
    missing = [label for label in absent if is_text == (label == "CLIP")]
    if missing:
        return f"belongs to the {missing[0]}, and none is connected"
    return f"no such layer in the {' or '.join(networks)}"
