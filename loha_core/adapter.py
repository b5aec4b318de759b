"""What a LoHa file holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import LoHaError
from .factors import Layer, LoHaFactors, LoRAFactors

# What PEFT puts before the name of every module.
WRAPPER = "base_model.model."

# Suffixes of adapters that are not LoHa but may share the file.
OTHER_SUFFIXES = (
    ".lora_up.weight .lora_down.weight .lora_mid.weight .lora_A.weight .lora_B.weight .lora_A .lora_B "
    ".lora.up.weight .lora.down.weight .lora_linear_layer.up.weight .lora_linear_layer.down.weight "
    ".lora_A.default.weight .lora_B.default.weight .lora_up .lora_down "
    ".lokr_w1 .lokr_w2 .lokr_w1_a .lokr_w1_b .lokr_w2_a .lokr_w2_b .lokr_t2 "
    ".a1.weight .a2.weight .b1.weight .b2.weight "
    ".oft_blocks .oft_diag .rescale .w_norm .b_norm .diff .diff_b .set_weight .reshape_weight .alpha .dora_scale"
).split()

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
_SHARED = ("alpha", "dora_scale", "lora_mid.weight")
# Differences of whole tensors: they add up as they are.
DIFFERENCES = ("diff", "diff_b", "w_norm", "b_norm")


@dataclass(eq=False)
class Adapter:
    """LoHa layers by module name, and everything else that the file held.

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


def split_other(key: str) -> tuple[str, str] | None:
    """``module.suffix`` -> (module, suffix without its dot) for adapters that are not LoHa, else None."""
    for suffix in sorted(OTHER_SUFFIXES, key=len, reverse=True):
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix[1:]
    return None


def modules(adapter: Adapter) -> list[str]:
    """Names of all modules: of the LoHa layers, and of the other adapters' tensors."""
    others = (found[0] for key in adapter.extras if (found := split_other(key)))
    return list(dict.fromkeys([*adapter.layers, *others]))


def renamed(adapter: Adapter, new: Mapping[str, str]) -> Adapter:
    """The same tensors under other module names."""

    def key_of(key: str) -> str:
        found = split_other(key)
        return f"{new[found[0]]}.{found[1]}" if found else key

    layers = {new[name]: factors for name, factors in adapter.layers.items()}
    return replace(adapter, layers=layers, extras={key_of(key): t for key, t in adapter.extras.items()})


def split(adapter: Adapter) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Every low-rank layer by module name, and the tensors that are none: LoKr, norms, embeddings.

    Raises:
        LoHaError: half of a LoRA is missing, or its shapes don't fit together; names file and key.
    """
    layers: dict[str, Layer] = dict(adapter.layers)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.extras.items():
        if found := split_other(key):
            modules.setdefault(found[0], {})[found[1]] = tensor
    used: set[str] = set()
    for module, parts in modules.items():
        pair = next((pair for pair in _UP_DOWN if set(pair) & parts.keys()), None)
        if pair is None:
            continue
        if missing := [name for name in pair if name not in parts]:
            raise LoHaError(
                f"{adapter.source}: {module}.{missing[0]} is missing; the file is incomplete, save it again"
            )
        name = module.removeprefix(WRAPPER)
        if name in layers:
            raise LoHaError(f"{adapter.source}: {name} is both a LoHa and a LoRA layer; rename one of them")
        up, down = (parts[suffix] for suffix in pair)
        try:
            alpha = float(parts["alpha"]) if "alpha" in parts else float(down.shape[0])
            layers[name] = LoRAFactors(up, down, alpha, parts.get("lora_mid.weight"), parts.get("dora_scale"))
        except (LoHaError, RuntimeError) as error:
            raise LoHaError(f"{adapter.source}: {module}: {error}") from None
        used |= {f"{module}.{suffix}" for suffix in (*pair, *_SHARED)}
    return layers, {key: tensor for key, tensor in adapter.extras.items() if key not in used}


def join(layers: Mapping[str, Layer], rest: Mapping[str, Tensor], like: Adapter) -> Adapter:
    """The inverse of `split`: LoRA layers become extras in kohya's spelling, with their alpha."""
    extras = dict(rest)
    for name, layer in layers.items():
        if isinstance(layer, LoRAFactors):
            extras |= {f"{name}.{suffix}": tensor for suffix, tensor in layer.tensors().items()}
            alpha = torch.tensor(layer.alpha, dtype=torch.float64)
            extras[f"{name}.alpha"] = alpha.float() if float(alpha.float()) == layer.alpha else alpha
    kept = {name: layer for name, layer in layers.items() if isinstance(layer, LoHaFactors)}
    return replace(like, layers=kept, extras=extras, metadata=dict(like.metadata), notes=[])
