"""The modules of a Stable Diffusion U-Net under the names of the diffusers library and of LDM, which ComfyUI keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from ..errors import LoHaError
from . import names

# How many levels a U-Net has, and which of them have attention. SD2 is as SD1.5.
UNETS = {"SD1.5": (4, (0, 1, 2)), "SDXL": (3, (1, 2))}
_PLAIN = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# What the paths of each side's blocks begin with.
UNET_SIDES = {
    "diffusers": ("down_blocks_", "up_blocks_", "mid_block_"),
    "ldm": ("input_blocks_", "output_blocks_", "middle_block_"),
}


@cache
def unet_blocks(family: str) -> dict[str, str]:
    """LDM block -> diffusers block, both dotted, of a Stable Diffusion U-Net with two residual blocks a level.

    >>> unet_blocks("SDXL")["output_blocks.2.2.conv"], unet_blocks("SD1.5")["output_blocks.2.1.conv"]
    ('up_blocks.0.upsamplers.0.conv', 'up_blocks.0.upsamplers.0.conv')

    Raises:
        LoHaError: no such family.
    """
    if family not in UNETS:
        raise LoHaError(f"no U-Net family {family!r}; there are {', '.join(UNETS)}")
    levels, attention = UNETS[family]
    diffusers = dict(_PLAIN)
    for level in range(levels):
        for i in range(2):
            diffusers[f"input_blocks.{3 * level + i + 1}.0"] = f"down_blocks.{level}.resnets.{i}"
            if level in attention:
                diffusers[f"input_blocks.{3 * level + i + 1}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < levels - 1:
            diffusers[f"input_blocks.{3 * level + 3}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for step in range(levels):
        has_attention = levels - 1 - step in attention
        for i in range(3):
            diffusers[f"output_blocks.{3 * step + i}.0"] = f"up_blocks.{step}.resnets.{i}"
            if has_attention:
                diffusers[f"output_blocks.{3 * step + i}.1"] = f"up_blocks.{step}.attentions.{i}"
        if step < levels - 1:
            diffusers[f"output_blocks.{3 * step + 2}.{1 + has_attention}.conv"] = f"up_blocks.{step}.upsamplers.0.conv"
    return diffusers


@cache
def _flat_blocks(family: str | None, to_ldm: bool) -> list[tuple[str, str]]:
    """(old, new) flat names of blocks, the longest first; of all families at once if None."""
    merged: dict[str, str] = {}
    for name in UNETS if family is None else [family]:
        merged |= unet_blocks(name)
    pairs = [(v, k) if to_ldm else (k, v) for k, v in merged.items()]
    return sorted(((names.flat(k), names.flat(v)) for k, v in pairs), key=lambda pair: -len(pair[0]))


@cache
def _translate(path: str, family: str | None, to_ldm: bool) -> str:
    for old, new in _flat_blocks(family, to_ldm):
        if path == old or path.startswith(f"{old}_"):
            layer = path[len(old) + 1 :]
            if "resnets" in old + new:
                inner = {names.flat(k): v for k, v in _RESNET.items()}
                inner = {v: k for k, v in inner.items()} if to_ldm else inner
                layer = inner.get(layer, layer)
            return f"{new}_{layer}" if layer else new
    return path


def to_diffusers(path: str) -> str:
    """A flat path of a U-Net, in LDM's names, in those of diffusers; any other path as it is.

    >>> to_diffusers("output_blocks_3_1_transformer_blocks_0_attn2_to_k")
    'up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k'
    """
    return _translate(path, None, False)


def to_ldm(path: str, family: str = "SD1.5") -> str:
    """The inverse of `to_diffusers`; the families differ in ``up_blocks_0_upsamplers_0_conv`` alone."""
    return _translate(path, family, True)


def unet_family(layers: Iterable[str]) -> str:
    """Which U-Net the names are of: "SDXL" if a module that only it has is among them, else "SD1.5"."""
    only_sdxl = ("up_blocks_0_attentions", "output_blocks_0_1_", "add_embedding", "label_emb", "output_blocks_2_2_")
    return "SDXL" if any(names.path_of(name).startswith(only_sdxl) for name in layers) else "SD1.5"


def unet_side(path: str) -> str | None:
    """Whose names a flat path of a U-Net has, "diffusers" or "ldm"; None for any other path."""
    for ldm, diffusers in _PLAIN.items():
        for side, plain in (("ldm", names.flat(ldm)), ("diffusers", names.flat(diffusers))):
            if path == plain or path.startswith(f"{plain}_"):
                return side
    if re.match(r"(?:down|up)_blocks_\d+_\d", path):
        return None  # Stable Cascade's lists have that name too, and lists within them
    return next((side for side, starts in UNET_SIDES.items() if path.startswith(starts)), None)
