"""A module's name in the spelling of other programs: which names are one module, and how each style writes it.

`names` brings prefixes and separators together, `unet` the two names of a U-Net's blocks. Where a DiT's names mean
other weights in another style, `respell` cuts or joins the layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Literal

from ..adapter import WRAPPER
from ..errors import LoHaError
from . import names
from .families import Family
from .names import path_of
from .unet import UNET_SIDES, to_diffusers, to_ldm, unet_family, unet_side

# What the paths of a transformer's blocks begin with, in the names of each side.
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
_UNET_OF_STYLE: dict[str, UNet] = {"diffusers": "diffusers", "native": "ldm"}
_PREFIXES: dict[str, dict[str, str]] = {
    "kohya": {"unet": "lora_unet_", "te1": "lora_te_", "te2": "lora_te2_", "te3": "lora_te3_"},
    "diffusers": {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2.", "te3": "text_encoder_3."},
    "native": {
        "unet": "diffusion_model.",
        "te1": "text_encoders.clip_l.transformer.",
        "te2": "text_encoders.clip_g.transformer.",
        "te3": "text_encoders.t5xxl.transformer.",
    },
}


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


def is_dit(name: str) -> bool:
    """Whether a module is of a diffusion model that is no U-Net of Stable Diffusion's."""
    component, path = identity(name)
    return component == "unet" and not unet_side(path)


def aliases(modules: Iterable[str]) -> dict[str, str]:
    """A U-Net's modules: the flat name that the other side, diffusers or LDM, has for one -> the name given here.

    >>> aliases(["down_blocks.0.resnets.0.conv1"])
    {'input_blocks_1_0_in_layers_2': 'down_blocks.0.resnets.0.conv1'}
    """
    modules = list(modules)
    family, others = unet_family(modules), {}
    for name in modules:
        path = names.flat(bare(name))
        other = to_ldm(path, family) if unet_side(path) == "diffusers" else to_diffusers(path)
        if other != path:
            others[other] = name
    return others


def native_key(name: str, family: str = "SD1.5", table: Family | None = None) -> str:
    """The weight's key as ComfyUI names it, for block strengths; a name of no known block comes out as BASE does.

    Args:
        family: which U-Net.
        table: of a DiT's names.
    """
    component, path = identity(name)
    if component != "unet":
        return name
    if table is not None and not unet_side(path):
        place = table.place(path, None)
        return f"diffusion_model.{place[0] if place else names.dotted(path)}.weight"
    return f"diffusion_model.{names.dotted(to_ldm(path, family))}.weight"


def bare(name: str) -> str:
    """A name less its prefix, as it is spelled."""
    name = name.removeprefix(WRAPPER)
    return name.removeprefix(names.prefix_of(name) or "").removeprefix(WRAPPER)


def in_style(layers: Iterable[str], style: str, unet: UNet = "keep") -> dict[str, str]:
    """Name -> name in another spelling.

    Args:
        style: "kohya" (``lora_unet_…``; "lycoris" means the same), "diffusers" (``unet.…``, ``transformer.…``) or
            "native" (``diffusion_model.…``, as ComfyUI calls its weights).
        unet: for "kohya", whose names a U-Net's blocks get; the other two have one each.

    Raises:
        LoHaError: an unknown style, two names that would become one, or a module whose name in that style is not
            known: a file that says so in its names and is not read by them is lost work.
    """
    style = style_of(style, unet)
    unet = _UNET_OF_STYLE.get(style, unet)
    layers = list(layers)
    prefixes, family = _prefixes(layers, style), unet_family(layers)
    new_names = {name: prefixes[identity(name)[0]] + _path(name, style, unet, family) for name in layers}
    named: dict[str, str] = {}
    for name, new in new_names.items():
        if named.setdefault(new, name) != name:
            raise LoHaError(f"{name} and {named[new]} would both become {new}; leave out or rename one")
    return new_names


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
    fixed = _UNET_OF_STYLE.get(style, unet)
    if unet not in ("keep", fixed):
        raise LoHaError(f"{style} names have {fixed}'s blocks in a U-Net, not {unet}'s; leave that choice out")
    return style


