"""What live adapters do to one layer as it runs, with its stored weight left alone.

A layer is W·x + b, and a LoHa changes it as an operator does, whatever W is kept as:

    plain           y = f(x) + s·U(V·x)
    DoRA, outputs   y = g∘(f(x) − b) + b + s·(c∘ΔW)·x,     c = m/‖W+ΔW‖,  g = 1 − s + s·c
    DoRA, inputs    y = f(g∘x) + s·(ΔW∘c)·x

with f the layer's own forward, quantised product included, or what the adapters before have made of it. A part of a
fused weight is a part of y or x. Where W + s·ΔW is cheaper (many tokens, a high rank) and ComfyUI casts W for each call
anyway, a weight function makes it from that copy. What is no such operator, other adapters' kinds for instance, acts by
a weight function too, or, where there are none, by (W' − W)·x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from typing import Any

import comfy.lora
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loha_core import LoHaError, LoHaFactors, add_delta_, algebra
from loha_core.ops.functional import loha_conv, loha_linear
from loha_core.ops.paths import estimate
from loha_core.tuner import forwards

from . import weights
from .entries import Entry
from .patches import LoHaPatch, part_of, reordered

Part = tuple[int, int, int] | None  # axis, start, length


class Update:
    """An entry while it acts: its factors on the layer's device, and what DoRA knows of the weight."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.part: Part = part_of(entry.patch.target)
        self._moved: LoHaFactors | None = None
        self._ratio: tuple[tuple[float, ...], Tensor] | None = None

    @cached_property
    def loha(self) -> LoHaFactors | None:
        """The factors, in the order of the weight's rows; None for other kinds of adapters."""
        update = self.entry.patch.update
        return reordered(update.factors, self.entry.patch.target) if isinstance(update, LoHaPatch) else None

    @property
    def is_dora(self) -> bool:
        return self.loha is not None and self.loha.dora_scale is not None

    def factors(self, device: torch.device) -> LoHaFactors:
        if self._moved is None or self._moved.w1_a.device != device:
            assert self.loha is not None
            # Autograd, when something is trained on top, keeps no tensors that were made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                moved = {n: t.to(device) for n, t in self.loha.tensors().items()}
                kept: dict[str, Any] = {n: t.clone() if t.is_inference() else t for n, t in moved.items()}
            self._moved = replace(self.loha, **kept)
        return self._moved

    def axis(self, weight_shape: Sequence[int]) -> int:
        """Along which DoRA's magnitudes lie."""
        assert self.loha is not None and self.loha.dora_scale is not None
        return algebra.dora_axis(self.loha.dora_scale, part_shape(weight_shape, self.part))

    def ratio(self, before: tuple[float, ...], weight: Callable[[], Tensor]) -> Tensor:
        """DoRA's c = m/‖W+ΔW‖, (o,) or (i,); ``weight`` is asked for where the strengths before have changed."""
        if self._ratio is None or self._ratio[0] != before:
            with torch.inference_mode(False), torch.no_grad():
                self._ratio = (before, self._ratio_of(weight()))
        return self._ratio[1]

    def _ratio_of(self, weight: Tensor) -> Tensor:
        factors = self.factors(weight.device)
        assert factors.dora_scale is not None
        part = narrowed(weight, self.part)
        axis = algebra.dora_axis(factors.dora_scale, tuple(part.shape))
        wide = part.to(algebra.compute_dtype(weight), copy=True)
        norm = algebra.dora_norm(add_delta_(wide, replace(factors, dora_scale=None)), axis).flatten()
        return factors.dora_scale.to(wide).flatten() / norm.clamp_min(torch.finfo(wide.dtype).tiny)


Acting = Sequence[tuple[Update, float]]


def narrowed(weight: Tensor, part: Part) -> Tensor:
    return weight if part is None else weight.narrow(*part)


def part_shape(shape: Sequence[int], part: Part) -> tuple[int, ...]:
    return tuple(shape) if part is None else tuple(part[2] if d == part[0] else n for d, n in enumerate(shape))


