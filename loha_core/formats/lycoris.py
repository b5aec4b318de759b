"""Single files: LyCORIS/kohya, LyCORIS standalone, diffusers or native dotted names, OneTrainer.

They share one layout, ``<module>.hada_w1_a … hada_t2, .alpha, .dora_scale``, and differ in how they spell the
module; `names` resolves that. What is left to each is data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import names
from ..adapter import Adapter
from ..errors import LoHaError
from .container import SUFFIXES, cast, write_tensors

# Dialect -> what its keys begin with; the first that fits names the dialect.
PREFIXES: dict[str, tuple[str, ...]] = {
    "onetrainer": ("lora_transformer_", "bundle_emb."),
    "lycoris": ("lora_unet_", "lora_te", "lora_prior_"),
    "lycoris-standalone": ("lycoris_",),
    "native": ("diffusion_model.", "model.diffusion_model.", "text_encoders."),
    "diffusers": ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3."),
}


def detect(tensors: Mapping[str, Tensor]) -> str:
    """Which spelling a file uses. Convolution factors of four dimensions give OneTrainer away."""
    if any(key.endswith("hada_w1_a") and tensor.dim() > 2 for key, tensor in tensors.items()):
        return "onetrainer"
    hits = (name for name, prefixes in PREFIXES.items() if any(key.startswith(prefixes) for key in tensors))
    return next(hits, "diffusers")


def write(adapter: Adapter, path: Path, dtype: torch.dtype | None) -> None:
    """Save as LyCORIS/kohya: names and metadata that kohya's, A1111's and ComfyUI's readers expect."""
    if path.suffix.lower() not in SUFFIXES or os.path.isdir(path):
        raise LoHaError(f"{path}: a LyCORIS adapter is one file; give a name that ends in {' or '.join(SUFFIXES)}")
    tensors, alphas = dict(adapter.extras), {}
    spelled = kohya_names(adapter.layers)
    for name, factors in adapter.layers.items():
        module = spelled[name]
        if f"{module}.alpha" in alphas:
            raise LoHaError(f"{path}: {name} would be a second {module}; leave out or rename one")
        for field, tensor in factors.tensors().items():
            key = field if field == "dora_scale" else f"hada_{field}"
            tensors[f"{module}.{key}"] = tensor
        alphas[f"{module}.alpha"] = _alpha(factors.alpha, dtype or factors.dtype)
    write_tensors(path, cast(tensors, dtype, path) | alphas, _metadata(adapter, dtype))


def kohya_names(layers: Iterable[str]) -> dict[str, str]:
    """Layer name -> module name as kohya spells it. A name that already has a single-file spelling keeps it."""
    layers = list(layers)
    first_encoder = "lora_te1_" if any(names.split(name)[0] == "te2" for name in layers) else "lora_te_"
    lead = {"unet": "lora_unet_", "te1": first_encoder, "te2": "lora_te2_", "te3": "lora_te3_", "": "lora_unet_"}

    def spell(name: str) -> str:
        prefix = names.prefix_of(name)
        if prefix is not None and prefix.endswith("_"):
            return name
        component = names.PREFIXES[prefix] if prefix else _component_by_path(name)
        return lead[component] + names.flat(name.removeprefix(prefix or ""))

    return {name: spell(name) for name in layers}


def _component_by_path(name: str) -> str:
    """A bare name does not say its network; only text encoders have these paths."""
    return "te1" if name.startswith(("text_model.", "encoder.layers.")) else ""


def _alpha(alpha: float, dtype: torch.dtype) -> Tensor:
    """A zero-dimensional alpha in ``dtype`` where that is exact, else in float32, or float64 where it must be."""
    for candidate in (dtype, torch.float32):
        if float(torch.tensor(alpha, dtype=candidate)) == alpha:
            return torch.tensor(alpha, dtype=candidate)
    return torch.tensor(alpha, dtype=torch.float64)


def _metadata(adapter: Adapter, dtype: torch.dtype | None) -> dict[str, str]:
    """The file's own metadata, completed with what kohya's readers look for."""
    if not adapter.layers:
        return dict(adapter.metadata)
    rank, alpha = adapter.ranks.most_common(1)[0][0], adapter.alphas.most_common(1)[0][0]
    arguments = {"algo": "loha", "use_tucker": any(f.is_tucker for f in adapter.layers.values())}
    wanted = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(arguments),
    }
    kept = dict(adapter.metadata)
    if dtype is not None or adapter.dialect == "peft":
        # Hashes of the tensors that the file held, not of those that it will hold.
        kept = {key: value for key, value in kept.items() if not key.startswith("sshs_")}
    return wanted | kept
