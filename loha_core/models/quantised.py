"""Quantised weights of checkpoints: how each layer's is stored, the weight that the layer multiplies by, and back.

The formats are ComfyUI's (QUANTIZATION.md in its repository; comfy-kitchen's layouts). Beside ``layer.weight`` lie

- ``scale_weight`` (its older scaled fp8, told by a tensor ``scaled_fp8``) or ``weight_scale``: one number, or one for
  each output, of 8-bit floats or integers; of integers the columns may have been rotated (ConvRot);
- ``weight_scale`` for blocks of 16 numbers of 4 bits, and ``weight_scale_2`` for all (nvfp4); or for blocks of 32
  8-bit floats (mxfp8). Blocks' scales lie in the order that cuBLAS reads them in;
- ``comfy_quant``, the format as JSON in bytes; or the metadata's ``_quantization_metadata`` says it of every layer.

What is packed in any other way is known by its keys, and refused by name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

# A tensor's dtype, as safetensors names it, and its shape.
Kind = tuple[str, tuple[int, ...]]
Read = Callable[[str], Tensor]

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in (FLOATS | _INTEGERS).items()}
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
# Format -> the dtype that its weights are stored in.
_STORED = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8_tensorwise": "I8",
    "nvfp4": "U8",
    "mxfp8": "F8_E4M3",
}
# Numbers that share a scale, and the dtypes of the scales: bytes stand for types that not every torch has.
_BLOCKS = {"nvfp4": (16, ("F8_E4M3", "U8")), "mxfp8": (32, ("F8_E8M0", "U8"))}
# Keys that other libraries' packed weights have beside them, or in their place.
_FOREIGN = {
    "bitsandbytes' 4 bits (NF4, FP4)": re.compile(r"(.+)\.weight\.(?:nested_)?(?:absmax|quant_map|quant_state\..+)"),
    "bitsandbytes' int8": re.compile(r"(.+)\.(?:SCB|weight_format)"),
    "fp8 with scales of square blocks": re.compile(r"(.+)\.weight_scale_inv"),
    "GPTQ, AWQ or SVDQuant": re.compile(r"(.+)\.qweight"),
    "quanto": re.compile(r"(.+)\.weight\._data"),
    "compressed-tensors": re.compile(r"(.+)\.weight_(?:packed|zero_point)"),
}
_UNKNOWN_SHAPE = (1 << 30, 1)  # of a weight that cannot be read: any part of it may be asked for
_CONVROT_GROUPS = tuple(4**k for k in range(1, 8))
_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}


@dataclass(frozen=True)
class Storage:
    """How one layer's weight is stored.

    Attributes:
        format: as ComfyUI names it.
        keys: of the weight, of its scale, and for nvfp4 of the scale of all.
        shape: of the weight that is meant, (o, i) or (o, i, *k). Of nvfp4 and mxfp8 with their padding, if any.
        group: columns that were rotated together (ConvRot); 0 for none.
    """

    format: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    group: int = 0

    def dense(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight that the layer multiplies by, in float32, from the tensors under ``keys``."""
        if self.format == "nvfp4":
            return _from_nvfp4(*parts)
        if self.format == "mxfp8":
            return _from_mxfp8(*parts)
        weight = parts[0].float() * _by_rows(parts[1], parts[0].dim())
        return _rotated(weight, self.group) if self.group else weight

    def store_(self, dense: Tensor, parts: Sequence[Tensor]) -> None:
        """Write a weight into the tensors under ``keys``: new scales, then each number rounded once, to the nearest.

        Args:
            dense: (o, i) or (o, i, *k), float32, finite. It is overwritten.
        """
        if self.format == "nvfp4":
            _into_nvfp4_(dense, *parts)
        elif self.format == "mxfp8":
            _into_mxfp8_(dense, *parts)
        else:
            _into_scaled_(_rotated(dense, self.group) if self.group else dense, *parts)


