"""A LoHa written as an ordinary LoRA, in PEFT's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import WRAPPER
from ..errors import LoHaError
from ..formats.container import atomic, write_tensors
from ..transform import lowrank
from .config import CONFIG_NAME
from .layers import LoHaLayer


@dataclass
class Lora:
    """ΔW = B·A per module; the scale is 1, as alpha is the rank.

    Attributes:
        a: module -> (r, i, *k).
        b: module -> (o, r), or (o, r, 1, …) for a convolution.
        errors: module -> ‖ΔW − B·A‖ / ‖ΔW‖; 0 where nothing was truncated.
    """

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, layers: Mapping[str, LoHaLayer], adapter_name: str, rank: int | None = None, energy: float | None = None
    ) -> Lora:
        """Exact at rank r² when neither ``rank`` nor ``energy`` is given.

        Raises:
            LoHaError: DoRA, or a grouped convolution, for which PEFT's LoRA means something else.
        """
        lora = cls()
        for name, layer in layers.items():
            factors, shape = layer.factors(adapter_name), layer.weight_shape
            if factors.dora_scale is not None:
                raise LoHaError(f"{name}: a DoRA update is not B·A; convert an adapter without it")
            geometry = layer._geometry()
            if geometry is not None and geometry.groups > 1:
                raise LoHaError(f"{name}: PEFT's LoRA has no grouped convolution like this one")
            u, v = lowrank.product(factors)
            error = 0.0
            if rank is not None or energy is not None:
                u, v, error = lowrank.truncate(u, v, rank, energy)
            lora.b[name] = u.reshape(*u.shape, *[1] * (len(shape) - 2))
            lora.a[name] = v.reshape(-1, *shape[1:])
            lora.errors[name] = error
        return lora

    def delta(self, name: str) -> Tensor:
        """B·A of a module, as its weight is shaped."""
        a, b = self.a[name], self.b[name]
        return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])

    def state_dict(self) -> dict[str, Tensor]:
        """Under PEFT's names."""
        a = {f"{WRAPPER}{name}.lora_A.weight": tensor for name, tensor in self.a.items()}
        return a | {f"{WRAPPER}{name}.lora_B.weight": tensor for name, tensor in self.b.items()}

    def config(self) -> dict[str, Any]:
        """What `adapter_config.json` says, for PEFT's LoraConfig."""
        ranks = {name: tensor.shape[0] for name, tensor in sorted(self.a.items(), key=lambda x: -len(x[0]))}
        pattern = ranks if len(set(ranks.values())) > 1 else {}
        common = next(iter(ranks.values()))
        return {
            "peft_type": "LORA",
            "r": common,
            "lora_alpha": common,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(self.a),
            "inference_mode": True,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """The two files of PEFT's LoRA."""
        folder = Path(folder)
        write_tensors(folder / "adapter_model.safetensors", self.state_dict(), {"format": "pt"})
        with atomic(folder / CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(self.config(), indent=2, sort_keys=True), "utf-8")
