"""Flat names get their dots back, for every module that LoHa can adapt in the models of the field."""

from __future__ import annotations

import pytest
from torch import nn

from loha_core.naming import names

diffusers = pytest.importorskip("diffusers", reason="its models are the reference: pip install .[peers]")
transformers = pytest.importorskip("transformers", reason="its models are the reference: pip install .[peers]")


def sd_unet(**options) -> nn.Module:
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 2, "layers_per_block": 1}
    return diffusers.UNet2DConditionModel(**kinds | sizes | {"cross_attention_dim": 6} | options)


def sdxl_unet() -> nn.Module:
    addition = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return sd_unet(**addition, projection_class_embeddings_input_dim=32, use_linear_projection=True)


def flux() -> nn.Module:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2}
    return diffusers.FluxTransformer2DModel(
        **sizes,
        in_channels=4,
        joint_attention_dim=6,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2),
    )


def sd3() -> nn.Module:
    sizes = {"num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "caption_projection_dim": 8}
    return diffusers.SD3Transformer2DModel(
        **sizes, sample_size=8, in_channels=4, joint_attention_dim=6, pooled_projection_dim=6, pos_embed_max_size=8
    )


def text_encoder() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes, vocab_size=16))


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


@pytest.mark.parametrize("make", [sd_unet, sdxl_unet, flux, sd3, text_encoder, t5])
def test_dots_come_back(make):
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [name for name, module in make().named_modules() if isinstance(module, kinds)]
    wrong = {name: names.dotted(names.flat(name)) for name in found if names.dotted(names.flat(name)) != name}
    assert len(found) > 5 and not wrong


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", "down_blocks 1", "cross-attention"),
        ("lora_unet_up_blocks_0_resnets_1_conv1", "up_blocks 0", "convolution"),
        ("unet.mid_block.attentions.0.proj_in", "middle", "projection"),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks 4", "attention"),
        ("diffusion_model.double_blocks.3.img_mlp.0", "double_blocks 3", "feed-forward"),
        ("diffusion_model.single_blocks.12.linear1", "single_blocks 12", "feed-forward"),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "te1 layers 3", "feed-forward"),
        ("text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj", "te2 layers 3", "attention"),
        ("lora_unet_time_embedding_linear_1", "other", "time/embedding"),
    ],
)
def test_block_and_kind(name, block, kind):
    assert (names.block_label(name), names.kind_of(name)) == (block, kind)
