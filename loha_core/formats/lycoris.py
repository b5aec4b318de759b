"""Single files: LyCORIS/kohya, LyCORIS standalone, diffusers or native dotted names, OneTrainer.

They share one layout, ``<module>.hada_w1_a … hada_t2, .alpha, .dora_scale``, and differ in how they spell the
module; `names` resolves that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter, module_names, renamed
from ..errors import LoHaError
from ..naming import spelling
from . import metadata
from .container import SUFFIXES, cast

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
    return _spelling_of(tensors)


def _spelling_of(keys: Iterable[str]) -> str:
    keys = list(keys)
    fitting = (name for name, prefixes in PREFIXES.items() if any(key.startswith(prefixes) for key in keys))
    return next(fitting, "diffusers")


def as_one_file(adapter: Adapter) -> Adapter:
    """The adapter under the names that a single file has: a single file's own, or those that PEFT's folders become."""
    if adapter.dialect != "peft":
        return adapter
    single = renamed(adapter, spelling.in_one_file(module_names(adapter)))
    # Hashes are of the tensors that the folder held.
    kept = {key: value for key, value in adapter.metadata.items() if not key.startswith("sshs_")}
    return replace(single, dialect=_spelling_of(module_names(single)), metadata=kept)


def content(adapter: Adapter, path: Path, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of one file, laid out as kohya's, A1111's and ComfyUI's readers expect.

    Modules keep their names, so that what could read the source file can read this one.
    """
    if path.suffix.lower() not in SUFFIXES or os.path.isdir(path):
        raise LoHaError(f"a LyCORIS adapter is one file; give a name that ends in {' or '.join(SUFFIXES)}")
    adapter = as_one_file(adapter)
    tensors, alphas = dict(adapter.extras), {}
    for module, factors in adapter.layers.items():
        for field, tensor in factors.tensors().items():
            key = field if field == "dora_scale" else f"hada_{field}"
            tensors[f"{module}.{key}"] = tensor
        alphas[f"{module}.alpha"] = _alpha(factors.alpha, dtype or factors.dtype)
    return cast(tensors, dtype) | alphas, _metadata(adapter, dtype)


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
    kept = dict(adapter.metadata)
    if dtype is not None:
        # Hashes of the tensors that the file held, not of those that it will hold.
        kept = {key: value for key, value in kept.items() if not key.startswith("sshs_")}
    return metadata.network(adapter.layers.values()) | kept
