"""Which other programs find a file's names: to be said before it is written, for no loader says it well afterwards."""

from __future__ import annotations

from collections.abc import Iterable

from .families import Family
from .names import WRAPPER, flat, path_of, prefix_of
from .recognise import family_of
from .spelling import bare, is_dit

COMFYUI, KOHYA = "ComfyUI's own loader", "kohya's scripts"
# ComfyUI's loader (0.33) knows all weights of these families by diffusers' names too, with one of these before them, ""
# being nothing. Of every family it knows the original's names, after lora_unet_ and after diffusion_model.
_IN_COMFYUI: dict[str, tuple[str, ...]] = {
    "Flux": ("transformer.", "lycoris_", "lora_transformer_"),
    "SD3": ("transformer.", "lycoris_", "lora_transformer_", WRAPPER),
    "PixArt": ("transformer.", WRAPPER),
    "AuraFlow": ("transformer.",),
    "HiDream": ("transformer.", "lycoris_"),
    "Qwen-Image": ("transformer.", "lycoris_", ""),
    "Z-Image": ("lycoris_", "diffusion_model."),
}


def unread(names: Iterable[str]) -> str | None:
    """A warning for the author of a file with a DiT's layers under these names; None if all readers find them.

    None also for models that have no table, U-Nets and text encoders.

    >>> unread(["lora_unet_double_blocks_0_img_mod_lin"]) is None
    True
    >>> print(unread(["lycoris_blocks_0_ffn_net_0_proj"])[:76])
    ComfyUI's own loader and kohya's scripts may not find 1 of 1 layers by these
    """
    dit = [name for name in names if is_dit(name)]
    family = family_of(map(path_of, dit))
    if family is None:
        return None
    readers = {name: _readers(name, family) for name in dit}
    missed = {who: [name for name in dit if who not in readers[name]] for who in (COMFYUI, KOHYA)}
    missed = {who: layers for who, layers in missed.items() if layers}
    if not missed:
        return None
    count, example = max(map(len, missed.values())), next(iter(missed.values()))[0]
    return f"{' and '.join(missed)} may not find {count} of {len(dit)} layers by these names ({example}, …)"


def _readers(name: str, family: Family) -> set[str]:
    """Which of the two programs find a name."""
    path = path_of(name)
    prefix = WRAPPER if name.startswith(WRAPPER) else prefix_of(name) or ""
    spelled = flat if prefix.endswith("_") else str
    weight, part = family.weight(path), family.part(path)
    if weight is not None and bare(name) == spelled(weight.name):
        if prefix == "lora_unet_":
            return {COMFYUI, KOHYA}
        if prefix == "diffusion_model.":
            return {COMFYUI}
    is_diffusers = part is not None and bare(name) == spelled(part[1].name)
    return {COMFYUI} if is_diffusers and prefix in _IN_COMFYUI.get(family.name, ()) else set()
