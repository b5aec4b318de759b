"""PEFT's own LoHa on our layers: one line, and everything else stays PEFT's.

    import loha_core.peft

    loha_core.peft.enable()          # or: with loha_core.peft.enabled(): …

From then on `peft.get_peft_model`, `PeftModel.from_pretrained`, `PeftMixedModel`, diffusers' `add_adapter` and all
else that makes LoHa layers makes them with loha_core's forward, backward and ΔW. They are subclasses of PEFT's, with
PEFT's parameters, names and files. Models that were made before keep their layers. Conv3d and transformers' Conv1D, for
which PEFT has no LoHa layer, get one. Needs PEFT 0.19 or later: pip install 'comfyui-loha[peft]'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .algebra import Factors, factor_shapes
from .errors import LoHaError
from .ops.autograd import Delta, Geometry, LayerSpec
from .ops.functional import adapted_forward, update_forward
from .ops.padding import padded, padding_of
from .tuner import forwards
from .tuner.layer import drop_rows
from .tuner.targets import is_transformers_conv1d

try:
    from peft.tuners.loha import layer as theirs
    from peft.tuners.loha.model import LoHaModel
except ImportError as error:
    raise LoHaError(f"PEFT 0.19 or later is not here ({error}): pip install 'comfyui-loha[peft]'") from error

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "TransformersConv1D", "disable", "enable", "enabled"]


class _Layer(theirs.LoHaLayer):
    """What all kinds share. W is the base layer's weight, of shape (o, i, *k)."""

    base_class: type[nn.Module]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, r: int = 0, alpha: float = 0.0, **settings: Any
    ) -> None:
        theirs.LoHaLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, **settings)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _geometry(self) -> Geometry | None:
        return None

    def _prepared(self, x: Tensor) -> Tensor:
        return x

    # Parameters

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: Any = None, **settings: Any) -> None:
        """As PEFT's, of which releases differ in how they pass the configuration."""
        if config is not None:
            settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
        if r <= 0:
            raise ValueError(f"r is {r}; a rank is a whole number from 1")
        self.r[adapter_name], self.alpha[adapter_name], self.scaling[adapter_name] = r, alpha, alpha / r
        self.rank_dropout[adapter_name] = settings["rank_dropout"]
        self.module_dropout[adapter_name] = settings["module_dropout"]
        shape = self._weight_shape
        kernel = math.prod(shape[2:])
        tucker = settings["use_effective_conv2d"] and kernel > 1
        self.create_adapter_parameters(adapter_name, r, shape if tucker else (shape[0], shape[1] * kernel))
        if settings["init_weights"]:
            self.reset_adapter_parameters(adapter_name)
        else:
            self.reset_adapter_parameters_random(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=settings["inference_mode"])

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        if len(shape) < 5:
            super().create_adapter_parameters(adapter_name, r, shape)
            return
        for name, size in factor_shapes(shape, r, tucker=True).items():
            getattr(self, f"hada_{name}")[adapter_name] = nn.Parameter(torch.empty(size))

    def _factors(self, adapter: str, is_dropped: bool) -> Factors:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        cores = [getattr(self, name)[adapter] for name in ("hada_t1", "hada_t2") if adapter in self.hada_t1]
        axes = len(self._weight_shape)
        # PEFT has Conv1d's core as (r, r, k, 1).
        cores = [core.squeeze(3) if axes == 3 else core for core in cores]
        factors = Factors(*(getattr(self, name)[adapter] for name in names), *cores)
        return drop_rows(factors, self._weight_shape[0], self.rank_dropout[adapter]) if is_dropped else factors

    def _spec(self, adapter: str) -> LayerSpec:
        return LayerSpec(self._weight_shape, self._geometry(), self.scaling[adapter])

    # What it computes

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        """ΔW, shaped as the base's weight."""
        factors = self._factors(adapter_name, is_dropped=apply_rank_dropout)
        return Delta.apply(self.scaling[adapter_name], self._weight_shape, *factors)

    def _acting(self, adapter: str) -> Factors:
        return self._factors(adapter, is_dropped=self.training and bool(self.rank_dropout[adapter]))

    def _get_delta_activations(self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return update_forward(self._prepared(input), self._acting(adapter_name), self._spec(adapter_name))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = x.dtype
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = None
        for adapter in () if self.disable_adapters or self.merged else self.active_adapters:
            if adapter not in self.hada_w1_a or (self.training and self._drops_module(adapter)):
                continue
            if result is None and not args and not kwargs and self._can_fuse(x):
                base: Any = self.base_layer
                prepared, spec = self._prepared(x), self._spec(adapter)
                result = adapted_forward(prepared, self._acting(adapter), spec, base.weight, base.bias)
                continue
            if result is None:
                result = self.base_layer(x, *args, **kwargs)
            result = result + self._get_delta_activations(adapter, x, *args, **kwargs)
        return (self.base_layer(x, *args, **kwargs) if result is None else result).to(dtype)

    def _drops_module(self, adapter: str) -> bool:
        drawn, p = torch.rand(1), self.module_dropout[adapter]
        # PEFT draws at 0 too, and so do we; but torch.compile's graph cannot hold a branch on what was drawn.
        return p > 0 and not bool(drawn > p)

    def _can_fuse(self, x: Tensor) -> bool:
        """The base is plain, and its weight there whole (ZeRO-3 partitions it) in x's dtype."""
        if not forwards.is_plain(self.base_layer, self.base_class):
            return False
        weight: Any = self.base_layer.weight
        return weight.dtype == x.dtype and tuple(weight.shape) == self._weight_shape


class Linear(_Layer, theirs.Linear):
    base_class = nn.Linear

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features


class TransformersConv1D(Linear):
    """GPT-2's linear layer, whose weight is (in, out)."""

    base_class = type(None)

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        return super().get_delta_weight(adapter_name, apply_rank_dropout=apply_rank_dropout).T

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class _Conv(_Layer):
    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self._pads, self._walk = padding_of(self.get_base_layer())

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        base: Any = self.get_base_layer()
        return base.out_channels, base.in_channels // base.groups, *base.kernel_size

    def _geometry(self) -> Geometry:
        return self._walk

    def _prepared(self, x: Tensor) -> Tensor:
        return padded(x, self._pads)


class Conv1d(_Conv, theirs.Conv1d):
    base_class = nn.Conv1d


class Conv2d(_Conv, theirs.Conv2d):
    base_class = nn.Conv2d


class Conv3d(_Conv):
    base_class = nn.Conv3d

    def __repr__(self) -> str:
        return f"loha.{super().__repr__()}"


_KINDS = (nn.Linear, Linear), (nn.Conv1d, Conv1d), (nn.Conv2d, Conv2d), (nn.Conv3d, Conv3d)
_theirs = LoHaModel._create_new_module.__func__


def _ours(cls: type[LoHaModel], config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
    """In the place of PEFT's method; what neither has a layer for is left to that to refuse."""
    base: Any = getattr(target, "get_base_layer", lambda: target)()
    kind = next((ours for kind, ours in _KINDS if isinstance(base, kind)), None)
    if is_transformers_conv1d(base):
        kind = TransformersConv1D
    if kind is None:
        return _theirs(cls, config, adapter_name, target, **kwargs)
    return kind(target, adapter_name, **({"config": config} | kwargs))


def enable() -> None:
    """Let PEFT make our layers from now on."""
    LoHaModel._create_new_module = classmethod(_ours)


def disable() -> None:
    """Let PEFT make its own layers again. Layers that are there stay as they are."""
    LoHaModel._create_new_module = classmethod(_theirs)


@contextmanager
def enabled() -> Iterator[None]:
    """`enable` for the length of a block."""
    before = LoHaModel._create_new_module.__func__
    enable()
    try:
        yield
    finally:
        LoHaModel._create_new_module = classmethod(before)
