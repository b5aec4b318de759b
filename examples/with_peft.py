"""PEFT's own LoHa on our layers by one line: transformers' Trainer, diffusers and mixed models stay as they are."""

from __future__ import annotations

import tempfile

import peft
import torch
import transformers
from models import arguments, llama, stable_diffusion, train

import loha_core.peft

args = arguments(__doc__)
loha_core.peft.enable()
torch.manual_seed(0)

# 1. transformers' Trainer: a language model, and the second half again from the checkpoint after the first.
ids = torch.randint(0, 128, (16, 32))
sentences = [{"input_ids": sentence, "labels": sentence} for sentence in ids]


def trainer(folder: str) -> transformers.Trainer:
    torch.manual_seed(1)
    config = peft.LoHaConfig(r=8, alpha=16, target_modules="all-linear", rank_dropout=0.1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(args.model), config)
    half = max(1, args.steps // 2)
    settings = transformers.TrainingArguments(
        folder, max_steps=2 * half, save_steps=half, logging_steps=half, learning_rate=1e-2, report_to="none"
    )
    return transformers.Trainer(model, settings, train_dataset=sentences)


with tempfile.TemporaryDirectory() as folder:
    whole, resumed = trainer(folder), trainer(folder)
    whole.model.print_trainable_parameters()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{whole.state.max_steps // 2}")
first, second = (entry["loss"] for entry in whole.state.log_history if "loss" in entry)
print(f"loss {first:.3f} -> {second:.3f}")
pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
print("resumed, parameters differ by", max(float((a - b).detach().abs().max()) for a, b in pairs))

# 2. diffusers: an adapter of the U-Net's own.
_, unet = stable_diffusion()
unet.requires_grad_(False)
unet.add_adapter(peft.LoHaConfig(r=4, alpha=4, target_modules=["to_q", "to_k", "to_v", "conv1", "conv2"]))
latents, caption = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
train(unet, lambda: (unet(latents, 500, caption).sample - latents).square().mean(), args.steps)

# 3. A LoHa and a LoRA in one model.
mixed = peft.PeftMixedModel(llama(args.model), peft.LoHaConfig(target_modules=["q_proj", "v_proj"]), "loha")
mixed.add_adapter("lora", peft.LoraConfig(target_modules=["v_proj", "o_proj"]))
mixed.set_adapter(["loha", "lora"])
train(mixed, lambda: mixed(input_ids=ids, labels=ids).loss, args.steps)
