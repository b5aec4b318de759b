"""Train the base model, which has never seen the held-back digits: `python -m demo.train_base`.

Its result, `demo/base.safetensors` (int8, 18 MB), is kept in the repository so that the demo
starts at once. Training takes about ten minutes on two cores that multiply bfloat16 matrices in
hardware, about half an hour on two that don't.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import comfyui, digits

comfyui.importable()
from . import model  # noqa: E402  (needs ComfyUI on the path)
from .prepare import BASE  # noqa: E402


def fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices clearly faster than float32 ones."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(1024, 1024, dtype=dtype)
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        return time.perf_counter() - start

    return 1.5 * seconds(torch.bfloat16) < seconds(torch.float32)


def noise_loss(unet: torch.nn.Module, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise at random steps of SD1.5's schedule (DDPM, eq. 14).

    Args:
        latents: (n, 4, 4, 4) clean latents in the model's space.
        context: (n, 77, 768) text embeddings.
    """
    step = torch.randint(0, 1000, (len(latents),))
    signal = model.alphas_cumprod()[step].reshape(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    return F.mse_loss(unet(noisy, step.float(), context).float(), noise)


def train(steps: int, batch: int, lr: float, seed: int = 0) -> model.StateDict:
    """Train from scratch on the known digits; returns the averaged (EMA) weights, float32."""
    torch.manual_seed(seed)
    data = digits.load()[0].only(digits.KNOWN)
    latents = model.to_latents(torch.from_numpy(data.pictures))
    contexts = model.encode_prompts([digits.prompt(d) for d in range(10)] + [""])
    contexts_of = torch.from_numpy(data.labels)

    unet = model.new_unet(seed).train().requires_grad_()
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bfloat16 = fast_bfloat16()

    progress = tqdm(range(steps), desc="base model", unit="step")
    for step in progress:
        pick = torch.randint(0, len(latents), (batch,))
        which = contexts_of[pick]
        which = torch.where(torch.rand(batch) < 0.1, 10, which)  # the empty prompt, for guidance
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = noise_loss(unet, latents[pick], contexts[which])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), unet.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return average.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=64, help="pictures per step")
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--out", type=Path, default=BASE)
    args = parser.parse_args()
    weights = train(args.steps, args.batch, args.lr)
    model.save_int8(weights, args.out)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