@dataclass(frozen=True)
class WeightFormats:
    """How a checkpoint stores its weights.

    Attributes:
        quantised: key -> storage, of quantised weights.
        unreadable: key -> why the weight cannot be read.
        shapes: of all tensors of floating point and of the above, as layers see them.
    """

    quantised: dict[str, Storage] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def summary(self, keys: Iterable[str]) -> str:
        """How many of the weights are quantised in which format, such as "3 × nvfp4"; "" for none."""
        counts = Counter(self.quantised[key].format for key in keys if key in self.quantised)
        return ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))


def find_formats(kinds: Mapping[str, Kind], read: Read, metadata: Mapping[str, str] | None = None) -> WeightFormats:
    """Find each weight's storage.

    Args:
        kinds: every tensor of a file or state dict.
        read: gives a tensor as it is stored; asked for ``comfy_quant`` only.
        metadata: the file's.
    """
    formats = WeightFormats(shapes={key: shape for key, (dtype, shape) in kinds.items() if dtype in FLOATS})
    declared = _declarations(kinds, read, metadata or {})
    scaled_fp8 = tuple(key.removesuffix("scaled_fp8") for key in kinds if f".{key}".endswith(".scaled_fp8"))
    for key in kinds:
        if key.endswith(".weight"):
            layer = key.removesuffix(".weight")
            storage = _storage(layer, kinds, declared.get(layer), key.startswith(scaled_fp8))
        else:
            storage = _undeclared(kinds[key]) if key.endswith(("in_proj_weight", "text_projection")) else None
        if isinstance(storage, Storage):
            formats.quantised[key] = storage
            formats.shapes[key] = storage.shape
        elif storage is not None:
            formats.unreadable[key] = storage
    for key in kinds:
        for name, pattern in _FOREIGN.items():
            if match := pattern.fullmatch(key):
                formats.unreadable[f"{match[1]}.weight"] = f"is packed by {name}, which cannot be read here"
    for key in formats.unreadable:
        formats.quantised.pop(key, None)
        formats.shapes[key] = _UNKNOWN_SHAPE
    return formats


def kind_of(tensor: Tensor) -> Kind:
    """A tensor's dtype, as safetensors names it, and shape."""
    # torch's name of the powers of two is float8_e8m0fnu.
    other = "F8_E8M0" if "e8m0" in str(tensor.dtype) else str(tensor.dtype)
    return _NAMES.get(tensor.dtype, other), tuple(tensor.shape)


