"""The result of a transformation: a new adapter, and its error layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ..adapter import Adapter, join_layers
from ..factors import Layer
from ..formats import metadata
from . import lowrank

# (how many layers are done, of how many, the name of the next)
Progress = Callable[[int, int, str], object]
Source = TypeVar("Source")


@dataclass(frozen=True)
class LayerError:
    """The error of one layer.

    Attributes:
        rank: of the result.
        exact_rank: the number of columns that the exact result has.
        size: ‖ΔW‖ of the exact result.
        error: ‖ΔW − result‖ / ‖ΔW‖.
        lora_error: for a fit, the error of the best LoRA with as many parameters; else None.
    """

    name: str
    rank: int
    exact_rank: int
    size: float
    error: float
    lora_error: float | None = None


@dataclass
class ErrorReport:
    """The relative error of each layer, and notes for the user."""

    layers: list[LayerError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """‖exact − result‖ / ‖exact‖ over all layers together."""
        return self._overall(lambda layer: layer.error)

    @property
    def lora_error(self) -> float | None:
        """The same for LoRAs of equal size, where the layers were fitted."""
        if not self.layers or any(layer.lora_error is None for layer in self.layers):
            return None
        return self._overall(lambda layer: layer.lora_error or 0.0)

    def _overall(self, error_of: Callable[[LayerError], float]) -> float:
        total = sum(layer.size**2 for layer in self.layers)
        lost = sum((error_of(layer) * layer.size) ** 2 for layer in self.layers)
        return (lost / total) ** 0.5 if total else 0.0

    def lines(self, limit: int = 10) -> Iterator[str]:
        ranks = sorted({layer.rank for layer in self.layers})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}…{ranks[-1]}" if ranks else "none"
        yield f"{len(self.layers)} layers, rank {shown}; relative error {self.error:.3g}"
        if self.lora_error is not None:
            wins = sum(layer.error < (layer.lora_error or 0.0) for layer in self.layers)
            better = "better" if self.error < self.lora_error else "not better"
            yield f"a LoRA of equal size: {self.lora_error:.3g}; LoHa is {better}, and wins {wins} layers"
        worst = sorted(self.layers, key=lambda layer: -layer.error)
        for layer in worst[:limit]:
            if layer.error > 1e-6:
                yield f"{layer.error:<6.3g} rank {layer.rank}/{layer.exact_rank}  {layer.name}"
        yield from (f"note: {note}" for note in self.notes[:limit])
        if len(self.notes) > limit:
            yield f"note: … and {len(self.notes) - limit} more"

    def text(self, limit: int = 10) -> str:
        """Plain text: the overall error, the worst layers and the notes, at most ``limit`` of each."""
        return "\n".join(self.lines(limit))


class Result(NamedTuple):
    """A new adapter, and how far it is from what was asked for."""

    adapter: Adapter
    report: ErrorReport

    def then(self, step: Callable[[Adapter], Result]) -> Result:
        """The result of a further step, with the layers of the step of the larger error, and the notes of both."""
        adapter, report = step(self.adapter)
        is_worse = report.layers and report.error >= self.report.error
        layers = report.layers if is_worse else self.report.layers
        return Result(adapter, ErrorReport(layers, [*self.report.notes, *report.notes]))


def each_layer(
    sources: Mapping[str, Source],
    change: Callable[[str, Source], tuple[Layer, LayerError] | None],
    progress: Progress | None = None,
) -> tuple[dict[str, Layer], list[LayerError]]:
    """``change(name, source)`` for each layer in turn, None leaving it out; the progress is told before each."""
    layers: dict[str, Layer] = {}
    errors: list[LayerError] = []
    for done, (name, source) in enumerate(sources.items()):
        if progress is not None:
            progress(done, len(sources), name)
        if (changed := change(name, source)) is not None:
            layers[name] = changed[0]
            errors.append(changed[1])
    if progress is not None:
        progress(len(sources), len(sources), "")
    return layers, errors


def result_of(
    layers: Mapping[str, Layer],
    others: Mapping[str, Tensor],
    sources: Sequence[Adapter],
    report: ErrorReport,
    operation: str,
    **details: Any,
) -> Result:
    """New layers and other tensors as an adapter like the first source; ``operation`` goes into its history."""
    adapter = join_layers(layers, others, sources[0])
    adapter.metadata = metadata.derived(sources, operation, error=report.error, **details)
    if not adapter.layers:
        adapter.metadata |= metadata.network(layers.values())
    return Result(adapter, report)


def unchanged(name: str, layer: Layer) -> LayerError:
    """The error of a layer whose update did not change: 0."""
    u, v = lowrank.product(layer)
    return LayerError(name, layer.rank, u.shape[1], lowrank.finite_norm(name, u, v), 0.0)


def rounded(name: str, before: Layer, after: Layer) -> LayerError:
    """The error of a layer of which only the numbers' rounding changed."""
    exact, result = lowrank.product(before), lowrank.product(after)
    size = lowrank.finite_norm(name, *exact)
    lowrank.finite_norm(name, *result)
    error = lowrank.distance(exact, result) / size if size else 0.0
    return LayerError(name, after.rank, exact[0].shape[1], size, error)
