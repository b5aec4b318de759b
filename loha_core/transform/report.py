"""How far a new adapter is from what was asked for, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerError:
    """What became of one layer.

    Attributes:
        rank: of the result.
        exact_rank: the number of columns that the exact result has.
        size: ‖ΔW‖ as wanted.
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
    """The relative error of each layer, and what else a user should know."""

    layers: list[LayerError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """‖wanted − result‖ / ‖wanted‖ over all layers together."""
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
