"""PEFT: a folder with adapter_config.json and adapter_model.safetensors, or one such folder per network.

The tensors carry no alpha: it comes from the configuration (see `scales`).
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import WRAPPER, Adapter
from ..errors import LoHaError
from ..factors import LoHaFactors
from ..naming import names
from . import scales
from .container import atomic, cast, check_finite, read_tensors, save_tensors
from .grouping import group
from .scales import CONFIG

WEIGHTS = "adapter_model.safetensors"
_COMPONENTS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}


def folders(path: Path) -> list[tuple[str, Path]]:
    """(component prefix, folder) of each PEFT adapter in ``path``: itself, or its sub-folders unet, text_encoder, …"""
    if os.path.isfile(path / CONFIG):
        return [("", path)]
    if not os.path.isdir(path):
        return []
    return [(f"{child.name}.", child) for child in sorted(path.iterdir()) if os.path.isfile(child / CONFIG)]


def read(path: Path) -> Adapter:
    """A PEFT folder, or a folder of them, as one adapter."""
    whole = Adapter({}, dialect="peft", source=str(path))
    for prefix, folder in folders(path):
        part = read_file(folder / WEIGHTS, prefix)
        whole.layers |= part.layers
        whole.extras |= part.extras
        whole.metadata |= part.metadata
        whole.notes += part.notes
    return whole


def read_file(path: Path, prefix: str = "") -> Adapter:
    """One PEFT file; alpha comes from the adapter_config.json beside it."""
    tensors, metadata = read_tensors(path)
    return from_tensors(tensors, metadata, path, prefix)


def from_tensors(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path, prefix: str = "") -> Adapter:
    def name_of(module: str) -> str:
        return prefix + module.removeprefix(WRAPPER)

    tensors = {key: _squeeze_conv1d(key, tensor) for key, tensor in tensors.items()}
    alpha_of = scales.alpha_of(metadata, scales.config_beside(path))
    adapter = group(tensors, str(path), name_of=name_of, alpha_of=alpha_of)
    adapter.dialect, adapter.metadata = "peft", metadata
    # Several folders become one adapter, so that what is not LoHa has to say its network too.
    adapter.extras = {prefix + key: tensor for key, tensor in adapter.extras.items()}
    return adapter


def _squeeze_conv1d(key: str, tensor: Tensor) -> Tensor:
    """PEFT writes Conv1d's core as (r, r, k, 1)."""
    return tensor.squeeze(3) if ".hada_t" in key and tensor.dim() == 4 and tensor.shape[3] == 1 else tensor


def write(adapter: Adapter, path: Path, dtype: torch.dtype | None) -> None:
    """Save as PEFT does: into ``path`` itself, or into unet/ and text_encoder…/ where the names tell networks apart.

    Raises:
        LoHaError: the adapter holds what PEFT's LoHa cannot: DoRA, other kinds of layers, kernels of three axes,
            names of which only some tell their network. Nothing is written then.
    """
    if path.suffix.lower() in (".safetensors", ".sft"):
        raise LoHaError(f"{path}: PEFT saves into a folder, since alpha lives in {CONFIG}; give a folder's name")
    if beyond := next(_beyond_peft(adapter), None):
        raise LoHaError(f"{path}: PEFT's LoHa format cannot hold {beyond}; save as format='lycoris'")
    parts: dict[str, dict[str, LoHaFactors]] = defaultdict(dict)
    for name, factors in adapter.layers.items():
        part, module = _place(name)
        if module in parts[part]:
            raise LoHaError(f"{path}: {name} would be a second {part}/{module}; leave out or rename one")
        parts[part][module] = factors
    if "" in parts and len(parts) > 1:
        nameless = next(name for name in adapter.layers if not _place(name)[0])
        raise LoHaError(f"{path}: {nameless} doesn't say which network it is for, while other layers do; rename it")
    prepared = {
        path / part: (cast(_tensors(layers), dtype, path / part), _config(layers)) for part, layers in parts.items()
    }
    for folder, (tensors, _) in prepared.items():
        for key, tensor in tensors.items():
            check_finite(tensor, f"{folder}: refusing to save {key}")
    # All are written before the first is renamed: new tensors beside an old configuration are another adapter.
    with ExitStack() as stack:
        for folder, (tensors, config) in prepared.items():
            save_tensors(stack.enter_context(atomic(folder / WEIGHTS)), tensors, adapter.metadata | {"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True)
            stack.enter_context(atomic(folder / CONFIG)).write_text(text, "utf-8")


def _beyond_peft(adapter: Adapter) -> Iterator[str]:
    """What PEFT's format has no place for."""
    yield from adapter.extras
    for name, factors in adapter.layers.items():
        if factors.dora_scale is not None:
            yield f"DoRA ({name})"
        if factors.t1 is not None and factors.t1.dim() > 4:
            yield f"a kernel of {factors.t1.dim() - 2} axes ({name})"


def _place(name: str) -> tuple[str, str]:
    """Layer name -> (folder, module name as PEFT spells it).

    Raises:
        LoHaError: a flat name whose dots are not known.
    """
    prefix = names.prefix_of(name)
    if prefix is None:
        return "", name  # a module's own name, which may have a "_" of its own
    path = name.removeprefix(prefix)
    if prefix.endswith("_") and not names.has_known_dots(path):
        raise LoHaError(
            f"{name}: which of its '_' stand for '.' is not known, and PEFT's names have dots; save as one file"
        )
    folder = (
        "transformer" if prefix in ("transformer.", "lora_transformer_") else _COMPONENTS.get(names.PREFIXES[prefix])
    )
    return folder or "", names.dotted(path) if prefix.endswith("_") else path


def _tensors(layers: Mapping[str, LoHaFactors]) -> dict[str, Tensor]:
    tensors = {}
    for name, factors in layers.items():
        for field, tensor in factors.tensors().items():
            if field.startswith("t") and tensor.dim() == 3:
                tensor = tensor.unsqueeze(3)
            tensors[f"{WRAPPER}{name}.hada_{field}"] = tensor
    return tensors


def _config(layers: Mapping[str, LoHaFactors]) -> dict[str, Any]:
    adapter = Adapter(dict(layers))
    # A pattern fits every name that ends with it, and PEFT sorts them when it saves again; "^" makes each exact.
    ranks = {f"^{name}": factors.rank for name, factors in layers.items()}
    alphas = {f"^{name}": factors.alpha for name, factors in layers.items()}
    return {
        "peft_type": "LOHA",
        "r": adapter.ranks.most_common(1)[0][0],
        "alpha": adapter.alphas.most_common(1)[0][0],
        "rank_pattern": {} if len(adapter.ranks) == 1 else ranks,
        "alpha_pattern": {} if len(adapter.alphas) == 1 else alphas,
        "use_effective_conv2d": any(factors.is_tucker for factors in layers.values()),
        "target_modules": sorted(layers),
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "init_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
        "revision": None,
        "auto_mapping": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
