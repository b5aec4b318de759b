"""The safetensors container: the only thing that is ever opened. No pickle, on any path."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoHaError, about

SUFFIXES = (".safetensors", ".sft")
_DTYPES = frozenset("F64 F32 F16 BF16 F8_E4M3 F8_E5M2 I64 I32 I16 I8 U8 BOOL".split())


def read_tensors(path: Path, values: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, copied into memory, and the metadata.

    The header is checked against the file's size before anything is allocated.

    Args:
        values: False reads the header and single numbers only; other tensors are on the meta device.

    Raises:
        LoHaError: not a safetensors file, damaged, or with values that are not finite.
    """
    check_is_safetensors(path)
    with about(path):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {key: _tensor(file, key, values) for key in file.keys()}
                metadata = dict(file.metadata() or {})
        # TypeError and RuntimeError are torch's, of axes beyond 2⁶³, with a stack trace below the first line.
        except (SafetensorError, OSError, UnicodeError, TypeError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            raise LoHaError(
                f"not a readable safetensors file ({why}). It may be truncated: download or save it again."
            ) from error
        for key, tensor in tensors.items():
            check_finite(tensor, key)
    return tensors, metadata


def _tensor(file: Any, key: str, values: bool) -> Tensor:
    stored = file.get_slice(key)
    dtype, shape = stored.get_dtype(), stored.get_shape()
    if dtype not in _DTYPES:
        raise LoHaError(f"{key} has dtype {dtype}, which torch has no factors in; re-save the file")
    if values or math.prod(shape) == 1:
        # Cloned: the file may be replaced while its tensors are in use.
        return file.get_tensor(key).clone()  # type: ignore[no-any-return]
    return torch.empty(shape, dtype=stored[:0].dtype, device="meta")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: a temporary file in the same folder, fsynced, then renamed over ``path``.

    Raises:
        LoHaError: a value is not finite, or the file cannot be written; ``path`` is then as it was.
    """
    for key, tensor in tensors.items():
        check_finite(tensor, f"{path}: refusing to save {key}")
    with atomic(path) as temporary:
        save_tensors(temporary, tensors, metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write to ``path`` itself, unchecked."""
    # safetensors refuses tensors that share memory.
    copies = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    save_file(copies, path, dict(metadata))


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The floating-point tensors in ``dtype``, or all as they are.

    Raises:
        LoHaError: a value is too large for it. Not left to the cast, which may saturate in silence (8 bits).
    """
    if dtype is None:
        return dict(tensors)
    largest = torch.finfo(dtype).max
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and (beyond := int((tensor.double().abs() > largest).sum())):
            raise LoHaError(
                f"{key}: {beyond} of {tensor.numel()} values are beyond {largest:g}, the largest of {dtype}; "
                "save in a wider dtype"
            )
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


class atomic:
    """Context manager: yields a temporary path beside ``path`` and renames it there on success."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent)
        except (OSError, ValueError) as error:
            raise LoHaError(f"{self.path}: cannot be written ({error})") from error
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                with open(self.temporary, "rb+") as file:
                    os.fsync(file.fileno())
                self.temporary.chmod(0o666 & ~_umask())
                os.replace(self.temporary, self.path)
        except OSError as failure:
            error = failure
        finally:
            with suppress(OSError):
                self.temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError, UnicodeError)):
            raise LoHaError(f"{self.path}: cannot be written ({error}); nothing was changed") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_finite(tensor: Tensor, what: str) -> None:
    if broken := broken_values(tensor):
        raise LoHaError(f"{what}: {broken}; the training run broke")


def broken_values(tensor: Tensor) -> str:
    """How many values are not finite, in words; empty where all are."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return ""
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    if bool(torch.isfinite(wide).all()):
        return ""
    return f"{int((~torch.isfinite(wide)).sum())} of {tensor.numel()} values are NaN or infinite"


def check_is_safetensors(path: Path) -> None:
    """Look at a file's name, size and first bytes.

    Raises:
        LoHaError: not a file, not readable, or no safetensors file.
    """
    with about(path):
        if os.path.isdir(path):
            raise LoHaError("a folder without adapter_config.json; expected a .safetensors file or a PEFT folder")
        if not os.path.isfile(path):
            raise LoHaError("no such file, or none that may be looked at")
        if path.suffix.lower() not in SUFFIXES:
            raise LoHaError(f"only {' and '.join(SUFFIXES)} files are read, since other formats can run code")
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(9)
        except OSError as error:
            raise LoHaError(f"cannot be read ({error.strerror})") from error
        if size == 0:
            raise LoHaError("the file is empty; download or save it again")
        header = int.from_bytes(head[:8], "little")
        if size >= 9 and header <= size - 8 and head[8:9] == b"{":
            return
        # Not before: the length of a sound header may begin with the same two bytes.
        if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise LoHaError(f"a pickle renamed to {path.suffix}; loading one can run code, so it is refused")
        raise LoHaError(
            f"not a safetensors file: {size} bytes, of which its first 8 claim {header} as header. "
            "It may be truncated, or a web page saved by mistake: download it again."
        )
