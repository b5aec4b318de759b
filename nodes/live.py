"""Live strength: the base weights stay as they are, and each layer adds its adapters as it runs.

A layer's forward is replaced while the model is loaded (ComfyUI's `PatcherInjection`). It takes the cheaper of two
ways, by `loha_core.paths`: W·x + s·U(V·x) with the base's own forward, or W + s·ΔW made from the copy of W that
ComfyUI casts for this call. A new strength is a new float in the injection; nothing is unloaded or copied.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import Tensor, nn

from loha_core import LoHaError, LoHaFactors, add_delta_, algebra
from loha_core.bind import weight_key
from loha_core.functional import loha_conv, loha_linear
from loha_core.paths import estimate

from .patches import LoHaPatch, Patch

KEY = "loha"  # one injection for all live adapters of a model

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Clock:
    """How far sampling has come, 0…1; set before each call of the diffusion model."""

    percent: float = 0.0

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper around ``apply_model``; t is sigma."""
        self.percent = percent_of(float(t.max()), executor.class_obj.model_sampling)
        return executor(x, t, *args, **kwargs)


def percent_of(sigma: float, model_sampling: Any) -> float:
    """The inverse of ``percent_to_sigma``, which falls from percent 0 to 1; by bisection, for every kind of model."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return (low + high) / 2


@dataclass
class Entry:
    """One live update of one weight."""

    patch: Patch
    strength: float
    schedule: Callable[[float], float] | None
    clock: Clock
    # Made when first needed, kept while the model stays loaded:
    moved: LoHaFactors | None = None
    ratio: Tensor | None = None  # DoRA's m/‖W+ΔW‖

    def now(self) -> float:
        """The strength at this moment of sampling."""
        strength = self.strength * self.patch.share
        return strength * self.schedule(self.clock.percent) if self.schedule else strength

    @property
    def is_loha(self) -> bool:
        """A LoHa for a weight, not for a slice of one."""
        return isinstance(self.patch.update, LoHaPatch) and isinstance(self.patch.target, str)

    @property
    def is_dora(self) -> bool:
        return self.is_loha and self.patch.update.factors.dora_scale is not None

    def factors(self, device: torch.device) -> LoHaFactors:
        if self.moved is None or self.moved.w1_a.device != device:
            self.moved = self.patch.update.factors.to(device=device)
        return self.moved

    def native(self, strength: float) -> tuple[Any, ...]:
        """As ``ModelPatcher.patches`` holds it."""
        target = self.patch.target
        offset, function = (None, None) if isinstance(target, str) else (*target[1:], None)[:2]
        return (strength, self.patch.update, 1.0, offset, function)


class Live(PatcherInjection):
    """All live adapters of one patcher.

    Several patchers (clones) share one model, and at most one Live is active on it. ComfyUI ejects a patcher's
    injection when it loads another; what it does not do is eject when a patcher dies, so that is seen to here.
    """

    _active: weakref.WeakKeyDictionary[nn.Module, Live] = weakref.WeakKeyDictionary()

    def __init__(self, entries: tuple[Entry, ...], clock: Clock) -> None:
        super().__init__(inject=self._inject, eject=self._eject)
        self.entries, self.clock = entries, clock
        self.layers: list[LiveLayer] = []
        self.owner = 0  # id of the patcher that injected

    def by_key(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            found[weight_key(entry.patch.target)].append(entry)
        return found

    def _inject(self, patcher: Any) -> None:
        if (other := Live._active.get(patcher.model)) is not None:
            other.end(patcher.model)
        modules: dict[str, dict[str, list[Entry]]] = defaultdict(dict)
        for key, entries in self.by_key().items():
            path, _, parameter = key.rpartition(".")
            modules[path][parameter] = [replace(entry, moved=None, ratio=None) for entry in entries]
        self.layers = [LiveLayer(comfy.utils.get_attr(patcher.model, path), path, p) for path, p in modules.items()]
        self.owner = id(patcher)
        Live._active[patcher.model] = self

    def _eject(self, patcher: Any) -> None:
        if Live._active.get(patcher.model) is self:
            self.end(patcher.model)

    def end(self, model: nn.Module) -> None:
        """Give every layer its own forward back."""
        for layer in self.layers:
            layer.restore()
        self.layers = []
        Live._active.pop(model, None)

    def watch(self, patcher: Any) -> None:
        """End with ``patcher``, if it is the one that injected when it dies."""
        weakref.finalize(patcher, _end_with, weakref.ref(self), weakref.ref(patcher.model), id(patcher)).atexit = False


def _end_with(live: weakref.ref[Live], model: weakref.ref[nn.Module], patcher: int) -> None:
    this, that = live(), model()
    if this is not None and that is not None and Live._active.get(that) is this and this.owner == patcher:
        this.end(that)


class LiveLayer:
    """Stands in for a module's forward."""

    def __init__(self, module: nn.Module, path: str, parameters: dict[str, list[Entry]]) -> None:
        self.module, self.path, self.parameters = module, path, parameters
        self.forward = module.forward  # perhaps another pack's replacement: it stays in place beneath
        self.was_replaced = "forward" in vars(module)
        module.forward = self  # type: ignore[method-assign, assignment]
        simple = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and parameters.keys() == {"weight"}
        self.additive = simple and all(e.is_loha and not e.is_dora for e in parameters["weight"])
        self.choices: dict[int, bool] = {}

    def restore(self) -> None:
        if self.was_replaced:
            self.module.forward = self.forward  # type: ignore[method-assign]
        else:
            del self.module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = {
            parameter: [(entry, entry.now()) for entry in entries] for parameter, entries in self.parameters.items()
        }
        if all(strength == 0 for entries in acting.values() for _, strength in entries):
            return self.forward(x, *args, **kwargs)
        if self.additive and (not hasattr(self.module, "weight_function") or self._adding_is_cheaper(x)):
            return self._add(self.forward(x, *args, **kwargs), x, acting["weight"])
        return self._rewrite(acting, x, *args, **kwargs)

    # --- W·x + s·U(V·x) ---

    def _adding_is_cheaper(self, x: Tensor) -> bool:
        tokens = x.numel() // x.shape[1 if isinstance(self.module, _CONVOLUTIONS) else -1]
        if tokens not in self.choices:
            self.choices[tokens] = cheaper_to_add(self.module, (e.patch for e in self.parameters["weight"]), tokens)
        return self.choices[tokens]

    def _add(self, y: Tensor, x: Tensor, acting: Sequence[tuple[Entry, float]]) -> Tensor:
        for entry, strength in acting:
            if strength != 0:
                update = self._update(x, entry.factors(x.device), strength).to(y.dtype)
                y = y + update if torch.is_grad_enabled() else y.add_(update)
        return y

    def _update(self, x: Tensor, factors: LoHaFactors, strength: float) -> Tensor:
        if not isinstance(self.module, _CONVOLUTIONS):
            return loha_linear(x, factors, strength=strength, path="khatri-rao")
        m: Any = self.module
        padding = m.padding
        if m.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x, padding = nn.functional.pad(x, m._reversed_padding_repeated_twice, mode=mode), 0
        return loha_conv(
            x,
            factors,
            kernel_size=m.kernel_size,
            stride=m.stride,
            padding=padding,
            dilation=m.dilation,
            groups=m.groups,
            strength=strength,
            path="khatri-rao",
        )

    # --- (W + s·ΔW)·x ---

    def _rewrite(self, acting: dict[str, list[tuple[Entry, float]]], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Through the module's own forward: ComfyUI hands the copy of W that it casts to its ``weight_function``."""
        seen: set[str] = set()

        def function_for(parameter: str) -> Callable[[Tensor], Tensor]:
            def adapt(weight: Tensor) -> Tensor:
                seen.add(parameter)
                return _adapted(weight, acting[parameter], f"{self.path}.{parameter}")

            return adapt

        before = {parameter: getattr(self.module, f"{parameter}_function", None) for parameter in acting}
        try:
            for parameter, functions in before.items():
                if functions is not None:
                    setattr(self.module, f"{parameter}_function", [*functions, function_for(parameter)])
            y = self.forward(x, *args, **kwargs)
        finally:
            for parameter, functions in before.items():
                if functions is not None:
                    setattr(self.module, f"{parameter}_function", functions)
        missed = [parameter for parameter, entries in acting.items() if entries and parameter not in seen]
        if missed == ["weight"] and self.additive:
            return self._add(y, x, acting["weight"])  # a layer that keeps its weight to itself, such as GGUF's
        if missed:
            raise LoHaError(
                f"{self.path}: a {type(self.module).__name__} does not let go of its {missed[0]}, and this update "
                "cannot be added to its output; set the LoHa node's mode to merge"
            )
        return y


def _adapted(weight: Tensor, acting: Sequence[tuple[Entry, float]], key: str) -> Tensor:
    """``weight`` (ComfyUI's copy) with all updates; neighbouring LoHas in one pass, rounded once."""
    dtype = weight.dtype
    stack: list[tuple[LoHaFactors, float]] = []
    if len(acting) > 1:
        weight = weight.to(algebra.compute_dtype(weight))

    def add(weight: Tensor) -> Tensor:
        weight = add_delta_(weight, [f for f, _ in stack], [s for _, s in stack])
        stack.clear()
        return weight

    steady = True  # nothing that changes with sampling comes before
    for entry, strength in acting:
        if strength == 0:
            pass
        elif entry.is_dora and steady:
            weight = _dora(add(weight), entry, strength)
        elif entry.is_loha:
            stack.append((entry.factors(weight.device), strength))
        else:
            patch = entry.native(strength)
            weight = comfy.lora.calculate_weight([patch], add(weight), key, intermediate_dtype=torch.float32)
        steady = steady and entry.schedule is None
    return add(weight).to(dtype)


def _dora(weight: Tensor, entry: Entry, strength: float) -> Tensor:
    """W + s(W' − W) = (1−s+s·c)∘W + s·(c∘ΔW) with c = m/‖W+ΔW‖ known: c∘ΔW is a plain LoHa, its w1 scaled by c."""
    factors = entry.factors(weight.device)
    assert factors.dora_scale is not None
    axis = algebra.dora_axis(factors.dora_scale, tuple(weight.shape))
    plain = replace(factors, dora_scale=None)
    wide = weight.to(algebra.compute_dtype(weight), copy=True)
    if entry.ratio is None:
        magnitude = factors.dora_scale.to(wide).reshape([-1 if d == axis else 1 for d in range(wide.dim())])
        norm = algebra.dora_norm(add_delta_(wide.clone(), plain), axis)
        entry.ratio = magnitude / norm.clamp_min(torch.finfo(wide.dtype).tiny)
    wide.mul_(1 - strength + strength * entry.ratio)
    scaled = _scaled(plain, entry.ratio.flatten(), axis, prod(weight.shape[2:]))
    return add_delta_(wide, scaled, strength).to(weight.dtype)


def _scaled(factors: LoHaFactors, ratio: Tensor, axis: int, kernel: int) -> LoHaFactors:
    """Factors of c∘ΔW, c along the outputs or the inputs."""
    if axis == 0:
        a = factors.w1_a.to(ratio.dtype)
        return replace(factors, w1_a=a * (ratio if factors.is_tucker else ratio[:, None]))
    columns = ratio if factors.is_tucker else ratio.repeat_interleave(kernel)
    return replace(factors, w1_b=factors.w1_b.to(ratio.dtype) * columns)


def cheaper_to_add(module: nn.Module, patches: Iterable[Patch], tokens: int) -> bool:
    """Whether U(V·x) costs less than ΔW, for a layer's LoHas together."""
    add = rewrite = 0.0
    weight: Any = module.weight
    kernel = tuple(getattr(module, "kernel_size", ()))
    for patch in patches:
        factors = patch.update.factors
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


# --- on a ModelPatcher ---------------------------------------------------------------------------


def apply(
    patcher: Any, patches: Iterable[Patch], strength: float, schedule: Callable[[float], float] | None = None
) -> Any:
    """A clone of ``patcher`` with the updates live, on top of those it has; ``patcher`` itself at strength 0.

    Raises:
        LoHaError: an update of a parameter that live mode cannot reach.
    """
    wanted = [patch for patch in patches if patch.share * strength != 0]
    if not wanted:
        return patcher
    if problem := obstacle(patcher, wanted):
        raise LoHaError(f"{problem}; set mode to merge")
    before = of(patcher) or Live((), Clock())
    new = tuple(Entry(patch, strength, schedule, before.clock) for patch in wanted)
    clone = patcher.clone()
    clone.set_injections(KEY, [Live((*before.entries, *new), before.clock)])
    if schedule is not None and KEY not in clone.wrappers.get(WrappersMP.APPLY_MODEL, {}):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, before.clock)
    if not before.entries:
        clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda _, new: _guard(new))
        clone.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _refuse_to_save)
    _guard(clone)
    return clone


