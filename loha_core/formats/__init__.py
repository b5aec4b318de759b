"""Reading and writing adapter files; one module per kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..adapter import Adapter, split_other
from ..errors import LoHaError
from ..naming.names import WRAPPER
from ..naming.respell import respelled
from . import lycoris, peft, scales
from .container import read_tensors
from .grouping import group

__all__ = ["DIALECTS", "from_tensors", "load_adapter", "save_adapter"]

DIALECTS = (*lycoris.PREFIXES, "peft")
_WRITERS = {"lycoris": lycoris.write, "peft": peft.write}


def load_adapter(path: str | Path, *, legacy_tucker: bool = False) -> Adapter:
    """Read a LoHa in any dialect.

    Args:
        path: a ``.safetensors``/``.sft`` file, or a PEFT folder (or a folder of PEFT folders: unet, text_encoder, …).
        legacy_tucker: rebuild both halves from t1, as LyCORIS did before October 2023.

    Raises:
        LoHaError: names the file, the key, what was found and what was expected.
    """
    path = Path(path)
    if peft.folders(path):
        adapter = peft.read(path)
    else:
        adapter = from_tensors(*read_tensors(path), path)
    if not adapter.layers and not any(split_other(key) for key in adapter.extras):
        found = ", ".join(list(adapter.extras)[:3]) or "no tensors"
        raise LoHaError(f"{path}: holds no LoHa and no other adapter; found {found}. A whole checkpoint, perhaps?")
    return _with_legacy_tucker(adapter) if legacy_tucker else adapter


def from_tensors(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> Adapter:
    """What a single file holds, in any dialect; of PEFT's, the adapter_config.json beside ``path`` is read too."""
    if any(key.startswith(WRAPPER) and ".hada_" in key for key in tensors):
        return peft.from_tensors(tensors, metadata, path)
    adapter = group(tensors, str(path), alpha_of=scales.alpha_of(metadata))
    adapter.dialect, adapter.metadata = lycoris.detect(tensors), metadata
    return adapter


def _with_legacy_tucker(adapter: Adapter) -> Adapter:
    """Both halves from t1."""
    layers = {name: replace(f, t2=f.t1) if f.is_tucker else f for name, f in adapter.layers.items()}
    return replace(adapter, layers=layers)


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    format: Literal["lycoris", "peft"] = "lycoris",
    names: str = "keep",
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter; a reader of that format gets the same update.

    Args:
        path: a ``.safetensors``/``.sft`` file for "lycoris", a folder for "peft".
        names: of modules: "keep", as the adapter has them, which is as its file had them (what comes from PEFT or from
            a model's own modules gets the names that readers of single files know); or those of "kohya", "diffusers"
            or "native" (ComfyUI); "peft" means the format of that name with diffusers' names.
        dtype: of the saved tensors; by default each keeps its own, bit for bit.

    Raises:
        LoHaError: values that are not finite (also after the cast), what the format cannot hold, names that are not
            known in that spelling, or a path that cannot be written. An existing file is then left as it was.
    """
    if names == "peft":
        format, names = "peft", "diffusers"
    if format not in _WRITERS:
        raise LoHaError(f"format is {format!r}; expected one of {', '.join(map(repr, _WRITERS))}")
    if dtype is not None and not dtype.is_floating_point:
        raise LoHaError(f"{path}: LoHa factors are floating point; they cannot be saved as {dtype}")
    if format == "peft" and names not in ("keep", "diffusers"):
        raise LoHaError(
            f"{path}: names is {names!r}, but PEFT's folders have the dotted names of diffusers; leave it out"
        )
    _WRITERS[format](respelled(adapter, names), Path(path), dtype)