def _prefixes(layers: list[str], style: str) -> dict[str, str]:
    """What stands in front of each network's names."""
    prefixes = dict(_PREFIXES[style])
    if style == "kohya" and any(identity(name)[0] == "te2" for name in layers):
        prefixes["te1"] = "lora_te1_"
    if style == "diffusers" and _is_transformer(layers):
        prefixes["unet"] = "transformer."
    return prefixes


def _is_transformer(layers: Iterable[str]) -> bool:
    """Whether the names are of a DiT: one that diffusers calls ``transformer``, in place of a U-Net."""
    identities = [identity(name) for name in layers]
    starts = tuple(start for each in UNET_SIDES.values() for start in each)
    has_unet = any(component == "unet" and path.startswith(starts) for component, path in identities)
    return not has_unet and any(_dit_side(name) == "diffusers" for name in layers)


def _dit_side(name: str) -> str | None:
    """Whose names a transformer's module has, by its prefix or its blocks; None where neither tells."""
    prefix, path = names.prefix_of(name.removeprefix(WRAPPER)), path_of(name)
    by_prefix = _SIDE_OF_PREFIX.get(prefix or "")
    by_blocks = next((side for side, starts in _DIT_SIDES.items() if path.startswith(starts)), None)
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
    if identity(name)[0] == "unet" and (side := unet_side(path)):
        if unet not in ("keep", side):
            path = to_ldm(path, family) if unet == "ldm" else to_diffusers(path)
            if unet_side(path) != unet:
                raise LoHaError(f"{name}: {unet}'s name of this block is not known; keep the names as they are")
            return path if style == "kohya" else _dotted(name, path)
    elif identity(name)[0] == "unet":
        side = "diffusers" if style == "diffusers" else "native"
        if name.startswith("text_encoders.") or _dit_side(name) not in (None, side):
            raise LoHaError(
                f"{name}: what {style} calls this module is not known; for this family of models names can only be "
                "kept as they are"
            )
    return path if style == "kohya" else _with_dots(name)


def _with_dots(name: str) -> str:
    path = bare(name)
    return path if "." in path else _dotted(name, path)


def _dotted(name: str, path: str) -> str:
    if not names.has_known_parts(path):
        raise LoHaError(
            f"{name}: which of its '_' stand for '.' is not known for this family of models; keep the names as they are"
        )
    return names.dotted(path)


def in_one_file(layers: Iterable[str]) -> dict[str, str]:
    """Names of PEFT's folders, or of a model's modules, -> as the readers of single files know them.

    A U-Net's and the text encoders' in kohya's spelling. A transformer's stay dotted, for flat names are taken for
    those of its original code. Names that a single file could have had already stay as they are.
    """
    layers = list(layers)
    prefixes = _prefixes(layers, "kohya")

    def new_name(name: str) -> str:
        prefix, (component, path) = names.prefix_of(name), identity(name)
        if prefix is not None and (prefix.endswith("_") or prefix == "transformer."):
            return name
        if component == "unet" and prefix is None and not unet_side(path):
            return f"transformer.{name}" if "." in name else f"lora_unet_{name}"
        return prefixes[component] + names.flat(bare(name))

    return {name: new_name(name) for name in layers}


def spelled_like(first: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """The others' names as the first's file would spell them; a module that the first has gets its very name.

    Raises:
        LoHaError: how it would is not known.
    """
    first = list(first)
    if not first:
        return {name: name for name in others}
    first_names = {identity(name): name for name in first}
    style = "kohya" if "." not in first[0] and (names.prefix_of(first[0]) or "").endswith("_") else "diffusers"
    if (names.prefix_of(first[0].removeprefix(WRAPPER)) or "").endswith("diffusion_model."):
        style = "native"
    unet = "ldm" if any(path_of(name).startswith(UNET_SIDES["ldm"]) for name in first) else "diffusers"
    prefixes = _PREFIXES[style] | {identity(name)[0]: name.removesuffix(bare(name)) for name in first}
    family = unet_family(first)
    side = next((side for name in first if is_dit(name) and (side := _dit_side(name))), None)

    def new_name(name: str) -> str:
        if identity(name) in first_names:
            return first_names[identity(name)]
        if is_dit(name) and side in (None, _dit_side(name)):
            path = names.flat(bare(name)) if style == "kohya" else _with_dots(name)
        else:
            path = _path(name, style, unet, family)
        return prefixes[identity(name)[0]] + path

    return {name: new_name(name) for name in others}
