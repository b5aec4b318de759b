"""Reading and writing adapter files; one module per kind of file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..adapter import Adapter, split_key
from ..errors import LoHaError, about
from ..naming.respell import respelled
from . import lycoris, peft, scales
from .container import read_tensors, write_tensors
from .grouping import group

__all__ = ["DIALECTS", "load_adapter", "save_adapter"]

DIALECTS = (*lycoris.PREFIXES, "peft")
_MAX_KEY = 1000  # letters: patterns are matched with names, and are quick on those of this length (`naming.patterns`)


def load_adapter(path: str | Path, *, legacy_tucker: bool = False, values: bool = True) -> Adapter:
    """Read a LoHa in any dialect.

    Args:
        path: a ``.safetensors``/``.sft`` file, or a PEFT folder (or a folder of PEFT folders: unet, text_encoder, …).
        legacy_tucker: rebuild both halves from t1, as LyCORIS did before October 2023.
        values: False reads names, shapes, dtypes, alphas and metadata only: factors are on the meta device.

    Raises:
        LoHaError: names the file, the key, what was found and what was expected.
    """
    path = Path(path)
    folders = peft.folders(path)
    parts = [_read(folder / peft.WEIGHTS_NAME, prefix, values) for prefix, folder in folders]
    adapter = _joined(parts or [_read(path, None, values)])
    adapter.source = str(path)
    if not adapter.layers and not any(split_key(key) for key in adapter.extras):
        keys = ", ".join(list(adapter.extras)[:3]) or "no tensors"
        raise LoHaError(f"{path}: holds no LoHa and no other adapter; found {keys}. A whole checkpoint, perhaps?")
    return _with_legacy_tucker(adapter) if legacy_tucker else adapter


def _read(path: Path, prefix: str | None, values: bool) -> Adapter:
    """One file: of a PEFT folder, whose layers get ``prefix`` in front of their names, or by itself (None)."""
    tensors, metadata = read_tensors(path, values)
    with about(path):
        if long := next((key for key in tensors if len(key) > _MAX_KEY), None):
            raise LoHaError(f"{long[:80]}… is a key of {len(long)} letters; at most {_MAX_KEY} are read")
        if prefix is not None or peft.is_peft(tensors):
            return peft.from_tensors(tensors, metadata, peft.config_beside(path), prefix or "")
        adapter = group(tensors, alpha_of=scales.alpha_of(metadata))
        return replace(adapter, dialect=lycoris.detect(tensors), metadata=metadata)


def _joined(parts: list[Adapter]) -> Adapter:
    """The adapters of several networks as one."""
    adapter, *others = parts
    for part in others:
        adapter.layers |= part.layers
        adapter.extras |= part.extras
        adapter.metadata |= part.metadata
        adapter.notes += part.notes
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
        path: a ``.safetensors``/``.sft`` file for "lycoris", a folder for "peft", whose LoHa or LoRA it then is.
        names: of modules: "keep", as the adapter has them, which is as its file had them (what comes from PEFT or from
            a model's own modules gets the names that readers of single files know); or those of "kohya", "diffusers"
            or "native" (ComfyUI); "peft" means the format of that name with diffusers' names.
        dtype: of the saved tensors; by default each keeps its own, bit for bit.

    Raises:
        LoHaError: values that are not finite (also after the cast), what the format cannot hold, names that are not
            known in that spelling, or a path that cannot be written. An existing file is then left as it was.
    """
    path = Path(path)
    if names == "peft":
        format, names = "peft", "diffusers"
    with about(path):
        if format not in ("lycoris", "peft"):
            raise LoHaError(f"format is {format!r}; expected 'lycoris' or 'peft'")
        if dtype is not None and not dtype.is_floating_point:
            raise LoHaError(f"LoHa factors are floating point; they cannot be saved as {dtype}")
        if format == "peft" and names not in ("keep", "diffusers"):
            raise LoHaError(f"names is {names!r}, but PEFT's folders have the dotted names of diffusers; leave it out")
        adapter = respelled(adapter, names)
        if format == "peft":
            folders = peft.content(adapter, path, dtype)
        else:
            tensors, metadata = lycoris.content(adapter, path, dtype)
    if format == "peft":
        peft.write_folders(folders)
    else:
        write_tensors(path, tensors, metadata)
