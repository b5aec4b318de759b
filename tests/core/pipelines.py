"""Diffusers pipelines with every part and random weights, small enough to train in a second. Nothing is downloaded."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers

FAMILIES = ("sd15", "sdxl", "sd3", "flux")


def build(family: str) -> Any:
    """A pipeline from a fixed seed."""
    torch.manual_seed(0)
    return {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[family]()


def _tokenizer() -> Any:
    letters = string.ascii_lowercase + string.digits + ",."
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, [], model_max_length=16)


def _t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, ","]
    return transformers.T5TokenizerFast(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=16
    )


def _clip(width: int = 32, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3, vocab_size=100,
        projection_dim=width, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def _t5(width: int) -> Any:
    config = transformers.T5Config(
        d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0
    )
    return transformers.T5EncoderModel(config).eval()


def _vae(channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=channels, norm_num_groups=4, sample_size=32, **options,
    ).eval()  # fmt: skip


def _unet(context: int, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, cross_attention_dim=context,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, **options,
    ).eval()  # fmt: skip


_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _sd15() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(), tokenizer=_tokenizer(), unet=_unet(32), safety_checker=None,
        scheduler=diffusers.DDIMScheduler(**_BETAS, clip_sample=False, steps_offset=1), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    unet = _unet(64, addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
                 projection_class_embeddings_input_dim=32 + 6 * 8, use_linear_projection=True)  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(), text_encoder_2=_clip(projection=True), tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(), unet=unet, add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(**_BETAS, prediction_type="v_prediction"),
    )  # fmt: skip


def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        vae=_vae(shift_factor=0.1, scaling_factor=1.5), text_encoder=_clip(16, True), text_encoder_2=_clip(48, True),
        text_encoder_3=_t5(32), tokenizer=_tokenizer(), tokenizer_2=_tokenizer(), tokenizer_3=_t5_tokenizer(),
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        vae=_vae(shift_factor=0.1, scaling_factor=0.4), text_encoder=_clip(), tokenizer=_tokenizer(),
        text_encoder_2=_t5(32), tokenizer_2=_t5_tokenizer(), transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip
