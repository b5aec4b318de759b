"""Flux, and models of its build: two streams in the first blocks, one in the others, if there are others."""

from __future__ import annotations

from ..families import Family, Size

_TWO_STREAMS = """
transformer_blocks.N.attn.to_q                   double_blocks.N.img_attn.qkv   0:i
transformer_blocks.N.attn.to_k                   double_blocks.N.img_attn.qkv   i:2i
transformer_blocks.N.attn.to_v                   double_blocks.N.img_attn.qkv   2i:3i
transformer_blocks.N.attn.to_out.0               double_blocks.N.img_attn.proj
transformer_blocks.N.attn.add_q_proj             double_blocks.N.txt_attn.qkv   0:i
transformer_blocks.N.attn.add_k_proj             double_blocks.N.txt_attn.qkv   i:2i
transformer_blocks.N.attn.add_v_proj             double_blocks.N.txt_attn.qkv   2i:3i
transformer_blocks.N.attn.to_add_out             double_blocks.N.txt_attn.proj
"""
_FEED_FORWARD = """
transformer_blocks.N.ff.net.0.proj               double_blocks.N.img_mlp.0
transformer_blocks.N.ff.net.2                    double_blocks.N.img_mlp.2
transformer_blocks.N.ff_context.net.0.proj       double_blocks.N.txt_mlp.0
transformer_blocks.N.ff_context.net.2            double_blocks.N.txt_mlp.2
"""
# LyCORIS writes these for Flux too, and Flux.2 is called so in diffusers.
_FEED_FORWARD_IN_OUT = """
transformer_blocks.N.ff.linear_in                double_blocks.N.img_mlp.0
transformer_blocks.N.ff.linear_out               double_blocks.N.img_mlp.2
transformer_blocks.N.ff_context.linear_in        double_blocks.N.txt_mlp.0
transformer_blocks.N.ff_context.linear_out       double_blocks.N.txt_mlp.2
"""
_ONE_STREAM = """
single_transformer_blocks.N.attn.to_q            single_blocks.N.linear1        0:i
single_transformer_blocks.N.attn.to_k            single_blocks.N.linear1        i:2i
single_transformer_blocks.N.attn.to_v            single_blocks.N.linear1        2i:3i
single_transformer_blocks.N.proj_mlp             single_blocks.N.linear1        3i:7i
single_transformer_blocks.N.proj_out             single_blocks.N.linear2
"""
_QUERIES_KEYS_VALUES = """
single_blocks.N.linear1_qkv                      single_blocks.N.linear1        0:3i
"""
_MODULATION_OF_TWO = """
transformer_blocks.N.norm1.linear                double_blocks.N.img_mod.lin
transformer_blocks.N.norm1_context.linear        double_blocks.N.txt_mod.lin
"""
_MODULATION_OF_ONE = """
single_transformer_blocks.N.norm.linear          single_blocks.N.modulation.lin
"""
_BLOCK_LINES = _TWO_STREAMS + _FEED_FORWARD + _ONE_STREAM + _MODULATION_OF_TWO + _MODULATION_OF_ONE
_TIME_AND_TEXT = """
time_text_embed.timestep_embedder.linear_1       time_in.in_layer
time_text_embed.timestep_embedder.linear_2       time_in.out_layer
time_text_embed.guidance_embedder.linear_1       guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2       guidance_in.out_layer
time_text_embed.text_embedder.linear_1           vector_in.in_layer
time_text_embed.text_embedder.linear_2           vector_in.out_layer
"""
_TIME_AND_GUIDANCE = """
time_guidance_embed.timestep_embedder.linear_1   time_in.in_layer
time_guidance_embed.timestep_embedder.linear_2   time_in.out_layer
time_guidance_embed.guidance_embedder.linear_1   guidance_in.in_layer
time_guidance_embed.guidance_embedder.linear_2   guidance_in.out_layer
"""
_ENDS = """
context_embedder                                 txt_in
x_embedder                                       img_in
proj_out                                         final_layer.linear
"""
_LAST_MODULATION = """
norm_out.linear                                  final_layer.adaLN_modulation.1   swapped
"""
_BLOCKS = (("D", "double_blocks"), ("S", "single_blocks"))

