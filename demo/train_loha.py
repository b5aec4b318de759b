"""Teach the base model a held-back digit with a LoHa on every linear and convolution layer of its UNet."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from . import digits, model
from .train_base import noise_loss

RANK = 8
ALPHA = 8.0
STEPS = 150
BATCH = 32
LEARNING_RATE = 3e-3
SHARE_OF_TARGET = 0.6
"""Share of each batch that shows the new digit; the rest keeps the known ones in memory."""


class LoHa(nn.Module):
    """One layer's update ΔW = alpha/rank · (w1_a w1_b) ∘ (w2_a w2_b) (FedPara, arXiv 2108.06098, eq. 2).

    Args:
        weight: the layer's weight (o, i) or (o, i, k, k); the update has its shape.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, inner = weight.flatten(1).shape
        self.shape, self.scale = weight.shape, alpha / rank
        # LyCORIS' initialisation: w2_a = 0 makes the update start at zero.
        self.hada_w1_a = nn.Parameter(0.1 * torch.randn(out, rank))
        self.hada_w1_b = nn.Parameter(torch.randn(rank, inner))
        self.hada_w2_a = nn.Parameter(torch.zeros(out, rank))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, inner))

    def forward(self) -> Tensor:
        update = (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        return self.scale * update.view(self.shape)


class WithLoHa(nn.Module):
    """A frozen UNet whose weights are W + ΔW."""

    def __init__(self, unet: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        self.unet = unet.eval().requires_grad_(False)
        layers = [name for name, layer in unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        self.names = {f"{layer}.weight": layer.replace(".", "_") for layer in layers}
        self.updates = nn.ModuleDict(
            {short: LoHa(unet.get_parameter(name), rank, alpha) for name, short in self.names.items()}
        )

    def forward(self, latents: Tensor, step: Tensor, context: Tensor) -> Tensor:
        weights = {name: self.unet.get_parameter(name) + self.updates[short]() for name, short in self.names.items()}
        return functional_call(self.unet, weights, (latents, step, context))


def train(unet_weights: model.StateDict, target: int, out: Path, metadata: dict[str, str], seed: int = 0) -> None:
    """Train a LoHa for the digit `target` and write it to `out` in LyCORIS' format, float16.

    Args:
        unet_weights: the base model.
        metadata: goes into the file beside what kohya's readers expect.
    """
    torch.manual_seed(seed)
    data = digits.load()[0].only((*digits.KNOWN, target))
    latents = model.to_latents(torch.from_numpy(data.pictures))
    labels = torch.from_numpy(data.labels)
    chance = torch.where(
        labels == target,
        SHARE_OF_TARGET / (labels == target).sum(),
        (1 - SHARE_OF_TARGET) / (labels != target).sum(),
    )
    contexts = model.encode_prompts([digits.prompt(d) for d in range(10)] + [""])

    unet = model.new_unet()
    unet.load_state_dict(unet_weights)
    network = WithLoHa(unet, RANK, ALPHA)
    optimizer = torch.optim.AdamW(network.updates.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)

    progress = tqdm(range(STEPS), desc=f"LoHa for {digits.WORDS[target]}", unit="step")
    for _ in progress:
        pick = torch.multinomial(chance, BATCH, replacement=True)
        which = torch.where(torch.rand(BATCH) < 0.1, 10, labels[pick])
        loss = noise_loss(network, latents[pick], contexts[which])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.updates.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    tensors: model.StateDict = {}
    for name, update in network.updates.items():
        for factor, value in update.named_parameters():
            tensors[f"lora_unet_{name}.{factor}"] = value.detach().half().contiguous()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
    temporary = out.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=_metadata(target, data.labels) | metadata)
    temporary.replace(out)


def _metadata(target: int, labels: np.ndarray) -> dict[str, str]:
    """What kohya's scripts write about a training, as far as it applies."""
    frequency = {digits.prompt(d): int((labels == d).sum()) for d in (target, *digits.KNOWN)}
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(ALPHA),
        "ss_network_args": json.dumps({"algo": "loha", "conv_dim": str(RANK), "conv_alpha": str(ALPHA)}),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "Handwritten digits",
        "ss_learning_rate": str(LEARNING_RATE),
        "ss_max_train_steps": str(STEPS),
        "ss_total_batch_size": str(BATCH),
        "ss_num_train_images": str(len(labels)),
        "ss_resolution": f"({model.PICTURE}, {model.PICTURE})",
        "ss_output_name": f"digit_{digits.WORDS[target]}",
        "ss_tag_frequency": json.dumps({"digits": frequency}),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": f"A handwritten {digits.WORDS[target]}",
        "modelspec.trigger_phrase": digits.prompt(target),
    }
