"""One live update of one weight: what it is, how strong it is now, and what it makes of the weight.

W' is W + ΔW, and with DoRA c∘(W + ΔW), c = m/‖W+ΔW‖. At strength s a weight becomes W + s(W' − W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import comfy.lora
import torch
from comfy.hooks import Hook
from torch import Tensor

from loha_core import LoHaError, LoHaFactors, add_delta_, algebra

from .patches import LoHaPatch, Part, Patch, Strength, part_of, reordered
from .regions import Region


class SamplingCall:
    """What the diffusion model is asked at this moment of sampling.

    A wrapper of ComfyUI's around ``apply_model`` sets it before each call: `KEY` in a patcher's wrappers. Where regions
    act, another around ``predict_noise`` (`of_sampler`) sees the latents that areas, tiles and windows are parts of.

    Attributes:
        shape: of the latents, (rows, channels, …, height, width); () outside a call.
        chunks: conditionings that the rows hold one after the other, each for all pictures of the batch.
        whole: the shape of the latents that the sampler holds; () where that is not known.
        context: how many tokens of text there are.
        inputs: the other inputs of ``apply_model`` that are given.
        options: transformer_options.
        patcher: gives the patcher whose adapters act.
    """

    shape: tuple[int, ...] = ()
    chunks: int = 1
    whole: tuple[int, ...] = ()
    context: int = 0
    inputs: frozenset[str] = frozenset()
    options: Mapping[str, Any] = MappingProxyType({})
    patcher: Callable[[], Any] = staticmethod(lambda: None)
    _moment: Callable[[], float] = staticmethod(lambda: 0.0)

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> Any:
        """ComfyUI's wrapper around ``apply_model``; t is sigma."""
        self.shape, self.options = tuple(x.shape), transformer_options
        self.chunks = len(transformer_options.get("cond_or_uncond", ())) or 1
        self.context = c_crossattn.shape[1] if c_crossattn is not None and c_crossattn.dim() > 1 else 0
        self.inputs = frozenset(
            name for name, value in kwargs.items() if value is not None and not (isinstance(value, list) and not value)
        )
        self._moment = cache(lambda: percent_of(float(t.max()), executor.class_obj.model_sampling))
        try:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        finally:
            self.shape = ()

    def of_sampler(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper around ``predict_noise``."""
        self.whole = tuple(x.shape)
        try:
            return executor(x, *args, **kwargs)
        finally:
            self.whole = ()

    @property
    def pictures(self) -> int:
        """How many pictures the batch has: row i of the latents is of picture i % pictures. 0 outside a call."""
        return self.shape[0] // self.chunks if self.shape else 0

    @property
    def percent(self) -> float:
        """How far sampling has come, 0…1."""
        return self._moment()


def percent_of(sigma: float, model_sampling: Any) -> float:
    """The inverse of ``percent_to_sigma``, which falls from percent 0 to 1; by bisection, for every kind of model."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return (low + high) / 2


def agreed(counts: Iterable[int | None]) -> int | None:
    """For how many pictures all of these are; None if for any number.

    Raises:
        LoHaError: they are for different numbers.
    """
    found = sorted({count for count in counts if count is not None})
    if len(found) > 1:
        raise LoHaError(
            f"strengths or masks for {found[0]} pictures meet some for {found[1]}; expected one per picture"
        )
    return found[0] if found else None


def pictures_of(*strengths: Strength) -> int | None:
    """For how many pictures these are; None if for any number. Raises as `agreed`."""
    return agreed(len(strength) if isinstance(strength, tuple) else None for strength in strengths)


def strength_of(strength: Strength, picture: int) -> float:
    return strength[picture] if isinstance(strength, tuple) else strength


def acts(*strengths: Strength) -> bool:
    """Whether the product is other than 0 for some picture."""
    return any(prod(strength_of(s, picture) for s in strengths) for picture in range(pictures_of(*strengths) or 1))


@dataclass
class LiveUpdate:
    """One live update of one weight, as a patcher and its clones hold it."""

    patch: Patch
    strength: Strength = 1.0
    schedule: Callable[[float], float] | None = None
    call: SamplingCall = field(default_factory=SamplingCall)
    region: Region | None = None  # where in the picture it acts
    hook: Hook | None = None  # acts only for conditionings that carry it, as strongly as its keyframes say there

    @cached_property
    def pictures(self) -> int | None:
        """How many pictures there are strengths or masks for; None where one is for all."""
        masks = self.region.pictures if self.region else None
        return agreed((pictures_of(self.strength, self.patch.block_strength), masks))

    @property
    def varies(self) -> bool:
        """Whether one strength does not say what it is."""
        return self.pictures is not None or self.region is not None

    def strength_now(self, picture: int = 0) -> float:
        """The strength at this moment of sampling, on one picture of the batch."""
        strength = strength_of(self.strength, picture) * strength_of(self.patch.block_strength, picture)
        if self.hook is not None:
            hooks = self.call.patcher().current_hooks
            strength *= sum(float(hook.strength) for hook in (hooks.hooks if hooks else ()) if hook == self.hook)
        return strength * self.schedule(self.call.percent) if self.schedule else strength

    def native(self, strength: float) -> tuple[Any, ...]:
        """As ``ModelPatcher.patches`` holds it."""
        target = self.patch.target
        offset, function = (None, None) if isinstance(target, str) else (*target[1:], None)[:2]
        return (strength, self.patch.update, 1.0, offset, function)


class ActingUpdate:
    """An update while it acts on a layer: its factors on the layer's device, and DoRA's c."""

    def __init__(self, live: LiveUpdate) -> None:
        self.live = live
        self.part = part_of(live.patch.target)
        self._on_device: LoHaFactors | None = None
        self._ratio: tuple[tuple[float, ...], Tensor] | None = None

    @cached_property
    def loha(self) -> LoHaFactors | None:
        """The factors, in the order of the weight's rows; None for other kinds of adapters."""
        update = self.live.patch.update
        return reordered(update.factors, self.live.patch.target) if isinstance(update, LoHaPatch) else None

    @property
    def is_dora(self) -> bool:
        return self.loha is not None and self.loha.dora_scale is not None

    def factors(self, device: torch.device) -> LoHaFactors:
        if self._on_device is None or self._on_device.w1_a.device != device:
            assert self.loha is not None
            # Autograd, when something is trained on top, keeps no tensors that were made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                moved = {name: t.to(device) for name, t in self.loha.tensors().items()}
                tensors: dict[str, Any] = {name: t.clone() if t.is_inference() else t for name, t in moved.items()}
            self._on_device = replace(self.loha, **tensors)
        return self._on_device

    def dora_axis(self, weight_shape: Sequence[int]) -> int:
        """Along which DoRA's magnitudes lie."""
        assert self.loha is not None and self.loha.dora_scale is not None
        shape = [self.part[2] if self.part and axis == self.part[0] else n for axis, n in enumerate(weight_shape)]
        return algebra.dora_axis(self.loha.dora_scale, tuple(shape))

    def ratio(self, strengths_before: tuple[float, ...], weight: Callable[[], Tensor]) -> Tensor:
        """DoRA's c, (o,) or (i,); ``weight`` is only called when the strengths of the updates before have changed."""
        if self._ratio is None or self._ratio[0] != strengths_before:
            with torch.inference_mode(False), torch.no_grad():
                self._ratio = (strengths_before, self._ratio_of(weight()))
        return self._ratio[1]

    def _ratio_of(self, weight: Tensor) -> Tensor:
        factors = self.factors(weight.device)
        assert factors.dora_scale is not None
        part = narrowed(weight, self.part)
        axis = algebra.dora_axis(factors.dora_scale, tuple(part.shape))
        wide = part.to(algebra.compute_dtype(weight), copy=True)
        norm = algebra.dora_norm(add_delta_(wide, replace(factors, dora_scale=None)), axis).flatten()
        return factors.dora_scale.to(wide).flatten() / norm.clamp_min(torch.finfo(wide.dtype).tiny)


Active = Sequence[tuple[ActingUpdate, float]]
"""Updates with their strengths now, none of them 0."""


def narrowed(weight: Tensor, part: Part) -> Tensor:
    return weight if part is None else weight.narrow(*part)


def updated(weight: Tensor, active: Active, key: str) -> Tensor:
    """``weight`` with all updates, as a new tensor; neighbouring LoHas in one pass, rounded once."""
    if not active:
        return weight
    lohas = [update.factors(weight.device) for update, _ in active if update.loha is not None and update.part is None]
    strengths = [strength for _, strength in active]
    if len(lohas) == len(active) and all(factors.dora_scale is None for factors in lohas):
        return add_delta_(torch.empty_like(weight), lohas, strengths, source=weight)
    wide = weight.to(algebra.compute_dtype(weight), copy=True)
    for n, (update, strength) in enumerate(active):
        if update.loha is None:
            patch = update.live.native(strength)
            wide = comfy.lora.calculate_weight([patch], wide, key, intermediate_dtype=torch.float32)
        elif update.is_dora:
            ratio = update.ratio(tuple(strengths[:n]), wide.clone)
            _add_dora_(narrowed(wide, update.part), update.factors(wide.device), strength, ratio)
        else:
            add_delta_(narrowed(wide, update.part), update.factors(wide.device), strength)
    return wide.to(weight.dtype)


def _add_dora_(weight: Tensor, factors: LoHaFactors, strength: float, ratio: Tensor) -> None:
    """W + s(W' − W) = (1−s+s·c)∘W + s·(c∘ΔW), in place."""
    assert factors.dora_scale is not None
    axis = algebra.dora_axis(factors.dora_scale, tuple(weight.shape))
    gain = torch.lerp(torch.ones_like(ratio), ratio, strength)
    weight.mul_(gain.reshape([-1 if d == axis else 1 for d in range(weight.dim())]))
    add_delta_(weight, scaled_delta(factors, ratio, axis, prod(weight.shape[2:])), strength)


def scaled_delta(factors: LoHaFactors, ratio: Tensor, axis: int, kernel: int) -> LoHaFactors:
    """Plain factors of c∘ΔW, c along the outputs (axis 0) or the inputs; ``kernel`` is its number of elements."""
    factors = replace(factors, dora_scale=None)
    if axis == 0:
        a = factors.w1_a.to(ratio.dtype)
        return replace(factors, w1_a=a * (ratio if factors.is_tucker else ratio[:, None]))
    columns = ratio if factors.is_tucker else ratio.repeat_interleave(kernel)
    return replace(factors, w1_b=factors.w1_b.to(ratio.dtype) * columns)
