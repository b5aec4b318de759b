"""One module under the names of the diffusers library and of the original checkpoints (LDM, which ComfyUI keeps).

`names` brings prefixes and separators together; here ``input_blocks.4.1`` and ``down_blocks.1.attentions.0`` meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal

from ..adapter import WRAPPER
from ..errors import LoHaError
from . import names
from .families import Family

# Levels of the U-Net, and those that have attention. SD2 is as SD1.5.
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
# What tells whose names a path has.
_UNET_SIDES = {
    "diffusers": ("down_blocks_", "up_blocks_", "mid_block_"),
    "ldm": ("input_blocks_", "output_blocks_", "middle_block_"),
}
_DIT_SIDES = {
    "diffusers": ("transformer_blocks_", "single_transformer_blocks_"),
    "native": ("double_blocks_", "single_blocks_", "joint_blocks_"),
}
_SIDE_OF_PREFIX = {
    "transformer.": "diffusers",
    "lora_transformer_": "diffusers",
    "lycoris_": "diffusers",
    "diffusion_model.": "native",
    "model.diffusion_model.": "native",
}

STYLES = ("kohya", "diffusers", "native")
# LyCORIS' trainers write kohya's names.
_ALIASES = {"lycoris": "kohya"}
UNet = Literal["keep", "diffusers", "ldm"]
# Styles that have one name for a U-Net's blocks.
_UNET_OF: dict[str, UNet] = {"diffusers": "diffusers", "native": "ldm"}


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
    for name in UNETS if family is None else [family]:
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


def aliases(modules: Iterable[str]) -> dict[str, str]:
    """What a U-Net's modules are called in the other world -> their own name in this one; both ways.

    >>> aliases(["down_blocks.0.resnets.0.conv1"])
    {'input_blocks_1_0_in_layers_2': 'down_blocks.0.resnets.0.conv1'}
    """
    modules = list(modules)
    family, found = family_of(modules), {}
    for name in modules:
        path = names.flat(bare(name))
        other = to_ldm(path, family) if _unet_side(path) == "diffusers" else to_diffusers(path)
        if other != path:
            found[other] = name
    return found


def native_key(name: str, family: str = "SD1.5", table: Family | None = None) -> str:
    """The weight's key as ComfyUI names it, for block strengths; a name of no known block comes out as BASE does.

    Args:
        family: which U-Net.
        table: of a DiT's names.
    """
    component, path = identity(name)
    if component != "unet":
        return name
    if table is not None and not _unet_side(path):
        place = table.place(path, None)
        return f"diffusion_model.{place[0] if place else names.dotted(path)}.weight"
    return f"diffusion_model.{names.dotted(to_ldm(path, family))}.weight"


def bare(name: str) -> str:
    """A name less its prefix, as it is spelled."""
    name = name.removeprefix(WRAPPER)
    return name.removeprefix(names.prefix_of(name) or "").removeprefix(WRAPPER)


_LEADS: dict[str, dict[str, str]] = {
    "kohya": {"unet": "lora_unet_", "te1": "lora_te_", "te2": "lora_te2_", "te3": "lora_te3_"},
    "diffusers": {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2.", "te3": "text_encoder_3."},
    "native": {
        "unet": "diffusion_model.",
        "te1": "text_encoders.clip_l.transformer.",
        "te2": "text_encoders.clip_g.transformer.",
        "te3": "text_encoders.t5xxl.transformer.",
    },
}


def respell(layers: Iterable[str], style: str, unet: UNet = "keep") -> dict[str, str]:
    """Name -> name in another spelling.

    Args:
        style: "kohya" (``lora_unet_…``; "lycoris" means the same), "diffusers" (``unet.…``, ``transformer.…``) or
            "native" (``diffusion_model.…``, as ComfyUI calls its weights).
        unet: for "kohya", whose names a U-Net's blocks get; the other two have their own.

    Raises:
        LoHaError: an unknown style, two names that would become one, or a module whose name in that style is not
            known: a file that says so in its names and is not read by them is lost work.
    """
    style = style_of(style, unet)
    own = _UNET_OF.get(style, unet)
    layers = list(layers)
    lead, family = _leads(layers, style), family_of(layers)
    found = {name: lead[identity(name)[0]] + _path(name, style, own, family) for name in layers}
    spelled: dict[str, str] = {}
    for name, new in found.items():
        if spelled.setdefault(new, name) != name:
            raise LoHaError(f"{name} and {spelled[new]} would both become {new}; leave out or rename one")
    return found


def style_of(style: str, unet: UNet) -> str:
    """One of STYLES.

    Raises:
        LoHaError: no such style, or one that has other names for a U-Net's blocks.
    """
    style = _ALIASES.get(style, style)
    if style not in STYLES or unet not in ("keep", "diffusers", "ldm"):
        raise LoHaError(
            f"no spelling {style!r} with {unet!r} names; there are {', '.join(STYLES)}; keep, diffusers, ldm"
        )
    own = _UNET_OF.get(style, unet)
    if unet not in ("keep", own):
        raise LoHaError(f"{style} names have {own}'s blocks in a U-Net, not {unet}'s; leave that choice out")
    return style


def is_dit(name: str) -> bool:
    """Whether a module is of a diffusion model that is no U-Net of Stable Diffusion's."""
    component, path = identity(name)
    return component == "unet" and not _unet_side(path)


