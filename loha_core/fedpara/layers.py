"""Layers that learn factors of their weight, W = W₁∘W₂."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from ..algebra import Factors, compute_dtype, factor_shapes, halves
from ..ops.autograd import Delta, Geometry, LayerSpec, apply_weight
from ..ops.functional import update_forward
from ..ops.padding import padded, padding_of
from . import init
from .init import Fan

Activation = Literal["tanh"]
FACTORS = Factors._fields


class FedParaLayer(nn.Module):
    """y = W∗x + b with W = W₁∘W₂, or tanh(W₁)∘tanh(W₂), or W₁∘(W₂ + 1) where W₂ stays with a client (pFedPara).

    Parameters are ``w1_a, w1_b, w2_a, w2_b``, with Tucker cores ``t1, t2``, shaped as in `LoHaFactors`; and ``bias``,
    which is the replaced layer's own. They have the replaced weight's device and dtype; what is made of them is made in
    float32 or float64. Nothing of the weight's size is kept for the backward. First derivatives only.

    Args:
        layer: the nn.Linear or nn.Conv1d, 2d or 3d whose place this takes; its weight's values are not used.
        rank: r, of each half.
        tucker: cores for the kernel (proposition 3) instead of a flattened one (proposition 1).
        personal, activation, fan: see `factorize`.
    """

    bias: Tensor | None

    def __init__(
        self, layer: nn.Module, rank: int, *, tucker: bool = False, personal: bool = False,
        activation: Activation | None = None, fan: Fan = init.DEFAULT_FAN,
    ) -> None:  # fmt: skip
        super().__init__()
        weight: Any = layer.weight
        self.weight_shape = tuple(weight.shape)
        constants: Any = layer.__constants__
        for name in constants:  # in_features, or channels, kernel, stride, …
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.rank, self.personal, self.activation, self.fan = rank, personal, activation, fan
        for name, shape in factor_shapes(self.weight_shape, rank, tucker).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=weight.dtype)))
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
        self._weights: list[Tensor] | None = None  # see `JacobianCorrection`
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew, so that W has He's variance; the bias stays."""
        variance = init.variance(self.weight_shape, self.fan, getattr(self, "groups", 1))
        init.fill_(self.factors(), variance, personal=self.personal, tanh=self.activation == "tanh")

    @property
    def is_tucker(self) -> bool:
        return "t1" in self._parameters

    @property
    def local_names(self) -> tuple[str, ...]:
        """Names of the parameters that stay with a client."""
        return tuple(name for name in FACTORS if "2" in name and name in self._parameters) if self.personal else ()

    def factors(self) -> Factors:
        """The parameters."""
        return Factors._make(self._parameters.get(name) for name in FACTORS)

    @property
    def weight(self) -> Tensor:
        """W (o, i, *k), made anew of the factors and differentiable: a result, which cannot be written to."""
        return self.weight_of(self.factors())

    def weight_of(self, factors: Factors) -> Tensor:
        """W, if the parameters were these."""
        if self.activation == "tanh":
            return _tanh(factors).reshape(self.weight_shape)
        acting = self._acting(factors)
        return Delta.apply(1.0, self.weight_shape, *acting.to(compute_dtype(*acting))).to(acting.w1_a.dtype)

    def _acting(self, f: Factors) -> Factors:
        """Factors of the two halves whose product W is."""
        return _plus_one(f) if self.personal else f

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self._product(x), self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """W∗x."""
        factors, geometry = self.factors(), self._geometry()
        if self._weights is not None:
            self._weights.append(weight := self.weight_of(factors))
            return apply_weight(x, weight, None, geometry)
        if self.activation is not None:
            # Computed again in the backward, so that W and both halves are not kept.
            return checkpoint(  # type: ignore[no-any-return]
                self._by_weight, x, *factors, use_reentrant=False, preserve_rng_state=False
            )
        return update_forward(x, self._acting(factors), LayerSpec(self.weight_shape, geometry, 1.0))

    def _by_weight(self, x: Tensor, *factors: Tensor) -> Tensor:
        return apply_weight(x, self.weight_of(Factors(*factors)), None, self._geometry())

    def _geometry(self) -> Geometry | None:
        return None

    def dense(self) -> nn.Module:
        """The plain layer with this weight and this bias; shares no memory but the bias'."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name)}" for name in self._shown]
        parts.append(f"rank={self.rank}")
        parts += [name for name, is_on in (("tucker", self.is_tucker), ("personal", self.personal)) if is_on]
        return ", ".join([*parts, *([self.activation] if self.activation else [])])

    _shown: tuple[str, ...] = ()


class FedParaLinear(FedParaLayer):
    """In the place of nn.Linear; flat factors."""

    _shown = ("in_features", "out_features")

    def dense(self) -> nn.Linear:
        out, inner = self.weight_shape
        return _with(self, skip_init(nn.Linear, inner, out, **_like(self)))  # type: ignore[return-value]


class FedParaConv(FedParaLayer):
    """In the place of nn.Conv1d, 2d and 3d, with any stride, padding, dilation, groups and padding mode."""

    _shown = ("in_channels", "out_channels", "kernel_size", "stride")

    def __init__(self, layer: nn.Module, rank: int, **settings: Any) -> None:
        super().__init__(layer, rank, **settings)
        self._pads, self._walk = padding_of(layer)

    def _geometry(self) -> Geometry:
        return self._walk

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == len(self.weight_shape) - 1:
            return self.forward(x[None])[0]
        y, bias = self._product(padded(x, self._pads)), self.bias
        return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))

    def dense(self) -> nn.Module:
        kind = getattr(nn, f"Conv{len(self.weight_shape) - 2}d")
        settings = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        channels = (self.in_channels, self.out_channels, self.kernel_size)
        return _with(self, skip_init(kind, *channels, **settings, **_like(self)))


def _plus_one(f: Factors) -> Factors:
    """W₂ + 1: one more column of ones on either side; in the core a slice that joins the two."""
    ones = torch.ones_like
    b2 = torch.cat([f.w2_b, ones(f.w2_b[:1])])
    if f.t2 is None:
        return f._replace(w2_a=torch.cat([f.w2_a, ones(f.w2_a[:, :1])], 1), w2_b=b2)
    core = nn.functional.pad(f.t2, (0, 0) * (f.t2.dim() - 2) + (0, 1, 0, 1))
    corner = torch.zeros_like(core)
    corner[-1, -1] = 1
    return f._replace(w2_a=torch.cat([f.w2_a, ones(f.w2_a[:1])]), w2_b=b2, t2=core + corner)


def _tanh(f: Factors) -> Tensor:
    """tanh(W₁)∘tanh(W₂) (supplement, additional techniques), in the factors' dtype."""
    dtype = f.w1_a.dtype
    first, second = halves(f.to(compute_dtype(*f)))
    return (first.tanh() * second.tanh()).to(dtype)


def _like(layer: FedParaLayer) -> dict[str, Any]:
    first: Any = layer.w1_a
    return {"bias": layer.bias is not None, "device": first.device, "dtype": first.dtype}


def _with(layer: FedParaLayer, plain: nn.Module) -> nn.Module:
    plain.weight = nn.Parameter(layer.weight.detach())
    plain.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
    return plain.train(layer.training)
