"""The tensors of a .safetensors file, one at a time: read when asked for, and written into a changed copy.

Quantised weights are read as what their layers multiply by, and written in the format that they had (`quantised`).
Nothing is mapped, so that memory never grows with the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoHaError, about
from ..formats.container import atomic, check_is_safetensors
from .checkpoint import Checkpoint
from .quantised import FLOATS, find_formats

# Those that quantised weights and their scales have, too; powers of two (F8_E8M0) as bytes.
_DTYPES = FLOATS | {"I8": torch.int8, "U8": torch.uint8, "F8_E8M0": torch.uint8}
_BLOCK = 8 << 20  # bytes that are read at once

Change = Callable[[Tensor], object]


class Entry(NamedTuple):
    """Where a tensor lies: its dtype as the file names it, its shape, and its bytes from ``start`` to ``stop``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile(Checkpoint):
    """The tensors of a .safetensors file by key; quantised weights as their layers multiply by them.

    >>> file = TensorFile("model.safetensors")                              # doctest: +SKIP
    >>> file["model.diffusion_model.out.2.weight"].shape                    # doctest: +SKIP
    torch.Size([4, 320, 3, 3])

    Attributes:
        metadata: the file's string metadata.
        entries: key -> where the tensor lies, in the order of the file.

    Raises:
        LoHaError: not a safetensors file, damaged, or not readable; names the file.
    """

    path: Path

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_is_safetensors(self.path)
        try:
            with safe_open(self.path, framework="pt", device="cpu") as checked:
                self.metadata: dict[str, str] = dict(checked.metadata() or {})
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise LoHaError(f"{path}: not a readable safetensors file ({why}); download or save it again") from error
        header.pop("__metadata__", None)
        entries = {
            key: Entry(e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
            for key, e in header.items()
        }
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1].start))
        kinds = {key: (entry.dtype, entry.shape) for key, entry in self.entries.items()}
        self.formats = find_formats(kinds, self.stored, self.metadata)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def stored(self, key: str) -> Tensor:
        """A copy of one tensor.

        Raises:
            LoHaError: the file ends too early, or cannot be read any more.
        """
        return self._read(key)[0]

    def _read(self, key: str) -> tuple[Tensor, bytearray]:
        """A tensor as it is stored, and the memory that it lies in."""
        entry = self.entries[key]
        data = bytearray(entry.stop - entry.start)
        view, start = memoryview(data), 0
        for block in self._blocks(key):
            view[start : start + len(block)] = block
            start += len(block)
        if not data:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype]), data
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape), data

    def _blocks(self, key: str) -> Iterator[bytes]:
        """A tensor's bytes, some at a time."""
        left = self.entries[key].stop - self.entries[key].start
        with about(self.path, key):
            try:
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(self.entries[key].start)
                    while left and (block := file.read(min(left, _BLOCK))):
                        yield block
                        left -= len(block)
            except OSError as error:
                raise LoHaError(f"cannot be read ({error})") from error
            if left:
                raise LoHaError("the file ends within this tensor; it was changed while it was read")

    def rewrite(self, out: Path, changes: Mapping[str, Change], metadata: Mapping[str, str]) -> None:
        """Write a copy with some tensors changed, each in its dtype, or its format.

        Tensors are read, changed and written one after another, a quantised weight with its scales, into a temporary
        file that takes the name ``out`` only when all is written.

        Args:
            changes: key -> what changes the tensor in place. A quantised weight is passed as its layer multiplies by
                it, in float32; its scales are written with it.

        Raises:
            LoHaError: the file cannot be read or written; ``out`` is then as it was.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        begin = min((entry.start for entry in self.entries.values()), default=0)
        for key, e in self.entries.items():
            header[key] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.start - begin, e.stop - begin]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        shift = len(text) + 8 - begin
        quantised = self.formats.quantised
        scales = {part for storage in quantised.values() for part in storage.keys[1:]}
        with atomic(out) as temporary, open(temporary, "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for key in self.entries:
                if key in scales:
                    continue  # it is written with its weight, wherever it lies
                parts = quantised[key].keys if key in quantised else (key,)
                changed = self._changed(key, parts, changes[key]) if key in changes else []
                for number, part in enumerate(parts):
                    target.seek(self.entries[part].start + shift)
                    target.writelines([changed[number]] if changed else self._blocks(part))

    def _changed(self, key: str, parts: tuple[str, ...], change: Change) -> list[bytearray]:
        """The bytes of a tensor after a change, or those of a quantised weight and its scales."""
        tensors, data = zip(*(self._read(part) for part in parts), strict=True)
        if storage := self.formats.quantised.get(key):
            dense = storage.dense(tensors)
            change(dense)
            storage.store_(dense, tensors)
        else:
            change(tensors[0])
        return list(data)
