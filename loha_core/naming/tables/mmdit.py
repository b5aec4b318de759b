"""Stable Diffusion 3, and others that make pictures with one kind of transformer block, or two."""

from __future__ import annotations

from ..families import Family, Size, each

SD3 = Family(
    "SD3",
    """
transformer_blocks.N.attn.to_q                joint_blocks.N.x_block.attn.qkv                     0:i
transformer_blocks.N.attn.to_k                joint_blocks.N.x_block.attn.qkv                     i:2i
transformer_blocks.N.attn.to_v                joint_blocks.N.x_block.attn.qkv                     2i:3i
transformer_blocks.N.attn.to_out.0            joint_blocks.N.x_block.attn.proj
transformer_blocks.N.attn.add_q_proj          joint_blocks.N.context_block.attn.qkv               0:i
transformer_blocks.N.attn.add_k_proj          joint_blocks.N.context_block.attn.qkv               i:2i
transformer_blocks.N.attn.add_v_proj          joint_blocks.N.context_block.attn.qkv               2i:3i
transformer_blocks.N.attn.to_add_out          joint_blocks.N.context_block.attn.proj
transformer_blocks.N.attn2.to_q               joint_blocks.N.x_block.attn2.qkv                    0:i
transformer_blocks.N.attn2.to_k               joint_blocks.N.x_block.attn2.qkv                    i:2i
transformer_blocks.N.attn2.to_v               joint_blocks.N.x_block.attn2.qkv                    2i:3i
transformer_blocks.N.attn2.to_out.0           joint_blocks.N.x_block.attn2.proj
transformer_blocks.N.ff.net.0.proj            joint_blocks.N.x_block.mlp.fc1
transformer_blocks.N.ff.net.2                 joint_blocks.N.x_block.mlp.fc2
transformer_blocks.N.ff_context.net.0.proj    joint_blocks.N.context_block.mlp.fc1
transformer_blocks.N.ff_context.net.2         joint_blocks.N.context_block.mlp.fc2
transformer_blocks.N.norm1.linear             joint_blocks.N.x_block.adaLN_modulation.1
transformer_blocks.N.norm1_context.linear     joint_blocks.N.context_block.adaLN_modulation.1     swapped   # the last's
time_text_embed.timestep_embedder.linear_1    t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2    t_embedder.mlp.2
time_text_embed.text_embedder.linear_1        y_embedder.mlp.0
time_text_embed.text_embedder.linear_2        y_embedder.mlp.2
context_embedder                              context_embedder
pos_embed.proj                                x_embedder.proj
norm_out.linear                               final_layer.adaLN_modulation.1                      swapped
proj_out                                      final_layer.linear
""",
    blocks=(("J", "joint_blocks"),),
    sizes=(Size("SD3", (24,), 1536), Size("SD3.5 medium", (24,), 1536), Size("SD3.5 large", (38,), 2432)),
    diffusers="SD3Transformer2DModel",
)

QWEN_IMAGE = Family(
    "Qwen-Image",
    """
transformer_blocks.N.attn.to_q
transformer_blocks.N.attn.to_k
transformer_blocks.N.attn.to_v
transformer_blocks.N.attn.to_out.0
transformer_blocks.N.attn.add_q_proj
transformer_blocks.N.attn.add_k_proj
transformer_blocks.N.attn.add_v_proj
transformer_blocks.N.attn.to_add_out
transformer_blocks.N.img_mlp.net.0.proj
transformer_blocks.N.img_mlp.net.2
transformer_blocks.N.txt_mlp.net.0.proj
transformer_blocks.N.txt_mlp.net.2
transformer_blocks.N.img_mod.1
transformer_blocks.N.txt_mod.1
time_text_embed.timestep_embedder.linear_1
time_text_embed.timestep_embedder.linear_2
img_in
txt_in
norm_out.linear
proj_out
""",
    blocks=(("T", "transformer_blocks"),),
    sizes=(Size("Qwen-Image", (60,), 3072),),
    diffusers="QwenImageTransformer2DModel",
)

