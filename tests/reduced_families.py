"""Every family of `loha_core.naming.tables` at a small size: as diffusers' class, and as ComfyUI's model.

No weights: both are built on the meta device, by tests/core with diffusers and by tests/comfy with ComfyUI.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from loha_core.naming.families import Family
from loha_core.naming.names import flat, split


@dataclass(frozen=True)
class Reduced:
    """One model of a family.

    Attributes:
        diffusers: what its class in diffusers is given.
        comfyui: the class of ``comfy.supported_models``, and the ``unet_config`` that ComfyUI finds for such a file;
            None if ComfyUI does not run this one.
        only_diffusers, only_native: weights that only one side has, regular expressions of their dotted names.
        kind: diffusers' class, if it is another than the family's.
    """

    diffusers: dict[str, Any]
    comfyui: tuple[str, dict[str, Any]] | None
    only_diffusers: tuple[str, ...] = ()
    only_native: tuple[str, ...] = ()
    kind: str = ""


REDUCED: dict[str, Reduced | tuple[Reduced, ...]] = {}
"""By the family's name; several where a family's models differ in the weights that they have."""


def variants(name: str) -> tuple[Reduced, ...]:
    """The models that stand for a family."""
    found = REDUCED[name]
    return found if isinstance(found, tuple) else (found,)


def weights_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Module -> its weight's shape, of those with rows and columns; not of look-up tables."""
    found = {name: getattr(module, "weight", None) for name, module in model.named_modules() if not _is_table(module)}
    return {name: tuple(weight.shape) for name, weight in found.items() if weight is not None and weight.dim() > 1}


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def flat_path(name: str) -> str:
    """A module's dotted name as the tables are asked for it."""
    return split(flat(name))[1]


def is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def dead(names: set[str], modules: set[str]) -> set[str]:
    """The names of a table, with N for a block's number, that no module has."""
    return {name for name in names if not any(_pattern(name).fullmatch(module) for module in modules)}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\bN\b", r"\\d+", re.escape(name)))


