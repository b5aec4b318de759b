"""Between ``loha_core`` and ComfyUI's ModelPatcher: names to weights, factors to patches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from loha_core import Adapter, LoHaError, LoHaFactors, Network, Report, add_delta_, algebra, bind
from loha_core.bind import Target, reason
from loha_core.formats.grouping import split_other

MODEL, CLIP = "MODEL", "CLIP"


class LoHaPatch(WeightAdapterBase):
    """A LoHa as ComfyUI patches it into a weight, wherever and in whatever dtype ComfyUI loads that weight.

    ``weights`` is the tuple of LoHaFactors' fields: newer ComfyUI rebuilds adapters as ``type(a)(keys, weights)``.
    """

    name = "loha"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def from_factors(cls, f: LoHaFactors) -> LoHaPatch:
        return cls(set(), (f.w1_a, f.w1_b, f.w2_a, f.w2_b, f.alpha, f.t1, f.t2, f.dora_scale))

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
        """Add strength·ΔW (or DoRA's interpolation) to ``weight`` in place and return it."""
        factors = LoHaFactors(*self.weights).to(device=weight.device)
        if _is_identity(function):
            return add_delta_(weight, factors, strength)
        # ComfyUI reorders the outputs of some weights (adaLN halves); magnitudes along the outputs go with them.
        update = function(factors.delta().reshape(weight.shape))
        wide = weight.to(update.dtype)
        if factors.dora_scale is None:
            return weight.copy_(wide.add_(update, alpha=strength))
        magnitude = factors.dora_scale
        if algebra.dora_axis(magnitude, tuple(weight.shape)) == 0:
            magnitude = function(magnitude.reshape(-1, *[1] * (weight.dim() - 1)))
        return weight.copy_(torch.lerp(wide, algebra.dora(wide, update, magnitude), strength))


def _is_identity(function: Callable[[Tensor], Tensor]) -> bool:
    probe = torch.empty(2, 1)
    return function(probe) is probe


def apply(
    model: Any, clip: Any, adapter: Adapter, strength_model: float, strength_clip: float
) -> tuple[Any, Any, Report]:
    """Clones of ``model`` and ``clip`` (either may be None) with the adapter's patches, and what matched.

    Raises:
        LoHaError: nothing in the file matches, a shape does not fit, or a strength is not finite. Model and clip
            are then untouched.
    """
    if not (math.isfinite(strength_model) and math.isfinite(strength_clip)):
        raise LoHaError(f"strengths are {strength_model} and {strength_clip}; both must be finite numbers")
    patchers = {label: patcher for label, patcher in ((MODEL, model), (CLIP, clip)) if patcher is not None}
    networks = {label: _network(label, patcher) for label, patcher in patchers.items()}
    absent = [label for label in (MODEL, CLIP) if label not in networks]
    binding = bind(adapter, networks, absent)
    others = _bind_extras(adapter, networks, absent, binding.report)
    if not binding.report.matched:
        raise LoHaError(f"nothing in this file fits the model; nothing was applied\n{binding.report.text(limit=20)}")

    strengths = {MODEL: strength_model, CLIP: strength_clip}
    patched: dict[str, Any] = {MODEL: model, CLIP: clip}
    for label, patcher in patchers.items():
        if strengths[label] == 0:
            continue
        patched[label] = patcher.clone()
        loha = {t: [LoHaPatch.from_factors(f) for f in stack] for t, stack in binding.layers[label].items()}
        for patches in (*_rounds(loha), others[label]):
            taken = patched[label].add_patches(patches, strengths[label])
            if lost := set(patches) - set(taken):
                raise LoHaError(f"{adapter.source}: ComfyUI did not take the patches for {sorted(map(str, lost))[:3]}")
    return patched[MODEL], patched[CLIP], binding.report


def _rounds(stacks: Mapping[Target, list[LoHaPatch]]) -> Iterator[dict[Target, LoHaPatch]]:
    """ComfyUI takes one patch per weight and call; nearly always one round is all."""
    for n in range(max(map(len, stacks.values()), default=0)):
        yield {target: stack[n] for target, stack in stacks.items() if n < len(stack)}


def _network(label: str, patcher: Any) -> Network:
    if label == MODEL:
        module, keys = patcher.model, comfy.lora.model_lora_keys_unet
    else:
        module, keys = patcher.cond_stage_model, comfy.lora.model_lora_keys_clip
    return Network(keys(module, {}), {key: tuple(weight.shape) for key, weight in module.state_dict().items()})


def _bind_extras(
    adapter: Adapter, networks: Mapping[str, Network], absent: list[str], report: Report
) -> dict[str, dict[Target, Any]]:
    """What is not LoHa, through ComfyUI's own adapters: LoRA, LoKr, OFT, …, norms and biases."""
    patches: dict[str, dict[Target, Any]] = {label: {} for label in networks}
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in comfy.lora_convert.convert_lora(dict(adapter.extras)).items():
        if place := split_other(key):
            modules[place[0]][place[1]] = tensor
        elif key.startswith("bundle_emb."):
            report.unmatched[key] = "an embedding packed into the file; save it to the embeddings folder to use it"
        else:
            report.unmatched[key] = "not the key of any adapter that ComfyUI or this pack knows"
    for module, parts in modules.items():
        label, target = next(((la, t) for la, n in networks.items() if (t := n.find(module)) is not None), ("", None))
        if target is None:
            report.unmatched[module] = reason(module, networks, absent)
            continue
        native, problem = _native_patches(parts, target)
        for place, patch in native.items():
            misfit = _native_misfit(patch, networks[label], place)
            if misfit:
                raise LoHaError(f"{adapter.source}: made for another model: {module}: {misfit}. Nothing was applied.")
        if problem:
            report.unmatched[module] = problem
        if native:
            patches[label].update(native)
            report.matched[label].append(module)
    return patches


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


def _native_misfit(patch: Any, network: Network, target: Target) -> str | None:
    """Why one of ComfyUI's patches cannot act on its weight, or None. ComfyUI itself only logs this."""
    key = target if isinstance(target, str) else target[0]
    if key not in network.shapes:
        return f"the model has no {key}"
    shape = network.shape(target)
    if isinstance(patch, tuple):
        found = tuple(patch[1][0].shape)
        return None if found == shape else f"a difference of shape {found} for a weight of shape {shape}"
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
