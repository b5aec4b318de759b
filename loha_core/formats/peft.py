"""PEFT: a folder with adapter_config.json and adapter_model.safetensors, or one such folder per network.

The tensors carry no alpha: it comes from the configuration (see `scales`).
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter import WRAPPER, Adapter, split_layers
from ..errors import LoHaError, about
from ..factors import Layer, LoHaFactors, LoRAFactors
from ..naming import names
from . import scales
from .container import SUFFIXES, atomic, cast, check_finite, save_tensors
from .grouping import group

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 10_000_000
_COMPONENTS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}


# --- reading ---------------------------------------------------------------------------------------------------------


def folders(path: Path) -> list[tuple[str, Path]]:
    """(component prefix, folder) of each PEFT adapter in ``path``: itself, or its sub-folders unet, text_encoder, …"""
    if os.path.isfile(path / CONFIG_NAME):
        return [("", path)]
    try:
        children = sorted(path.iterdir()) if os.path.isdir(path) else []
    except OSError as error:
        raise LoHaError(f"{path}: the folder cannot be read ({error.strerror})") from error
    return [(f"{child.name}.", child) for child in children if os.path.isfile(child / CONFIG_NAME)]


def read_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Raises:
        LoHaError: it is no JSON object, or of another kind of adapter. The path is left to the caller to name.
    """
    try:
        size = os.path.getsize(path)
        if size > _MAX_CONFIG_BYTES:
            raise LoHaError(f"{size} bytes is no adapter configuration")
        if not os.path.isfile(path):
            raise OSError("not a file")
        # From bytes, json finds out the encoding: editors write byte-order marks, PowerShell UTF-16.
        config = json.loads(path.read_bytes())
    except LoHaError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise LoHaError(f"not readable as JSON ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(config, dict):
        raise LoHaError(f"expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type", "LOHA")
    if kind != "LOHA":
        raise LoHaError(f"peft_type is {kind}, not LOHA; load it with a loader for that kind of adapter")
    return config


def config_beside(path: Path) -> dict[str, Any] | None:
    """What adapter_config.json in a file's folder says, or None where there is none."""
    with about(CONFIG_NAME):
        return read_config(path.parent / CONFIG_NAME) if os.path.isfile(path.parent / CONFIG_NAME) else None


def is_peft(keys: Iterable[str]) -> bool:
    """Whether a file's keys are those of PEFT's LoHa."""
    return any(key.startswith(WRAPPER) and ".hada_" in key for key in keys)


def from_tensors(
    tensors: Mapping[str, Tensor], metadata: dict[str, str], config: Mapping[str, Any] | None, prefix: str = ""
) -> Adapter:
    """The adapter of one folder; names get ``prefix`` in front where several folders become one adapter."""

    def name_of(module: str) -> str:
        return prefix + module.removeprefix(WRAPPER)

    tensors = {key: _squeeze_conv1d(key, tensor) for key, tensor in tensors.items()}
    adapter = group(tensors, name_of=name_of, alpha_of=scales.alpha_of(metadata, config))
    adapter.dialect, adapter.metadata = "peft", metadata
    adapter.extras = {prefix + key: tensor for key, tensor in adapter.extras.items()}
    return adapter


def _squeeze_conv1d(key: str, tensor: Tensor) -> Tensor:
    """PEFT writes Conv1d's core as (r, r, k, 1)."""
    return tensor.squeeze(3) if ".hada_t" in key and tensor.dim() == 4 and tensor.shape[3] == 1 else tensor


def unsqueeze_conv1d(key: str, tensor: Tensor) -> Tensor:
    """The inverse of `_squeeze_conv1d`."""
    return tensor.unsqueeze(3) if ".hada_t" in key and tensor.dim() == 3 else tensor


# --- writing ---------------------------------------------------------------------------------------------------------


class Folder(NamedTuple):
    """What goes into a folder: the configuration, the tensors (None writes the configuration alone), their metadata."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None = None
    metadata: Mapping[str, str] = {}


def write_folders(contents: Mapping[Path, Folder]) -> None:
    """Write PEFT's two files into each folder, all of them or, if one cannot be written, none.

    Raises:
        LoHaError: a value that is not finite, or a folder that cannot be written.
    """
    for path, folder in contents.items():
        for key, tensor in (folder.tensors or {}).items():
            check_finite(tensor, f"{path}: refusing to save {key}")
    # All are written before the first is renamed: new tensors beside an old configuration are another adapter.
    with ExitStack() as stack:
        for path, folder in contents.items():
            if folder.tensors is not None:
                temporary = stack.enter_context(atomic(path / WEIGHTS_NAME))
                save_tensors(temporary, folder.tensors, dict(folder.metadata) | {"format": "pt"})
            text = json.dumps(folder.config, indent=2, sort_keys=True)
            stack.enter_context(atomic(path / CONFIG_NAME)).write_text(text, "utf-8")


def content(adapter: Adapter, path: Path, dtype: torch.dtype | None) -> dict[Path, Folder]:
    """What to write as PEFT does: into ``path`` itself, or into unet/ and text_encoder…/ where names tell networks.

    Raises:
        LoHaError: the adapter holds what PEFT's LoHa or LoRA cannot: both kinds of layers, DoRA, other tensors,
            a LoHa's kernel of three axes, a LoRA's core; or names of which only some tell their network.
    """
    if path.suffix.lower() in SUFFIXES:
        raise LoHaError(f"PEFT saves into a folder, since alpha lives in {CONFIG_NAME}; give a folder's name")
    layers, others = split_layers(adapter)
    kind = "LoHa" if adapter.layers else "LoRA"
    if beyond := next(_beyond_peft(layers, others, kind), None):
        raise LoHaError(f"PEFT's {kind} format cannot hold {beyond}; save as format='lycoris'")
    parts: dict[str, dict[str, Layer]] = defaultdict(dict)
    for name, layer in layers.items():
        part, module = _place(name)
        if module in parts[part]:
            raise LoHaError(f"{name} would be a second {part}/{module}; leave out or rename one")
        parts[part][module] = layer
    if "" in parts and len(parts) > 1:
        nameless = next(name for name in layers if not _place(name)[0])
        raise LoHaError(f"{nameless} doesn't say which network it is for, while other layers do; rename it")
    return {
        path / part: Folder(config_of(layers), cast(tensors_of(layers), dtype), adapter.metadata)
        for part, layers in parts.items()
    }


def _beyond_peft(layers: Mapping[str, Layer], others: Iterable[str], kind: str) -> Iterator[str]:
    """What PEFT's format has no place for."""
    yield from others
    for name, layer in layers.items():
        if layer.dora_scale is not None:
            yield f"DoRA ({name})"
        if kind == "LoHa" and isinstance(layer, LoRAFactors):
            yield f"LoRA layers beside LoHa layers ({name})"
        if isinstance(layer, LoRAFactors) and layer.mid is not None:
            yield f"a LoRA's core ({name})"
        if isinstance(layer, LoHaFactors) and layer.t1 is not None and layer.t1.dim() > 4:
            yield f"a kernel of {layer.t1.dim() - 2} axes ({name})"


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


def tensors_of(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Under PEFT's names, shaped as PEFT has them."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if isinstance(layer, LoRAFactors):
            tensors |= {f"{WRAPPER}{name}.lora_A.weight": layer.down, f"{WRAPPER}{name}.lora_B.weight": layer.up}
            continue
        for field, tensor in layer.tensors().items():
            key = f"{WRAPPER}{name}.hada_{field}"
            tensors[key] = unsqueeze_conv1d(key, tensor)
    return tensors


def config_of(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """What adapter_config.json says of these layers, all of one kind."""
    ranks, alphas = Counter(layer.rank for layer in layers.values()), Counter(layer.alpha for layer in layers.values())
    is_lora = any(isinstance(layer, LoRAFactors) for layer in layers.values())
    # A pattern fits every name that ends with it, and PEFT sorts them when it saves again; "^" makes each exact.
    config = {
        "peft_type": "LORA" if is_lora else "LOHA",
        "r": ranks.most_common(1)[0][0],
        "lora_alpha" if is_lora else "alpha": alphas.most_common(1)[0][0],
        "rank_pattern": {} if len(ranks) == 1 else {f"^{name}": layer.rank for name, layer in layers.items()},
        "alpha_pattern": {} if len(alphas) == 1 else {f"^{name}": layer.alpha for name, layer in layers.items()},
        "target_modules": sorted(layers),
        "inference_mode": True,
        **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "auto_mapping", "modules_to_save")),
        **dict.fromkeys(("layers_to_transform", "layers_pattern")),
    }
    if is_lora:
        return config | {"lora_dropout": 0.0, "init_lora_weights": True}
    is_tucker = any(isinstance(layer, LoHaFactors) and layer.is_tucker for layer in layers.values())
    dropout = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}
    return config | {"use_effective_conv2d": is_tucker} | dropout