def _declarations(kinds: Mapping[str, Kind], read: Read, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Layer -> what the file declares of it; as in ComfyUI the metadata win."""
    suffix = ".comfy_quant"
    declared = {
        key.removesuffix(suffix): _object(bytes(read(key).flatten().tolist()) if dtype == "U8" else "")
        for key, (dtype, shape) in kinds.items()
        if key.endswith(suffix) and prod(shape) < 1 << 16
    }
    layers = _object(metadata.get("_quantization_metadata", "")).get("layers")
    for name, entry in layers.items() if isinstance(layers, dict) else ():
        # Today's ComfyUI names them as the file does, 0.3.75 as the diffusion model does.
        layer = name if f"{name}.weight" in kinds else f"model.diffusion_model.{name}"
        declared[layer] = entry if isinstance(entry, dict) else {}
    return declared


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _undeclared(kind: Kind) -> str | None:
    """Why a weight of which nothing is declared cannot be read, or None for a plain one."""
    dtype, shape = kind
    if dtype in FLOATS or len(shape) < 2:
        return None
    return f"is stored as {dtype}, and nothing says in which format; expected a comfy_quant beside it"


def _storage(
    layer: str, kinds: Mapping[str, Kind], declared: dict[str, Any] | None, is_scaled_fp8: bool
) -> Storage | str | None:
    """How a layer's weight is stored, or why it cannot be read, or None for a plain one."""
    dtype, shape = kinds[f"{layer}.weight"]
    scales = [key for key in (f"{layer}.scale_weight", f"{layer}.weight_scale") if key in kinds]
    if declared is not None:
        form = declared.get("format")
    elif dtype in _FP8 and (scales or (is_scaled_fp8 and len(shape) == 2)):
        form = _FP8[dtype]
    elif dtype in FLOATS and scales:
        return f"has a scale, {scales[0]}, but is stored as {dtype}; expected an 8-bit type"
    else:
        return _undeclared(kinds[f"{layer}.weight"])
    if not isinstance(form, str) or form not in _STORED:
        return f"is quantised as {form!r}; the formats known here are {', '.join(_STORED)}"
    if dtype != _STORED[form]:
        return f"is declared as {form}, but stored as {dtype}; expected {_STORED[form]}"
    if f"{layer}.pre_quant_scale" in kinds:
        return f"is {form} with smoothed inputs ({layer}.pre_quant_scale), which cannot be read here"
    if len(scales) != 1:
        return f"is {form}, but has {len(scales)} scales; expected one, {layer}.weight_scale or {layer}.scale_weight"
    if form in _BLOCKS:
        return _in_blocks(layer, form, scales[0], kinds)
    return _scaled(layer, form, scales[0], kinds, declared if declared and form == "int8_tensorwise" else {})


def _scaled(layer: str, form: str, scale: str, kinds: Mapping[str, Kind], declared: dict[str, Any]) -> Storage | str:
    shape = kinds[f"{layer}.weight"][1]
    dtype, scale_shape = kinds[scale]
    by_rows = scale_shape[:1] == shape[:1] and prod(scale_shape[1:]) == 1
    if dtype not in FLOATS or dtype in _FP8 or not (prod(scale_shape) == 1 or by_rows):
        return f"is {form}, but {scale} is {scale_shape} of {dtype}; expected a number, or one for each row of {shape}"
    # ComfyUI has these options here or in ``params``.
    params = declared.get("params")
    options: dict[str, Any] = (params if isinstance(params, dict) else {}) | declared
    if not options.get("convrot"):
        return Storage(form, (f"{layer}.weight", scale), shape)
    group = options.get("convrot_groupsize", 256)
    if group not in _CONVROT_GROUPS or len(shape) != 2 or shape[1] % group:
        return f"is {form} of shape {shape}, turned by {group!r} columns; expected a power of 4 that divides them"
    return Storage(form, (f"{layer}.weight", scale), shape, group)


def _in_blocks(layer: str, form: str, scale: str, kinds: Mapping[str, Kind]) -> Storage | str:
    shape = kinds[f"{layer}.weight"][1]
    size, dtypes = _BLOCKS[form]
    rows, columns = shape[0], prod(shape[1:]) * (2 if form == "nvfp4" else 1)
    if len(shape) != 2 or columns % size:
        return f"is {form} of shape {shape}; expected a matrix of whole blocks of {size}"
    dtype, scale_shape = kinds[scale]
    expected = _tiled(rows, columns // size)
    if dtype not in dtypes or scale_shape != expected:
        return f"is {form}, but {scale} is {scale_shape} of {dtype}; expected {expected} of {dtypes[0]}"
    keys: tuple[str, ...] = (f"{layer}.weight", scale)
    if form == "nvfp4":
        keys = (*keys, f"{layer}.weight_scale_2")
        dtype, scale_shape = kinds.get(keys[2], ("nothing", ()))
        if dtype not in FLOATS or prod(scale_shape) != 1:
            return f"is {form}, but {keys[2]} is {scale_shape} of {dtype}; expected one number, F32"
    return Storage(form, keys, (rows, columns))


# --- the numbers ---------------------------------------------------------------------------------------------------


def _by_rows(scale: Tensor, axes: int) -> Tensor:
    """One number, or one for each row, shaped to multiply the weight; float32."""
    return scale.float().reshape(-1, *[1] * (axes - 1))


def _into_scaled_(dense: Tensor, weight: Tensor, scale: Tensor) -> None:
    largest = _MAX[weight.dtype]
    over = tuple(range(0 if scale.numel() == 1 else 1, dense.dim()))
    size = torch.linalg.vector_norm(dense, torch.inf, over)
    # Zeros have any scale. No other may vanish in its dtype: the least of half precision is not far away.
    least = max(1e-30, torch.finfo(scale.dtype).tiny * torch.finfo(scale.dtype).eps)
    scale.copy_(torch.where(size > 0, size / largest, 1.0).clamp_(min=least).reshape(scale.shape))
    # By the scale as it is stored, which may have been rounded.
    dense.div_(_by_rows(scale, dense.dim())).clamp_(-largest, largest)
    weight.copy_(dense if weight.is_floating_point() else dense.round_())


def _rotated(weight: Tensor, group: int) -> Tensor:
    """Each group of columns times the regular Hadamard matrix, which undoes itself (ConvRot)."""
    hadamard4 = (1 - 2 * torch.eye(4).flip(0)) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, hadamard4)
    return (weight.reshape(-1, group) @ matrix.to(weight.device)).reshape(weight.shape)


# The sixteen numbers of 4 bits (E2M1), and what lies between the first eight of them; ties go to the even one of two.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
_EDGES = torch.where(torch.arange(7) % 2 == 1, torch.nextafter(_TIES, torch.zeros(7)), _TIES)


def _from_nvfp4(weight: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Two numbers a byte, the first in the higher half; each times its block's scale and that of all."""
    numbers = _E2M1.to(weight.device)
    pairs = torch.stack((numbers.repeat_interleave(16), numbers.repeat(16)), 1)
    dense = torch.nn.functional.embedding(weight.int(), pairs).reshape(len(weight), -1, 16)
    blocks = _untiled(scale.view(torch.float8_e4m3fn), *dense.shape[:2])
    return dense.mul_((blocks.float() * global_scale.float()).unsqueeze(-1)).flatten(1)


def _into_nvfp4_(dense: Tensor, weight: Tensor, scale: Tensor, global_scale: Tensor) -> None:
    size = torch.linalg.vector_norm(dense, torch.inf)
    global_scale.copy_(torch.where(size > 0, size / (448 * 6), 1.0).clamp_(min=1e-30).reshape(global_scale.shape))
    blocks = dense.reshape(len(dense), -1, 16)
    block_scale = torch.linalg.vector_norm(blocks, torch.inf, -1) / 6 / global_scale.float()
    stored = block_scale.clamp_(max=448).to(torch.float8_e4m3fn)
    step = (stored.float() * global_scale.float()).unsqueeze(-1)
    # A block that is too small for a scale is a block of zeros.
    values = torch.where(step > 0, blocks / step, 0.0).flatten(1)
    codes = torch.bucketize(values.abs(), _EDGES.to(dense.device), out_int32=True).byte()
    codes += values.signbit().byte() * 8
    weight.copy_(codes[:, 0::2] * 16 + codes[:, 1::2])
    scale.view(torch.uint8).copy_(_tiles(stored.view(torch.uint8)))


def _from_mxfp8(weight: Tensor, scale: Tensor) -> Tensor:
    """8-bit floats times a power of two for each block of 32: 2^(code - 127)."""
    dense = weight.float().reshape(len(weight), -1, 32)
    codes = _untiled(scale.view(torch.uint8), *dense.shape[:2])
    return torch.ldexp(dense, codes.int().unsqueeze(-1) - 127).flatten(1)


def _into_mxfp8_(dense: Tensor, weight: Tensor, scale: Tensor) -> None:
    blocks = dense.reshape(len(dense), -1, 32)
    size = torch.linalg.vector_norm(blocks, torch.inf, -1)
    # The smallest power of two that leaves no number beyond the largest.
    mantissa, exponent = torch.frexp(size / 448)
    power = (exponent - (mantissa == 0.5).int()).clamp_(-126, 127)
    weight.copy_(torch.ldexp(blocks, -power.unsqueeze(-1)).clamp_(-448, 448).flatten(1))
    scale.view(torch.uint8).copy_(_tiles(torch.where(size > 0, power + 127, 0).byte()))


def _tiled(rows: int, columns: int) -> tuple[int, int]:
    """The shape of blocks' scales in tiles of 128×4."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def _tiles(scales: Tensor) -> Tensor:
    """Blocks' scales, padded by zeros, as cuBLAS reads them: in a tile, the four of rows r, r + 32, r + 64, r + 96."""
    rows, columns = _tiled(*scales.shape)
    padded = scales.new_zeros(rows, columns)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    return padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, columns)


def _untiled(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse."""
    high, wide = _tiled(rows, columns)
    padded = tiles.reshape(high // 128, wide // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(high, wide)
    return padded[:rows, :columns]
