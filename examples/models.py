"""Small models of the real classes, with random weights, so that the examples run offline in seconds.

With a model id (or a folder), the real one is loaded instead.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from diffusers import UNet2DConditionModel


def arguments(what: str) -> argparse.Namespace:
    """``--model ID`` and ``--steps N``."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--model", help="id or folder of a real model; by default a small random one")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    return parser.parse_args()


def llama(model: str | None = None) -> Any:
    if model:
        return transformers.AutoModelForCausalLM.from_pretrained(model)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(model: str | None = None) -> Any:
    if model:
        return transformers.AutoModel.from_pretrained(model)
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=128
    )
    return transformers.BertModel(config)


def t5(model: str | None = None) -> Any:
    if model:
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(model)
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=128, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def stable_diffusion(model: str | None = None) -> tuple[Any, Any]:
    """(text encoder, UNet) of a Stable Diffusion 1 pipeline."""
    if model:
        encoder = transformers.CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
        return encoder, UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=128,
        bos_token_id=126, eos_token_id=127,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    return transformers.CLIPTextModel(config), unet


def train(model: torch.nn.Module, loss_of: Any, steps: int, lr: float = 1e-2) -> None:
    """AdamW on what asks for gradients; prints the loss at the start and at the end."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
