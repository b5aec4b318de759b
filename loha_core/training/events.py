"""Events that a `Trainer` passes to its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stepped:
    """An optimizer step was taken.

    Attributes:
        step: how many there have been, of ``steps``.
        loss: the mean over this step's batches.
        lr: the first group's learning rate.
        norm: the gradients' norm before clipping.
    """

    step: int
    steps: int
    loss: float
    lr: float
    norm: float


@dataclass(frozen=True)
class Validated:
    """The loss on held-out data was taken.

    Attributes:
        best: there has been no lower one before.
    """

    step: int
    loss: float
    best: bool


@dataclass(frozen=True)
class PreviewDue:
    """A preview is due. While callbacks get this, the layers act as they would be saved."""

    step: int


@dataclass(frozen=True)
class Saved:
    """The state was written to ``path``."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """An exception ended the run before its last step; the state was saved if it was good."""

    step: int
    reason: BaseException


Event = Stepped | Validated | PreviewDue | Saved | Stopped
Callback = Callable[[Event], None]
