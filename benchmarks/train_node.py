"""Training in ComfyUI: our nodes beside its own TrainLoraNode (LoHa and LoRA).

    PYTHONPATH=. python -m benchmarks.train_node [--part speed|validation] [--steps 6] [--repeats 3]

A reduced SD1.5 (107M-parameter UNet of random weights), 32×32 latents, batch 1, float32, AdamW, rank 8 on all linear
and convolution layers. Each trainer runs in a process of its own; what it steps by is ComfyUI's progress bar.

speed: seconds per step (the median, without the first) and how far the process's memory gets above the loaded model;
both with every activation kept, which is our node's default, and with blocks recomputed in the backward, the native's.
validation: ε-error on held-out latents after the same number of steps on the same data, each trainer at the best of
the same learning rates. The latents are handwritten digits, so that there is something to learn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

from . import memory

WAYS = ("ours", "native LoHa", "native LoRA")
RECOMPUTING = ", recomputing"
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
TRAINED, HELD_OUT = 64, 64
RANK = 8


# --- one trainer, in a process of its own ---------------------------------------------------------


def child(way: str, steps: int, rate: float, threads: int, validate: bool) -> dict[str, Any]:
    """Train, and say how long steps took, how much memory, and how good it is now."""
    import torch

    from .strength import UNET, load_pack  # the import that puts ComfyUI on the path

    torch.set_num_threads(threads)
    load_pack()
    import comfy.utils

    model, latents, conditioning = _model(UNET), *_data()
    times: list[float] = []
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: times.append(time.perf_counter()))
    memory.reset_peak()
    before = memory.resident()
    with torch.inference_mode():
        train = _ours if way.startswith("ours") else _native
        trained = train(model, latents[:TRAINED], conditioning[:TRAINED], steps, rate, way)
    most = memory.peak()
    gaps = [b - a for a, b in pairwise(times)]
    loss = _validation(trained, latents[TRAINED:], conditioning[TRAINED:]) if validate else None
    return {"seconds": statistics.median(gaps), "memory": most - before, "validation": loss}


def _model(options: dict[str, Any]) -> Any:
    """SD1.5 cut down to two levels of one residual block: 107M parameters, of a size that passes a signal on."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    reduced = {
        "num_res_blocks": [1, 1], "channel_mult": (1, 2), "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = comfy.supported_models.SD15(options | reduced)
    config.set_inference_dtype(torch.float32, None)
    unet = config.get_model({}, "")
    for name, parameter in unet.diffusion_model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(float(name.endswith("weight")))  # norms at one, biases at zero
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(unet, load_device=cpu, offload_device=cpu)


def _data() -> tuple[Any, list[Any]]:
    """Digits as latents (n, 4, 32, 32), and a conditioning for each: one direction per digit."""
    import torch

    from demo import digits

    found = digits.load()[0]
    small = torch.from_numpy(found.pictures[: TRAINED + HELD_OUT])
    latents = torch.nn.functional.interpolate(small[:, None], scale_factor=4, mode="bilinear").repeat(1, 4, 1, 1)
    latents = (latents - latents.mean()) / latents.std() / 0.18215  # as a VAE gives them
    prompts = torch.randn(10, 1, 77, 768, generator=torch.Generator().manual_seed(0))
    return latents, [[[prompts[label], {}]] for label in found.labels[: TRAINED + HELD_OUT]]


def _ours(model: Any, latents: Any, conditioning: Any, steps: int, rate: float, way: str) -> Any:
    import tempfile

    import folder_paths
    import torch

    from loha_core.training.data.dataset import Dataset, Item

    nodes = sys.modules["ComfyUI-LoHa.nodes"]
    pack = {name: sys.modules[f"{nodes.__name__}.graph.{name}"] for name in ("trainer", "network", "optimizer")}
    folder_paths.set_output_directory(tempfile.mkdtemp())
    with torch.inference_mode(False):
        items = [Item(latent.clone(), conditioning=c) for latent, c in zip(latents, conditioning, strict=True)]
    network = pack["network"].network_config(preset="all", rank=RANK, alpha=RANK, conv_rank=RANK, conv_alpha=RANK)
    optimizer = pack["optimizer"].optimizer_settings(learning_rate=rate, schedule="constant", max_grad_norm=0.0)
    output = pack["trainer"].LoHaTrainer.execute(
        model, None, "benchmark", False, dataset=Dataset(items), network=network, optimizer=optimizer, steps=steps,
        mixed_precision="fp32", save_every=0, gradient_checkpointing=way.endswith(RECOMPUTING),
    )  # fmt: skip
    return output.args[1]