FLUX = Family(
    "Flux",
    _BLOCK_LINES + _TIME_AND_TEXT + _ENDS + _LAST_MODULATION,
    also=_FEED_FORWARD_IN_OUT + _QUERIES_KEYS_VALUES,
    blocks=_BLOCKS,
    sizes=(Size("Flux", (19, 38), 3072),),
    diffusers="FluxTransformer2DModel",
)

FLUX2 = Family(
    "Flux.2",
    _TWO_STREAMS
    + _FEED_FORWARD_IN_OUT
    + _TIME_AND_GUIDANCE
    + _ENDS
    + _LAST_MODULATION
    + """
single_transformer_blocks.N.attn.to_qkv_mlp_proj single_blocks.N.linear1        0:9i
single_transformer_blocks.N.attn.to_out          single_blocks.N.linear2
double_stream_modulation_img.linear              double_stream_modulation_img.lin
double_stream_modulation_txt.linear              double_stream_modulation_txt.lin
single_stream_modulation.linear                  single_stream_modulation.lin
""",
    also=_QUERIES_KEYS_VALUES,
    blocks=_BLOCKS,
    sizes=(
        Size("Flux.2 dev", (8, 48), 6144),
        Size("Flux.2 klein 9B", (8, 24), 4096),
        Size("Flux.2 klein 4B", (5, 20), 3072),
    ),
    diffusers="Flux2Transformer2DModel",
)

CHROMA = Family(
    "Chroma",
    _TWO_STREAMS
    + _FEED_FORWARD
    + _ONE_STREAM
    + _ENDS
    + """
distilled_guidance_layer.in_proj
distilled_guidance_layer.layers.N.linear_1       distilled_guidance_layer.layers.N.in_layer
distilled_guidance_layer.layers.N.linear_2       distilled_guidance_layer.layers.N.out_layer
distilled_guidance_layer.out_proj
""",
    also=_FEED_FORWARD_IN_OUT + _QUERIES_KEYS_VALUES,
    blocks=_BLOCKS,
    sizes=(Size("Chroma", (19, 38), 3072),),
    diffusers="ChromaTransformer2DModel",
)

# The text goes through two blocks of its own first, which adapters seldom change.
_REFINER = "context_embedder.token_refiner.refiner_blocks.N"
_REFINER_NATIVE = "txt_in.individual_token_refiner.blocks.N"
_HUNYUAN = f"""
context_embedder.time_text_embed.timestep_embedder.linear_1   txt_in.t_embedder.in_layer
context_embedder.time_text_embed.timestep_embedder.linear_2   txt_in.t_embedder.out_layer
context_embedder.time_text_embed.text_embedder.linear_1       txt_in.c_embedder.in_layer
context_embedder.time_text_embed.text_embedder.linear_2       txt_in.c_embedder.out_layer
context_embedder.proj_in                                      txt_in.input_embedder
{_REFINER}.attn.to_q                                          {_REFINER_NATIVE}.self_attn.qkv   0:i
{_REFINER}.attn.to_k                                          {_REFINER_NATIVE}.self_attn.qkv   i:2i
{_REFINER}.attn.to_v                                          {_REFINER_NATIVE}.self_attn.qkv   2i:3i
{_REFINER}.attn.to_out.0                                      {_REFINER_NATIVE}.self_attn.proj
{_REFINER}.ff.net.0.proj                                      {_REFINER_NATIVE}.mlp.0
{_REFINER}.ff.net.2                                           {_REFINER_NATIVE}.mlp.2
{_REFINER}.norm_out.linear                                    {_REFINER_NATIVE}.adaLN_modulation.1
x_embedder.proj                                               img_in.proj
proj_out                                                      final_layer.linear
norm_out.linear                                               final_layer.adaLN_modulation.1   swapped
"""
_GLYPHS = """
context_embedder_2.linear_1                      byt5_in.fc1
context_embedder_2.linear_2                      byt5_in.fc2
context_embedder_2.linear_3                      byt5_in.fc3
"""
# What its makers call them, and with them diffusion-pipe and musubi-tuner. Where they have "_" for ComfyUI's "." (as in
# img_attn_qkv) the flat names are alike.
_HUNYUAN_MAKERS = f"""
double_blocks.N.img_mod.linear                   double_blocks.N.img_mod.lin
double_blocks.N.txt_mod.linear                   double_blocks.N.txt_mod.lin
double_blocks.N.img_mlp.fc1                      double_blocks.N.img_mlp.0
double_blocks.N.img_mlp.fc2                      double_blocks.N.img_mlp.2
double_blocks.N.txt_mlp.fc1                      double_blocks.N.txt_mlp.0
double_blocks.N.txt_mlp.fc2                      double_blocks.N.txt_mlp.2
time_in.mlp.0                                    time_in.in_layer
time_in.mlp.2                                    time_in.out_layer
txt_in.t_embedder.mlp.0                          txt_in.t_embedder.in_layer
txt_in.t_embedder.mlp.2                          txt_in.t_embedder.out_layer
txt_in.c_embedder.linear_1                       txt_in.c_embedder.in_layer
txt_in.c_embedder.linear_2                       txt_in.c_embedder.out_layer
{_REFINER_NATIVE}.mlp.fc1                        {_REFINER_NATIVE}.mlp.0
{_REFINER_NATIVE}.mlp.fc2                        {_REFINER_NATIVE}.mlp.2
"""
_MAKERS_OF_ONE = """
single_blocks.N.modulation.linear                single_blocks.N.modulation.lin
guidance_in.mlp.0                                guidance_in.in_layer
guidance_in.mlp.2                                guidance_in.out_layer
"""
_MAKERS_SECOND_TIME = """
time_r_in.mlp.0                                  time_r_in.in_layer
time_r_in.mlp.2                                  time_r_in.out_layer
"""

