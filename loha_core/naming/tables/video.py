"""Models that make video, and those of the same build that make images."""

from __future__ import annotations

from ..families import Family, Size, each

_WAN_BLOCK = """
LIST.N.attn1.to_q                                       LIST.N.self_attn.q
LIST.N.attn1.to_k                                       LIST.N.self_attn.k
LIST.N.attn1.to_v                                       LIST.N.self_attn.v
LIST.N.attn1.to_out.0                                   LIST.N.self_attn.o
LIST.N.attn2.to_q                                       LIST.N.cross_attn.q
LIST.N.attn2.to_k                                       LIST.N.cross_attn.k
LIST.N.attn2.to_v                                       LIST.N.cross_attn.v
LIST.N.attn2.to_out.0                                   LIST.N.cross_attn.o
LIST.N.ffn.net.0.proj                                   LIST.N.ffn.0
LIST.N.ffn.net.2                                        LIST.N.ffn.2
"""

# With VACE, whose blocks run beside the first ones of the others.
WAN = Family(
    "Wan",
    each(("blocks", "vace_blocks"), _WAN_BLOCK)
    + """
blocks.N.attn2.add_k_proj                               blocks.N.cross_attn.k_img
blocks.N.attn2.add_v_proj                               blocks.N.cross_attn.v_img
vace_blocks.0.proj_in                                   vace_blocks.0.before_proj
vace_blocks.N.proj_out                                  vace_blocks.N.after_proj
vace_patch_embedding
patch_embedding
condition_embedder.time_embedder.linear_1               time_embedding.0
condition_embedder.time_embedder.linear_2               time_embedding.2
condition_embedder.time_proj                            time_projection.1
condition_embedder.text_embedder.linear_1               text_embedding.0
condition_embedder.text_embedder.linear_2               text_embedding.2
condition_embedder.image_embedder.ff.net.0.proj         img_emb.proj.1
condition_embedder.image_embedder.ff.net.2              img_emb.proj.3
ref_conv
proj_out                                                head.head
""",
    blocks=(("B", "blocks"), ("V", "vace_blocks")),
    sizes=(
        Size("Wan 14B", (40, 0), 5120),
        Size("Wan 1.3B", (30, 0), 1536),
        Size("Wan 5B", (30, 0), 3072),
        Size("Wan VACE 14B", (40, 8), 5120),
        Size("Wan VACE 1.3B", (30, 15), 1536),
    ),
    diffusers="WanTransformer3DModel",
)

LTX = Family(
    "LTX-Video",
    """
transformer_blocks.N.attn1.to_q
transformer_blocks.N.attn1.to_k
transformer_blocks.N.attn1.to_v
transformer_blocks.N.attn1.to_out.0
transformer_blocks.N.attn2.to_q
transformer_blocks.N.attn2.to_k
transformer_blocks.N.attn2.to_v
transformer_blocks.N.attn2.to_out.0
transformer_blocks.N.ff.net.0.proj
transformer_blocks.N.ff.net.2
time_embed.emb.timestep_embedder.linear_1               adaln_single.emb.timestep_embedder.linear_1
time_embed.emb.timestep_embedder.linear_2               adaln_single.emb.timestep_embedder.linear_2
time_embed.linear                                       adaln_single.linear
caption_projection.linear_1
caption_projection.linear_2
proj_in                                                 patchify_proj
proj_out
""",
    blocks=(("T", "transformer_blocks"),),
    sizes=(Size("LTX-Video 2B", (28,), 2048), Size("LTX-Video 13B", (48,), 4096)),
    diffusers="LTXVideoTransformer3DModel",
)

_COSMOS = """
transformer_blocks.N.attn1.to_q                         blocks.N.self_attn.q_proj
transformer_blocks.N.attn1.to_k                         blocks.N.self_attn.k_proj
transformer_blocks.N.attn1.to_v                         blocks.N.self_attn.v_proj
transformer_blocks.N.attn1.to_out.0                     blocks.N.self_attn.output_proj
transformer_blocks.N.attn2.to_q                         blocks.N.cross_attn.q_proj
transformer_blocks.N.attn2.to_k                         blocks.N.cross_attn.k_proj
transformer_blocks.N.attn2.to_v                         blocks.N.cross_attn.v_proj
transformer_blocks.N.attn2.to_out.0                     blocks.N.cross_attn.output_proj
transformer_blocks.N.ff.net.0.proj                      blocks.N.mlp.layer1
transformer_blocks.N.ff.net.2                           blocks.N.mlp.layer2
transformer_blocks.N.norm1.linear_1                     blocks.N.adaln_modulation_self_attn.1
transformer_blocks.N.norm1.linear_2                     blocks.N.adaln_modulation_self_attn.2
transformer_blocks.N.norm2.linear_1                     blocks.N.adaln_modulation_cross_attn.1
transformer_blocks.N.norm2.linear_2                     blocks.N.adaln_modulation_cross_attn.2
transformer_blocks.N.norm3.linear_1                     blocks.N.adaln_modulation_mlp.1
transformer_blocks.N.norm3.linear_2                     blocks.N.adaln_modulation_mlp.2
time_embed.t_embedder.linear_1                          t_embedder.1.linear_1
time_embed.t_embedder.linear_2                          t_embedder.1.linear_2
patch_embed.proj                                        x_embedder.proj.1
norm_out.linear_1                                       final_layer.adaln_modulation.1
norm_out.linear_2                                       final_layer.adaln_modulation.2
proj_out                                                final_layer.linear
"""
COSMOS = Family(
    "Cosmos-Predict2",
    _COSMOS + "crossattn_proj.0\n",  # 2.5 only
    blocks=(("B", "blocks"),),
    sizes=(Size("Cosmos-Predict2 2B", (28,), 2048), Size("Cosmos-Predict2 14B", (36,), 5120)),
    diffusers="CosmosTransformer3DModel",
)

_ANIMA_ADAPTER = (
    *(f"blocks.N.{attn}.{proj}_proj" for attn in ("self_attn", "cross_attn") for proj in "qkvo"),
    *("blocks.N.mlp.0", "blocks.N.mlp.2", "out_proj"),
)
# Cosmos-Predict2 behind a network for the text, which diffusers keeps outside of the transformer.
ANIMA = Family(
    "Anima",
    _COSMOS + "".join(f"llm_adapter.{name}\n" for name in _ANIMA_ADAPTER),
    also="".join(f"text_conditioner.{name} llm_adapter.{name}\n" for name in _ANIMA_ADAPTER),
    blocks=(("B", "blocks"),),
    sizes=(Size("Anima", (28,), 2048),),
    diffusers="CosmosTransformer3DModel",
)

FAMILIES = (WAN, LTX, COSMOS, ANIMA)