def stretches(family: Family, native: str, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Part -> (first row, how many) of the original's weight of this shape."""
    weight = family.weight(flat_path(native))
    assert weight is not None and weight.name == native
    return {part.name: part.span.rows(*shape[:2]) if part.span else (0, shape[0]) for part in weight.parts}


def tile(rows: list[tuple[int, int]], height: int) -> bool:
    """Whether stretches cover all rows, and none twice."""
    ends = 0
    for start, length in sorted(rows):
        if start != ends or length <= 0:
            return False
        ends += length
    return ends == height


# --- two streams, then one ---

_TWO_STREAMS = {
    "hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "mlp_ratio": 4.0,
    "theta": 10000, "qkv_bias": True, "context_in_dim": 24, "vec_in_dim": 20, "txt_ids_dims": [],
}  # fmt: skip
_HEADS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
_TWO_LISTS = {**_HEADS, "num_single_layers": 2}

_FLUX = {**_TWO_STREAMS, "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2}
_FLUX_DIFFUSERS = {**_TWO_LISTS, "in_channels": 64, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
REDUCED["Flux"] = Reduced(
    diffusers={**_FLUX_DIFFUSERS, "pooled_projection_dim": 20, "guidance_embeds": True},
    comfyui=("Flux", {**_FLUX, "guidance_embed": True}),
)

REDUCED["Flux.2"] = Reduced(
    diffusers={**_FLUX_DIFFUSERS, "axes_dims_rope": (4, 4, 4, 4)},
    comfyui=(
        "Flux2",
        {
            **_FLUX, "image_model": "flux2", "axes_dim": [4, 4, 4, 4], "mlp_ratio": 3.0, "qkv_bias": False,
            "ops_bias": False, "in_channels": 64, "out_channels": 64, "patch_size": 1, "vec_in_dim": None,
            "global_modulation": True, "mlp_silu_act": True, "txt_ids_dims": [3], "guidance_embed": True,
        },
    ),
)  # fmt: skip

REDUCED["Chroma"] = Reduced(
    diffusers={**_FLUX_DIFFUSERS, "approximator_hidden_dim": 40, "approximator_layers": 2},
    comfyui=(
        "Chroma",
        {
            **_FLUX, "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32,
            "hidden_dim": 40, "n_layers": 2,
        },
    ),
)  # fmt: skip

_HUNYUAN = {
    **{name: value for name, value in _TWO_STREAMS.items() if name != "txt_ids_dims"},
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
    "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False,
}  # fmt: skip
_HUNYUAN_DIFFUSERS = {**_TWO_LISTS, "text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 6, 6)}
REDUCED["HunyuanVideo"] = (
    Reduced(diffusers=_HUNYUAN_DIFFUSERS, comfyui=("HunyuanVideo", _HUNYUAN)),
    # FramePack. ComfyUI has none of its own.
    Reduced(
        diffusers={**_HUNYUAN_DIFFUSERS, "has_image_proj": True, "image_proj_dim": 28, "has_clean_x_embedder": True},
        comfyui=None,
        only_diffusers=(r"image_projection\..*", r"clean_x_embedder\..*"),
        kind="HunyuanVideoFramepackTransformer3DModel",
    ),
)
_BYT5 = 1472
REDUCED["HunyuanImage 2.1"] = Reduced(
    diffusers={
        **_TWO_LISTS, "in_channels": 64, "out_channels": 64, "guidance_embeds": True, "text_embed_dim": 24,
        "text_embed_2_dim": _BYT5, "rope_axes_dim": (8, 8), "use_meanflow": True,
    },
    comfyui=(
        "HunyuanImage21",
        {
            **_HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [8, 8],
            "vec_in_dim": None, "byt5": True, "meanflow": True,
        },
    ),
)  # fmt: skip
REDUCED["HunyuanVideo 1.5"] = Reduced(
    diffusers={
        **_HEADS, "in_channels": 65, "out_channels": 32, "text_embed_dim": 24, "text_embed_2_dim": _BYT5,
        "image_embed_dim": 28, "rope_axes_dim": (4, 6, 6), "use_meanflow": True,
    },
    comfyui=(
        "HunyuanVideo15",
        {
            **_HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None,
            "depth_single_blocks": 0, "guidance_embed": False, "byt5": True, "meanflow": True, "meanflow_sum": True,
            "use_cond_type_embedding": True, "vision_in_dim": 28,
        },
    ),
)  # fmt: skip

# --- one list or two of blocks that take text and picture together ---


def _sd3(second_attention: tuple[int, ...]) -> Reduced:
    """SD 3, and SD 3.5 medium, which attends twice in some blocks."""
    return Reduced(
        diffusers={
            "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 24,
            "caption_projection_dim": 128, "pooled_projection_dim": 20, "pos_embed_max_size": 4, "sample_size": 8,
            "dual_attention_layers": second_attention, "qk_norm": "rms_norm",
        },
        comfyui=(
            "SD3",
            {
                "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
                "adm_in_channels": 20, "num_patches": 16, "pos_embed_max_size": 4, "pos_embed_scaling_factor": None,
                "context_embedder_config": {
                    "target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}
                },
                "qk_norm": "rms", "x_block_self_attn_layers": list(second_attention),
            },
        ),
    )  # fmt: skip


REDUCED["SD3"] = (_sd3(()), _sd3((0,)))


def _pixart(kind: str, sizes: bool) -> Reduced:
    """PixArt: α is also told the picture's size and shape."""
    return Reduced(
        diffusers={
            "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48,
            "caption_channels": 20, "sample_size": 8, "use_additional_conditions": sizes,
        },
        comfyui=(
            f"PixArt{kind}",
            {
                "image_model": f"pixart_{kind.lower()}", "num_heads": 2, "patch_size": 2, "hidden_size": 48,
                "in_channels": 4, "depth": 2, "caption_channels": 20, "micro_condition": sizes,
            },
        ),
    )  # fmt: skip


REDUCED["PixArt"] = (_pixart("Alpha", True), _pixart("Sigma", False))

REDUCED["AuraFlow"] = Reduced(
    diffusers={
        "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "caption_projection_dim": 32, "pos_embed_max_size": 16, "sample_size": 8,
    },
    comfyui=(
        "AuraFlow",
        {
            "max_seq": 16, "cond_seq_dim": 24, "n_double_layers": 2, "n_layers": 4, "dim": 32, "n_heads": 2,
            "global_conddim": 32,
        },
    ),
)  # fmt: skip

_HIDREAM = {
    **_TWO_LISTS, "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [24, 28],
    "text_emb_dim": 20, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4),
    "max_resolution": (8, 8), "llama_layers": [0, 1, 2, 2],
}  # fmt: skip
REDUCED["HiDream"] = Reduced(diffusers=_HIDREAM, comfyui=("HiDream", {**_HIDREAM, "image_model": "hidream"}))

_QWEN = {**_HEADS, "in_channels": 64, "out_channels": 16, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
REDUCED["Qwen-Image"] = Reduced(diffusers=_QWEN, comfyui=("QwenImage", {**_QWEN, "image_model": "qwen_image"}))

REDUCED["Krea 2"] = Reduced(
    diffusers={
        **_HEADS, "in_channels": 64, "num_key_value_heads": 1, "intermediate_size": 128, "text_hidden_dim": 48,
        "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
        "text_intermediate_size": 128, "axes_dims_rope": (4, 6, 6),
    },
    comfyui=(
        "Krea2",
        {
            "image_model": "krea2", "features": 32, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1,
            "txtlayers": 3, "txtdim": 48, "txtheads": 2, "txtkvheads": 2,
        },
    ),
)  # fmt: skip

# --- video ---

_WAN_DIFFUSERS = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
    "text_dim": 20, "ffn_dim": 52,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "dim": 24, "num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16, "ffn_dim": 52,
    "freq_dim": 256, "text_dim": 20, "patch_size": (1, 2, 2),
}  # fmt: skip
REDUCED["Wan"] = (
    Reduced(
        diffusers=_WAN_DIFFUSERS,
        comfyui=("WAN21_T2V", {**_WAN, "model_type": "t2v", "in_dim_ref_conv": 16}),
        only_native=("ref_conv",),
    ),
    Reduced(
        diffusers={**_WAN_DIFFUSERS, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 24},
        comfyui=("WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36}),
    ),
    Reduced(
        diffusers={**_WAN_DIFFUSERS, "vace_layers": [0, 1], "vace_in_channels": 28},
        comfyui=("WAN21_Vace", {**_WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 28}),
        kind="WanVACETransformer3DModel",
    ),
)

_LTX = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 20, "out_channels": 20,
    "cross_attention_dim": 32, "caption_channels": 24,
}  # fmt: skip
REDUCED["LTX-Video"] = Reduced(diffusers=_LTX, comfyui=("LTXV", {**_LTX, "image_model": "ltxv"}))

_COSMOS_DIFFUSERS = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "text_embed_dim": 20, "adaln_lora_dim": 8,
    "extra_pos_embed_type": None,
}  # fmt: skip
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 24, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 20,
    "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8,
}  # fmt: skip
REDUCED["Cosmos-Predict2"] = Reduced(
    diffusers={**_COSMOS_DIFFUSERS, "use_crossattn_projection": True, "crossattn_proj_in_channels": 36},
    comfyui=("CosmosT2IPredict2", {**_COSMOS, "image_model": "cosmos_predict2"}),
    only_diffusers=(r"crossattn_proj\.0",),  # 2.5
)
REDUCED["Anima"] = Reduced(
    diffusers=_COSMOS_DIFFUSERS,
    comfyui=("Anima", {**_COSMOS, "image_model": "anima"}),
    only_native=(r"llm_adapter\..*",),
)

# --- one stream, and the U-Nets of Stable Cascade ---

_Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 20, "n_layers": 2,
    "n_refiner_layers": 2, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [16, 16, 16],
    "axes_lens": [16, 16, 16], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
REDUCED["Z-Image"] = Reduced(
    diffusers={
        "n_layers": 2, "n_refiner_layers": 2, "dim": 96, "n_heads": 2, "n_kv_heads": 2, "in_channels": 16,
        "cap_feat_dim": 20, "axes_dims": [16, 16, 16], "axes_lens": [16, 16, 16], "siglip_feat_dim": 28,
    },
    comfyui=("ZImage", _Z_IMAGE),
    only_diffusers=(r"siglip_.*",),  # Omni, which older ComfyUI does not run
)  # fmt: skip

_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "cap_feat_dim": 20, "n_layers": 2,
    "n_refiner_layers": 2, "qk_norm": True, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [4, 6, 6],
    "axes_lens": [16, 16, 16], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
}  # fmt: skip
REDUCED["Lumina 2"] = Reduced(
    diffusers={
        "num_layers": 2, "num_refiner_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2,
        "multiple_of": 256, "cap_feat_dim": 20, "axes_dim_rope": (4, 6, 6), "axes_lens": (16, 16, 16),
    },
    comfyui=("Lumina2", _LUMINA),
)  # fmt: skip

