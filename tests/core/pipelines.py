"""Diffusers pipelines with every part and random weights, small enough to train in a second. Nothing is downloaded."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers

from ..reduced_families import variants

FAMILIES = ("sd15", "sdxl", "sd3", "flux")


def build(family: str) -> Any:
    """A pipeline from a fixed seed; of FAMILIES, or of `reduced_families.PIPELINES`."""
    torch.manual_seed(0)
    return _BUILDERS[family]()


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


def _qwen_tokenizer() -> Any:
    """Bytes, and a template of chats."""
    pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = transformers.Qwen2Tokenizer(vocab=pieces, merges=[])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
    )
    return tokenizer


def _language_model(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": width // 2, "vocab_size": 257, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def _vae(channels: int = 4, kind: Any = diffusers.AutoencoderKL, **options: Any) -> Any:
    return kind(**{
        "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": channels, "norm_num_groups": 4,
        "sample_size": 32, **options,
    }).eval()  # fmt: skip


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


def _sd3(**options: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4, **options,
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


# --- with transformers of `reduced_families` --------------------------------------------------------------------------


def _transformer(kind: Any, family: str, variant: int = 0, **options: Any) -> Any:
    """Zeros, as some begin with, would hide what the inputs are."""
    model = kind(**{**variants(family)[variant].diffusers, **options}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1:].numel() ** -0.5)
    return model


def _flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def _chroma() -> Any:
    return diffusers.ChromaPipeline(
        vae=_vae(16, shift_factor=0.1, scaling_factor=0.4), text_encoder=_t5(24), tokenizer=_t5_tokenizer(),
        transformer=_transformer(diffusers.ChromaTransformer2DModel, "Chroma"),
        scheduler=_flow(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def _flux2_parts(**options: Any) -> dict[str, Any]:
    vae = _vae(16, kind=diffusers.AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return {
        "vae": vae, "tokenizer": _qwen_tokenizer(), "scheduler": _flow(use_dynamic_shifting=True),
        "transformer": _transformer(diffusers.Flux2Transformer2DModel, "Flux.2", **options),
    }  # fmt: skip


def _flux2() -> Any:
    """It takes three layers of its text encoder, up to the 30th."""
    vision = {**_language_model(8, 1), "model_type": "pixtral", "image_size": 8, "patch_size": 4}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **_language_model(8, 30)}, vision_config=vision, image_token_index=2
    )
    text_encoder = transformers.Mistral3ForConditionalGeneration(config).eval()
    return diffusers.Flux2Pipeline(text_encoder=text_encoder, **_flux2_parts())


def _flux2_klein() -> Any:
    text_encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_language_model(8, 27))).eval()
    return diffusers.Flux2KleinPipeline(text_encoder=text_encoder, **_flux2_parts(guidance_embeds=False))


_VIDEO_VAE: dict[str, Any] = {
    "base_dim": 4, "z_dim": 16, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False],
}  # fmt: skip


def _qwen() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_language_model(24, 2), "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24},
        image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        vae=diffusers.AutoencoderKLQwenImage(**_VIDEO_VAE).eval(), tokenizer=_qwen_tokenizer(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        transformer=_transformer(diffusers.QwenImageTransformer2DModel, "Qwen-Image"),
        scheduler=_flow(use_dynamic_shifting=True),
    )  # fmt: skip


_LENGTHS = {"axes_lens": [128, 32, 32]}


def _z_image() -> Any:
    return diffusers.ZImagePipeline(
        vae=_vae(16, shift_factor=0.1, scaling_factor=0.4), tokenizer=_qwen_tokenizer(),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_language_model(20, 3))).eval(),
        transformer=_transformer(diffusers.ZImageTransformer2DModel, "Z-Image", siglip_feat_dim=None, **_LENGTHS),
        scheduler=_flow(shift=3.0),
    )  # fmt: skip


def _wan(**options: Any) -> Any:
    config = transformers.UMT5Config(d_model=20, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=64)
    return diffusers.WanPipeline(
        **{"vae": diffusers.AutoencoderKLWan(**_VIDEO_VAE, scale_factor_spatial=2).eval()} | options,
        text_encoder=transformers.UMT5EncoderModel(config).eval(), tokenizer=_t5_tokenizer(),
        transformer=_transformer(diffusers.WanTransformer3DModel, "Wan"),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def _wan22() -> Any:
    """Two models, for noise above and below a time."""
    return _wan(transformer_2=_transformer(diffusers.WanTransformer3DModel, "Wan"), boundary_ratio=0.9)


def _wan22_small() -> Any:
    """The VAE takes cells of 2×2 pixels, and each token has a timestep."""
    vae = diffusers.AutoencoderKLWan(
        **_VIDEO_VAE, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=4
    )
    return _wan(vae=vae.eval(), expand_timesteps=True)


def _aura_flow() -> Any:
    config = transformers.UMT5Config(d_model=24, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=64)
    return diffusers.AuraFlowPipeline(
        vae=_vae(scaling_factor=0.4), tokenizer=_t5_tokenizer(), scheduler=_flow(shift=1.73),
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        transformer=_transformer(diffusers.AuraFlowTransformer2DModel, "AuraFlow", pos_embed_max_size=576),
    )  # fmt: skip


def _lumina2() -> Any:
    """It takes its VAE's scale for 8."""
    config = transformers.Gemma2Config(**_language_model(20, 3), pad_token_id=256)
    wide = {"block_out_channels": [8] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4}
    vae = _vae(16, shift_factor=0.1, scaling_factor=0.4, up_block_types=["UpDecoderBlock2D"] * 4, **wide)
    return diffusers.Lumina2Pipeline(
        vae=vae, tokenizer=_qwen_tokenizer(), scheduler=_flow(shift=6.0),
        text_encoder=transformers.Gemma2Model(config).eval(),
        transformer=_transformer(diffusers.Lumina2Transformer2DModel, "Lumina 2", axes_lens=(300, 512, 512)),
    )  # fmt: skip


def _pixart(pipeline: Any, variant: int, **options: Any) -> Any:
    return pipeline(
        vae=_vae(scaling_factor=0.4), text_encoder=_t5(20), tokenizer=_t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        transformer=_transformer(diffusers.PixArtTransformer2DModel, "PixArt", variant, **options),
    )  # fmt: skip


_BUILDERS = {
    "AuraFlowPipeline": _aura_flow,
    "Lumina2Pipeline": _lumina2,
    # α is told the picture's size if it is of this size.
    "PixArtAlphaPipeline": lambda: _pixart(diffusers.PixArtAlphaPipeline, 0, sample_size=128),
    "PixArtSigmaPipeline": lambda: _pixart(diffusers.PixArtSigmaPipeline, 1),
    "sd15": _sd15,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "SD 3.5": lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux": _flux,
    "Kontext": lambda: diffusers.FluxKontextPipeline(**_flux().components),
    "ChromaPipeline": _chroma,
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2_klein,
    "QwenImagePipeline": _qwen,
    "ZImagePipeline": _z_image,
    "WanPipeline": _wan,
    "Wan 2.2": _wan22,
    "Wan 2.2, 5B": _wan22_small,
}