class ActingLayer:
    """All live updates of one module, from `start` to `stop`."""

    def __init__(self, module: nn.Module, path: str, entries: dict[str, list[Entry]]) -> None:
        self.module, self.path = module, path
        self.updates = {parameter: [Update(entry) for entry in found] for parameter, found in entries.items()}
        self.ran = False
        self.is_conv = isinstance(module, weights.CONVOLUTIONS)
        self.castable = weights.is_castable(module)
        self._take_off: dict[str, Callable[[], None]] = {}  # weight functions, by parameter
        self._asked: set[str] = set()  # parameters whose functions were called
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
                self._take_off[parameter] = weights.add_function(self.module, parameter, function)
        self._link = forwards.push(self.module, self)

    def stop(self) -> None:
        for take_off in self._take_off.values():
            take_off()
        if self._link is not None:
            forwards.remove(self._link)
        self._take_off, self._link = {}, None

    def renew(self) -> None:
        """Another pack may have put an older forward back."""
        if self._link is not None:
            forwards.renew(self._link)

    def _acting(self, parameter: str) -> list[tuple[Update, float]]:
        found = [(update, update.entry.now()) for update in self.updates.get(parameter, ())]
        return [(update, strength) for update, strength in found if strength != 0]

    def _function(self, parameter: str, weight: Tensor) -> Tensor:
        """ComfyUI's weight function."""
        self.ran = True
        self._asked.add(parameter)
        return changed(weight, self._acting(parameter), f"{self.path}.{parameter}")

    # In the forward's place

    def __call__(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.ran = True
        self._asked.clear()
        y = self._with_weight(forward, *args, **kwargs)
        for parameter in [p for p in self._take_off if p not in self._asked and self._acting(p)]:
            y = self._ignored(parameter, y, forwards.first(args, kwargs))
        if "bias" not in self._take_off and (biases := self._acting("bias")):
            bias = weights.dense(self.module, "bias", device=y.device)
            y = y + self._along(changed(bias, biases, f"{self.path}.bias") - bias, y)
        return y

    def _ignored(self, parameter: str, y: Tensor, x: Tensor) -> Tensor:
        """The class's forward asks no weight functions: what this one should have done is added."""
        if not (weights.is_linear(self.module) or weights.is_convolution(self.module)):
            raise LoHaError(
                f"{self.path}: a {type(self.module).__name__} does not let go of its {parameter}, and this update "
                "cannot be added to its output; set the LoHa node's mode to merge"
            )
        self._take_off.pop(parameter)()
        return self._beside(y, x, self._acting(parameter)) if parameter == "weight" else y

    def _with_weight(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        acting = [] if "weight" in self._take_off else self._acting("weight")
        if not acting:
            return forward(*args, **kwargs)
        if not all(is_operator(self.module, update) for update, _ in acting):
            return self._beside(forward(*args, **kwargs), forwards.first(args, kwargs), acting)
        if len(args) + len(kwargs) > 1:  # a convolution told how to pad, say
            if self.castable and (cast := self._recast(acting, forward, *args, **kwargs)) is not None:
                return cast
            raise LoHaError(
                f"{self.path}: a {type(self.module).__name__} is called with more than its input, which live mode does "
                "not understand; set the LoHa node's mode to merge"
            )
        x = forwards.first(args, kwargs)
        plain = x.dequantize() if hasattr(x, "_qdata") else x
        if self.castable and not self._adding_is_cheaper(plain):
            if (cast := self._recast(acting, forward, x)) is not None:
                return cast
            self.castable = False  # its class has a forward that asks nobody
        return self._operated(forward, x, plain, acting)

    def _recast(self, acting: Acting, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """(W + s·ΔW)·x from the copy of W that ComfyUI casts for this call; None if it casts none."""
        asked = False

        def function(weight: Tensor) -> Tensor:
            nonlocal asked
            asked = True
            return changed(weight, acting, f"{self.path}.weight")

        with weights.adapted(self.module, {"weight": function}):
            y = forward(*args, **kwargs)
        return y if asked else None

    def _beside(self, y: Tensor, x: Tensor, acting: Acting) -> Tensor:
        """y + (W' − W)·x."""
        weight = weights.dense(self.module, device=y.device)
        difference = changed(weight, acting, f"{self.path}.weight").sub_(weight).to(y.dtype)
        if not self.is_conv:
            return y + F.linear(x.to(y.dtype), difference)
        module: Any = self.module
        return y + module._conv_forward(x.to(y.dtype), difference, None)  # type: ignore[no-any-return]

    def _operated(self, forward: Callable[..., Tensor], x: Tensor, plain: Tensor, acting: Acting) -> Tensor:
        """The layer with these updates, the last of them around the others; ``plain`` is x if that is quantised."""
        if not acting:
            return forward(x)
        *below, (update, strength) = acting
        factors = update.factors(plain.device)
        if factors.dora_scale is None:
            y = self._operated(forward, x, plain, below)
            return self._added(y, self._product(plain, factors, update.part, strength), update.part)
        ratio = update.ratio(tuple(s for _, s in below), lambda: self._weight(plain.device, below))
        gain = torch.lerp(torch.ones_like(ratio), ratio, strength)
        axis = update.axis(weights.shape(self.module))
        if axis == 0:
            y = self._gained(self._operated(forward, x, plain, below), gain, update.part)
        else:
            scaled = plain * self._along(gain, plain)
            y = self._operated(forward, scaled, scaled, below)
        turned = scaled_by(factors, ratio, axis, weights.kernel(self.module))
        return self._added(y, self._product(plain, turned, update.part, strength), update.part)

    def _weight(self, device: torch.device, below: Acting) -> Tensor:
        return changed(weights.dense(self.module, device=device), below, f"{self.path}.weight")

    def _product(self, x: Tensor, factors: LoHaFactors, part: Part, strength: float) -> Tensor:
        """s·ΔW·x, by U and V where this was chosen over W + s·ΔW, else the cheaper way."""
        path: Any = "khatri-rao" if self.castable else "auto"
        if part is not None and part[0] == 1:
            x = x.narrow(self._channels(x), *part[1:])
        if not self.is_conv:
            return loha_linear(x, factors, strength=strength, path=path)
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
            path=path,
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
            found = [update.loha for update in self.updates["weight"] if update.loha is not None]
            self._cheaper[tokens] = cheaper_to_add(self.module, found, tokens)
        return self._cheaper[tokens]


def is_operator(module: nn.Module, update: Update) -> bool:
    """Whether an update of a weight acts by the equations above."""
    if update.loha is None or not (weights.is_linear(module) or weights.is_convolution(module)):
        return False
    if update.part is None:
        return True
    if getattr(module, "groups", 1) != 1:
        return False
    # A part's columns, or rows, are not all of those that the other axis' magnitudes act on.
    return not update.is_dora or update.axis(weights.shape(module)) == update.part[0] == 0


def why_not_live(module: nn.Module, parameter: str, updates: Iterable[Update]) -> str | None:
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


def changed(weight: Tensor, acting: Acting, key: str) -> Tensor:
    """``weight`` with all updates, as a new tensor; neighbouring LoHas in one pass, rounded once."""
    if not acting:
        return weight
    lohas = [update.factors(weight.device) for update, _ in acting if update.loha is not None and update.part is None]
    strengths = [strength for _, strength in acting]
    if len(lohas) == len(acting) and all(factors.dora_scale is None for factors in lohas):
        return add_delta_(torch.empty_like(weight), lohas, strengths, source=weight)
    wide = weight.to(algebra.compute_dtype(weight), copy=True)
    for n, (update, strength) in enumerate(acting):
        if update.loha is None:
            patch = update.entry.native(strength)
            wide = comfy.lora.calculate_weight([patch], wide, key, intermediate_dtype=torch.float32)
        elif update.is_dora:
            _turn(narrowed(wide, update.part), update, strength, update.ratio(tuple(strengths[:n]), wide.clone))
        else:
            add_delta_(narrowed(wide, update.part), update.factors(wide.device), strength)
    return wide.to(weight.dtype)


def _turn(weight: Tensor, update: Update, strength: float, ratio: Tensor) -> None:
    """W + s(W' − W) = (1−s+s·c)∘W + s·(c∘ΔW) with DoRA's c, in place."""
    factors = update.factors(weight.device)
    assert factors.dora_scale is not None
    axis = algebra.dora_axis(factors.dora_scale, tuple(weight.shape))
    gain = torch.lerp(torch.ones_like(ratio), ratio, strength)
    weight.mul_(gain.reshape([-1 if d == axis else 1 for d in range(weight.dim())]))
    add_delta_(weight, scaled_by(factors, ratio, axis, prod(weight.shape[2:])), strength)


def scaled_by(factors: LoHaFactors, ratio: Tensor, axis: int, kernel: int) -> LoHaFactors:
    """Plain factors of c∘ΔW, c along the outputs (axis 0) or the inputs."""
    factors = replace(factors, dora_scale=None)
    if axis == 0:
        a = factors.w1_a.to(ratio.dtype)
        return replace(factors, w1_a=a * (ratio if factors.is_tucker else ratio[:, None]))
    columns = ratio if factors.is_tucker else ratio.repeat_interleave(kernel)
    return replace(factors, w1_b=factors.w1_b.to(ratio.dtype) * columns)


def cheaper_to_add(module: nn.Module, lohas: Iterable[LoHaFactors], tokens: int) -> bool:
    """Whether U(V·x) costs less than ΔW, for a layer's LoHas together."""
    add = rewrite = 0.0
    weight: Any = module.weight
    kernel = tuple(getattr(module, "kernel_size", ()))
    for factors in lohas:
        cost = estimate(
            factors.shape[0],
            factors.shape[1] if factors.is_tucker else factors.shape[1] // max(1, prod(kernel)),
            factors.rank,
            tokens,
            kernel,
            groups=getattr(module, "groups", 1),
            tucker=factors.is_tucker,
            training=False,
            itemsize=max(2, weight.element_size()),
            device=weight.device.type,
        )
        add, rewrite = add + cost.cost("khatri-rao"), rewrite + cost.cost("rebuild")
    return add <= rewrite