def of(patcher: Any) -> Live | None:
    """A patcher's live adapters."""
    injections = patcher.get_injections(KEY)
    return injections[0] if injections else None


def obstacle(patcher: Any, patches: Iterable[Patch]) -> str | None:
    """Why some update cannot be live, or None."""
    for key in (weight_key(patch.target) for patch in patches):
        path, _, parameter = key.rpartition(".")
        module = comfy.utils.get_attr(patcher.model, path)
        known = hasattr(module, f"{parameter}_function") or isinstance(module, (nn.Linear, *_CONVOLUTIONS))
        if parameter not in ("weight", "bias") or not known:
            return f"live mode cannot reach {key}, which is used outside of a layer of its own"
    return None


def overhead(patcher: Any, patches: Iterable[Patch], tokens: int = 1024) -> float:
    """What live costs beside the layers' own work, estimated for ``tokens`` of input: 0.1 is a tenth more."""
    extra = own = 0.0
    for patch in patches:
        if isinstance(patch.update, LoHaPatch):
            factors = patch.update.factors
            out, columns = factors.shape[0], prod(factors.shape[1:])
            cost = estimate(out, columns, factors.rank, tokens, training=False, device=patcher.load_device.type)
            extra += cost.cost(cost.best)
            own += 2.0 * tokens * out * columns
    return extra / own if own else 0.0


