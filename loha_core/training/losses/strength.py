"""How strongly the layers that are trained act while a loss asks the model: one model, no second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint

from ...errors import LoHaError
from ...tuner.layer import LoHaLayer


class Strength:
    """The strength of a run's layers: 1, but for the time that a loss asks for another.

    At 0 they are not there: the model is the base itself, bit for bit, with whatever else acts in it, and their
    dropouts draw nothing. An adapter that training went on from is a part of them, hence not of the base.

    Args:
        layers: all that are trained, text encoders' too.

    Attributes:
        now: the strength.
    """

    def __init__(self, layers: Iterable[LoHaLayer] = ()) -> None:
        self.layers, self.now = list(layers), 1.0

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """While this lasts, the layers act at ``strength``.

        Raises:
            LoHaError: neither 0 nor 1, and a layer has a DoRA's magnitude, which no strength scales.
        """
        if strength not in (0, 1) and any(len(layer.dora_scale) for layer in self.layers):
            raise LoHaError(
                f"the layers are trained at strength {strength:g}, and with DoRA their magnitude stays the same at "
                "every strength; switch DoRA off"
            )
        before = self.now
        self._set(strength)
        try:
            yield
        finally:
            self._set(before)

    def recomputed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward`` by gradient checkpointing: when it runs again in the backward, the strength is again this one."""
        now = self.now
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self.at(now)), **kwargs
        )

    def _set(self, strength: float) -> None:
        self.now = strength
        for layer in self.layers:
            layer._disabled = strength == 0
            for adapter in layer.active_adapters:
                layer.set_scale(adapter, strength)
