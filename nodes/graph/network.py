"""Which layers of a ComfyUI model are trained, and the LoHa layers around them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod
from typing import Any

import comfy.lora
from comfy_api.latest import io, ui
from torch import Tensor, nn

from loha_core import Adapter, LoHaConfig, LoHaConv1d, LoHaConv2d, LoHaError, LoHaFactors, LoHaLayer, LoHaLinear, bind
from loha_core.naming.names import flat
from loha_core.training.trainer import ADAPTER
from loha_core.tuner import forwards
from loha_core.tuner.layers import LoHaConv3d

from ..host import weights
from ..host.patches import CLIP, MODEL, networks_of

LOHA_CONFIG = io.Custom("LOHA_CONFIG")

# Preset -> what a layer's path must contain. Timestep, size and modulation embeddings are nobody's style.
_EMBEDDINGS = r"time_|label_emb|emb_layers|adaLN|modulation|_mod\.|[xtyc]_embedder|(img|txt|time|vector|guidance)_in"
PRESETS: dict[str, str] = {
    "blocks": rf"^(?!.*({_EMBEDDINGS})).*\.\d+\.",
    "attention": r"attn|attention|qkv",
    "attention and feed-forward": r"attn|attention|qkv|\.ff\b|mlp|feed_forward|linear[12]",
    "all": "",
}
_TEXT = r"attn|attention|mlp|DenseReluDense|feed_forward"


@dataclass(frozen=True)
class NetworkConfig:
    """What LoHaNetwork says.

    Attributes:
        loha: rank, alpha, dropouts, … of linear layers and of convolutions with a kernel of 1.
        conv_rank, conv_alpha: of the others; 0 leaves them out.
        layers, exclude: regular expressions that a layer's path must, and must not, contain.
    """

    loha: LoHaConfig
    conv_rank: int
    conv_alpha: float
    layers: str
    exclude: str

    def wants(self, path: str, kernel: int) -> bool:
        if kernel > 1 and not self.conv_rank:
            return False
        return bool(re.search(self.layers, path)) and not (self.exclude and re.search(self.exclude, path))

    def rank_and_alpha(self, path: str, kernel: int) -> tuple[int, float]:
        if kernel == 1:
            return self.loha.resolved(path)
        return replace(self.loha, r=self.conv_rank, alpha=self.conv_alpha).resolved(path)


class _InComfyUI:
    """A LoHa layer around one of ComfyUI's, which may keep its weight elsewhere or packed, and cast it on each call."""

    base_layer: Any
    _link: forwards.Link | None

    def _can_fuse(self) -> bool:
        return self._acts_as_it_is() and forwards.is_own(self.base_layer, self._link)

    def _acts_as_it_is(self) -> bool:
        """The stored weight itself is what acts, here and now."""
        base, here = self.base_layer, self.hada_w1_a[ADAPTER].device  # type: ignore[attr-defined]
        functions = [*getattr(base, "weight_function", ()), *getattr(base, "bias_function", ())]
        plain = isinstance(base, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and weights.acts_as_stored(base)
        return plain and base.weight.device == here and not functions

    def _base_weight(self) -> Tensor:
        """What DoRA looks at: the weight that acts, whatever it is kept as."""
        if ADAPTER in self.hada_w1_a and self._acts_as_it_is():  # type: ignore[attr-defined]
            return self.base_layer.weight  # type: ignore[no-any-return]
        device = self.hada_w1_a[ADAPTER].device if ADAPTER in self.hada_w1_a else None  # type: ignore[attr-defined]
        return weights.dense(self.base_layer, device=device)


class _Linear(_InComfyUI, LoHaLinear):
    pass


class _Conv1d(_InComfyUI, LoHaConv1d):
    pass


class _Conv2d(_InComfyUI, LoHaConv2d):
    pass


class _Conv3d(_InComfyUI, LoHaConv3d):
    pass


_CLASSES: dict[type[nn.Module], type[LoHaLayer]] = {nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}


def _class_for(layer: nn.Module) -> type[LoHaLayer]:
    return next((new for old, new in _CLASSES.items() if isinstance(layer, old)), _Linear)


def targets(module: nn.Module, config: NetworkConfig, *, text: bool = False) -> dict[str, nn.Module]:
    """Path -> layer to train, in the model's order.

    Raises:
        LoHaError: none is wanted; names some that there are.
    """
    found: dict[str, nn.Module] = {}
    there = []
    for path, layer in weights.layers(module):
        there.append(path)
        wanted = re.search(_TEXT, path) if text else config.wants(path, weights.kernel(layer))
        if wanted:
            found[path] = layer
    if not found:
        raise LoHaError(
            f"no layer's name contains {config.layers!r}"
            + (f" without {config.exclude!r}" if config.exclude else "")
            + ("" if config.conv_rank else " (convolutions are out: conv_rank is 0)")
            + f"; the model has {', '.join(_nearest(config.layers, there))}, …"
        )
    return found


def _nearest(wanted: str, paths: list[str]) -> list[str]:
    """Some paths, those first that have a part such as the one that was perhaps meant."""
    parts = dict.fromkeys(part for path in paths for part in path.split("."))
    close = [near for word in re.findall(r"\w+", wanted) for near in get_close_matches(word, parts, 2)]
    found = [next(path for path in paths if near in path.split(".")) for near in close]
    return list(dict.fromkeys([*found, *paths]))[:5]


def build(patcher: Any, label: str, config: NetworkConfig, start: Adapter | None = None) -> dict[str, LoHaLayer]:
    """LoHa layers for a loaded model, by the name that a file calls them.

    Args:
        patcher: of a diffusion model (label MODEL) or of text encoders (CLIP).
        start: an adapter to go on from; layers that it lacks begin anew.
    """
    module, is_text = patcher.model, label == CLIP
    inner = module if is_text else module.diffusion_model
    lead = "" if is_text else "diffusion_model."
    names = spelled(module, is_text)
    begun = _begun(start, module, label) if start else {}
    layers = {}
    found = targets(inner, config, text=is_text)
    if lost := begun.keys() - {f"{lead}{path}.weight" for path in found}:
        raise LoHaError(
            f"the loha input has {len(begun)} layers for the {label}, and the network leaves out {len(lost)} of them, "
            f"such as {min(lost)}; what they do would be lost. Choose more layers (preset all, a conv_rank above 0)."
        )
    for path, layer in found.items():
        new = _class_for(layer)(layer)
        new._active = [ADAPTER]
        key = f"{lead}{path}.weight"
        if (factors := begun.get(key)) is not None:
            own: dict[str, Any] = {part: tensor.clone() for part, tensor in factors.tensors().items()}
            new.add_factors(ADAPTER, replace(factors, **own), config.loha)  # the input stays what it is
        else:
            rank, alpha = config.rank_and_alpha(path, weights.kernel(layer))
            new.update_layer(ADAPTER, rank, alpha, config.loha)
        name = names.get(key, f"lora_unet_{flat(path)}" if not is_text else f"text_encoders.{path}")
        layers[name] = new
        for _, parameter in new._parameters_of(ADAPTER):
            parameter.data = parameter.data.to(patcher.load_device)
    return layers


def _begun(start: Adapter, module: nn.Module, label: str) -> dict[str, LoHaFactors]:
    """Weight key -> the factors that an adapter has for it."""
    model, clip = (module, None) if label == MODEL else (None, module)
    bound = bind(start, networks_of((model, clip)), [MODEL, CLIP])
    return {target: factors for _, target, factors in bound.layers[label] if isinstance(target, str)}


def check_start(start: Adapter, model: nn.Module, clip: nn.Module | None) -> None:
    """Whether all of an adapter can be gone on from.

    Raises:
        LoHaError: part of it belongs elsewhere, and would be lost.
    """
    networks = networks_of((model, clip))
    bound = bind(start, networks, {MODEL, CLIP} - networks.keys())
    found = [(name, target) for layers in bound.layers.values() for name, target, _ in layers]
    if not found:
        raise LoHaError(f"the loha input: nothing in {start.source} fits this model; connect one that was made for it")
    lost = dict(bound.report.unmatched)
    lost |= {name: "a part of a fused weight" for name, target in found if not isinstance(target, str)}
    lost |= {name: "not a LoHa" for name in start.extras}
    if lost:
        some = "; ".join(f"{name}: {why}" for name, why in list(lost.items())[:3])
        raise LoHaError(
            f"the loha input: training cannot go on from {len(lost)} parts of {start.source}, and they would be lost "
            f"({some}). Connect clip if they are the text encoders', or apply that adapter to the model instead."
        )


def spelled(module: nn.Module, is_text: bool) -> dict[str, str]:
    """Weight key -> the name that most readers know it by: kohya's, diffusers' path before the model's own."""
    keys = (comfy.lora.model_lora_keys_clip if is_text else comfy.lora.model_lora_keys_unet)(module, {})
    several = any(name.startswith("lora_te2_") for name in keys)
    leads = ("lora_te1_", "lora_te2_", "lora_te3_", "lora_te_") if several else ("lora_te_", "lora_te1_", "lora_te3_")
    found: dict[str, tuple[int, str]] = {}
    for name, key in keys.items():
        if not isinstance(key, str):
            continue
        if is_text:
            place = next((i for i, lead in enumerate(leads) if name.startswith(lead)), len(leads))
        else:
            own = flat(key.removeprefix("diffusion_model.").removesuffix(".weight"))
            place = 2 if not name.startswith("lora_unet_") else int(name == f"lora_unet_{own}")
        found[key] = min(found.get(key, (99, "")), (place, name))
    return {key: name for key, (_, name) in found.items()}


def count(config: NetworkConfig, model: Any, clip: Any) -> str:
    """How many layers and parameters a configuration means for these models."""
    lines = []
    for label, module, text in (
        (MODEL, None if model is None else model.model.diffusion_model, False),
        (CLIP, None if clip is None else clip.cond_stage_model, True),
    ):
        if module is None:
            continue
        found = targets(module, config, text=text)
        parameters = sum(_parameters(path, layer, config) for path, layer in found.items())
        kinds: dict[str, int] = {}
        for layer in found.values():
            kind = _class_for(layer).base_class.__name__
            kinds[kind] = kinds.get(kind, 0) + 1
        share = parameters / sum(map(prod, weights.shapes(module).values()))
        of = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        lines.append(f"{label}: {len(found)} layers ({of}), {parameters / 1e6:.2f} M parameters, {share:.2%} of it")
    return "\n".join(lines) or "connect a model to see how many layers and parameters this means"


def _parameters(path: str, layer: nn.Module, config: NetworkConfig) -> int:
    rank, _ = config.rank_and_alpha(path, weights.kernel(layer))
    out, inner = weights.shape(layer)[:2]
    tucker = config.loha.use_effective_conv2d and weights.kernel(layer) > 1
    half = (
        rank * (out + inner + rank * weights.kernel(layer)) if tucker else rank * (out + inner * weights.kernel(layer))
    )
    return int(2 * half + (out if config.loha.use_dora else 0) + config.loha.use_scalar)


class LoHaNetwork(io.ComfyNode):
    """Rank, alpha, … and which layers -> LOHA_CONFIG."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoHaNetwork",
            display_name="LoHa Network",
            category="LoHa/train",
            description="What is trained: the rank of the LoHa, which layers get one, and how it begins.",
            inputs=list(_inputs()),
            outputs=[
                LOHA_CONFIG.Output(display_name="network", tooltip="For the network input of Train LoHa."),
                io.String.Output(display_name="text", tooltip="How many layers and parameters this means."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any = None, clip: Any = None, **values: Any) -> io.NodeOutput:
        config = network_config(**values)
        text = count(config, model, clip)
        return io.NodeOutput(config, text, ui=ui.PreviewText(text))


def _inputs() -> Iterator[Any]:
    def number(name: str, default: Any, tooltip: str, most: float = 1e6, *, advanced: bool = False) -> Any:
        kind = io.Int if isinstance(default, int) else io.Float
        step = {} if isinstance(default, int) else {"step": 0.01}
        low = 1 if name == "rank" else 0
        return kind.Input(name, default=default, min=low, max=int(most) if isinstance(default, int) else most,
                          tooltip=tooltip, optional=advanced, **step)  # fmt: skip

    yield number("rank", 8, "Rank of each half. The update reaches rank², and the file grows with the rank.", 256)
    yield number("alpha", 8.0, "The update is scaled by alpha / rank. Equal to the rank: a scale of 1.")
    yield number("conv_rank", 8, "Rank for convolutions with a kernel larger than 1; 0 leaves them out.", 256)
    yield number("conv_alpha", 8.0, "Alpha for convolutions with a kernel larger than 1.")
    yield io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default="blocks",
        tooltip="Which layers: those in the model's blocks, attention alone, attention and feed-forward, or all.",
    )
    yield io.String.Input(
        "layers",
        default="",
        placeholder="attn2|to_out",
        tooltip="A regular expression that a layer's path must contain, instead of the preset. Empty: the preset.",
    )
    yield io.String.Input(
        "exclude", default="", optional=True, tooltip="A regular expression that a layer's path must not contain."
    )
    yield io.String.Input(
        "patterns",
        default="",
        multiline=True,
        optional=True,
        placeholder="attn2: 16, 8",
        tooltip="Lines of 'pattern: rank' or 'pattern: rank, alpha', for layers whose path ends with it.",
    )
    yield io.Boolean.Input(
        "effective_conv",
        default=False,
        optional=True,
        tooltip="Tucker factors for convolutions with a kernel larger than 1: smaller files (FedPara, prop. 3).",
    )
    yield io.Combo.Input(
        "dora",
        options=["off", "output", "input"],
        default="off",
        optional=True,
        tooltip="Learn the weights' magnitude apart from their direction (DoRA), along the output or the input axis.",
    )
    yield io.Boolean.Input(
        "rank_stabilized", default=False, optional=True, tooltip="Scale by alpha / √rank (rsLoRA), for high ranks."
    )
    yield io.Combo.Input(
        "init",
        options=["lycoris", "peft"],
        default="lycoris",
        optional=True,
        tooltip="How the factors begin. Either way the update begins at zero.",
    )
    yield io.Boolean.Input(
        "scalar", default=False, optional=True, tooltip="A learned factor per layer that begins at zero (LyCORIS)."
    )
    yield number("rank_dropout", 0.0, "Probability to drop an output row of the update in a step.", 0.99, advanced=True)
    yield number("module_dropout", 0.0, "Probability to drop a layer's update in a step.", 0.99, advanced=True)
    yield io.Model.Input("model", optional=True, tooltip="To show how many layers this means; it is not changed.")
    yield io.Clip.Input("clip", optional=True, tooltip="To show how many layers this means; it is not changed.")


def network_config(
    rank: int = 8,
    alpha: float = 8.0,
    conv_rank: int = 8,
    conv_alpha: float = 8.0,
    preset: str = "blocks",
    layers: str = "",
    exclude: str = "",
    patterns: str = "",
    effective_conv: bool = False,
    dora: str = "off",
    rank_stabilized: bool = False,
    init: str = "lycoris",
    scalar: bool = False,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
) -> NetworkConfig:
    """A checked configuration from the node's inputs.

    Raises:
        LoHaError: no such preset, an expression that is none, or a value out of its range.
    """
    if preset not in PRESETS:
        raise LoHaError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    ranks, alphas = _patterns(patterns)
    loha = LoHaConfig(
        r=rank,
        alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_effective_conv2d=effective_conv,
        use_dora=False if dora == "off" else dora,
        use_rslora=rank_stabilized,
        init_weights=init,
        use_scalar=scalar,
        rank_dropout=rank_dropout,
        module_dropout=module_dropout,
    )
    config = NetworkConfig(loha, conv_rank, conv_alpha, layers.strip() or PRESETS[preset], exclude.strip())
    for name in ("layers", "exclude"):
        try:
            re.compile(getattr(config, name))
        except re.error as error:
            raise LoHaError(f"{name} is {getattr(config, name)!r}, which is no regular expression ({error})") from error
    return config


def _patterns(text: str) -> tuple[dict[str, int], dict[str, float]]:
    """'pattern: rank[, alpha]' lines."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        pattern, _, numbers = line.rpartition(":")
        try:
            rank, *alpha = (part.strip() for part in numbers.split(","))
            ranks[pattern.strip()] = int(rank)
            if alpha:
                [alphas[pattern.strip()]] = map(float, alpha)
        except ValueError as error:
            raise LoHaError(f"patterns: {line!r}; expected 'pattern: rank' or 'pattern: rank, alpha'") from error
    return ranks, alphas
