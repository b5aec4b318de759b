"""One module under the names of the diffusers library and of the original checkpoints (LDM, which ComfyUI keeps).

`names` brings prefixes and separators together; here ``input_blocks.4.1`` and ``down_blocks.1.attentions.0`` meet.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Literal

from . import names
from .errors import LoHaError

# Levels of the U-Net, and those that have attention. SD2 is as SD1.5.
_UNETS = {"SD1.5": (4, (0, 1, 2)), "SDXL": (3, (1, 2))}
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
# A DiT's blocks, for block strengths: diffusers -> native, where one block is one block.
_DIT = {"single_transformer_blocks.": "single_blocks.", "transformer_blocks.": "joint_blocks."}

Style = Literal["lycoris", "diffusers", "native"]
STYLES = ("lycoris", "diffusers", "native")


@cache
def unet_blocks(family: str) -> dict[str, str]:
    """LDM block -> diffusers block, both dotted, of a Stable Diffusion U-Net with two residual blocks a level.

    >>> unet_blocks("SDXL")["output_blocks.2.2.conv"], unet_blocks("SD1.5")["output_blocks.2.1.conv"]
    ('up_blocks.0.upsamplers.0.conv', 'up_blocks.0.upsamplers.0.conv')

    Raises:
        LoHaError: no such family.
    """
    if family not in _UNETS:
        raise LoHaError(f"no U-Net family {family!r}; there are {', '.join(_UNETS)}")
    levels, attention = _UNETS[family]
    found = dict(_PLAIN)
    for level in range(levels):
        for i in range(2):
            found[f"input_blocks.{3 * level + i + 1}.0"] = f"down_blocks.{level}.resnets.{i}"
            if level in attention:
                found[f"input_blocks.{3 * level + i + 1}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < levels - 1:
            found[f"input_blocks.{3 * level + 3}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for step in range(levels):
        has_attention = levels - 1 - step in attention
        for i in range(3):
            found[f"output_blocks.{3 * step + i}.0"] = f"up_blocks.{step}.resnets.{i}"
            if has_attention:
                found[f"output_blocks.{3 * step + i}.1"] = f"up_blocks.{step}.attentions.{i}"
        if step < levels - 1:
            found[f"output_blocks.{3 * step + 2}.{1 + has_attention}.conv"] = f"up_blocks.{step}.upsamplers.0.conv"
    return found


@cache
def _flat_blocks(family: str | None, to_ldm: bool) -> list[tuple[str, str]]:
    """The same with flat names, the longest first; of all families at once if None."""
    merged: dict[str, str] = {}
    for name in _UNETS if family is None else [family]:
        merged |= unet_blocks(name)
    pairs = [(v, k) if to_ldm else (k, v) for k, v in merged.items()]
    return sorted(((names.flat(k), names.flat(v)) for k, v in pairs), key=lambda pair: -len(pair[0]))


@cache
def _translate(path: str, family: str | None, to_ldm: bool) -> str:
    for old, new in _flat_blocks(family, to_ldm):
        if path == old or path.startswith(f"{old}_"):
            rest = path[len(old) + 1 :]
            if "resnets" in old + new:
                inner = {names.flat(k): v for k, v in _RESNET.items()}
                inner = {v: k for k, v in inner.items()} if to_ldm else inner
                rest = inner.get(rest, rest)
            return f"{new}_{rest}" if rest else new
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


def family_of(layers: Iterable[str]) -> str:
    """Which U-Net the names are of: "SDXL" where something only it has is there, else "SD1.5"."""
    only_sdxl = ("up_blocks_0_attentions", "output_blocks_0_1_", "add_embedding", "label_emb", "output_blocks_2_2_")
    return "SDXL" if any(path_of(name).startswith(only_sdxl) for name in layers) else "SD1.5"


def path_of(name: str) -> str:
    return names.split(name)[1]


@cache
def identity(name: str) -> tuple[str, str]:
    """(network, path) that is the same for every spelling of a module; a bare name is taken for the U-Net's or DiT's.

    >>> identity("lora_unet_input_blocks_4_1_proj_in") == identity("unet.down_blocks.1.attentions.0.proj_in")
    True
    """
    component, path = names.split(name)
    if not component:
        component = "te1" if path.startswith("encoder_layers_") else "unet"
    return component, to_diffusers(path) if component == "unet" else path


def native_key(name: str, family: str = "SD1.5") -> str:
    """The weight's key as ComfyUI names it, for block strengths; a name of no known block comes out as BASE does."""
    component, path = identity(name)
    if component != "unet":
        return name
    dotted = names.dotted(to_ldm(path, family))
    for diffusers, native in _DIT.items():
        if dotted.startswith(diffusers):
            flux = diffusers == "transformer_blocks." and family == "Flux"
            dotted = ("double_blocks." if flux else native) + dotted.removeprefix(diffusers)
            break
    return f"diffusion_model.{dotted}.weight"


