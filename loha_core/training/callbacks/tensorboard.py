"""A run's curves for TensorBoard. Needs tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import LoHaError
from ..events import Event, Stepped, Stopped, Validated


class TensorBoard:
    """Writes loss, learning rate, the gradients' norm and the validation loss; `tensorboard --logdir` shows them.

    >>> board = TensorBoard(Path("runs/cat"))                    # doctest: +SKIP
    >>> trainer.callbacks = [*trainer.callbacks, board]          # doctest: +SKIP
    >>> board.going_on_from(trainer.step)                        # doctest: +SKIP

    Args:
        folder: of this run; its name is the curve's.

    Raises:
        LoHaError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LoHaError(
                f"TensorBoard's files need tensorboard ({error}): pip install 'comfyui-loha[tensorboard]'"
            ) from None
        self.folder, self._writer_class = folder, SummaryWriter
        self._writer: Any = None

    def going_on_from(self, step: int) -> None:
        """Steps after this one, which a run that was cut off wrote and takes again, are not shown twice."""
        self._writer = self._writer_class(str(self.folder), purge_step=step + 1)

    def __call__(self, event: Event) -> None:
        if self._writer is None:
            self.going_on_from(0)
        match event:
            case Stepped():
                for name, value in (("loss", event.loss), ("lr", event.lr), ("gradient norm", event.norm)):
                    self._writer.add_scalar(name, value, event.step)
                if event.step == event.steps:
                    self._writer.flush()
            case Validated():
                self._writer.add_scalar("validation loss", event.loss, event.step)
                self._writer.flush()
            case Stopped():
                self._writer.flush()