_HIDREAM_BLOCK = """
LIST.N.block.attn1.to_q
LIST.N.block.attn1.to_k
LIST.N.block.attn1.to_v
LIST.N.block.attn1.to_out
LIST.N.block.ff_i.shared_experts.w1
LIST.N.block.ff_i.shared_experts.w2
LIST.N.block.ff_i.shared_experts.w3
LIST.N.block.ff_i.experts.N.w1
LIST.N.block.ff_i.experts.N.w2
LIST.N.block.ff_i.experts.N.w3
LIST.N.block.ff_i.gate
LIST.N.block.adaLN_modulation.1
"""
HIDREAM = Family(
    "HiDream",
    each(("double_stream_blocks", "single_stream_blocks"), _HIDREAM_BLOCK)
    + """
double_stream_blocks.N.block.attn1.to_q_t
double_stream_blocks.N.block.attn1.to_k_t
double_stream_blocks.N.block.attn1.to_v_t
double_stream_blocks.N.block.attn1.to_out_t
double_stream_blocks.N.block.ff_t.w1
double_stream_blocks.N.block.ff_t.w2
double_stream_blocks.N.block.ff_t.w3
t_embedder.timestep_embedder.linear_1
t_embedder.timestep_embedder.linear_2
p_embedder.pooled_embedder.linear_1
p_embedder.pooled_embedder.linear_2
x_embedder.proj
caption_projection.N.linear
final_layer.adaLN_modulation.1
final_layer.linear
""",
    blocks=(("D", "double_stream_blocks"), ("S", "single_stream_blocks")),
    sizes=(Size("HiDream I1", (16, 32), 2560),),
    diffusers="HiDreamImageTransformer2DModel",
)

# Its makers' first stream is the text's.
AURAFLOW = Family(
    "AuraFlow",
    """
joint_transformer_blocks.N.attn.to_q                    double_layers.N.attn.w2q
joint_transformer_blocks.N.attn.to_k                    double_layers.N.attn.w2k
joint_transformer_blocks.N.attn.to_v                    double_layers.N.attn.w2v
joint_transformer_blocks.N.attn.to_out.0                double_layers.N.attn.w2o
joint_transformer_blocks.N.attn.add_q_proj              double_layers.N.attn.w1q
joint_transformer_blocks.N.attn.add_k_proj              double_layers.N.attn.w1k
joint_transformer_blocks.N.attn.add_v_proj              double_layers.N.attn.w1v
joint_transformer_blocks.N.attn.to_add_out              double_layers.N.attn.w1o
joint_transformer_blocks.N.ff.linear_1                  double_layers.N.mlpX.c_fc1
joint_transformer_blocks.N.ff.linear_2                  double_layers.N.mlpX.c_fc2
joint_transformer_blocks.N.ff.out_projection            double_layers.N.mlpX.c_proj
joint_transformer_blocks.N.ff_context.linear_1          double_layers.N.mlpC.c_fc1
joint_transformer_blocks.N.ff_context.linear_2          double_layers.N.mlpC.c_fc2
joint_transformer_blocks.N.ff_context.out_projection    double_layers.N.mlpC.c_proj
joint_transformer_blocks.N.norm1.linear                 double_layers.N.modX.1
joint_transformer_blocks.N.norm1_context.linear         double_layers.N.modC.1
single_transformer_blocks.N.attn.to_q                   single_layers.N.attn.w1q
single_transformer_blocks.N.attn.to_k                   single_layers.N.attn.w1k
single_transformer_blocks.N.attn.to_v                   single_layers.N.attn.w1v
single_transformer_blocks.N.attn.to_out.0               single_layers.N.attn.w1o
single_transformer_blocks.N.ff.linear_1                 single_layers.N.mlp.c_fc1
single_transformer_blocks.N.ff.linear_2                 single_layers.N.mlp.c_fc2
single_transformer_blocks.N.ff.out_projection           single_layers.N.mlp.c_proj
single_transformer_blocks.N.norm1.linear                single_layers.N.modCX.1
time_step_proj.linear_1                                 t_embedder.mlp.0
time_step_proj.linear_2                                 t_embedder.mlp.2
context_embedder                                        cond_seq_linear
pos_embed.proj                                          init_x_linear
norm_out.linear                                         modF.1                      swapped
proj_out                                                final_linear
""",
    blocks=(("D", "double_layers"), ("S", "single_layers")),
    sizes=(Size("AuraFlow", (4, 32), 3072),),
    diffusers="AuraFlowTransformer2DModel",
)

