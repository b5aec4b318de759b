"""Which layers of a ComfyUI model are trained, and the LoHa layers around them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from typing import Any

import comfy.lora
from torch import Tensor, nn

from loha_core import Adapter, LoHaConfig, LoHaConv1d, LoHaConv2d, LoHaError, LoHaFactors, LoHaLayer, LoHaLinear, bind
from loha_core.naming.names import flat
from loha_core.training.trainer import ADAPTER
from loha_core.tuner import forwards
from loha_core.tuner.layers import LoHaConv3d

from . import weights
from .patches import CLIP, MODEL, networks_of

# What the path of a text encoder's layer must contain.
_TEXT = r"attn|attention|mlp|DenseReluDense|feed_forward"


@dataclass(frozen=True)
class NetworkConfig:
    """Which layers are trained, and the shape of their factors.

    Attributes:
        loha: rank, alpha, dropouts, … of linear layers and of convolutions with a kernel of 1.
        conv_rank, conv_alpha: of the others; 0 leaves them out.
        layers, exclude: regular expressions that a layer's path must, and must not, contain.
        lr_pattern: as `OptimizerConfig.lr_pattern`, of paths in the model.
    """

    loha: LoHaConfig
    conv_rank: int
    conv_alpha: float
    layers: str
    exclude: str
    lr_pattern: Mapping[str, float] = field(default_factory=dict)

    def includes(self, path: str, kernel: int) -> bool:
        if kernel > 1 and not self.conv_rank:
            return False
        return bool(re.search(self.layers, path)) and not (self.exclude and re.search(self.exclude, path))

    def rank_and_alpha(self, path: str, kernel: int) -> tuple[int, float]:
        if kernel == 1:
            return self.loha.resolved(path)
        return replace(self.loha, r=self.conv_rank, alpha=self.conv_alpha).resolved(path)


class _ComfyUILayer:
    """A LoHa layer around one of ComfyUI's, which may keep its weight elsewhere or packed, and cast it on each call."""

    base_layer: Any
    _link: forwards.Link | None

    def _can_fuse(self) -> bool:
        return self._acts_as_stored() and forwards.is_own(self.base_layer, self._link)

    def _acts_as_stored(self) -> bool:
        """Whether the layer computes with the stored weight itself, on the factors' device."""
        base, device = self.base_layer, self.hada_w1_a[ADAPTER].device  # type: ignore[attr-defined]
        functions = [*getattr(base, "weight_function", ()), *getattr(base, "bias_function", ())]
        plain = isinstance(base, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and weights.acts_as_stored(base)
        return plain and base.weight.device == device and not functions

    def _base_weight(self) -> Tensor:
        """The dense weight that the layer computes with, for DoRA's norms."""
        if ADAPTER in self.hada_w1_a and self._acts_as_stored():  # type: ignore[attr-defined]
            return self.base_layer.weight  # type: ignore[no-any-return]
        device = self.hada_w1_a[ADAPTER].device if ADAPTER in self.hada_w1_a else None  # type: ignore[attr-defined]
        return weights.dense(self.base_layer, device=device)

    def _weight_for_norms(self) -> Callable[[], Tensor]:
        return self._base_weight


class _Linear(_ComfyUILayer, LoHaLinear):
    pass


class _Conv1d(_ComfyUILayer, LoHaConv1d):
    pass


class _Conv2d(_ComfyUILayer, LoHaConv2d):
    pass


class _Conv3d(_ComfyUILayer, LoHaConv3d):
    pass


_CLASSES: dict[type[nn.Module], type[LoHaLayer]] = {nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}


def layer_class(layer: nn.Module) -> type[LoHaLayer]:
    """The class of the LoHa layer for one of a model's layers."""
    return next((ours for base, ours in _CLASSES.items() if isinstance(layer, base)), _Linear)


def targets(module: nn.Module, config: NetworkConfig, *, text: bool = False) -> dict[str, nn.Module]:
    """Path -> layer to train, in the model's order.

    Raises:
        LoHaError: the configuration includes no layer; names similar ones.
    """
    layers = dict(weights.layers(module))

    def included(path: str, layer: nn.Module) -> bool:
        return bool(re.search(_TEXT, path)) if text else config.includes(path, weights.kernel(layer))

    chosen = {path: layer for path, layer in layers.items() if included(path, layer)}
    if not chosen:
        raise LoHaError(
            f"no layer's name contains {config.layers!r}"
            + (f" without {config.exclude!r}" if config.exclude else "")
            + ("" if config.conv_rank else " (convolutions are out: conv_rank is 0)")
            + f"; the model has {', '.join(_nearest(config.layers, list(layers)))}, …"
        )
    return chosen


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    """Up to five paths, those first that have a part similar to a word of the pattern."""
    parts = dict.fromkeys(part for path in paths for part in path.split("."))
    similar = [part for word in re.findall(r"\w+", pattern) for part in get_close_matches(word, parts, 2)]
    first = [next(path for path in paths if part in path.split(".")) for part in similar]
    return list(dict.fromkeys([*first, *paths]))[:5]


def build(patcher: Any, label: str, config: NetworkConfig, start: Adapter | None = None) -> dict[str, LoHaLayer]:
    """LoHa layers for a loaded model, by the name that a file calls them.

    Args:
        patcher: of a diffusion model (label MODEL) or of text encoders (CLIP).
        start: an adapter to go on from; layers that it lacks begin anew.
    """
    module, is_text = patcher.model, label == CLIP
    prefix = "" if is_text else "diffusion_model."
    started = _factors_by_weight(start, module, label) if start else {}
    chosen = _chosen(patcher, label, config)
    if lost := started.keys() - {f"{prefix}{path}.weight" for path in chosen}:
        raise LoHaError(
            f"the loha input has {len(started)} layers for the {label}, and the network leaves out {len(lost)} of "
            f"them, such as {min(lost)}; what they do would be lost. Choose more layers (preset all, a conv_rank "
            "above 0)."
        )
    layers = {}
    for path, (name, base) in chosen.items():
        key = f"{prefix}{path}.weight"
        layer = layer_class(base)(base)
        layer._active = [ADAPTER]
        if (factors := started.get(key)) is not None:
            copies: dict[str, Any] = {part: tensor.clone() for part, tensor in factors.tensors().items()}
            layer.add_factors(ADAPTER, replace(factors, **copies), config.loha)
        else:
            rank, alpha = config.rank_and_alpha(path, weights.kernel(base))
            layer.update_layer(ADAPTER, rank, alpha, config.loha)
        for parameter in layer.parameters_of(ADAPTER):
            parameter.data = parameter.data.to(patcher.load_device)
        layers[name] = layer
    return layers


def names_of(patcher: Any, label: str, config: NetworkConfig) -> dict[str, str]:
    """Path of each layer to train -> the name that a file calls it."""
    return {path: name for path, (name, _) in _chosen(patcher, label, config).items()}


def _chosen(patcher: Any, label: str, config: NetworkConfig) -> dict[str, tuple[str, nn.Module]]:
    """Path of each layer to train -> its name in files, and the layer."""
    model, is_text = patcher.model, label == CLIP
    names = names_in_files(model, is_text)
    prefix, other = ("", "text_encoders.{}") if is_text else ("diffusion_model.", "lora_unet_{}")
    return {
        path: (names.get(f"{prefix}{path}.weight", other.format(path if is_text else flat(path))), layer)
        for path, layer in targets(model if is_text else model.diffusion_model, config, text=is_text).items()
    }


def _factors_by_weight(start: Adapter, module: nn.Module, label: str) -> dict[str, LoHaFactors]:
    """Weight key -> the factors that an adapter has for it."""
    model, clip = (module, None) if label == MODEL else (None, module)
    bound = bind(start, networks_of((model, clip)), [MODEL, CLIP])
    return {target: factors for _, target, factors in bound.layers[label] if isinstance(target, str)}


def check_start(start: Adapter, model: nn.Module, clip: nn.Module | None) -> None:
    """Refuse an adapter of which training cannot go on from every part.

    Raises:
        LoHaError: names the parts that would be lost.
    """
    networks = networks_of((model, clip))
    bound = bind(start, networks, {MODEL, CLIP} - networks.keys())
    matched = [(name, target) for layers in bound.layers.values() for name, target, _ in layers]
    if not matched:
        raise LoHaError(f"the loha input: nothing in {start.source} fits this model; connect one that was made for it")
    lost = dict(bound.report.unmatched)
    lost |= {name: "a part of a fused weight" for name, target in matched if not isinstance(target, str)}
    lost |= {name: "not a LoHa" for name in start.extras}
    if lost:
        some = "; ".join(f"{name}: {why}" for name, why in list(lost.items())[:3])
        raise LoHaError(
            f"the loha input: training cannot go on from {len(lost)} parts of {start.source}, and they would be lost "
            f"({some}). Connect clip if they are the text encoders', or apply that adapter to the model instead."
        )


def names_in_files(module: nn.Module, is_text: bool) -> dict[str, str]:
    """Weight key -> the name that most readers know it by: kohya's, diffusers' path before the model's own."""
    keys = (comfy.lora.model_lora_keys_clip if is_text else comfy.lora.model_lora_keys_unet)(module, {})
    several = any(name.startswith("lora_te2_") for name in keys)
    prefixes = (
        ("lora_te1_", "lora_te2_", "lora_te3_", "lora_te_") if several else ("lora_te_", "lora_te1_", "lora_te3_")
    )

    def order(name: str, key: str) -> int:
        if is_text:
            return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), len(prefixes))
        if not name.startswith("lora_unet_"):
            return 2
        return int(name == f"lora_unet_{flat(key.removeprefix('diffusion_model.').removesuffix('.weight'))}")

    candidates = sorted(
        ((order(name, key), name, key) for name, key in keys.items() if isinstance(key, str)), reverse=True
    )
    return {key: name for _, name, key in candidates}  # the first in order is written last


