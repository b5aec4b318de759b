"""Reading and writing adapter files; one module per kind of file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from .. import names
from ..adapter import Adapter
from ..errors import LoHaError
from . import lycoris, peft
from .container import read_tensors
from .grouping import group, split_other

__all__ = ["DIALECTS", "load_adapter", "save_adapter"]

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
        tensors, metadata = read_tensors(path)
        if any(key.startswith(names.WRAPPER) and ".hada_" in key for key in tensors):
            adapter = peft.from_tensors(tensors, metadata, path)
        else:
            adapter = group(tensors, str(path))
            adapter.dialect, adapter.metadata = lycoris.detect(tensors), metadata
    if not adapter.layers and not any(split_other(key) for key in adapter.extras):
        found = ", ".join(list(adapter.extras)[:3]) or "no tensors"
        raise LoHaError(f"{path}: holds no LoHa and no other adapter; found {found}. A whole checkpoint, perhaps?")
    return _with_legacy_tucker(adapter) if legacy_tucker else adapter


def _with_legacy_tucker(adapter: Adapter) -> Adapter:
    """Both halves from t1."""
    layers = {name: replace(f, t2=f.t1) if f.is_tucker else f for name, f in adapter.layers.items()}
    return replace(adapter, layers=layers)


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    format: Literal["lycoris", "peft"] = "lycoris",
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter; a reader of that format gets the same update.

    Args:
        path: a ``.safetensors``/``.sft`` file for "lycoris", a folder for "peft".
        dtype: of the saved tensors; by default each keeps its own, bit for bit.

    Raises:
        LoHaError: values that are not finite (also after the cast), what the format cannot hold, or a path that
            cannot be written. An existing file is then left as it was.
    """
    if format not in _WRITERS:
        raise LoHaError(f"format is {format!r}; expected one of {', '.join(map(repr, _WRITERS))}")
    if dtype is not None and not dtype.is_floating_point:
        raise LoHaError(f"{path}: LoHa factors are floating point; they cannot be saved as {dtype}")
    _WRITERS[format](adapter, Path(path), dtype)
