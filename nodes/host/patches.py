"""An adapter's updates as ComfyUI's patches: names to weights, factors to `WeightAdapterBase`."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from loha_core import Adapter, LoHaError, LoHaFactors, Network, Report, add_delta_, algebra, bind
from loha_core.adapter import split_key
from loha_core.bind import Target, weight_key, why_unmatched
from loha_core.naming.parts import rows_of

from . import weights

MODEL, CLIP = "MODEL", "CLIP"
# What ComfyUI knows of the names that files use.
_KEYS = (comfy.lora.model_lora_keys_unet, comfy.lora.model_lora_keys_clip)
Layer = tuple[str, Target, Any]  # name in the file, weight, update
Part = tuple[int, int, int] | None  # axis, start, length; None is all of a weight
Strength = float | tuple[float, ...]  # one for all pictures of a batch, or one for each
Blocks = Callable[[str, str], Strength]  # (weight key, name in the file) -> multiplier of the strength


class Term(NamedTuple):
    """strength · ΔW of one LoHa: LoHaFactors' fields in their order, flat as ComfyUI's own adapters have them."""

    strength: float
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None
    t2: Tensor | None
    dora_scale: Tensor | None


class LoHaPatch(WeightAdapterBase):
    """LoHas as ComfyUI patches them into a weight, wherever and in whatever dtype ComfyUI loads that weight.

    Newer ComfyUI rebuilds adapters as ``type(a)(keys, weights)``, with plain tuples of moved tensors.
    """

    name = "loha"

    def __init__(self, loaded_keys: set[str], weights: Iterable[tuple[Any, ...]]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = tuple(Term(*term) for term in weights)

    @classmethod
    def from_factors(cls, f: LoHaFactors) -> LoHaPatch:
        return cls(set(), [Term(1.0, f.w1_a, f.w1_b, f.w2_a, f.w2_b, f.alpha, f.t1, f.t2, f.dora_scale)])

    @cached_property
    def lohas(self) -> list[LoHaFactors]:
        return [LoHaFactors(*term[1:]) for term in self.weights]

    @property
    def factors(self) -> LoHaFactors:
        """Of a patch that holds one LoHa."""
        [factors] = self.lohas
        return factors

    def scaled(self, strength: float) -> tuple[Term, ...]:
        """``weights`` with all strengths multiplied."""
        return tuple(term._replace(strength=strength * term.strength) for term in self.weights)

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple[int, int, int] | None,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """Add strength·ΔW (or DoRA's interpolation) to ``weight`` in place, in one pass, and return it."""
        lohas = [factors.to(device=weight.device) for factors in self.lohas]
        strengths = [strength * term.strength for term in self.weights]
        if _is_identity(function):
            return add_delta_(weight, lohas, strengths)
        for factors, each in zip(lohas, strengths, strict=True):
            _add_reordered_(weight, factors, each, function)
        return weight


def _add_reordered_(
    weight: Tensor, factors: LoHaFactors, strength: float, function: Callable[[Tensor], Tensor]
) -> None:
    """ComfyUI reorders the outputs of some weights (adaLN halves); magnitudes along the outputs go with them."""
    update = function(factors.delta().reshape(weight.shape))
    wide = weight.to(update.dtype)
    if factors.dora_scale is None:
        weight.copy_(wide.add_(update, alpha=strength))
        return
    magnitude = factors.dora_scale
    if algebra.dora_axis(magnitude, tuple(weight.shape)) == 0:
        magnitude = function(magnitude.reshape(-1, *[1] * (weight.dim() - 1)))
    weight.copy_(torch.lerp(wide, algebra.dora(wide, update, magnitude), strength))


def part_of(target: Target) -> Part:
    """The slice of a weight that a target is."""
    return None if isinstance(target, str) or target[1] is None else tuple(target[1])


def reordered(factors: LoHaFactors, target: Target) -> LoHaFactors | None:
    """Factors whose outputs are in the weight's order; None where ComfyUI's function does not permute them."""
    function = None if isinstance(target, str) or len(target) < 3 else target[2]
    if function is None or _is_identity(function):
        return factors
    out = factors.shape[0]
    order = function(torch.arange(out, dtype=torch.float32).unsqueeze(1)).long()
    if order.shape != (out, 1) or not torch.equal(order.flatten().sort().values, torch.arange(out)):
        return None
    permuted = rows_of("", factors, order.flatten(), is_whole=True)
    assert isinstance(permuted, LoHaFactors)
    return permuted


def _is_identity(function: Callable[[Tensor], Tensor]) -> bool:
    probe = torch.empty(2, 1)
    return function(probe) is probe


@dataclass
class Patch:
    """One update of one weight: where ComfyUI's ``add_patches`` would put it, what it is, and its block's strength."""

    target: Target
    update: Any  # LoHaPatch, or what comfy.lora.load_lora makes of other adapters
    block_strength: Strength  # multiplies the network's; only live mode has one per picture


@dataclass
class Bound:
    """An adapter's updates of each network, checked but not yet applied."""

    patches: dict[str, list[Patch]]
    report: Report


def find(adapter: Adapter, model: Any, clip: Any, blocks: Blocks = lambda key, name: 1.0) -> Bound:
    """Where the adapter's updates belong in ``model`` and ``clip``, either of which may be None.

    Args:
        blocks: (weight key, name in the file) -> multiplier of the strength.

    Raises:
        LoHaError: nothing in the file matches, or a shape does not fit.
    """
    modules = (None if model is None else model.model, None if clip is None else clip.cond_stage_model)
    cached = _bound.get(adapter)
    if cached is None or any(ref() is not module for ref, module in zip(cached[0], modules, strict=True)):
        cached = _bound[adapter] = (tuple(map(_reference, modules)), *_find(adapter, modules))
    _, networks, report = cached
    patches = {
        label: [Patch(target, update, blocks(weight_key(target), name)) for name, target, update in layers]
        for label, layers in networks.items()
    }
    return Bound(patches, replace(report, notes=list(report.notes)))


# Adapter -> the modules it was last bound to, its layers and the report: strengths change much more often than these.
_bound: weakref.WeakKeyDictionary[Adapter, tuple[Any, dict[str, list[Layer]], Report]] = weakref.WeakKeyDictionary()


def _reference(module: Any) -> Callable[[], Any]:
    return (lambda: None) if module is None else weakref.ref(module)


def _find(adapter: Adapter, modules: tuple[Any, Any]) -> tuple[dict[str, list[Layer]], Report]:
    networks = networks_of(modules)
    absent = [label for label in (MODEL, CLIP) if label not in networks]
    binding = bind(adapter, networks, absent)
    bound: dict[str, list[Layer]] = {
        label: [(name, target, LoHaPatch.from_factors(f)) for name, target, f in layers]
        for label, layers in binding.layers.items()
    }
    for label, name, target, patch in _bind_extras(adapter, networks, absent, binding.report):
        bound[label].append((name, target, patch))
    if not binding.report.matched:
        raise LoHaError(f"nothing in this file fits the model; nothing was applied\n{binding.report.text(limit=20)}")
    return bound, binding.report


def networks_of(modules: tuple[Any, Any]) -> dict[str, Network]:
    """The connected ones of (model, text encoders), by label, with all names that files call their weights by."""
    return {
        label: Network(keys(module, {}), weights.shapes(module))
        for label, module, keys in zip((MODEL, CLIP), modules, _KEYS, strict=True)
        if module is not None
    }


def merge(patcher: Any, patches: Iterable[Patch], strength: Strength) -> Any:
    """A clone of ``patcher`` whose weights ComfyUI patches when it loads them; ``patcher`` itself at strength 0."""
    # ComfyUI takes one patch per weight and one strength per call; nearly always one round is all.
    rounds: list[tuple[float, dict[Target, Any]]] = []
    for patch in patches:
        if isinstance(strength, tuple) or isinstance(patch.block_strength, tuple):
            raise LoHaError("merged weights have one strength for all pictures of a batch; set mode to live")
        if strength * patch.block_strength == 0:
            continue
        free = (taken for s, taken in rounds if s == patch.block_strength and patch.target not in taken)
        if (taken := next(free, None)) is None:
            rounds.append((patch.block_strength, taken := {}))
        taken[patch.target] = patch.update
    if not rounds:
        return patcher
    if why := why_not_merged(patcher, (target for _, taken in rounds for target in taken)):
        raise LoHaError(f"{why}; set mode to live")
    clone = patcher.clone()
    for block_strength, updates in rounds:
        if lost := set(updates) - set(clone.add_patches(updates, strength * block_strength)):  # type: ignore[operator]
            raise LoHaError(f"ComfyUI did not take the patches for {sorted(map(str, lost))[:3]}")
        _join(getattr(clone, "patcher", clone).patches, map(weight_key, updates))
    return clone


def why_not_merged(patcher: Any, targets: Iterable[Target]) -> str | None:
    """Why some weight cannot be written, or None."""
    model = getattr(patcher, "patcher", patcher).model
    for key in map(weight_key, targets):
        if why := weights.why_not_merged(*weights.place(model, key)):
            return f"{key}: {why}"
    return None


def _join(patches: dict[str, list[Any]], keys: Iterable[str]) -> None:
    """LoHas that follow each other on one weight become one patch, which reads and writes the weight once."""
    for key in keys:
        match patches[key][-2:]:
            case [(a, LoHaPatch() as first, of_weight, *place), (b, LoHaPatch() as second, 1.0, *same)] if (
                place == same
            ):
                joined = LoHaPatch(set(), first.scaled(a) + second.scaled(b))
                patches[key][-2:] = [(1.0, joined, of_weight, *place)]


def _bind_extras(
    adapter: Adapter, networks: Mapping[str, Network], absent: list[str], report: Report
) -> Iterator[tuple[str, str, Target, Any]]:
    """(network, name, target, patch) for tensors that are no LoHa's, by ComfyUI's own adapters: LoRA, LoKr, norms, …"""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in comfy.lora_convert.convert_lora(dict(adapter.extras)).items():
        if place := split_key(key):
            modules[place[0]][place[1]] = tensor
        elif key.startswith("bundle_emb."):
            report.unmatched[key] = "an embedding packed into the file; save it to the embeddings folder to use it"
        else:
            report.unmatched[key] = "not the key of any adapter that ComfyUI or this pack knows"
    for module, parts in modules.items():
        label, target = next(((la, t) for la, n in networks.items() if (t := n.find(module)) is not None), ("", None))
        if target is None:
            report.unmatched[module] = why_unmatched(module, networks, absent)
            continue
        native, why = _native_patches(parts, target)
        if why:
            report.unmatched[module] = why
        for weight, patch in native.items():
            if mismatch := _shape_mismatch(patch, networks[label], weight):
                raise LoHaError(f"{adapter.source}: made for another model: {module}: {mismatch}. Nothing was applied.")
            yield label, module, weight, patch
        if native:
            report.matched[label].append(module)


def _native_patches(parts: Mapping[str, Tensor], target: Target) -> tuple[dict[Target, Any], str | None]:
    """ComfyUI's patches for one module's tensors, and why some or all of the tensors gave none."""
    if not isinstance(target, str) and any(suffix in parts for suffix in ("b_norm", "diff_b")):
        return {}, "a bias for a part of a fused weight, which ComfyUI cannot patch"
    native = comfy.lora.load_lora(
        {f"x.{name}": tensor for name, tensor in parts.items()}, {"x": target}, log_missing=False
    )
    if not native:
        return {}, f"ComfyUI has no adapter made of {', '.join(sorted(parts))}"
    return native, None


def _shape_mismatch(patch: Any, network: Network, target: Target) -> str | None:
    """Why one of ComfyUI's patches cannot act on its weight, or None. ComfyUI itself only logs this."""
    key = weight_key(target)
    if key not in network.shapes:
        return f"the model has no {key}"
    shape = network.shape(target)
    if isinstance(patch, tuple):
        patch_shape = tuple(patch[1][0].shape)
        return None if patch_shape == shape else f"a difference of shape {patch_shape} for a weight of shape {shape}"
    elements = _native_elements(patch)
    if elements is None or elements == prod(shape):
        return None
    return f"a {patch.name} update of {elements} elements for a weight of shape {shape}"


def _native_elements(patch: WeightAdapterBase) -> int | None:
    """How many elements a LoRA's or LoKr's update has; None for kinds that this does not check."""
    if patch.name == "lora":
        up, down, _, mid, *_, reshape = patch.weights
        if reshape is not None:
            return None
        return up.shape[0] * (down[0].numel() if mid is None else down.shape[1] * mid[0, 0].numel())
    if patch.name == "lokr":
        w1, w2, _, w1_a, w1_b, w2_a, w2_b, t2, *_ = patch.weights
        first = w1.numel() if w1 is not None else w1_a.shape[0] * w1_b.shape[1]
        if w2 is not None:
            return first * w2.numel()
        if t2 is None:
            return first * w2_a.shape[0] * w2_b[0].numel()
        return first * w2_a.shape[1] * w2_b.shape[1] * t2[0, 0].numel()
    return None
