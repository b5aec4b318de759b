"""Module names: every trainer spells them its own way; this is where the spellings meet.

``lora_unet_down_blocks_0_attentions_0_proj_in``, ``unet.down_blocks.0.attentions.0.proj_in`` and
``base_model.model.down_blocks.0.attentions.0.proj_in`` are one module. `split` brings them to one form.
"""

from __future__ import annotations

import re

from ..adapter import WRAPPER

# Prefix -> which network it speaks of. Longest first where one begins another. "" = the file does not say.
PREFIXES: dict[str, str] = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "lora_prior_unet_": "unet",
    "lora_transformer_": "unet",
    "lora_unet_": "unet",
    "transformer.": "unet",
    "unet.": "unet",
    "text_encoders.clip_l.transformer.": "te1",
    "text_encoders.clip_g.transformer.": "te2",
    "text_encoders.t5xxl.transformer.": "te3",
    "lora_prior_te_": "te1",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "lora_te3_": "te3",
    "lora_te_": "te1",
    "text_encoder_2.": "te2",
    "text_encoder_3.": "te3",
    "text_encoder.": "te1",
    "lycoris_": "",
}

# Names of modules that contain "_" themselves; needed to get "." back from a flat name.
_COMPOUNDS = frozenset(
    """
    down_blocks up_blocks mid_block transformer_blocks time_embedding time_emb_proj conv_shortcut conv_in conv_out
    linear_1 linear_2 linear_3 to_q to_k to_v to_out to_add_out proj_in proj_out add_embedding class_embedding
    add_q_proj add_k_proj add_v_proj ff_context proj_mlp norm_out context_embedder x_embedder y_embedder t_embedder
    time_text_embed timestep_embedder text_embedder guidance_embedder pos_embed norm1_context single_transformer_blocks
    text_model self_attn q_proj k_proj v_proj out_proj token_embedding position_embedding text_projection
    final_layer_norm layer_norm1 layer_norm2 gate_proj up_proj down_proj
    input_blocks output_blocks middle_block emb_layers in_layers out_layers skip_connection time_embed label_emb
    double_blocks single_blocks joint_blocks context_block x_block img_attn txt_attn img_mlp txt_mlp img_mod txt_mod
    img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer adaLN_modulation
    wi_0 wi_1 cap_embedder noise_refiner context_refiner caption_projection cross_attn image_embedding
    """.split()
)
# Names without a "_" that stand beside them. A flat path of these, compounds and numbers has its dots for certain.
_WORDS = frozenset(
    """
    attentions resnets downsamplers upsamplers conv conv1 conv2 op norm norm1 norm2 norm3 norm4 attn attn1 attn2 ff net
    proj mlp fc1 fc2 qkv q k v o lin linear linear1 linear2 out add encoder layers block layer embeddings
    SelfAttention DenseReluDense wi wo query_norm key_norm modulation
    """.split()
)
_LONGEST = max(name.count("_") + 1 for name in _COMPOUNDS)


def flat(name: str) -> str:
    """A dotted or flat name as kohya's files spell it, with '_' for '.'."""
    return name.replace(".", "_")


def dotted(path: str) -> str:
    """A flat path with its dots back, as far as the field's module names are known; the inverse of `flat`.

    >>> dotted("down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0")
    'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0'
    """
    if "." in path:
        return path
    words, parts = path.split("_"), []
    while words:
        length = next((n for n in range(min(_LONGEST, len(words)), 1, -1) if "_".join(words[:n]) in _COMPOUNDS), 1)
        parts.append("_".join(words[:length]))
        words = words[length:]
    return ".".join(parts)


def has_known_parts(path: str) -> bool:
    """Whether all names within a path are known ones: those of another family may be cut rightly and mean nothing."""
    parts = dotted(path).split(".")
    return "." in path or len(parts) == 1 or all(p.isdecimal() or p in _WORDS or p in _COMPOUNDS for p in parts)


def has_known_dots(path: str) -> bool:
    """Whether `dotted` is right for certain, rather than cut at a "_" that may belong to a name.

    Beside a number it is a dot, and between two names that are known.
    """
    parts = dotted(path).split(".")
    sure = [part.isdecimal() for part in parts]
    known = [part in _WORDS or part in _COMPOUNDS for part in parts]
    return "." in path or all(sure[n] or sure[n + 1] or (known[n] and known[n + 1]) for n in range(len(parts) - 1))


def prefix_of(name: str) -> str | None:
    """The known prefix that a name carries, or None."""
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)


def split(name: str) -> tuple[str, str]:
    """A name in any spelling -> (component, path): the network it speaks of ("" if it doesn't say) and a flat path.

    >>> split("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    ('te1', 'encoder_layers_0_mlp_fc1')
    >>> split("unet.mid_block.attentions.0.processor.to_out")
    ('unet', 'mid_block_attentions_0_to_out')
    """
    name = name.removeprefix(WRAPPER)
    prefix = prefix_of(name)
    component = PREFIXES[prefix] if prefix else ""
    path = flat(name.removeprefix(prefix or "").removeprefix(WRAPPER)).replace("_processor_", "_")
    return component, path.removesuffix("_0" if path.endswith("_to_out_0") else "").removeprefix("text_model_")


def path_of(name: str) -> str:
    """The flat path alone; the tables of families know it."""
    return split(name)[1]


_BLOCK = re.compile(
    r"(?:encoder_)?(?:mid_block|middle_block|((?:(?:down|up|input|output|double|single|joint|transformer"
    r"|single_transformer)_)?blocks|layers)_(\d+))(?:_|$)"
)
_KINDS = (
    ("cross-attention", r"attn2|cross_attn|add_[qkv]_proj"),
    ("attention", r"attn|to_[qkv]|to_out|SelfAttention|qkv"),
    ("feed-forward", r"ff_|mlp|fc[12]|DenseReluDense|feed_forward|linear[12]"),
    ("time/embedding", r"time_emb|emb_layers|time_embed|label_emb|embed|adaLN|_mod_|modulation"),
    ("projection", r"proj_in|proj_out"),
    ("convolution", r"conv|resnets|in_layers|out_layers|skip_connection|_op$|downsamplers|upsamplers"),
)


def block_label(name: str) -> str:
    """The block that a module's name itself speaks of, such as 'down_blocks 1', 'middle' or 'te1 layers 3'.

    For charts of a file whose model is unknown; a model's weights are in the blocks that `layouts.block_of_key` says.
    """
    component, path = split(name)
    lead = f"{component} " if component.startswith("te") else ""
    match = _BLOCK.match(path)
    return lead + ("other" if match is None else f"{match[1]} {match[2]}" if match[1] else "middle")


def kind_of(name: str) -> str:
    """What sort of layer a module is: 'attention', 'cross-attention', 'feed-forward', 'convolution', …"""
    path = path_of(name)
    return next((kind for kind, pattern in _KINDS if re.search(pattern, path)), "other")
