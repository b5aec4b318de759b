"""Models with one stream or one U-Net for everything: Z-Image, Lumina 2, ACE-Step for music, Stable Cascade."""

from __future__ import annotations

from ..families import Family, Size, each

_LUMINA_LISTS = (("C", "context_refiner"), ("N", "noise_refiner"), ("L", "layers"))  # the caption is refined first

_Z_IMAGE_BLOCK = """
LIST.N.attention.to_q                                   LIST.N.attention.qkv    0:i
LIST.N.attention.to_k                                   LIST.N.attention.qkv    i:2i
LIST.N.attention.to_v                                   LIST.N.attention.qkv    2i:3i
LIST.N.attention.to_out.0                               LIST.N.attention.out
LIST.N.feed_forward.w1
LIST.N.feed_forward.w2
LIST.N.feed_forward.w3
"""
Z_IMAGE = Family(
    "Z-Image",
    each(("layers", "noise_refiner", "context_refiner", "siglip_refiner"), _Z_IMAGE_BLOCK)
    + each(("layers", "noise_refiner"), "LIST.N.adaLN_modulation.0\n")
    + """
all_x_embedder.2-1                                      x_embedder
all_final_layer.2-1.linear                              final_layer.linear
all_final_layer.2-1.adaLN_modulation.1                  final_layer.adaLN_modulation.1
t_embedder.mlp.0
t_embedder.mlp.2
cap_embedder.1
siglip_embedder.1
""",
    blocks=_LUMINA_LISTS,
    sizes=(Size("Z-Image", (2, 2, 30), 3840),),
    diffusers="ZImageTransformer2DModel",
)

# Fewer heads for keys and values than for queries.
_LUMINA_BLOCK = """
LIST.N.attn.to_q                                        LIST.N.attention.qkv    0:i
LIST.N.attn.to_k                                        LIST.N.attention.qkv    i:(i+o)/2
LIST.N.attn.to_v                                        LIST.N.attention.qkv    (i+o)/2:o
LIST.N.attn.to_out.0                                    LIST.N.attention.out
LIST.N.feed_forward.linear_1                            LIST.N.feed_forward.w1
LIST.N.feed_forward.linear_2                            LIST.N.feed_forward.w2
LIST.N.feed_forward.linear_3                            LIST.N.feed_forward.w3
"""
LUMINA2 = Family(
    "Lumina 2",
    each(("layers", "noise_refiner", "context_refiner"), _LUMINA_BLOCK)
    + each(("layers", "noise_refiner"), "LIST.N.norm1.linear LIST.N.adaLN_modulation.1\n")
    + """
time_caption_embed.timestep_embedder.linear_1           t_embedder.mlp.0
time_caption_embed.timestep_embedder.linear_2           t_embedder.mlp.2
time_caption_embed.caption_embedder.1                   cap_embedder.1
x_embedder
norm_out.linear_1                                       final_layer.adaLN_modulation.1
norm_out.linear_2                                       final_layer.linear
""",
    blocks=_LUMINA_LISTS,
    sizes=(Size("Lumina 2", (2, 2, 26), 2304),),
    diffusers="Lumina2Transformer2DModel",
)

ACE_STEP = Family(
    "ACE-Step",
    """
transformer_blocks.N.attn.to_q
transformer_blocks.N.attn.to_k
transformer_blocks.N.attn.to_v
transformer_blocks.N.attn.to_out.0
transformer_blocks.N.cross_attn.to_q
transformer_blocks.N.cross_attn.to_k
transformer_blocks.N.cross_attn.to_v
transformer_blocks.N.cross_attn.to_out.0
transformer_blocks.N.cross_attn.add_q_proj
transformer_blocks.N.cross_attn.add_k_proj
transformer_blocks.N.cross_attn.add_v_proj
transformer_blocks.N.cross_attn.to_add_out
transformer_blocks.N.ff.inverted_conv.conv
transformer_blocks.N.ff.depth_conv.conv
transformer_blocks.N.ff.point_conv.conv
timestep_embedder.linear_1
timestep_embedder.linear_2
t_block.1
speaker_embedder
genre_embedder
lyric_encoder.embed.out.0
lyric_encoder.encoders.N.self_attn.linear_q
lyric_encoder.encoders.N.self_attn.linear_k
lyric_encoder.encoders.N.self_attn.linear_v
lyric_encoder.encoders.N.self_attn.linear_out
lyric_encoder.encoders.N.self_attn.linear_pos
lyric_encoder.encoders.N.feed_forward.w_1
lyric_encoder.encoders.N.feed_forward.w_2
lyric_proj
projectors.N.0
projectors.N.2
projectors.N.4
proj_in.early_conv_layers.0
proj_in.early_conv_layers.2
final_layer.linear
""",
    blocks=(("T", "transformer_blocks"),),
    sizes=(Size("ACE-Step", (24,), 2560),),
)

