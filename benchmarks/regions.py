"""What an adapter in a region costs beside the same adapter everywhere, and eight strengths beside eight runs.

    PYTHONPATH=. python -m benchmarks.regions [--channels 128] [--ranks 4,8,16] [--size 64] [--repeats 5]

A SD1.5 of so many channels (128: 138M parameters; the real one has 320) with random weights in float32, a LoHa on all
linear and convolution layers. One call of the UNet on a batch of two, prompt and negative prompt; all in one process,
in turns, medians. Both are live: `region` has half of the picture masked, `everywhere` no mask, `plain` no adapter.

Then a batch of eight pictures, as the same seed at eight strengths: one run, and eight.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .strength import UNET, load_pack

import comfy.model_management  # isort: skip  (after benchmarks.strength has found ComfyUI)
import comfy.model_patcher  # isort: skip
import comfy.supported_models  # isort: skip

from loha_core import Adapter, LoHaFactors  # isort: skip

STRENGTHS = tuple(n / 7 for n in range(8))
TEXT = 77


def build(channels: int) -> Any:
    torch.manual_seed(0)
    config = comfy.supported_models.SD15(UNET | {"model_channels": channels})
    config.set_inference_dtype(torch.float32, None)
    unet = config.get_model({}, "")
    for parameter in unet.diffusion_model.parameters():
        parameter.requires_grad_(False)
        fan_in = max(1, parameter[0].numel() if parameter.dim() > 1 else 1)
        parameter.data.normal_(std=fan_in**-0.5 if parameter.dim() > 1 else 0.02)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(unet, load_device=cpu, offload_device=cpu)


def adapter_for(model: Any, rank: int) -> Adapter:
    layers = {}
    for name, layer in model.model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            out, columns = layer.weight.shape[0], layer.weight[0].numel()
            parts = [torch.randn(s) * 0.05 for s in ((out, rank), (rank, columns)) * 2]
            layers[name] = LoHaFactors(*parts, alpha=float(rank))
    return Adapter(layers, dialect="native", source="random")


def call(patcher: Any, pictures: list[int], size: int, chunks: int = 2) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, size, size, generator=rng).expand(chunks * len(pictures), -1, -1, -1).contiguous()
    context = torch.randn(chunks, TEXT, 768, generator=rng).repeat_interleave(len(pictures), 0)
    options = {"wrappers": patcher.wrappers, "cond_or_uncond": list(range(chunks))}
    with torch.inference_mode():
        return patcher.model.apply_model(
            x, torch.full((len(x),), 3.0), c_crossattn=context, transformer_options=options
        ).unflatten(0, (chunks, len(pictures)))


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each, in turns, after one round that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(repeats + 1):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if n:
                samples[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in samples.items()}


def loaded(patcher: Any, work: Callable[[Any], Any]) -> Callable[[], Any]:
    def run() -> Any:
        comfy.model_management.load_models_gpu([patcher])
        return work(patcher)

    return run


def region(modes: Any, model: Any, rank: int, size: int, repeats: int) -> dict[str, float]:
    from importlib import import_module

    regions = import_module(modes.__name__.replace("modes", "regions"))
    adapter, mask = adapter_for(model, rank), torch.zeros(8 * size, 8 * size)
    mask[:, : 4 * size] = 1
    patchers = {
        "plain": model,
        "everywhere": modes.apply(model, None, adapter, 0.5, 0.0, mode="live")[0],
        "region": modes.apply(model, None, adapter, 0.5, 0.0, region=regions.Region(mask))[0],
    }
    return medians({k: loaded(p, lambda p: call(p, [0], size)) for k, p in patchers.items()}, repeats)


def strengths(modes: Any, model: Any, rank: int, size: int, repeats: int) -> tuple[dict[str, float], float]:
    """Seconds, and the largest difference, as a share of the output."""
    adapter = adapter_for(model, rank)
    everyone = list(range(len(STRENGTHS)))
    together = modes.apply(model, None, adapter, STRENGTHS, 0.0)[0]
    alone = [modes.apply(model, None, adapter, s, 0.0, mode="live")[0] for s in STRENGTHS]

    def single() -> list[torch.Tensor]:
        found = []
        for patcher in alone:
            comfy.model_management.load_models_gpu([patcher])
            found.append(call(patcher, [0], size))
        return found

    batch = loaded(together, lambda p: call(p, everyone, size))
    found, wanted = batch(), torch.cat(single(), dim=1)
    error = max(float((found[:, n] - wanted[:, n]).norm() / wanted[:, n].norm()) for n in everyone)
    return medians({"batch of eight": batch, "eight runs": single}, repeats), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--ranks", default="4,8,16")
    parser.add_argument("--size", type=int, default=64, help="of the latents, for the region")
    parser.add_argument("--sizes", default="8,16,32", help="of the latents, for the strengths")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    modes = load_pack()
    model = build(args.channels)
    count = sum(p.numel() for p in model.model.diffusion_model.parameters())
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {count / 1e6:.0f}M")
    print(f"\n{'rank':>4}{'plain':>9}{'everywhere':>12}{'region':>9}{'region/everywhere':>19}  s, latents {args.size}²")
    for rank in map(int, args.ranks.split(",")):
        t = region(modes, model, rank, args.size, args.repeats)
        ratio = t["region"] / t["everywhere"]
        print(f"{rank:>4}{t['plain']:>9.2f}{t['everywhere']:>12.2f}{t['region']:>9.2f}{ratio:>19.2f}", flush=True)
    print(f"\n{'rank':>4}{'latents':>9}{'eight runs':>12}{'batch':>9}{'batch/runs':>12}{'error':>10}")
    for size in map(int, args.sizes.split(",")):
        rank = 8
        t, error = strengths(modes, model, rank, size, args.repeats)
        ratio = t["batch of eight"] / t["eight runs"]
        print(
            f"{rank:>4}{f'{size}²':>9}{t['eight runs']:>12.2f}{t['batch of eight']:>9.2f}{ratio:>12.2f}{error:>10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
