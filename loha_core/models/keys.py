"""A checkpoint's keys -> the layers that adapters act on, under the names that adapters have for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from ..bind import Network, Target
from ..naming import names
from ..naming.recognise import known_weights
from ..naming.unet import UNETS, to_diffusers, to_ldm

# What parts of a checkpoint begin with -> the prefix that an adapter's names have. The first that fits counts.
_PREFIXES = (
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
    ("", "lora_unet_"),
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


def modules(shapes: Mapping[str, tuple[int, ...]], min_axes: int = 2) -> dict[str, Target]:
    """The layers that adapters act on, by the name that kohya's files give them -> weight, or slice of a weight.

    A Stable Diffusion U-Net's blocks get diffusers' names, whichever the file has; a DiT's keep their own.
    """
    targets: dict[str, Target] = {}
    in_tables = {key for key, _, _ in known_weights(shapes)}
    for key, shape in shapes.items():
        if len(shape) < min_axes or (_NOT_ADAPTED.match(key) and key not in in_tables):
            continue
        lead, path = next((new, key.removeprefix(old)) for old, new in _PREFIXES if key.startswith(old))
        if openclip := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)(?:\.weight)?", path):
            if parts := _OPENCLIP.get(openclip[2]):
                block = f"{lead}text_model_encoder_layers_{openclip[1]}_"
                targets |= {block + part: target for part, target in _slices(key, shape, parts)}
        elif path == "text_projection":
            targets[f"{lead}text_projection"] = (key, None, "transposed")
        elif path.endswith(".weight"):
            path = names.flat(path.removesuffix(".weight"))
            targets[lead + (to_diffusers(path) if lead == "lora_unet_" else path)] = key
    return targets


def network(shapes: Mapping[str, tuple[int, ...]], min_axes: int = 2) -> Network:
    """A checkpoint's, diffusers' or bare model's weights under every name that adapters have for them."""
    targets: dict[str, Target] = {}
    for name, target in modules(shapes, min_axes).items():
        targets[name] = target
        if isinstance(target, str):
            targets[target.removesuffix(".weight")] = target
            path = name.removeprefix("lora_unet_")
            if path != name:
                # The families differ in one name, which both lead here.
                targets |= {f"lora_unet_{to_ldm(path, family)}": target for family in UNETS}
    return Network(targets, shapes)


def _slices(key: str, shape: tuple[int, ...], parts: tuple[str, ...]) -> Iterator[tuple[str, Target]]:
    """Parts of a fused weight: each has as many rows as the weight has columns, the last all that remain."""
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
