"""Quantised weights as checkpoints hold them, in float64 from the formats' definitions. Knows nothing of loha_core.

Every number is looked up in the list of those that its type can hold, and every block's scale is put at the place that
cuBLAS gives it, one by one. comfy-kitchen's own bytes are in `test_quantised`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def values(dtype: torch.dtype) -> np.ndarray:
    """What each of the 256 bytes means."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The code of the nearest number in a table; the even one of two that are as near."""
    finite = np.flatnonzero(np.isfinite(table))
    sorted_values, first = np.unique(table[finite], return_index=True)
    order = finite[first]
    right = np.clip(np.searchsorted(sorted_values, x), 1, len(order) - 1)
    low, high = x - sorted_values[right - 1], sorted_values[right] - x
    up = (high < low) | ((high == low) & (order[right] % 2 == 0))
    return order[np.where(up, right, right - 1)]


def rounded(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(nearest(x, values(dtype)).astype(np.uint8)).view(dtype)


@dataclass(frozen=True)
class Format:
    """One way to store the weight of a layer.

    Attributes:
        names: the suffixes of its scales.
        per_row: one scale for each output, and not one for all.
        declared: what its ``comfy_quant`` says, if it has one.
        metadata: the declaration stands in the file's header, not beside the layer.
    """

    kind: str
    names: tuple[str, ...] = ("weight_scale",)
    per_row: bool = False
    declared: dict[str, Any] | None = None
    metadata: bool = False
    scale_dtype: torch.dtype = torch.float32
    rotation: int = 0
    marker: Tensor | None = field(default=None, compare=False)


def said(form: str, **more: Any) -> dict[str, Any]:
    return {"format": form} | more


OLD = ("scale_weight",)
FORMATS = {
    "scaled fp8": Format("e4m3", OLD, marker=torch.zeros(0, dtype=E4M3)),
    "scaled fp8, full precision": Format("e4m3", OLD, marker=torch.zeros(2, dtype=E4M3)),
    "scaled fp8 e5m2": Format("e5m2", OLD, marker=torch.zeros(0, dtype=E5M2)),
    "scaled fp8 by rows": Format("e4m3", OLD, per_row=True, marker=torch.zeros(0, dtype=E4M3)),
    "scaled fp8 without a marker": Format("e4m3", OLD),
    "float8_e4m3fn": Format("e4m3", declared=said("float8_e4m3fn", full_precision_matrix_mult=True)),
    "float8_e5m2": Format("e5m2", declared=said("float8_e5m2")),
    "float8_e4m3fn by rows": Format("e4m3", per_row=True, declared=said("float8_e4m3fn")),
    "float8_e4m3fn, scale in half": Format("e4m3", declared=said("float8_e4m3fn"), scale_dtype=torch.float16),
    "float8_e4m3fn by metadata": Format("e4m3", declared=said("float8_e4m3fn"), metadata=True),
    "fp8 that nothing declares": Format("e4m3"),
    "int8_tensorwise": Format("int8", declared=said("int8_tensorwise")),
    "int8_tensorwise by rows": Format("int8", per_row=True, declared=said("int8_tensorwise")),
    "int8 with convrot": Format(
        "int8", per_row=True, rotation=16, declared=said("int8_tensorwise", convrot=True, convrot_groupsize=16)
    ),
    "int8 with convrot, in params": Format(
        "int8", per_row=True, rotation=4,
        declared=said("int8_tensorwise", params={"convrot": True, "convrot_groupsize": 4}),
    ),
    "nvfp4": Format("nvfp4", ("weight_scale", "weight_scale_2"), declared=said("nvfp4")),
    "mxfp8": Format("mxfp8", declared=said("mxfp8")),
}  # fmt: skip


def packed(form: Format, weight: np.ndarray) -> dict[str, Tensor]:
    """The tensors of a layer by suffix: the weight nearest to this one, and its scales."""
    if form.kind == "nvfp4":
        found = _nvfp4(weight)
    elif form.kind == "mxfp8":
        found = _mxfp8(weight)
    else:
        found = _scaled(form, weight @ rotation(form, weight.shape[1]))
    found = {("weight", *form.names)[i]: tensor for i, tensor in enumerate(found)}
    if form.declared is not None and not form.metadata:
        found["comfy_quant"] = torch.tensor(list(json.dumps(form.declared).encode()), dtype=torch.uint8)
    return found


def meant(form: Format, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The weight that the layer multiplies by."""
    weight, *scales = (tensors[name] for name in ("weight", *form.names))
    if form.kind == "nvfp4":
        codes = weight.numpy()
        numbers = np.stack([FP4[codes >> 4], FP4[codes & 15]], -1).reshape(len(codes), -1)
        blocks = unswizzled(scales[0].double().numpy(), len(numbers), numbers.shape[1] // 16)
        return numbers * np.repeat(blocks, 16, 1) * scales[1].double().item()
    if form.kind == "mxfp8":
        numbers = weight.double().numpy()
        codes = scales[0].view(torch.uint8).numpy().astype(np.float64)
        return numbers * np.repeat(2.0 ** (unswizzled(codes, len(numbers), numbers.shape[1] // 32) - 127), 32, 1)
    turned = weight.double().numpy() * scales[0].double().numpy().reshape(-1, 1)
    return turned @ rotation(form, weight.shape[1]).T


def rotation(form: Format, columns: int) -> np.ndarray:
    """The regular Hadamard matrix in blocks along the diagonal (ConvRot), or the identity."""
    if not form.rotation:
        return np.eye(columns)
    smallest = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    whole = smallest
    while len(whole) < form.rotation:
        whole = np.kron(whole, smallest)
    return np.kron(np.eye(columns // len(whole)), whole.T)


def _scaled(form: Format, weight: np.ndarray) -> tuple[Tensor, Tensor]:
    largest = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}[form.kind]
    scale = np.abs(weight).max(1, keepdims=True) / largest if form.per_row else np.abs(weight).max() / largest
    entry = torch.as_tensor(scale, dtype=form.scale_dtype)
    exact = np.clip(weight / np.maximum(entry.double().numpy(), 1e-300), -largest, largest)
    if form.kind == "int8":
        return torch.from_numpy(np.rint(exact).astype(np.int8)), entry
    return rounded(exact, E4M3 if form.kind == "e4m3" else E5M2), entry


def _nvfp4(weight: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    whole = torch.tensor(np.abs(weight).max() / (448 * 6), dtype=torch.float32)
    blocks = weight.reshape(len(weight), -1, 16)
    scale = rounded(np.minimum(np.abs(blocks).max(-1) / 6 / whole.item(), 448), E4M3)
    exact = blocks / np.maximum(scale.double().numpy() * whole.item(), 1e-300)[..., None]
    codes = nearest(np.clip(exact, -6, 6), FP4).reshape(weight.shape)
    two = torch.from_numpy((codes[:, 0::2] * 16 + codes[:, 1::2]).astype(np.uint8))
    return two, torch.from_numpy(swizzled(scale.double().numpy())).to(E4M3), whole


def _mxfp8(weight: np.ndarray) -> tuple[Tensor, Tensor]:
    blocks = weight.reshape(len(weight), -1, 32)
    power = np.ceil(np.log2(np.abs(blocks).max(-1) / 448))
    data = rounded((blocks / 2.0 ** power[..., None]).reshape(weight.shape), E4M3)
    return data, torch.from_numpy(swizzled(power + 127).astype(np.uint8)).view(torch.float8_e8m0fnu)


def place(row: int, column: int, columns: int) -> tuple[int, int]:
    """Where cuBLAS looks for a block's scale: tiles of 128×4, and in them 32 runs of four rows' four scales."""
    tiles = -(-columns // 4)
    tile = row // 128 * tiles + column // 4
    offset = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return divmod(offset, tiles * 4)


def swizzled(scales: np.ndarray) -> np.ndarray:
    rows, columns = scales.shape
    found = np.zeros((-(-rows // 128) * 128, -(-columns // 4) * 4))
    for row, column in np.ndindex(rows, columns):
        found[place(row, column, columns)] = scales[row, column]
    return found


def unswizzled(found: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.array([[found[place(row, column, columns)] for column in range(columns)] for row in range(rows)])
