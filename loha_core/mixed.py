"""LoHa and LoRA layers of one adapter, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import algebra
from .adapter import Adapter, split_other
from .errors import LoHaError
from .factors import LoHaFactors
from .naming import names

# Suffixes of a LoRA's two factors, as trainers spell them; the first is the one that is written.
_UP_DOWN = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
    ("lora_B", "lora_A"),
    ("lora_up", "lora_down"),
)
_SHARED = ("alpha", "dora_scale", "lora_mid.weight")


@dataclass(frozen=True, eq=False)
class LoRAFactors:
    """ΔW = alpha/r · up·down; with a core (Tucker) up·mid·down. As `LoHaFactors` for a LoRA layer of a mixed file.

    Attributes:
        up: (o, r) or (o, r, 1, …).
        down: (r, i, *k).
        mid: (r, r, *k), with down (r, i, 1, …).
    """

    up: Tensor
    down: Tensor
    alpha: float
    mid: Tensor | None = None
    dora_scale: Tensor | None = None

    def __post_init__(self) -> None:
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or 0 in up + down:
            raise LoHaError(f"lora_up {up} and lora_down {down} share no rank; expected (o, r) and (r, i)")
        if self.mid is not None and tuple(self.mid.shape[:2]) != (self.rank, self.rank):
            raise LoHaError(f"lora_mid is {tuple(self.mid.shape)}; expected ({self.rank}, {self.rank}, *kernel)")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], alpha: float) -> LoRAFactors:
        """From tensors by suffix, the inverse of `tensors`."""
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        return cls(up, down, alpha, tensors.get("lora_mid.weight"), tensors.get("dora_scale"))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """(o, i, *k) as far as the file tells the kernel."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    def tensors(self) -> dict[str, Tensor]:
        """By suffix, as kohya's files have them; alpha apart."""
        named = {"lora_up.weight": self.up, "lora_down.weight": self.down, "lora_mid.weight": self.mid}
        return {key: t for key, t in (named | {"dora_scale": self.dora_scale}).items() if t is not None}

    def product(self) -> tuple[Tensor, Tensor]:
        """ΔW·scale = U·V: U (o, r), V (r, i·∏k), in float32 or float64."""
        dtype = algebra.compute_dtype(self.up, self.down)
        u, v = self.up.flatten(1).to(dtype), self.down.flatten(1).to(dtype)
        if self.mid is not None:
            v = torch.einsum("pq...,qi->pi...", self.mid.to(dtype), v).flatten(1)
        return u * self.scale, v


Layer = LoHaFactors | LoRAFactors


def split(adapter: Adapter) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Every low-rank layer by module name, and the tensors that are none: LoKr, norms, embeddings.

    Raises:
        LoHaError: half of a LoRA is missing, or its shapes don't fit together; names file and key.
    """
    layers: dict[str, Layer] = dict(adapter.layers)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.extras.items():
        if found := split_other(key):
            modules.setdefault(found[0], {})[found[1]] = tensor
    used: set[str] = set()
    for module, parts in modules.items():
        pair = next((pair for pair in _UP_DOWN if set(pair) & parts.keys()), None)
        if pair is None:
            continue
        if missing := [name for name in pair if name not in parts]:
            raise LoHaError(
                f"{adapter.source}: {module}.{missing[0]} is missing; the file is incomplete, save it again"
            )
        name = module.removeprefix(names.WRAPPER)
        if name in layers:
            raise LoHaError(f"{adapter.source}: {name} is both a LoHa and a LoRA layer; rename one of them")
        up, down = (parts[suffix] for suffix in pair)
        try:
            alpha = float(parts["alpha"]) if "alpha" in parts else float(down.shape[0])
            layers[name] = LoRAFactors(up, down, alpha, parts.get("lora_mid.weight"), parts.get("dora_scale"))
        except (LoHaError, RuntimeError) as error:
            raise LoHaError(f"{adapter.source}: {module}: {error}") from None
        used |= {f"{module}.{suffix}" for suffix in (*pair, *_SHARED)}
    return layers, {key: tensor for key, tensor in adapter.extras.items() if key not in used}


def join(layers: Mapping[str, Layer], rest: Mapping[str, Tensor], like: Adapter) -> Adapter:
    """The inverse of `split`: LoRA layers become extras in kohya's spelling, with their alpha."""
    extras = dict(rest)
    for name, layer in layers.items():
        if isinstance(layer, LoRAFactors):
            extras |= {f"{name}.{suffix}": tensor for suffix, tensor in layer.tensors().items()}
            alpha = torch.tensor(layer.alpha, dtype=torch.float64)
            extras[f"{name}.alpha"] = alpha.float() if float(alpha.float()) == layer.alpha else alpha
    kept = {name: layer for name, layer in layers.items() if isinstance(layer, LoHaFactors)}
    return replace(like, layers=kept, extras=extras, metadata=dict(like.metadata), notes=[])
