"""What a LoHa file holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import LoHaError, about
from .factors import Layer, LoHaFactors, LoRAFactors

# What PEFT puts before the name of every module.
WRAPPER = "base_model.model."

# Suffixes of adapters that are not LoHa but may share the file; the longest first.
OTHER_SUFFIXES = sorted(
    ".lora_up.weight .lora_down.weight .lora_mid.weight .lora_A.weight .lora_B.weight .lora_A .lora_B "
    ".lora.up.weight .lora.down.weight .lora_linear_layer.up.weight .lora_linear_layer.down.weight "
    ".lora_A.default.weight .lora_B.default.weight .lora_up .lora_down "
    ".lokr_w1 .lokr_w2 .lokr_w1_a .lokr_w1_b .lokr_w2_a .lokr_w2_b .lokr_t2 "
    ".a1.weight .a2.weight .b1.weight .b2.weight "
    ".oft_blocks .oft_diag .rescale .w_norm .b_norm .diff .diff_b .set_weight .reshape_weight "
    ".alpha .dora_scale".split(),
    key=len,
    reverse=True,
)

# Suffixes of a LoRA's two factors, as trainers spell them; the first is the one that is written.
_UP_DOWN = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
    ("lora_B", "lora_A"),
    ("lora_up", "lora_down"),
)
_BESIDE = ("alpha", "dora_scale", "lora_mid.weight")
# Differences of whole tensors: they add up as they are.
DIFFERENCES = ("diff", "diff_b", "w_norm", "b_norm")


@dataclass(eq=False)
class Adapter:
    """LoHa layers by module name, and the other tensors of the file.

    Attributes:
        layers: module name -> factors; names as the file spells them, less a wrapper such as ``base_model.model.``.
        extras: tensors that are not LoHa (LoRA/LoKr layers, norms, biases, embeddings), by their key in the file.
        metadata: the file's string metadata.
        dialect: which spelling the file uses; one of ``formats.DIALECTS``.
        source: where it came from, for messages.
        notes: what looked odd while reading.
    """

    layers: dict[str, LoHaFactors]
    extras: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    dialect: str = "lycoris"
    source: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> Counter[int]:
        """How many layers have which rank."""
        return Counter(f.rank for f in self.layers.values())

    @property
    def alphas(self) -> Counter[float]:
        """How many layers have which alpha."""
        return Counter(f.alpha for f in self.layers.values())

    def parameter_count(self) -> int:
        return sum(f.parameter_count() for f in self.layers.values())


def split_key(key: str) -> tuple[str, str] | None:
    """``module.suffix`` -> (module, suffix without its dot) for adapters that are not LoHa, else None."""
    suffix = next((suffix for suffix in OTHER_SUFFIXES if key.endswith(suffix)), None)
    return (key.removesuffix(suffix), suffix[1:]) if suffix else None


def module_names(adapter: Adapter) -> list[str]:
    """Names of all modules: of the LoHa layers, and of the other adapters' tensors."""
    others = (place[0] for key in adapter.extras if (place := split_key(key)))
    return list(dict.fromkeys([*adapter.layers, *others]))


def renamed(adapter: Adapter, new_names: Mapping[str, str]) -> Adapter:
    """The same tensors under other module names."""

    def renamed_key(key: str) -> str:
        place = split_key(key)
        return f"{new_names[place[0]]}.{place[1]}" if place else key

    layers = {new_names[name]: factors for name, factors in adapter.layers.items()}
    return replace(adapter, layers=layers, extras={renamed_key(key): t for key, t in adapter.extras.items()})


def split_layers(adapter: Adapter) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Every LoHa and LoRA layer by module name, and the other tensors by key: LoKr, norms, embeddings.

    Raises:
        LoHaError: half of a LoRA is missing, or its shapes don't fit together; names file and key.
    """
    layers: dict[str, Layer] = dict(adapter.layers)
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.extras.items():
        if place := split_key(key):
            by_module.setdefault(place[0], {})[place[1]] = tensor
    used: set[str] = set()
    for module, tensors in by_module.items():
        names = next((names for names in _UP_DOWN if set(names) & tensors.keys()), None)
        if names is None:
            continue
        with about(adapter.source, module):
            if missing := [name for name in names if name not in tensors]:
                raise LoHaError(f"{missing[0]} is missing; the file is incomplete, save it again")
            name = module.removeprefix(WRAPPER)
            if name in layers:
                raise LoHaError("both a LoHa and a LoRA layer; rename one of them")
            layers[name] = _lora(tensors[names[0]], tensors[names[1]], tensors)
        used |= {f"{module}.{suffix}" for suffix in (*names, *_BESIDE)}
    return layers, {key: tensor for key, tensor in adapter.extras.items() if key not in used}


def _lora(up: Tensor, down: Tensor, beside: Mapping[str, Tensor]) -> LoRAFactors:
    try:
        alpha = float(beside["alpha"]) if "alpha" in beside else float(down.shape[0])
    except (RuntimeError, IndexError) as error:
        raise LoHaError(f"alpha or lora_down is no tensor of a LoRA ({error})") from error
    return LoRAFactors(up, down, alpha, beside.get("lora_mid.weight"), beside.get("dora_scale"))


def join_layers(layers: Mapping[str, Layer], others: Mapping[str, Tensor], like: Adapter) -> Adapter:
    """The inverse of `split_layers`, with the metadata of ``like``: LoRA layers become extras in kohya's spelling."""
    extras = dict(others)
    for name, layer in layers.items():
        if isinstance(layer, LoRAFactors):
            extras |= {f"{name}.{suffix}": tensor for suffix, tensor in layer.tensors().items()}
            alpha = torch.tensor(layer.alpha, dtype=torch.float64)
            extras[f"{name}.alpha"] = alpha.float() if float(alpha.float()) == layer.alpha else alpha
    lohas = {name: layer for name, layer in layers.items() if isinstance(layer, LoHaFactors)}
    return replace(like, layers=lohas, extras=extras, metadata=dict(like.metadata), notes=[])