_SAVING = (
    "this model carries a live LoHa, which is not in its weights: saving would lose it. "
    "Set mode to merge on the LoHa node, then save."
)


class _CarriesLive:
    """Mixed into the class of a patcher with live adapters: where ComfyUI asks for weights, they are among them."""

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """What ComfyUI's model merges read: each weight and its patches."""
        found = super().get_key_patches(filter_prefix)  # type: ignore[misc]
        live = of(self)
        for key, entries in live.by_key().items() if live else ():
            if key in found:
                if any(entry.schedule for entry in entries):
                    raise LoHaError("a LoHa with a schedule has no single strength to merge into a model with")
                found[key] = [*found[key], *(entry.native(entry.now()) for entry in entries)]
        return found

    def model_state_dict_for_saving(self, *_: Any, **__: Any) -> Any:
        """What save nodes of ComfyUI 0.33 read."""
        raise LoHaError(_SAVING)


@cache
def _carrying(patcher_class: type) -> type:
    return type(f"Live{patcher_class.__name__}", (_CarriesLive, patcher_class), {})


def _guard(patcher: Any) -> None:
    """See to a new clone with live adapters."""
    live = of(patcher)
    if live is None:
        return
    if not isinstance(patcher, _CarriesLive):
        patcher.__class__ = _carrying(type(patcher))  # type: ignore[arg-type]
    patcher.is_injected = False  # a clone of an injected patcher is not injected itself, though ComfyUI copies the flag
    live.watch(patcher)


def _refuse_to_save(patcher: Any, device: Any, memory: Any, force_patch_weights: bool, full_load: bool) -> None:
    """Save nodes of ComfyUI 0.3.75 load with force_patch_weights, then write the weights."""
    if force_patch_weights and of(patcher):
        raise LoHaError(_SAVING)
