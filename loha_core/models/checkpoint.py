"""A model's weights by key, whatever holds them: the base of what `extract` and `bake` read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..bind import Target
from ..errors import LoHaError
from . import keys
from .quantised import WeightFormats, find_formats, kind_of


class Checkpoint:
    """Weights by key, as their layers multiply by them.

    Attributes:
        path: the file, or what messages call the model.
        formats: which weights are quantised, and how.
    """

    path: str | Path = "the model"
    formats = WeightFormats()

    def stored(self, key: str) -> Tensor:
        """A tensor as it is stored."""
        raise NotImplementedError

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors that are floating point, and of quantised weights as their layers see them."""
        return self.formats.shapes

    def modules(self) -> Mapping[str, Target]:
        """Layers by the names that files call them (see `keys.modules`)."""
        return keys.modules(self.shapes())

    def check(self, key: str) -> None:
        """Refuse a weight that cannot be read.

        Raises:
            LoHaError: names file, key, format, and what to do.
        """
        if why := self.formats.unreadable.get(key):
            raise LoHaError(
                f"{self.path}: {key} {why}. Use an fp16, bf16 or fp8 checkpoint of this model, or ComfyUI's Load LoHa "
                "and a save node"
            )

    def __getitem__(self, key: str) -> Tensor:
        """A tensor; of a quantised weight what its layer multiplies by, in float32.

        Raises:
            LoHaError: a weight that cannot be read.
        """
        self.check(key)
        storage = self.formats.quantised.get(key)
        return self.stored(key) if storage is None else storage.dense([self.stored(part) for part in storage.keys])


class StateDict(Checkpoint):
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.formats = find_formats({key: kind_of(tensor) for key, tensor in tensors.items()}, self.stored)

    def stored(self, key: str) -> Tensor:
        return self.tensors[key].detach()
