"""Stable Diffusion: text encoder and UNet, the UNet's convolutions with the effective (Tucker) form."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from models import arguments, stable_diffusion, train

from loha_core import LoHaConfig, LoHaModel

args = arguments(__doc__)
torch.manual_seed(0)
text_encoder, unet = stable_diffusion(args.model)
model = SimpleNamespace(text_encoder=text_encoder, unet=unet)

config_te = LoHaConfig(
    r=8,
    lora_alpha=32,
    target_modules=["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    rank_dropout=0.0,
    module_dropout=0.0,
    init_weights=True,
)
config_unet = LoHaConfig(
    r=8,
    lora_alpha=32,
    target_modules=[
        "proj_in",
        "proj_out",
        "to_k",
        "to_q",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    ],
    rank_dropout=0.0,
    module_dropout=0.0,
    init_weights=True,
    use_effective_conv2d=True,
)

model.text_encoder = LoHaModel(model.text_encoder, config_te, "default")
model.unet = LoHaModel(model.unet, config_unet, "default")
model.text_encoder.print_trainable_parameters()
model.unet.print_trainable_parameters()

size, channels = model.unet.config.sample_size, model.unet.config.in_channels
noisy, noise = torch.randn(1, channels, size, size), torch.randn(1, channels, size, size)
prompt = torch.randint(0, 100, (1, 16))


def loss() -> torch.Tensor:
    condition = model.text_encoder(prompt).last_hidden_state
    return (model.unet(noisy, torch.tensor([500]), condition).sample - noise).square().mean()


train(torch.nn.ModuleList([model.text_encoder, model.unet]), loss, args.steps, lr=3e-3)
