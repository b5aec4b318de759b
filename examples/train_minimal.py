"""Train a LoHa with a plain PyTorch loop, save it, and load it again: a tiny U-Net and made-up pictures, no download.

python examples/train_minimal.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss

from loha_core import LoHaConfig, LoHaModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
steps = parser.parse_args().steps
torch.manual_seed(0)


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


# 1. The model, frozen, with LoHa layers in its attention and convolutions.
config = LoHaConfig(r=4, alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
model = LoHaModel(unet(), config, "default")
model.print_trainable_parameters()

# 2. What it is trained on: latents, and what a text encoder would give for their captions.
latents, captions = torch.rand(8, 4, 1, 1).expand(-1, -1, 8, 8) * 2 - 1, torch.randn(8, 5, 16)
scheduler = DDPMScheduler()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

# 3. The loop: add noise, predict it, step.
losses = []
for _ in range(steps):
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (8,))
    predicted = model(scheduler.add_noise(latents, noise, timesteps), timesteps, captions).sample
    loss = mse_loss(predicted, noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {sum(losses[:5]) / 5:.3f} -> {sum(losses[-5:]) / 5:.3f}")

# 4. Saved as PEFT's folder, and loaded into the same base model.
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = LoHaModel.from_pretrained(unet(), Path(folder))
    same = [m(latents, timesteps, captions).sample for m in (model, loaded)]
print("loaded again, predictions differ by", float((same[0] - same[1]).abs().max()))
