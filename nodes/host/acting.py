"""What live adapters do to one layer as it runs, with its stored weight left alone.

A layer is W·x + b, and a LoHa changes it as an operator does, whatever W is kept as:

    plain           y = f(x) + s·U(V·x)
    DoRA, outputs   y = g∘(f(x) − b) + b + s·(c∘ΔW)·x,     c = m/‖W+ΔW‖,  g = 1 − s + s·c
    DoRA, inputs    y = f(g∘x) + s·(ΔW∘c)·x

with f the layer's own forward, quantised product included, with the adapters before this one. A part of a
fused weight is a part of y or x. Where W + s·ΔW is cheaper (many tokens, a high rank) and ComfyUI casts W for each call
anyway, a weight function makes it from that copy. Updates that are no such operator, other kinds of adapters for
instance, act by a weight function too, or, where the layer calls none, by (W' − W)·x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loha_core import LoHaError, LoHaFactors
from loha_core.ops.cost import Estimate, estimate
from loha_core.ops.functional import loha_conv, loha_linear
from loha_core.tuner import forwards

from . import weights
from .patches import Part
from .updates import ActingUpdate, Active, LiveUpdate, scaled_delta, updated


class ActingLayer:
    """All live updates of one module, from `start` to `stop`."""

    def __init__(self, module: nn.Module, path: str, updates: dict[str, list[LiveUpdate]]) -> None:
        self.module, self.path = module, path
        self.updates = {parameter: [ActingUpdate(each) for each in live] for parameter, live in updates.items()}
        self.ran = False
        self.is_conv = isinstance(module, weights.CONVOLUTIONS)
        self.castable = weights.is_castable(module)
        self._remove_function: dict[str, Callable[[], None]] = {}  # weight functions, by parameter
        self._called: set[str] = set()  # parameters whose functions were called
        self._link: forwards.Link | None = None
        self._cheaper: dict[int, bool] = {}

    def start(self) -> None:
        """Raises LoHaError where `why_not_live` has a reason."""
        for parameter, updates in self.updates.items():
            if why := why_not_live(self.module, parameter, updates):
                raise LoHaError(f"{self.path}.{parameter}: {why}; set the LoHa node's mode to merge")
        for parameter, updates in self.updates.items():
            operator = parameter == "weight" and all(is_operator(self.module, update) for update in updates)
            if not operator and weights.is_castable(self.module, parameter):
                # Whoever reads the weight, the layer's forward or another's: all ask for its functions.
                function = partial(self._function, parameter)
                self._remove_function[parameter] = weights.add_function(self.module, parameter, function)
        self._link = forwards.push(self.module, self)

    def stop(self) -> None:
        for remove in self._remove_function.values():
            remove()
        if self._link is not None:
            forwards.remove(self._link)
        self._remove_function, self._link = {}, None

    def renew(self) -> None:
        """Another pack may have put an older forward back."""
        if self._link is not None:
            forwards.renew(self._link)

    def _active(self, parameter: str) -> list[tuple[ActingUpdate, float]]:
        strengths = ((update, self._strength(update)) for update in self.updates.get(parameter, ()))
        return [(update, strength) for update, strength in strengths if strength != 0]

    def _strength(self, update: ActingUpdate) -> float:
        return update.live.strength_now()

    def _function(self, parameter: str, weight: Tensor) -> Tensor:
        """ComfyUI's weight function."""
        self.ran = True
        self._called.add(parameter)
        return updated(weight, self._active(parameter), f"{self.path}.{parameter}")

    # In the forward's place

    def __call__(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.ran = True
        return self._act(forward, *args, **kwargs)

    def _act(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._called.clear()
        y = self._with_weight(forward, *args, **kwargs)
        for parameter in [p for p in self._remove_function if p not in self._called and self._active(p)]:
            y = self._ignored(parameter, y, forwards.first(args, kwargs))
        if "bias" not in self._remove_function and (biases := self._active("bias")):
            bias = weights.dense(self.module, "bias", device=y.device)
            y = y + self._along(updated(bias, biases, f"{self.path}.bias") - bias, y)
        return y

    def _ignored(self, parameter: str, y: Tensor, x: Tensor) -> Tensor:
        """The class's forward calls no weight functions: what this one should have done is added."""
        if not (weights.is_linear(self.module) or weights.is_convolution(self.module)):
            raise LoHaError(
                f"{self.path}: a {type(self.module).__name__} calls no weight functions on its {parameter}, and this "
                "update cannot be added to its output; set the LoHa node's mode to merge"
            )
        self._remove_function.pop(parameter)()
        return self._beside(y, x, self._active(parameter)) if parameter == "weight" else y

    def _with_weight(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        active = [] if "weight" in self._remove_function else self._active("weight")
        if not active:
            return forward(*args, **kwargs)
        if not all(is_operator(self.module, update) for update, _ in active):
            return self._beside(forward(*args, **kwargs), forwards.first(args, kwargs), active)
        if len(args) + len(kwargs) > 1:  # a convolution told how to pad, say
            if self.castable and (cast := self._recast(active, forward, *args, **kwargs)) is not None:
                return cast
            raise LoHaError(
                f"{self.path}: a {type(self.module).__name__} is called with more than its input, which live mode does "
                "not understand; set the LoHa node's mode to merge"
            )
        x = forwards.first(args, kwargs)
        plain = x.dequantize() if hasattr(x, "_qdata") else x
        if self.castable and not self._adding_is_cheaper(plain):
            if (cast := self._recast(active, forward, x)) is not None:
                return cast
            self.castable = False  # its class has a forward that calls no weight functions
        return self._operated(forward, x, plain, active)

    def _recast(self, active: Active, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """(W + s·ΔW)·x from the copy of W that ComfyUI casts for this call; None if it casts none."""
        called = False

        def function(weight: Tensor) -> Tensor:
            nonlocal called
            called = True
            return updated(weight, active, f"{self.path}.weight")

        with weights.adapted(self.module, {"weight": function}):
            y = forward(*args, **kwargs)
        return y if called else None

    def _beside(self, y: Tensor, x: Tensor, active: Active) -> Tensor:
        """y + (W' − W)·x."""
        weight = weights.dense(self.module, device=y.device)
        difference = updated(weight, active, f"{self.path}.weight").sub_(weight).to(y.dtype)
        if not self.is_conv:
            return y + F.linear(x.to(y.dtype), difference)
        module: Any = self.module
        return y + module._conv_forward(x.to(y.dtype), difference, None)  # type: ignore[no-any-return]

    def _operated(self, forward: Callable[..., Tensor], x: Tensor, plain: Tensor, active: Active) -> Tensor:
        """The layer with these updates, the last of them around the others; ``plain`` is x if that is quantised."""
        if not active:
            return forward(x)
        *below, (update, strength) = active
        factors = update.factors(plain.device)
        if factors.dora_scale is None:
            y = self._operated(forward, x, plain, below)
            return self._added(y, self._product(plain, factors, update.part, strength), update.part)
        ratio = update.ratio(tuple(s for _, s in below), lambda: self._weight(plain.device, below))
        gain = torch.lerp(torch.ones_like(ratio), ratio, strength)
        axis = update.dora_axis(weights.shape(self.module))
        if axis == 0:
            y = self._gained(self._operated(forward, x, plain, below), gain, update.part)
        else:
            scaled = plain * self._along(gain, plain)
            y = self._operated(forward, scaled, scaled, below)
        delta = scaled_delta(factors, ratio, axis, weights.kernel(self.module))
        return self._added(y, self._product(plain, delta, update.part, strength), update.part)

    def _weight(self, device: torch.device, below: Active) -> Tensor:
        return updated(weights.dense(self.module, device=device), below, f"{self.path}.weight")

    @property
    def _strategy(self) -> Any:
        """By U and V where this was chosen over W + s·ΔW, else the cheaper way."""
        return "khatri-rao" if self.castable else "auto"

    def _product(self, x: Tensor, factors: LoHaFactors, part: Part, strength: float) -> Tensor:
        """s·ΔW·x."""
        if part is not None and part[0] == 1:
            x = x.narrow(self._channels(x), *part[1:])
        if not self.is_conv:
            return loha_linear(x, factors, strength=strength, strategy=self._strategy)
        m: Any = self.module
        padding = m.padding
        if m.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=mode), 0
        return loha_conv(
            x,
            factors,
            kernel_size=m.kernel_size,
            stride=m.stride,
            padding=padding,
            dilation=m.dilation,
            groups=m.groups,
            strength=strength,
            strategy=self._strategy,
        )

    def _added(self, y: Tensor, update: Tensor, part: Part) -> Tensor:
        update = update.to(y.dtype)
        rows = None if part is None or part[0] == 1 else part[1:]
        if torch.is_grad_enabled():
            return y + (update if rows is None else self._padded(update, y, rows))
        (y if rows is None else y.narrow(self._channels(y), *rows)).add_(update)
        return y

    def _gained(self, y: Tensor, gain: Tensor, part: Part) -> Tensor:
        """g∘(y − b) + b on the outputs of the part."""
        if part is not None:
            ones = torch.ones(weights.shape(self.module)[0], dtype=gain.dtype, device=gain.device)
            ones.narrow(0, *part[1:]).copy_(gain)
            gain = ones
        y = y * self._along(gain, y)
        if getattr(self.module, "bias", None) is None:
            return y
        bias = weights.dense(self.module, "bias", device=y.device)
        return y + self._along((1 - gain) * bias, y)

    def _padded(self, update: Tensor, y: Tensor, rows: tuple[int, int]) -> Tensor:
        axis, (start, length) = self._channels(y), rows
        after = y.shape[axis] - start - length
        return F.pad(update, (0, 0) * (y.dim() - 1 - axis) + (start, after))

    def _channels(self, t: Tensor) -> int:
        """The axis of channels in an input or output."""
        return t.dim() - 1 - (len(self.module.kernel_size) if self.is_conv else 0)  # type: ignore[arg-type]

    def _along(self, values: Tensor, t: Tensor) -> Tensor:
        """Values by channel, (c,) or a group's, so that they multiply or add to t."""
        axis = self._channels(t)
        values = values.repeat(t.shape[axis] // values.numel()).to(t)
        return values.reshape(-1, *[1] * (t.dim() - 1 - axis))

    def _adding_is_cheaper(self, x: Tensor) -> bool:
        tokens = x.numel() // x.shape[self._channels(x)]
        if tokens not in self._cheaper:
            lohas = [update.loha for update in self.updates["weight"] if update.loha is not None]
            self._cheaper[tokens] = cheaper_to_add(self.module, lohas, tokens, x.device.type)
        return self._cheaper[tokens]


def is_operator(module: nn.Module, update: ActingUpdate) -> bool:
    """Whether an update of a weight acts by the equations above."""
    if update.loha is None or not (weights.is_linear(module) or weights.is_convolution(module)):
        return False
    if update.part is None:
        return True
    if getattr(module, "groups", 1) != 1:
        return False
    # A part's columns, or rows, are not all of those that the other axis' magnitudes act on.
    return not update.is_dora or update.dora_axis(weights.shape(module)) == update.part[0] == 0


def why_not_live(module: nn.Module, parameter: str, updates: Iterable[ActingUpdate]) -> str | None:
    """Why updates of a parameter cannot act while the module runs, or None."""
    if weights.is_castable(module, parameter):
        return None
    multiplies = weights.is_linear(module) or weights.is_convolution(module)
    if parameter not in ("weight", "bias") or not multiplies:
        return f"live mode cannot reach the {parameter} of a {type(module).__name__}"
    plain = all(is_operator(module, update) and not update.is_dora for update in updates)
    if parameter == "weight" and plain:
        return None
    return weights.why_not_dense(module, parameter)


def cheaper_to_add(module: nn.Module, lohas: Iterable[LoHaFactors], tokens: int, device: str) -> bool:
    """Whether U(V·x) costs less than ΔW, for a layer's LoHas together."""
    costs = [layer_cost(module, factors, tokens, device) for factors in lohas]
    return sum(cost.khatri_rao.total for cost in costs) <= sum(cost.rebuild.total for cost in costs)


def layer_cost(module: nn.Module, factors: LoHaFactors, tokens: int, device: str) -> Estimate:
    """What a LoHa of a layer, or of a part of its weight, costs in a forward by either strategy."""
    kernel = tuple(getattr(module, "kernel_size", ()))
    weight: Any = module.weight
    return estimate(
        factors.shape[0],
        prod(factors.shape[1:]) // prod(kernel),
        factors.rank,
        tokens,
        kernel,
        groups=getattr(module, "groups", 1),
        tucker=factors.is_tucker,
        training=False,
        itemsize=max(2, weight.dtype.itemsize),
        device=device,
    )
