"""What a LoHa file holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from .factors import LoHaFactors


@dataclass(eq=False)
class Adapter:
    """LoHa layers by module name, and everything else that the file held.

    Attributes:
        layers: module name -> factors; names as the file spells them, less a wrapper such as ``base_model.model.``.
        extras: tensors that are not LoHa (LoRA/LoKr layers, norms, biases, embeddings), by their key in the file.
        metadata: the file's string metadata.
        dialect: which spelling the file uses; one of ``formats.DIALECTS``.
        source: where it came from, for messages.
        notes: what looked odd while reading.
    """

    layers: dict[str, LoHaFactors]
    extras: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    dialect: str = "lycoris"
    source: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> Counter[int]:
        """How many layers have which rank."""
        return Counter(f.rank for f in self.layers.values())

    @property
    def alphas(self) -> Counter[float]:
        """How many layers have which alpha."""
        return Counter(f.alpha for f in self.layers.values())

    def parameter_count(self) -> int:
        return sum(f.parameter_count() for f in self.layers.values())
