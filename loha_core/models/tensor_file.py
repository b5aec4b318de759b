"""A model's weights in a .safetensors file, one tensor at a time: read, found by an adapter's names, and written again.

Quantised weights are read as what their layers multiply by, and written in their own format (`quantised`). Memory
never grows with the file: nothing is mapped, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bind import Network, Target
from ..errors import LoHaError
from ..formats.container import atomic, check_is_safetensors
from ..naming import names, spelling
from ..naming.recognise import diffusion_paths, families_of
from .quantised import FLOATS, survey

# Those that quantised weights and their scales have, too; powers of two (F8_E8M0) as bytes.
_DTYPES = FLOATS | {"I8": torch.int8, "U8": torch.uint8, "F8_E8M0": torch.uint8}
_BLOCK = 8 << 20

Change = Callable[[Tensor], object]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its dtype as the file names it, its shape, and its bytes from ``start`` to ``stop``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Weights:
    """The tensors of a .safetensors file; quantised weights as what they mean.

    >>> weights = Weights("model.safetensors")                              # doctest: +SKIP
    >>> weights["model.diffusion_model.out.2.weight"].shape                 # doctest: +SKIP
    torch.Size([4, 320, 3, 3])

    Raises:
        LoHaError: not a safetensors file, or a damaged one; names the file.
    """

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
        begin = 8 + length
        found = {
            key: Entry(e["dtype"], tuple(e["shape"]), begin + e["data_offsets"][0], begin + e["data_offsets"][1])
            for key, e in header.items()
        }
        self.entries = dict(sorted(found.items(), key=lambda item: item[1].start))
        kinds = {key: (entry.dtype, entry.shape) for key, entry in self.entries.items()}
        self.survey = survey(kinds, self._stored, self.metadata)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are floating point, and of quantised weights as their layers see them."""
        return self.survey.shapes

    def __getitem__(self, key: str) -> Tensor:
        """A copy of one tensor; of a quantised weight what its layer multiplies by, in float32.

        Raises:
            LoHaError: the file ends too early, or cannot be read any more; a weight in a format that is not known.
        """
        return self.survey.dense(self.path, key, self._stored)

    def _stored(self, key: str) -> Tensor:
        return self._read(key)[0]

    def _read(self, key: str) -> tuple[Tensor, bytearray]:
        """A tensor as it is stored, and the memory that it lies in."""
        entry = self.entries[key]
        data = bytearray(entry.stop - entry.start)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(entry.start)
                view, count = memoryview(data), 0
                while count < len(data) and (read := file.readinto(view[count:])):
                    count += read
        except OSError as error:
            raise LoHaError(f"{self.path}: {key} cannot be read ({error})") from error
        if count < len(data):
            raise LoHaError(f"{self.path}: ends within {key}; it was changed while it was read")
        if not data:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype]), data
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape), data

    def rewritten(self, out: Path, change: Callable[[str], Change | None], metadata: Mapping[str, str]) -> None:
        """Write a copy with some tensors changed, each in its dtype, or its format.

        Tensors are read, changed and written one after another, a quantised weight with its scales, into a temporary
        file that takes the name ``out`` only when all is written.

        Args:
            change: key -> what changes the tensor in place, or None to copy it as it is. Of a quantised weight it
                gets what the weight means, in float32; it is not asked about its scales.

        Raises:
            LoHaError: the file cannot be written; ``out`` is then as it was.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        begin = min((entry.start for entry in self.entries.values()), default=0)
        for key, e in self.entries.items():
            header[key] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.start - begin, e.stop - begin]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        shift = len(text) + 8 - begin
        scales = {part for storage in self.survey.storages.values() for part in storage.keys[1:]}
        with atomic(out) as temporary, open(self.path, "rb") as source, open(temporary, "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for key in self.entries:
                if key in scales:
                    continue  # with its weight, wherever it lies
                storage = self.survey.storages.get(key)
                parts = storage.keys if storage else (key,)
                changed = change(key)
                blocks = None if changed is None else self._changed(key, parts, changed)
                for number, part in enumerate(parts):
                    entry = self.entries[part]
                    target.seek(entry.start + shift)
                    if blocks is None:
                        _copy(source, target, entry)
                    else:
                        target.write(blocks[number])

    def _changed(self, key: str, parts: tuple[str, ...], change: Change) -> list[bytearray]:
        """The bytes of a tensor after a change, or those of a quantised weight and its scales."""
        tensors, blocks = zip(*(self._read(part) for part in parts), strict=True)
        if storage := self.survey.storages.get(key):
            dense = storage.dense(tensors)
            change(dense)
            storage.store_(dense, tensors)
        else:
            change(tensors[0])
        return list(blocks)


def _copy(source: BinaryIO, target: BinaryIO, entry: Entry) -> None:
    source.seek(entry.start)
    left = entry.stop - entry.start
    while left and (block := source.read(min(left, _BLOCK))):
        target.write(block)
        left -= len(block)
    if left:
        raise OSError("the source ends too early")


# What parts of a checkpoint begin with -> the prefix that an adapter's names have. The first that fits counts.
_PARTS = (
    ("model.diffusion_model.", "lora_unet_"),
    ("diffusion_model.", "lora_unet_"),
    ("unet.", "lora_unet_"),
    ("transformer.", "lora_unet_"),
    ("cond_stage_model.transformer.", "lora_te_"),
    ("cond_stage_model.model.", "lora_te_"),
    ("conditioner.embedders.0.transformer.", "lora_te1_"),
    ("conditioner.embedders.1.model.", "lora_te2_"),
    ("text_encoders.clip_l.transformer.", "lora_te1_"),
    ("text_encoders.clip_g.transformer.", "lora_te2_"),
    ("text_encoders.t5xxl.transformer.", "lora_te3_"),
    ("text_encoder.", "lora_te1_"),
    ("text_encoder_2.", "lora_te2_"),
    ("text_encoder_3.", "lora_te3_"),
    ("text_model.", "lora_te_text_model_"),
)
_NOT_ADAPTED = re.compile(
    r"(first_stage_model|vae|model_ema|encoder|decoder|quant_conv|post_quant_conv|denoiser|control_model)\."
    r"|.*(_embedding|embeddings\.\w+|shared|embed_tokens|pos_embed|logit_scale|relative_attention_bias)\.weight$"
)
# OpenCLIP's text encoder in the names of transformers.
_OPENCLIP = {
    "attn.out_proj": ("self_attn_out_proj",),
    "mlp.c_fc": ("mlp_fc1",),
    "mlp.c_proj": ("mlp_fc2",),
    "attn.in_proj_weight": ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj"),
}


def modules(shapes: Mapping[str, tuple[int, ...]], least_axes: int = 2) -> dict[str, Target]:
    """The layers that adapters act on, by the name that kohya's files give them -> weight, or slice of a weight.

    A Stable Diffusion U-Net's blocks get diffusers' names, whichever the file has; a DiT's keep their own.
    """
    found: dict[str, Target] = {}
    paths = diffusion_paths(shapes)
    families = families_of(paths.values())
    for key, shape in shapes.items():
        is_known = key in paths and any(family.weight(paths[key]) for family in families)
        if len(shape) < least_axes or (_NOT_ADAPTED.match(key) and not is_known):
            continue
        lead, rest = next(((new, key[len(old) :]) for old, new in _PARTS if key.startswith(old)), ("lora_unet_", key))
        if openclip := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)(?:\.weight)?", rest):
            if parts := _OPENCLIP.get(openclip[2]):
                within = f"{lead}text_model_encoder_layers_{openclip[1]}_"
                found |= {within + part: target for part, target in _slices(key, shape, parts)}
        elif rest == "text_projection":
            found[f"{lead}text_projection"] = (key, None, "transposed")
        elif rest.endswith(".weight"):
            path = names.flat(rest.removesuffix(".weight"))
            found[lead + (spelling.to_diffusers(path) if lead == "lora_unet_" else path)] = key
    return found


def network(shapes: Mapping[str, tuple[int, ...]], least_axes: int = 2) -> Network:
    """A checkpoint's, diffusers' or bare model's weights under every name that adapters have for them."""
    found: dict[str, Target] = {}
    for name, target in modules(shapes, least_axes).items():
        key = target if isinstance(target, str) else target[0]
        found[name] = target
        if target == key:
            found[key.removesuffix(".weight")] = target
            path = name.removeprefix("lora_unet_")
            if path != name:
                # The families differ in one name, which both lead here.
                found |= {f"lora_unet_{spelling.to_ldm(path, family)}": key for family in ("SDXL", "SD1.5")}
    return Network(found, shapes)


def _slices(key: str, shape: tuple[int, ...], parts: tuple[str, ...]) -> Iterator[tuple[str, Target]]:
    """Parts of a fused weight: each has as many rows as the weight has columns, the last what is left."""
    if len(parts) == 1:
        yield parts[0], key
        return
    width = shape[1]
    for number, part in enumerate(parts):
        length = width if number < len(parts) - 1 else shape[0] - width * number
        if length > 0:
            yield part, (key, (0, width * number, length))


def part_of(weight: Tensor, target: Target) -> Tensor:
    """The view of a weight that a target means."""
    if isinstance(target, str):
        return weight
    if target[1] is not None:
        axis, start, length = target[1]
        return weight.narrow(axis, start, length)
    return weight.T


def rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's shape as a matrix: (o, i·∏k)."""
    return shape[0], prod(shape[1:])