def bare(name: str) -> str:
    """A name less its prefix, as it is spelled."""
    name = name.removeprefix(names.WRAPPER)
    return name.removeprefix(names.prefix_of(name) or "").removeprefix(names.WRAPPER)


_LEADS: dict[str, dict[str, str]] = {
    "lycoris": {"unet": "lora_unet_", "te1": "lora_te_", "te2": "lora_te2_", "te3": "lora_te3_"},
    "diffusers": {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2.", "te3": "text_encoder_3."},
    "native": {
        "unet": "diffusion_model.",
        "te1": "text_encoders.clip_l.transformer.",
        "te2": "text_encoders.clip_g.transformer.",
        "te3": "text_encoders.t5xxl.transformer.",
    },
}


def respell(layers: Iterable[str], style: str, unet: Literal["keep", "diffusers", "ldm"] = "keep") -> dict[str, str]:
    """Name -> name in another spelling.

    Args:
        style: "lycoris" (``lora_unet_…``), "diffusers" (``unet.…``) or "native" (``diffusion_model.…``).
        unet: whose names a U-Net's blocks get.

    Raises:
        LoHaError: an unknown style, or two names that would become one.
    """
    if style not in _LEADS or unet not in ("keep", "diffusers", "ldm"):
        raise LoHaError(
            f"no spelling {style!r} with {unet!r} names; there are {', '.join(_LEADS)}; keep, diffusers, ldm"
        )
    layers = list(layers)
    family = family_of(layers)
    lead = dict(_LEADS[style])
    if style == "lycoris" and any(identity(name)[0] == "te2" for name in layers):
        lead["te1"] = "lora_te1_"
    is_unet = any(path_of(name).startswith(("down_blocks_", "up_blocks_", "mid_block_")) for name in layers)
    if style == "diffusers" and not is_unet and any("transformer_blocks" in path_of(name) for name in layers):
        lead["unet"] = "transformer."
    found = {name: lead[identity(name)[0]] + _path(name, style, unet, family) for name in layers}
    spelled: dict[str, str] = {}
    for name, new in found.items():
        if spelled.setdefault(new, name) != name:
            raise LoHaError(f"{name} and {spelled[new]} would both become {new}; leave out or rename one")
    return found


def _path(name: str, style: str, unet: str, family: str) -> str:
    path = names.flat(bare(name))
    if identity(name)[0] == "unet" and unet != "keep":
        path = to_ldm(path, family) if unet == "ldm" else to_diffusers(path)
    elif style != "lycoris" and "." in bare(name):
        return bare(name)
    return path if style == "lycoris" else names.dotted(path)


def spelled_like(first: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """The others' names as the first's file would spell them; a module that the first has gets its very name."""
    first = list(first)
    own = {identity(name): name for name in first}
    if not first:
        return {name: name for name in others}
    style = "lycoris" if "." not in first[0] and (names.prefix_of(first[0]) or "").endswith("_") else "diffusers"
    if (names.prefix_of(first[0].removeprefix(names.WRAPPER)) or "").endswith("diffusion_model."):
        style = "native"
    ldm = any(path_of(n).startswith(("input_blocks_", "middle_block_", "output_blocks_")) for n in first)
    prefixes = {identity(name)[0]: name.removesuffix(bare(name)) for name in first}
    family, found = family_of(first), {}
    for name in others:
        component = identity(name)[0]
        path = _path(name, style, "ldm" if ldm else "diffusers", family)
        found[name] = own.get(identity(name)) or prefixes.get(component, _LEADS[style][component]) + path
    return found