def count(config: NetworkConfig, model: Any, clip: Any) -> str:
    """How many layers and parameters a configuration means for these models."""
    lines = []
    for label, module in ((MODEL, model and model.model.diffusion_model), (CLIP, clip and clip.cond_stage_model)):
        if module is None:
            continue
        chosen = targets(module, config, text=label == CLIP)
        parameters = sum(_parameters(path, layer, config) for path, layer in chosen.items())
        kinds = Counter(layer_class(layer).base_class.__name__ for layer in chosen.values())
        fraction = parameters / sum(map(prod, weights.shapes(module).values()))
        by_kind = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        lines.append(
            f"{label}: {len(chosen)} layers ({by_kind}), {parameters / 1e6:.2f} M parameters, {fraction:.2%} of it"
        )
    return "\n".join(lines) or "connect a model to see how many layers and parameters this means"


def _parameters(path: str, layer: nn.Module, config: NetworkConfig) -> int:
    kernel = weights.kernel(layer)
    rank, _ = config.rank_and_alpha(path, kernel)
    out, inner = weights.shape(layer)[:2]
    tucker = config.loha.use_effective_conv2d and kernel > 1
    half = rank * (out + inner + rank * kernel) if tucker else rank * (out + inner * kernel)
    return int(2 * half + (out if config.loha.use_dora else 0) + config.loha.use_scalar)