def _native(model: Any, latents: Any, conditioning: Any, steps: int, rate: float, way: str) -> Any:
    from comfy_extras.nodes_train import TrainLoraNode

    settings = {
        "batch_size": 1, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": rate, "rank": RANK,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
        "algorithm": way.removeprefix("native ").removesuffix(RECOMPUTING), "existing_lora": "[None]",
        "gradient_checkpointing": way.endswith(RECOMPUTING),
    }  # fmt: skip
    output = TrainLoraNode.execute(
        [model],
        [{"samples": latent[None]} for latent in latents],
        conditioning,
        **{name: [value] for name, value in settings.items()},
    )
    return output.args[0]


def _validation(model: Any, latents: Any, conditioning: Any) -> float:
    """Mean squared error of ε over held-out latents, at noise levels spread evenly."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    sampling, errors = model.model.model_sampling, []
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for place, (latent, c) in enumerate(zip(latents, conditioning, strict=True)):
            sigma = sampling.sigmas[int((place + 0.5) / len(latents) * len(sampling.sigmas))].view(1)
            noise = torch.randn(latent.shape, generator=rng)[None]
            clean = model.model.process_latent_in(latent[None])
            noisy = sampling.noise_scaling(sigma, noise, clean, False)
            denoised = model.model.apply_model(noisy, sigma, c_crossattn=c[0][0], transformer_options={})
            errors.append(float((((noisy - denoised) / sigma) - noise).square().mean()))
    return statistics.fmean(errors)


# --- all of them ----------------------------------------------------------------------------------


def run(way: str, steps: int, rate: float, threads: int, validate: bool = False) -> dict[str, Any]:
    arguments = [way, str(steps), str(rate), str(threads), str(int(validate))]
    command = [sys.executable, "-m", "benchmarks.train_node", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def speed(steps: int, repeats: int, threads: int) -> None:
    found: dict[str, list[dict[str, Any]]] = {way + how: [] for how in ("", RECOMPUTING) for way in WAYS}
    for _ in range(repeats):
        for way in found:
            found[way].append(run(way, steps, 1e-4, threads))
    middle = {w: {k: statistics.median(r[k] for r in rows) for k in ("seconds", "memory")} for w, rows in found.items()}
    print(f"{'':<26}{'s/step':>8}{'ours/it':>9}{'MiB':>8}{'ours/it':>9}")
    for way, row in middle.items():
        ratios = {key: middle["ours"][key] / row[key] for key in row}
        print(
            f"{way:<26}{row['seconds']:>8.2f}{ratios['seconds']:>8.2f}×{row['memory']:>8.0f}{ratios['memory']:>8.2f}×"
        )


def validation(steps: int, rates: list[float], threads: int) -> None:
    print(f"ε-error on held-out digits after {steps} steps, by learning rate")
    print(f"{'':<14}" + "".join(f"{rate:>9g}" for rate in rates) + f"{'best':>9}")
    for way in WAYS:
        losses = [run(way, steps, rate, threads, True)["validation"] for rate in rates]
        print(f"{way:<14}" + "".join(f"{loss:>9.4f}" for loss in [*losses, min(losses)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=["speed", "validation"])
    parser.add_argument("--steps", type=int, help="6 for speed, 30 for validation")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to choose from")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, steps, rate, threads, validate = options.child
        print(json.dumps(child(way, int(steps), float(rate), int(threads), bool(int(validate)))))
        return
    if options.part != "validation":
        speed(options.steps or 6, options.repeats, options.threads)
    if options.part != "speed":
        validation(options.steps or 30, options.rates, options.threads)


if __name__ == "__main__":
    main()