_ACE_BLOCK = """
LIST.N.self_attn.q_proj
LIST.N.self_attn.k_proj
LIST.N.self_attn.v_proj
LIST.N.self_attn.o_proj
LIST.N.mlp.gate_proj
LIST.N.mlp.up_proj
LIST.N.mlp.down_proj
"""
_ACE_ENCODERS = ("encoder.lyric_encoder", "encoder.timbre_encoder", "tokenizer.attention_pooler", "detokenizer")
# diffusers has its encoders in other models, or not at all.
ACE_STEP_15 = Family(
    "ACE-Step 1.5",
    """
layers.N.self_attn.to_q                                 decoder.layers.N.self_attn.q_proj
layers.N.self_attn.to_k                                 decoder.layers.N.self_attn.k_proj
layers.N.self_attn.to_v                                 decoder.layers.N.self_attn.v_proj
layers.N.self_attn.to_out.0                             decoder.layers.N.self_attn.o_proj
layers.N.cross_attn.to_q                                decoder.layers.N.cross_attn.q_proj
layers.N.cross_attn.to_k                                decoder.layers.N.cross_attn.k_proj
layers.N.cross_attn.to_v                                decoder.layers.N.cross_attn.v_proj
layers.N.cross_attn.to_out.0                            decoder.layers.N.cross_attn.o_proj
layers.N.mlp.gate_proj                                  decoder.layers.N.mlp.gate_proj
layers.N.mlp.up_proj                                    decoder.layers.N.mlp.up_proj
layers.N.mlp.down_proj                                  decoder.layers.N.mlp.down_proj
time_embed.linear_1                                     decoder.time_embed.linear_1
time_embed.linear_2                                     decoder.time_embed.linear_2
time_embed.time_proj                                    decoder.time_embed.time_proj
time_embed_r.linear_1                                   decoder.time_embed_r.linear_1
time_embed_r.linear_2                                   decoder.time_embed_r.linear_2
time_embed_r.time_proj                                  decoder.time_embed_r.time_proj
condition_embedder                                      decoder.condition_embedder
proj_in_conv                                            decoder.proj_in.1
proj_out_conv                                           decoder.proj_out.1
"""
    + each((f"{encoder}.layers" for encoder in _ACE_ENCODERS), _ACE_BLOCK)
    + """
encoder.text_projector
encoder.lyric_encoder.embed_tokens
encoder.timbre_encoder.embed_tokens
tokenizer.audio_acoustic_proj
tokenizer.attention_pooler.embed_tokens
tokenizer.quantizer.project_in
tokenizer.quantizer.project_out
detokenizer.embed_tokens
detokenizer.proj_out
""",
    # ACE-Step's own trainer adapts the decoder alone, and names its weights from there.
    also="".join(
        f"layers.N.{attention}.{proj}_proj decoder.layers.N.{attention}.{proj}_proj\n"
        for attention in ("self_attn", "cross_attn")
        for proj in "qkvo"
    )
    + """
proj_in.1                                               decoder.proj_in.1
proj_out.1                                              decoder.proj_out.1
""",
    blocks=(("L", "decoder.layers"),),
    sizes=(Size("ACE-Step 1.5", (24,), 2048), Size("ACE-Step 1.5 XL", (32,), 2560)),
    diffusers="AceStepTransformer1DModel",
)

# ComfyUI divides the original's attn.in_proj when it reads a file.
_CASCADE_BLOCK = """
LIST.N.N.depthwise
LIST.N.N.channelwise.0
LIST.N.N.channelwise.4
LIST.N.N.mapper
LIST.N.N.mapper_sca
LIST.N.N.kv_mapper.1
LIST.N.N.attention.to_q                                 LIST.N.N.attention.attn.to_q
LIST.N.N.attention.to_k                                 LIST.N.N.attention.attn.to_k
LIST.N.N.attention.to_v                                 LIST.N.N.attention.attn.to_v
LIST.N.N.attention.to_out.0                             LIST.N.N.attention.attn.out_proj
"""
_CASCADE = (
    each(("down_blocks", "up_blocks"), _CASCADE_BLOCK)
    + """
embedding.1
clf.1
"""
)
_CASCADE_LISTS = (("IN", "down_blocks"), ("OUT", "up_blocks"))  # of the U-Net's levels: blocks lie in these

CASCADE_C = Family(
    "Stable Cascade C",
    _CASCADE
    + each(("down_blocks", "up_blocks"), "LIST.N.N.mapper_crp\n")
    + """
down_downscalers.N.1.blocks.0
up_upscalers.N.1.blocks.1
clip_txt_mapper
clip_txt_pooled_mapper
clip_img_mapper
""",
    blocks=_CASCADE_LISTS,
    sizes=(Size("Stable Cascade C", (2, 2), 2048), Size("Stable Cascade C lite", (2, 2), 1536)),
    diffusers="StableCascadeUNet",
)
CASCADE_B = Family(
    "Stable Cascade B",
    _CASCADE
    + """
down_downscalers.N.1
up_upscalers.N.1
down_repeat_mappers.N.N
up_repeat_mappers.N.N
effnet_mapper.0
effnet_mapper.2
pixels_mapper.0
pixels_mapper.2
clip_txt_pooled_mapper                                  clip_mapper
""",
    blocks=_CASCADE_LISTS,
    sizes=(Size("Stable Cascade B", (4, 4), 1280), Size("Stable Cascade B lite", (4, 4), 1152)),
    diffusers="StableCascadeUNet",
)

FAMILIES = (Z_IMAGE, LUMINA2, ACE_STEP, ACE_STEP_15, CASCADE_C, CASCADE_B)