def _leads(layers: list[str], style: str) -> dict[str, str]:
    """What stands in front of each network's names."""
    lead = dict(_LEADS[style])
    if style == "kohya" and any(identity(name)[0] == "te2" for name in layers):
        lead["te1"] = "lora_te1_"
    if style == "diffusers" and _is_transformer(layers):
        lead["unet"] = "transformer."
    return lead


def _is_transformer(layers: Iterable[str]) -> bool:
    """Whether the names are of a DiT: one that diffusers calls ``transformer``, in place of a U-Net."""
    paths = [path for name in layers for component, path in [identity(name)] if component == "unet"]
    unet = any(_side(path, _UNET_SIDES) for path in paths)
    return not unet and any(_dit_side(name) == "diffusers" for name in layers)


def _side(path: str, sides: Mapping[str, tuple[str, ...]]) -> str | None:
    return next((side for side, starts in sides.items() if path.startswith(starts)), None)


def _unet_side(path: str) -> str | None:
    """Whose names a U-Net's path has; None for what is no U-Net's."""
    for ldm, diffusers in _PLAIN.items():
        for side, plain in (("ldm", names.flat(ldm)), ("diffusers", names.flat(diffusers))):
            if path == plain or path.startswith(f"{plain}_"):
                return side
    # Stable Cascade counts within its lists of that name.
    return None if re.match(r"(?:down|up)_blocks_\d+_\d", path) else _side(path, _UNET_SIDES)


def _dit_side(name: str) -> str | None:
    """Whose names a transformer's module has, by its prefix or its blocks; None where neither tells."""
    prefix, path = names.prefix_of(name.removeprefix(WRAPPER)), path_of(name)
    by_prefix, by_blocks = _SIDE_OF_PREFIX.get(prefix or ""), _side(path, _DIT_SIDES)
    if by_prefix == "diffusers" and by_blocks == "native":
        return "a third's"  # diffusion-pipe's HunyuanVideo
    # Trainers that write lora_unet_ wrap the original code's model.
    return by_prefix or by_blocks or ("native" if prefix == "lora_unet_" and "_" in path else None)


def _path(name: str, style: str, unet: str, family: str) -> str:
    """A name less its prefix, as ``style`` spells it.

    Raises:
        LoHaError: it is not known.
    """
    path = names.flat(bare(name))
    if identity(name)[0] == "unet" and (side := _unet_side(path)):
        if unet not in ("keep", side):
            path = to_ldm(path, family) if unet == "ldm" else to_diffusers(path)
            if _unet_side(path) != unet:
                raise LoHaError(f"{name}: {unet}'s name of this block is not known; keep the names as they are")
            return path if style == "kohya" else _dotted(name, path)
    elif identity(name)[0] == "unet":
        wanted, found = "diffusers" if style == "diffusers" else "native", _dit_side(name)
        if name.startswith("text_encoders.") or found not in (None, wanted):
            raise LoHaError(
                f"{name}: what {style} calls this module is not known; for this family of models names can only be "
                "kept as they are"
            )
    if style == "kohya":
        return path
    return bare(name) if "." in bare(name) else _dotted(name, path)


def _dotted(name: str, path: str) -> str:
    if not names.has_known_parts(path):
        raise LoHaError(
            f"{name}: which of its '_' stand for '.' is not known for this family of models; keep the names as they are"
        )
    return names.dotted(path)


def in_one_file(layers: Iterable[str]) -> dict[str, str]:
    """Names of PEFT's folders, or of a model's own modules, as the readers of single files know them.

    A U-Net's and the text encoders' in kohya's spelling. A transformer's stay dotted, for flat names are taken for
    those of its original code. Names that a single file could have had already stay as they are.
    """
    layers = list(layers)
    lead = _leads(layers, "kohya")

    def spelled(name: str) -> str:
        prefix, (component, path) = names.prefix_of(name), identity(name)
        if prefix is not None and (prefix.endswith("_") or prefix == "transformer."):
            return name
        if component == "unet" and prefix is None and not _unet_side(path):
            return f"transformer.{name}" if "." in name else f"lora_unet_{name}"
        return lead[component] + names.flat(bare(name))

    return {name: spelled(name) for name in layers}


def spelled_like(first: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """The others' names as the first's file would spell them; a module that the first has gets its very name.

    Raises:
        LoHaError: how it would is not known.
    """
    first = list(first)
    own = {identity(name): name for name in first}
    if not first:
        return {name: name for name in others}
    style = "kohya" if "." not in first[0] and (names.prefix_of(first[0]) or "").endswith("_") else "diffusers"
    if (names.prefix_of(first[0].removeprefix(WRAPPER)) or "").endswith("diffusion_model."):
        style = "native"
    ldm = any(path_of(n).startswith(_UNET_SIDES["ldm"]) for n in first)
    prefixes = {identity(name)[0]: name.removesuffix(bare(name)) for name in first}
    family, found = family_of(first), {}
    whose = next((side for name in first if is_dit(name) and (side := _dit_side(name))), None)
    for name in others:
        component = identity(name)[0]
        if identity(name) in own:
            found[name] = own[identity(name)]
        elif is_dit(name) and whose in (None, _dit_side(name)):
            written = names.flat(bare(name)) if style == "kohya" else _with_dots(bare(name))
            found[name] = prefixes.get(component, _LEADS[style][component]) + written
        else:
            path = _path(name, style, "ldm" if ldm else "diffusers", family)
            found[name] = prefixes.get(component, _LEADS[style][component]) + path
    return found


def _with_dots(name: str) -> str:
    return name if "." in name else _dotted(name, name)
