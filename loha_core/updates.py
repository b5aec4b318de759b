"""An adapter seen as updates of weights: its LoHa layers, and the LoRA layers that share the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import algebra, lowrank, names
from .adapter import Adapter
from .errors import LoHaError
from .factors import LoHaFactors
from .formats import container
from .formats.grouping import split_other

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
# Differences of whole tensors: they add up as they are.
DIFFERENCES = ("diff", "diff_b", "w_norm", "b_norm")


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


def product(layer: Layer) -> tuple[Tensor, Tensor]:
    """ΔW·scale = U·V exactly, of no more columns than the weight's shorter side; in float32 or float64."""
    if isinstance(layer, LoRAFactors):
        return lowrank.collapse(*layer.product())
    if layer.is_tucker:
        return lowrank.collapse(*lowrank.product(layer))
    # A sum written as a LoHa has a second half of ones in one column, and zeros: rank r, not r².
    (a1, b1), (a2, b2) = (_acting(a, b) for a, b in ((layer.w1_a, layer.w1_b), (layer.w2_a, layer.w2_b)))
    if len(b1) * len(b2) >= min(layer.shape):
        return lowrank.as_product(layer.delta())
    dtype = algebra.compute_dtype(*layer.tensors().values())
    a1, b1, a2, b2 = (part.to(dtype) for part in (a1, b1, a2, b2))
    return algebra.columnwise(a1.T, a2.T).T * layer.scale, algebra.columnwise(b1, b2)


def _acting(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A half without the columns of a whose rows in b are all zero; at least one is left."""
    acting = (b != 0).any(1)
    acting[0] = True
    return (a, b) if bool(acting.all()) else (a[:, acting], b[acting])


def flat_shape(layer: Layer) -> tuple[int, int]:
    """(o, i·∏k)."""
    out, *inner = layer.shape
    return out, torch.Size(inner).numel()


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


def scaled(layer: Layer, weight: float) -> Layer:
    """weight·ΔW: only alpha changes, so that the factors stay bit for bit."""
    return layer if weight == 1 else replace(layer, alpha=layer.alpha * weight)


def as_layer(u: Tensor, v: Tensor, kind: str, shape: tuple[int, ...]) -> Layer:
    """U·V as a LoHa whose second half is all ones, or as a LoRA whose factors are shaped like the weight."""
    if kind == "loha":
        return lowrank.as_loha(u, v)
    kernel = shape[2:]
    return LoRAFactors(u.reshape(*u.shape, *[1] * len(kernel)), v.reshape(v.shape[0], shape[1], *kernel), u.shape[1])


def cast(name: str, layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer in another dtype; alpha stays as it is.

    Raises:
        LoHaError: a value is too large for it.
    """
    tensors = container.cast(layer.tensors(), dtype, Path(name))
    if isinstance(layer, LoHaFactors):
        return replace(layer, **tensors)  # type: ignore[arg-type]
    return LoRAFactors.of(tensors, layer.alpha)


def size_of(name: str, u: Tensor, v: Tensor) -> float:
    """‖UV‖.

    Raises:
        LoHaError: it is not finite.
    """
    size = lowrank.norm(u, v)
    if not math.isfinite(size):
        raise LoHaError(f"{name}: the update is not finite; a weight is too large, or the adapter is broken")
    return size


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
