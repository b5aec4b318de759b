"""A layer with LoHa adapters around it: what all kinds share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Factors, compute_dtype, dora_norm
from ..errors import LoHaError
from ..factors import LoHaFactors
from ..ops.apply import add_delta_
from ..ops.autograd import Delta, Geometry, LayerSpec
from ..ops.functional import adapted_forward, update_forward
from . import forwards, init
from .config import LoHaConfig

# A ParameterDict keeps its entries as attributes.
_TAKEN = frozenset(dir(nn.ParameterDict()))


class LoHaLayer(nn.Module):
    """A frozen layer and its adapters: y = base(x) + Σ over the active ones of ΔW ∗ x.

    Parameters are kept per adapter name, under PEFT's names: ``hada_w1_a["default"]`` and so on, shaped as in
    `LoHaFactors`; beyond PEFT, ``dora_scale`` and ``scalar``. They are float32 (float64 beside a float64 base)
    whatever the base's dtype.

    Merging keeps a copy of the base weight, so that `unmerge` gives it back bit for bit. `LoHaModel.merge_and_unload`
    keeps none.

    Attributes:
        base_layer: what was wrapped.
        r, alpha, scaling, rank_dropout, module_dropout: by adapter name.
        merged_adapters: names of those that are in the weight now.
    """

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    extra_parameter_names = ("dora_scale", "scalar")
    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")
    base_class: type[nn.Module]
    _transposed = False  # the base's weight is (i, o)
    is_grouped = False  # a convolution of several groups

    hada_w1_a: nn.ParameterDict
    hada_w1_b: nn.ParameterDict
    hada_w2_a: nn.ParameterDict
    hada_w2_b: nn.ParameterDict
    hada_t1: nn.ParameterDict
    hada_t2: nn.ParameterDict
    dora_scale: nn.ParameterDict
    scalar: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in (*self.adapter_layer_names, *self.extra_parameter_names):
            setattr(self, name, nn.ParameterDict())
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._full_scale: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.rank_dropout_scale: dict[str, bool] = {}
        self.module_dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._kept_weight: Tensor | None = None
        self._active: list[str] = []
        self._disabled = False
        self._link: forwards.Link | None = None  # while this layer stands in for the base

    # What the wrapped layer is

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's; models look at its dtype."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(o, i, *k): also where the weight is stored packed."""
        raise NotImplementedError

    def _base_weight(self) -> Tensor:
        """The base's weight as (o, i, *k): a view."""
        return self.weight

    def _weight_for_norms(self) -> Tensor | Callable[[], Tensor]:  # where it is made for them, what makes it
        return self._base_weight()

    def _geometry(self) -> Geometry | None:
        return None

    def _prepare(self, x: Tensor) -> Tensor:
        return x

    # Adapters

    def update_layer(
        self, adapter_name: str, r: int | None, alpha: float | None, config: LoHaConfig, *, tucker: bool | None = None
    ) -> None:
        """Add an adapter.

        Args:
            r, alpha: the configuration's where None.
            tucker: whether to use Tucker factors; by default, as the configuration says for this kernel.
        """
        r = config.r if r is None else r
        alpha = config.alpha if alpha is None else alpha
        if r < 1:
            raise LoHaError(f"r is {r}; a rank is a whole number from 1")
        if tucker is None:
            tucker = config.use_effective_conv2d and torch.Size(self.weight_shape[2:]).numel() > 1
        self._record(adapter_name, r, alpha, config.scale(r, alpha), config)
        parameters = init.create(self.weight_shape, r, tucker, config)
        if config.use_dora:
            parameters["dora_scale"] = self._magnitude(config)
        self._register(adapter_name, parameters, config)

    def add_factors(self, adapter_name: str, factors: LoHaFactors, config: LoHaConfig) -> None:
        """Add an adapter with these factors, which may come from a file; dropout as the configuration says."""
        self._record(adapter_name, factors.rank, factors.alpha, factors.scale, config)
        parameters = {name if name == "dora_scale" else f"hada_{name}": t for name, t in factors.tensors().items()}
        self._register(adapter_name, parameters, config)

    def _record(self, adapter_name: str, r: int, alpha: float, scale: float, config: LoHaConfig) -> None:
        if "." in adapter_name or adapter_name in _TAKEN:
            raise LoHaError(f"{adapter_name!r} cannot be an adapter's name: it is a path or an attribute of torch's")
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self._full_scale[adapter_name] = self.scaling[adapter_name] = scale
        self.rank_dropout[adapter_name] = config.rank_dropout
        self.rank_dropout_scale[adapter_name] = config.rank_dropout_scale
        self.module_dropout[adapter_name] = config.module_dropout

    def _register(self, adapter_name: str, parameters: dict[str, Tensor], config: LoHaConfig) -> None:
        """Parameters beside the base layer, in float32; an adapter that is not active doesn't train."""
        base = self._placement()
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        trains = adapter_name in self._active and not config.inference_mode
        for name, tensor in parameters.items():
            # An offloaded base is on the meta device: values that are there stay where they are.
            device = tensor.device if "meta" in (tensor.device.type, base.device.type) else base.device
            getattr(self, name)[adapter_name] = nn.Parameter(tensor.to(device, dtype), requires_grad=trains)

    def _placement(self) -> Tensor:
        """A tensor of the base layer, for its device and dtype."""
        weight = getattr(self.base_layer, "weight", None)
        return weight if isinstance(weight, Tensor) else next(self.base_layer.parameters())

    def _magnitude(self, config: LoHaConfig) -> Tensor:
        weight = self._base_weight()
        if not weight.is_floating_point() or tuple(weight.shape) != self.weight_shape:
            raise LoHaError(f"use_dora needs the weight itself; {type(self.base_layer).__name__} keeps it packed")
        return dora_norm(weight.detach().float(), 1 if config.use_dora == "input" else 0)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that this layer has."""
        return list(self.hada_w1_a)

    @property
    def active_adapters(self) -> list[str]:
        """Names that the forward uses, as far as this layer has them."""
        return self._active

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; off, they don't train either."""
        if enabled:
            self.set_adapter(self._active)
        else:
            for adapter in self.adapters:
                for parameter in self.parameters_of(adapter):
                    parameter.requires_grad_(False)
        self._disabled = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters: these train (unless ``inference_mode``), the others are frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter in self.adapters:
            for parameter in self.parameters_of(adapter):
                parameter.requires_grad_(adapter in names and not inference_mode)
        self._active = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the first that is left takes its place."""
        if adapter_name in self.merged_adapters:
            raise LoHaError(f"{adapter_name} is merged into the weight; unmerge it before it is deleted")
        self.forget(adapter_name)
        if adapter_name in self._active:
            left = [name for name in self._active if name != adapter_name]
            self.set_adapter(left or self.adapters[:1])

    def forget(self, adapter_name: str) -> None:
        """Drop an adapter's parameters and settings, as far as there are any; which are active stays."""
        for name in (*self.adapter_layer_names, *self.extra_parameter_names):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        for name in (*self.other_param_names, "_full_scale"):
            getattr(self, name).pop(adapter_name, None)

    def parameters_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        held = (getattr(self, name) for name in (*self.adapter_layer_names, *self.extra_parameter_names))
        return (parameters[adapter_name] for parameters in held if adapter_name in parameters)

    # Scales

    def set_scale(self, adapter: str, scale: float) -> None:
        """Strength of an adapter: ``scale`` times its alpha / r."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._full_scale[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' strength."""
        for adapter in self._active:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`, or go back to strength 1."""
        for adapter in self._active:
            if adapter in self.scaling:
                self.scaling[adapter] = self._full_scale[adapter] if scale is None else self.scaling[adapter] / scale

    # The update as a value

    def factors(self, adapter_name: str) -> LoHaFactors:
        """What the adapter adds now, detached; its strength is in alpha, its scalar in w1_a."""
        tensors = (None if t is None else t.detach() for t in self._tensors(adapter_name))
        a1, b1, a2, b2, t1, t2 = Factors._make(tensors)
        magnitude = self.dora_scale[adapter_name].detach() if adapter_name in self.dora_scale else None
        alpha = self.scaling[adapter_name] * b1.shape[0]
        return LoHaFactors(a1, b1, a2, b2, alpha, t1, t2, magnitude)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of an adapter, shaped as the base's weight, differentiable; without DoRA and dropout."""
        tensors = self._tensors(adapter_name)
        delta = Delta.apply(self.scaling[adapter_name], self.weight_shape, *tensors)
        return delta.T if self._transposed else delta

    def _tensors(self, adapter: str) -> Factors:
        a1 = self.hada_w1_a[adapter]
        if adapter in self.scalar:
            a1 = a1 * self.scalar[adapter]
        cores = (self.hada_t1[adapter], self.hada_t2[adapter]) if adapter in self.hada_t1 else (None, None)
        return Factors(a1, self.hada_w1_b[adapter], self.hada_w2_a[adapter], self.hada_w2_b[adapter], *cores)

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(self.base_layer, *args, **kwargs)

    def _forward(self, base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """``base``: the base layer, or what it does while this layer stands in for it."""
        x = forwards.first(args, kwargs)
        if self._disabled and self.merged:
            self.unmerge()
        names = [] if self._disabled or self.merged else [name for name in self._active if name in self.hada_w1_a]
        if self.training:
            names = [name for name in names if not self._drops_module(name)]
        if not names:
            return base(*args, **kwargs)
        fused = len(args) + len(kwargs) == 1 and self._can_fuse()
        y = self._adapted(x, names[0], apply_base=True) if fused else base(*args, **kwargs)
        for name in names[fused:]:
            update = self._adapted(x.to(y.dtype) if y.is_floating_point() else x, name, apply_base=False)
            y = y + update.to(y.dtype)
        return y

    def _can_fuse(self) -> bool:
        return forwards.is_plain(self.base_layer, self.base_class, self._link)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While this lasts, the base module itself acts with its adapters; the tree that it is in stays as it is.

        What else acts in its place acts around it.
        """
        if self._link is not None:  # it does already
            yield
            return
        self._link = forwards.push(self.base_layer, self._forward, innermost=True)
        try:
            yield
        finally:
            forwards.remove(self._link)
            self._link = None

    def _adapted(self, x: Tensor, adapter: str, *, apply_base: bool) -> Tensor:
        factors = self._tensors(adapter)
        if self.training and (p := self.rank_dropout[adapter]):
            factors = drop_rows(factors, self.weight_shape[0], p, self.rank_dropout_scale[adapter])
        magnitude = self.dora_scale[adapter] if adapter in self.dora_scale else None
        x, spec = self._prepare(x), LayerSpec(self.weight_shape, self._geometry(), self.scaling[adapter])
        if apply_base:
            return adapted_forward(x, factors, spec, self._base_weight(), self.bias, magnitude)
        return update_forward(x, factors, spec, magnitude, None if magnitude is None else self._weight_for_norms())

    def _drops_module(self, adapter: str) -> bool:
        p = self.module_dropout[adapter]
        return p > 0 and bool(torch.rand(1) <= p)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, keep: bool = True) -> None:
        """Add the active adapters, or those named, into the base weight; computed in float32, rounded once.

        Args:
            safe_merge: look for NaN and infinity first; the weight is untouched if there are any.
            keep: hold a copy of the weight, for `unmerge`.

        Raises:
            LoHaError: a weight that is not floating point, or, with ``safe_merge``, values that are not finite.
        """
        names = self._mergeable(adapter_names)
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        weight = self._base_weight()
        if keep and self._kept_weight is None:
            self._kept_weight = weight.detach().clone()
        self._merge_into(weight.detach(), names)
        self.merged_adapters = [*self.merged_adapters, *names]

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises what `merge` with ``safe_merge`` would, and merges nothing."""
        if names := self._mergeable(adapter_names):
            merged = self._base_weight().detach().clone()
            self._merge_into(merged, names)
            if not bool(torch.isfinite(merged).all()):
                raise LoHaError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: "
                    "it gives NaN or infinity; nothing was merged"
                )

    def _mergeable(self, adapter_names: list[str] | None) -> list[str]:
        wanted = self._active if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.hada_w1_a and name not in self.merged_adapters]
        weight = self._base_weight()
        if names and (not weight.is_floating_point() or tuple(weight.shape) != self.weight_shape):
            raise LoHaError(f"{type(self.base_layer).__name__} keeps its weight packed; it cannot be merged into")
        return names

    def _merge_into(self, weight: Tensor, names: list[str]) -> None:
        if self._kept_weight is not None and any(name in self.dora_scale for name in (*self.merged_adapters, *names)):
            weight.copy_(self._kept_weight)
            names = [*self.merged_adapters, *names]
        stack = [self.factors(name) for name in names]
        if len(stack) == 1 or all(f.dora_scale is None for f in stack):
            add_delta_(weight, stack)
            return
        # With DoRA each looks at the base weight, as it does in the forward.
        base = weight.to(compute_dtype(weight), copy=True)
        weight.copy_(base + sum(add_delta_(base.clone(), f) - base for f in stack))

    def unmerge(self) -> None:
        """Give back the weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("nothing is merged, so nothing was unmerged", stacklevel=2)
            return
        if self._kept_weight is None:
            raise LoHaError("merged without keeping the weight; there is nothing to go back to")
        with torch.no_grad():
            self._base_weight().copy_(self._kept_weight)
        self._kept_weight, self.merged_adapters = None, []

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={self.r[name]}, alpha={self.alpha[name]:g}" for name in self.adapters)


def drop_rows(factors: Factors, out: int, probability: float, is_scaled: bool = True) -> Factors:
    """Rank dropout: output rows of ΔW, dropped in w1_a. Drawn on the CPU, as PEFT and LyCORIS do.

    Args:
        is_scaled: divide the rows that are left by their share of all.
    """
    kept = (torch.rand(out) > probability).to(factors.w1_a.dtype)
    if is_scaled:
        kept = kept / kept.mean().clamp_min(1 / out)
    kept = kept.to(factors.w1_a.device)
    return factors._replace(w1_a=factors.w1_a * (kept.unsqueeze(1) if factors.t1 is None else kept))