PIXART = Family(
    "PixArt",
    """
transformer_blocks.N.attn1.to_q                             blocks.N.attn.qkv               0:i
transformer_blocks.N.attn1.to_k                             blocks.N.attn.qkv               i:2i
transformer_blocks.N.attn1.to_v                             blocks.N.attn.qkv               2i:3i
transformer_blocks.N.attn1.to_out.0                         blocks.N.attn.proj
transformer_blocks.N.attn2.to_q                             blocks.N.cross_attn.q_linear
transformer_blocks.N.attn2.to_k                             blocks.N.cross_attn.kv_linear   0:i
transformer_blocks.N.attn2.to_v                             blocks.N.cross_attn.kv_linear   i:2i
transformer_blocks.N.attn2.to_out.0                         blocks.N.cross_attn.proj
transformer_blocks.N.ff.net.0.proj                          blocks.N.mlp.fc1
transformer_blocks.N.ff.net.2                               blocks.N.mlp.fc2
adaln_single.emb.timestep_embedder.linear_1                 t_embedder.mlp.0
adaln_single.emb.timestep_embedder.linear_2                 t_embedder.mlp.2
adaln_single.emb.resolution_embedder.linear_1               csize_embedder.mlp.0
adaln_single.emb.resolution_embedder.linear_2               csize_embedder.mlp.2
adaln_single.emb.aspect_ratio_embedder.linear_1             ar_embedder.mlp.0
adaln_single.emb.aspect_ratio_embedder.linear_2             ar_embedder.mlp.2
adaln_single.linear                                         t_block.1
caption_projection.linear_1                                 y_embedder.y_proj.fc1
caption_projection.linear_2                                 y_embedder.y_proj.fc2
pos_embed.proj                                              x_embedder.proj
proj_out                                                    final_layer.linear
""",
    blocks=(("B", "blocks"),),
    sizes=(Size("PixArt", (28,), 1152),),
    diffusers="PixArtTransformer2DModel",
)

# The text goes through blocks of its own first, within each layer's and across them.
_KREA2_BLOCKS = (
    ("transformer_blocks.N", "blocks.N"),
    ("text_fusion.layerwise_blocks.N", "txtfusion.layerwise_blocks.N"),
    ("text_fusion.refiner_blocks.N", "txtfusion.refiner_blocks.N"),
)
KREA2 = Family(
    "Krea 2",
    "".join(
        f"""
{diffusers}.attn.to_q        {native}.attn.wq
{diffusers}.attn.to_k        {native}.attn.wk
{diffusers}.attn.to_v        {native}.attn.wv
{diffusers}.attn.to_gate     {native}.attn.gate
{diffusers}.attn.to_out.0    {native}.attn.wo
{diffusers}.ff.gate          {native}.mlp.gate
{diffusers}.ff.up            {native}.mlp.up
{diffusers}.ff.down          {native}.mlp.down
"""
        for diffusers, native in _KREA2_BLOCKS
    )
    + """
img_in                       first
time_embed.linear_1          tmlp.0
time_embed.linear_2          tmlp.2
time_mod_proj                tproj.1
txt_in.linear_1              txtmlp.1
txt_in.linear_2              txtmlp.3
text_fusion.projector        txtfusion.projector
final_layer.linear           last.linear
""",
    blocks=(("B", "blocks"),),
    sizes=(Size("Krea 2", (28,), 6144),),
    diffusers="Krea2Transformer2DModel",
)

FAMILIES = (SD3, QWEN_IMAGE, HIDREAM, AURAFLOW, PIXART, KREA2)
