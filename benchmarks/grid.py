"""A grid of strengths: LoHa Grid's one batch beside a run for each strength.

    PYTHONPATH=. python -m benchmarks.grid [--sizes 4,8,16] [--count 8] [--steps 4] [--rank 8] [--repeats 3]

A reduced SD1.5 (107M-parameter UNet of random weights), a LoHa on all its linear and convolution layers, float32,
euler, with guidance. What is timed, in turns, medians: the nodes' own work, and all that ComfyUI's sampler does.

grid: LoHa Grid, and the sampler once. live, merge: Apply LoHa, and the sampler, for each strength. The difference is
the largest of any picture, of the grid's from that strength's live run, relative to its norm.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from .strength import UNET, adapter_for, load_pack, medians  # the import that puts ComfyUI on the path
from .train_node import _model as build


def sampled(model: Any, latent: dict[str, Any], steps: int) -> torch.Tensor:
    """As KSampler does."""
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent["samples"], 7, latent.get("batch_index"))
    random = torch.Generator().manual_seed(1)
    positive, negative = ([[torch.randn(1, 77, 768, generator=random), {}]] for _ in range(2))
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            5.0,
            "euler",
            "normal",
            positive,
            negative,
            latent["samples"],
            disable_pbar=True,
            seed=7,
        )


def ways(model: Any, adapter: Any, size: int, count: int, steps: int) -> dict[str, Callable[[], torch.Tensor]]:
    graph = lambda name: sys.modules[f"ComfyUI-LoHa.nodes.graph.{name}"]  # noqa: E731
    latent = {"samples": torch.zeros(1, 4, size, size)}
    values = [n / (count - 1) for n in range(count)]

    def grid() -> torch.Tensor:
        strengths = ", ".join(map(repr, values))
        planned = graph("grid").LoHaGrid.execute(model, latent, strengths, at_once=count, loha_1=adapter).result
        return sampled(planned[0][0], planned[1][0], steps)

    def each(mode: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            return torch.cat([
                sampled(graph("loader").LoHaApply.execute(
                    model, adapter, strength_model=value, strength_clip=0.0, mode=mode
                ).result[0], latent, steps)
                for value in values
            ])  # fmt: skip

        return run

    return {"grid": grid, "live": each("live"), "merge": each("merge")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4,8,16", help="latents are size × size")
    parser.add_argument("--count", type=int, default=8, help="strengths")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    load_pack()
    model = build(UNET)
    adapter, _ = adapter_for(model, SimpleNamespace(cond_stage_model=torch.nn.Module()), options.rank)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"{options.count} strengths, {options.steps} steps, rank {options.rank}; seconds for all of them")
    print("  latents       grid       live    (grid/live)      merge    (grid/merge)   difference")
    for size in map(int, options.sizes.split(",")):
        runs = ways(model, adapter, size, options.count, options.steps)
        found, wanted = runs["grid"](), runs["live"]()  # and warm up
        runs["merge"]()
        difference = float(((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())
        t = medians(runs, options.repeats)
        cells = "".join(f"{t[way]:9.2f} s  ({t['grid'] / t[way]:7.2f}×) " for way in ("live", "merge"))
        print(f"  {size:3d}×{size:<3d} {t['grid']:8.2f} s {cells} {difference:12.1e}", flush=True)


if __name__ == "__main__":
    main()