# FramePack is of this build, and ComfyUI has no model of its own for it.
HUNYUAN_VIDEO = Family(
    "HunyuanVideo",
    _BLOCK_LINES + _TIME_AND_TEXT + _HUNYUAN,
    also=_HUNYUAN_MAKERS + _MAKERS_OF_ONE,
    blocks=_BLOCKS,
    sizes=(Size("HunyuanVideo", (20, 40), 3072),),
    diffusers="HunyuanVideoTransformer3DModel",
)

HUNYUAN_IMAGE = Family(
    "HunyuanImage 2.1",
    _BLOCK_LINES
    + _TIME_AND_GUIDANCE
    + _HUNYUAN
    + _GLYPHS
    + """
time_guidance_embed.timestep_embedder_r.linear_1 time_r_in.in_layer
time_guidance_embed.timestep_embedder_r.linear_2 time_r_in.out_layer
""",
    also=_HUNYUAN_MAKERS + _MAKERS_OF_ONE + _MAKERS_SECOND_TIME,
    blocks=_BLOCKS,
    sizes=(Size("HunyuanImage 2.1", (20, 40), 3584),),
    diffusers="HunyuanImageTransformer2DModel",
)

HUNYUAN_VIDEO15 = Family(
    "HunyuanVideo 1.5",
    _TWO_STREAMS
    + _FEED_FORWARD
    + _MODULATION_OF_TWO
    + _HUNYUAN
    + _GLYPHS
    + """
time_embed.timestep_embedder.linear_1            time_in.in_layer
time_embed.timestep_embedder.linear_2            time_in.out_layer
time_embed.timestep_embedder_r.linear_1          time_r_in.in_layer
time_embed.timestep_embedder_r.linear_2          time_r_in.out_layer
image_embedder.linear_1                          vision_in.proj.1
image_embedder.linear_2                          vision_in.proj.3
""",
    also=_HUNYUAN_MAKERS + _MAKERS_SECOND_TIME,
    blocks=(("D", "double_blocks"),),
    sizes=(Size("HunyuanVideo 1.5", (54,), 2048),),
    diffusers="HunyuanVideo15Transformer3DModel",
)

FAMILIES = (FLUX, FLUX2, CHROMA, HUNYUAN_VIDEO, HUNYUAN_IMAGE, HUNYUAN_VIDEO15)
