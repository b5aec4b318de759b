"""The factorization of one weight's update: as a LoHa, and as a LoRA for the layers of mixed files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import algebra
from .errors import LoHaError, check_number


@dataclass(frozen=True, eq=False)
class LoHaFactors:
    """Factors of ΔW = alpha/r · M₁ ∘ M₂ (FedPara, arXiv 2108.06098, prop. 1).

    Flat (linear, or convolution with its kernel flattened), Mₕ = wₕ_a · wₕ_b:
        wₕ_a (o, r), wₕ_b (r, n), n = i or i·∏k.
    Tucker (arXiv 2108.06098, prop. 3), Mₕ[o,i,k] = Σ_pq tₕ[p,q,k] · wₕ_a[p,o] · wₕ_b[q,i]:
        tₕ (r, r, *k), wₕ_a (r, o), wₕ_b (r, i).

    o = output channels, i = input channels / groups, k = kernel sizes, r = rank.

    Args:
        alpha: numerator of the scale; a float or a one-element tensor.
        dora_scale: magnitudes m of DoRA; as many elements as outputs (first axis) or inputs (second axis).

    Raises:
        LoHaError: shapes that do not fit together, a factor that is not floating point, or a non-finite alpha.

    >>> a, b = torch.ones(6, 2), torch.ones(2, 4)
    >>> LoHaFactors(a, b, a, b, alpha=1.0).delta()[0, 0]   # 1/2 · (1+1) · (1+1)
    tensor(2.)
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    dora_scale: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _as_float(self.alpha))
        for name, tensor in self.tensors().items():
            if not tensor.is_floating_point():
                raise LoHaError(f"{name} has dtype {tensor.dtype}; LoHa factors are floating point")
        self._check_shapes()

    def _check_shapes(self) -> None:
        if (self.t1 is None) != (self.t2 is None):
            raise LoHaError("a Tucker LoHa needs both t1 and t2; only one of them is there")
        for half in ("1", "2"):
            a, b, t = self._half(half)
            if a.dim() != 2 or b.dim() != 2:
                raise LoHaError(f"w{half}_a {_shape(a)} and w{half}_b {_shape(b)} must have two dimensions each")
            rank = a.shape[0] if t is not None else a.shape[1]
            if b.shape[0] != rank or rank == 0:
                expected = f"w{half}_a ({'r, o' if t is not None else 'o, r'}), w{half}_b (r, i)"
                raise LoHaError(f"w{half}_a {_shape(a)} and w{half}_b {_shape(b)} share no rank; expected {expected}")
            if t is not None and (t.dim() < 3 or tuple(t.shape[:2]) != (rank, rank)):
                raise LoHaError(f"t{half} is {_shape(t)}; expected ({rank}, {rank}, *kernel)")
        if self.shape != self._shape_of("2"):
            raise LoHaError(f"the halves have different shapes: {self.shape} and {self._shape_of('2')}")
        if self.rank != self.w2_b.shape[0]:
            raise LoHaError(f"the halves have different ranks: {self.rank} and {self.w2_b.shape[0]}")
        if 0 in self.shape:
            raise LoHaError(f"an update of shape {self.shape} has no elements")
        if self.dora_scale is not None:
            out, inner, count = self.shape[0], self.shape[1], self.dora_scale.numel()
            # Flat factors know n = i·∏k only; binding to a weight checks i itself.
            if count not in (out, inner) and (self.is_tucker or count == 0 or inner % count):
                raise LoHaError(f"dora_scale {_shape(self.dora_scale)} fits neither {out} outputs nor {inner} inputs")

    def _half(self, half: str) -> tuple[Tensor, Tensor, Tensor | None]:
        return (self.w1_a, self.w1_b, self.t1) if half == "1" else (self.w2_a, self.w2_b, self.t2)

    def _shape_of(self, half: str) -> tuple[int, ...]:
        a, b, t = self._half(half)
        return (a.shape[0], b.shape[1]) if t is None else (a.shape[1], b.shape[1], *t.shape[2:])

    @property
    def rank(self) -> int:
        """r: the rank of each half."""
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def is_tucker(self) -> bool:
        return self.t1 is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape of ΔW: (o, i, *k) when Tucker, else (o, n)."""
        return self._shape_of("1")

    @property
    def dtype(self) -> torch.dtype:
        return self.w1_a.dtype

    @property
    def raw(self) -> algebra.Factors:
        """The factors alone, as `algebra` and `ops` take them."""
        return algebra.Factors(self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "alpha"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoHaFactors:
        """The same factors on another device or in another dtype; alpha stays a Python float."""
        moved: dict[str, Any] = {name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def parameter_count(self) -> int:
        return sum(t.numel() for t in self.tensors().values())

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """scale·ΔW at strength 1, without DoRA, in the canonical shape.

        Args:
            dtype: of the result. Computed in it, but never in less than float32;
                by default float32, or float64 if a factor is.
        """
        compute = algebra.compute_dtype(*self.raw, dtype=dtype)
        return algebra.delta(self.raw.to(compute), self.scale).to(dtype or compute)

    def khatri_rao(self, dtype: torch.dtype | None = None) -> algebra.KhatriRao:
        """The exact rank-r² form of ``delta()``; the scale is in u."""
        compute = algebra.compute_dtype(*self.raw, dtype=dtype)
        product = algebra.khatri_rao(self.raw.to(compute), self.scale)
        return algebra.KhatriRao._make(None if t is None else t.to(dtype or compute) for t in product)

    def norm(self) -> float:
        """Frobenius norm of scale·ΔW."""
        return algebra.norm(self.raw, self.scale)

    def product(self) -> tuple[Tensor, Tensor]:
        """ΔW·scale = U·V: U (o, r²), V (r², i·∏k), a Tucker core folded into V; in float32 or float64."""
        u, v, core = self.khatri_rao()
        return u, v if core is None else torch.einsum("PQ...,Qi->Pi...", core, v).flatten(1)

    @classmethod
    def from_product(cls, u: Tensor, v: Tensor) -> LoHaFactors:
        """U (o, R) · V (R, n) as a LoHa of rank R: alpha is the rank, and the second half is exactly one everywhere."""
        ones = torch.zeros_like(v)
        ones[0] = 1
        return cls(u, v, torch.ones_like(u), ones, alpha=u.shape[1])


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


def same(x: Layer, y: Layer) -> bool:
    """Whether two layers hold the same numbers."""
    mine, other = x.tensors(), y.tensors()
    return x.alpha == y.alpha and mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def shape_mismatch(factors: LoHaFactors, shape: tuple[int, ...]) -> str | None:
    """Why factors cannot act on a weight of this shape, or None."""
    out, inner = shape[0] if shape else 1, shape[1:]
    update = factors.shape
    fits = update[0] == out and prod(update[1:]) == prod(inner)
    if factors.is_tucker:
        # PEFT drops an axis of 1 from a kernel.
        kernels = [[k for k in axes if k != 1] for axes in (update[2:], inner[1:])]
        fits = fits and update[1] == (inner[0] if inner else 1) and kernels[0] == kernels[1]
    if not fits:
        return f"an update of shape {update} for a weight of shape {tuple(shape)}"
    if factors.dora_scale is not None:
        try:
            algebra.dora_axis(factors.dora_scale, shape)
        except LoHaError as error:
            return str(error)
    return None


def _as_float(alpha: Any) -> float:
    try:
        number = float(alpha)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LoHaError(f"alpha must be one finite number ({error})") from error
    check_number("alpha", number)
    return number


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