REDUCED["ACE-Step"] = Reduced(
    diffusers={},
    comfyui=(
        "ACEStep",
        {
            "audio_model": "ace", "attention_head_dim": 4, "in_channels": 8, "inner_dim": 16, "max_height": 16,
            "max_position": 64, "max_width": 64, "mlp_ratio": 2.5, "num_attention_heads": 4, "num_layers": 2,
            "out_channels": 8, "patch_size": [16, 1], "rope_theta": 1000000.0, "speaker_embedding_dim": 12,
            "text_embedding_dim": 20, "ssl_encoder_depths": [8, 8], "ssl_latent_dims": [24, 28],
            "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 50, "lyric_hidden_size": 36,
        },
    ),
)  # fmt: skip
REDUCED["ACE-Step 1.5"] = Reduced(
    diffusers={
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "encoder_hidden_size": 24, "in_channels": 16,
        "audio_acoustic_hidden_dim": 12,
    },
    comfyui=(
        "ACEStep15",
        {
            "audio_model": "ace1.5", "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2,
            "head_dim": 8, "encoder_hidden_size": 24, "encoder_num_heads": 4, "encoder_intermediate_size": 40,
            "num_dit_layers": 2, "num_lyric_layers": 2, "num_timbre_layers": 2, "num_tokenizer_layers": 2,
            "text_hidden_dim": 20, "timbre_hidden_dim": 12, "fsq_dim": 24, "audio_acoustic_hidden_dim": 12,
            "in_channels": 16,
        },
    ),
    only_native=(r"(encoder|tokenizer|detokenizer)\..*",),
)  # fmt: skip

REDUCED["Stable Cascade C"] = Reduced(
    diffusers={
        "conditioning_dim": 24, "block_out_channels": (16, 32), "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (2, 2), "up_num_layers_per_block": (2, 2), "clip_text_in_channels": 20,
        "clip_text_pooled_in_channels": 20, "clip_image_in_channels": 28, "switch_level": (False,),
    },
    comfyui=(
        "Stable_Cascade_C",
        {
            "stable_cascade_stage": "c", "c_cond": 24, "c_hidden": [16, 32], "nhead": [2, 2],
            "blocks": [[2, 2], [2, 2]], "c_clip_text": 20, "c_clip_text_pooled": 20, "c_clip_img": 28,
        },
    ),
)  # fmt: skip
_WITHOUT_ATTENTION = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
_WITH_ATTENTION = (*_WITHOUT_ATTENTION, "SDCascadeAttnBlock")
REDUCED["Stable Cascade B"] = Reduced(
    diffusers={
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "conditioning_dim": 24,
        "block_out_channels": (8, 16, 24, 32), "num_attention_heads": (-1, -1, 2, 2),
        "down_num_layers_per_block": (2, 2, 2, 2), "up_num_layers_per_block": (2, 2, 2, 2),
        "down_blocks_repeat_mappers": (1, 1, 1, 2), "up_blocks_repeat_mappers": (3, 3, 2, 2),
        "block_types_per_layer": (_WITHOUT_ATTENTION, _WITHOUT_ATTENTION, _WITH_ATTENTION, _WITH_ATTENTION),
        "clip_text_pooled_in_channels": 20, "effnet_in_channels": 16, "pixel_mapper_in_channels": 3,
        "dropout": (0.0, 0.0, 0.0, 0.0), "timestep_conditioning_type": ("sca",),
    },
    comfyui=(
        "Stable_Cascade_B",
        {
            "stable_cascade_stage": "b", "c_cond": 24, "c_hidden": [8, 16, 24, 32], "nhead": [-1, -1, 2, 2],
            "blocks": [[2, 2, 2, 2], [2, 2, 2, 2]], "block_repeat": [[1, 1, 1, 2], [3, 3, 2, 2]], "c_clip": 20,
        },
    ),
)  # fmt: skip

# --- pipelines of diffusers that are trained, and whose files have the names of the original ---

PIPELINES = {
    "AuraFlowPipeline": "AuraFlow",
    "ChromaPipeline": "Chroma",
    "Flux2Pipeline": "Flux.2",
    "Flux2KleinPipeline": "Flux.2",
    "Lumina2Pipeline": "Lumina 2",
    "PixArtAlphaPipeline": "PixArt",
    "PixArtSigmaPipeline": "PixArt",
    "QwenImagePipeline": "Qwen-Image",
    "WanPipeline": "Wan",
    "ZImagePipeline": "Z-Image",
}
"""Class -> the family of its transformer."""
