"""Two prompts with an adapter and a mask each: LoHa Hook beside ComfyUI's own weight hooks.

    PYTHONPATH=. python -m benchmarks.hooks [--sizes 8,16,32] [--rank 8] [--steps 6] [--repeats 3]

A reduced SD1.5 (107M-parameter UNet of random weights) in float32, a LoHa on all linear and convolution layers, a
negative prompt without hooks. Each way samples the same picture, in turns; medians over the runs of the time per step.

first: of the first step, in which ComfyUI makes the weights of each prompt and keeps copies.
next: of the steps after it, in which ComfyUI copies them into the model at each change from prompt to prompt.
keyframes: of all steps where the hooks' strengths follow keyframes, so that ComfyUI makes the weights at every step.

ours / ComfyUI is printed for each, the error of the latents in both cases, and whether a hash of all weights is as
before. no adapter: the same prompts and masks, which ComfyUI then samples in one batch.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import statistics
import sys
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from .strength import UNET, adapter_for, load_pack  # the import that puts ComfyUI on the path
from .train_node import _model as build

NATIVE, OURS, NONE = "ComfyUI", "ours", "no adapter"


def conditionings(hooks: list[Any], size: int) -> tuple[Any, Any]:
    """Two prompts, each in its half of the picture, and a negative one."""
    from comfy.hooks import set_conds_props

    prompts = torch.randn(3, 1, 77, 768, generator=torch.Generator().manual_seed(0))
    half = torch.zeros(size * 8, size * 8)
    half[:, : size * 4] = 1
    positive = []
    for prompt, hook, mask in zip(prompts[:2], hooks, (half, 1 - half), strict=True):
        [masked] = set_conds_props([[[prompt, {}]]], strength=1.0, set_cond_area="default", mask=mask, hooks=hook)
        positive += masked
    return positive, [[prompts[2], {}]]


def sample(model: Any, hooks: list[Any], size: int, steps: int) -> tuple[torch.Tensor, list[float]]:
    """The latents, and the seconds of each step."""
    import comfy.sample

    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    times = [time.perf_counter()]
    with torch.inference_mode():
        latents = comfy.sample.sample(
            model, noise, steps, 5.0, "euler", "normal", *conditionings(hooks, size), torch.zeros_like(noise),
            disable_pbar=True, callback=lambda *_: times.append(time.perf_counter()), seed=1,
        )  # fmt: skip
    return latents, [after - before for before, after in pairwise(times)]


def with_keyframes(hooks: list[Any], steps: int) -> list[Any]:
    """A strength of its own for each step."""
    from comfy_extras.nodes_hooks import CreateHookKeyframesInterpolated

    (group,) = CreateHookKeyframesInterpolated().create_hook_keyframes(1.0, 0.3, "linear", 0.0, 0.999, 4 * steps)
    clones = [hook.clone() for hook in hooks]
    for clone in clones:
        clone.set_keyframes_on_hooks(group)
    return clones


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for _, tensor in sorted(model.model.state_dict().items()):
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def row(model: Any, hooks: dict[str, list[Any]], size: int, steps: int, repeats: int) -> str:
    latents: dict[tuple[str, str], torch.Tensor] = {}
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 1):  # the first is to warm up
        for way, held in hooks.items():
            for case, given in (("masks", held), ("keyframes", with_keyframes(held, steps) if held[0] else held)):
                latents[way, case], found = sample(model, given, size, steps)
                parts = {"first": found[:1], "next": found[1:]} if case == "masks" else {"keyframes": found}
                for part, seconds in parts.items() if repeat else ():
                    times.setdefault((part, way), []).append(statistics.mean(seconds))
    median = {key: statistics.median(values) for key, values in times.items()}
    cells = "".join(
        f"{median[part, NATIVE]:9.3f}{median[part, OURS]:9.3f}{median[part, OURS] / median[part, NATIVE]:7.2f}×"
        for part in ("first", "next", "keyframes")
    )
    errors = (
        float((latents[OURS, case] - latents[NATIVE, case]).abs().max() / latents[NATIVE, case].abs().max())
        for case in ("masks", "keyframes")
    )
    return f"  {size:3d}×{size:<3d} {median['next', NONE]:8.3f} {cells}   {max(errors):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8,16,32", help="latents are size × size")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    load_pack()
    from comfy.hooks import create_hook_lora

    create = sys.modules["ComfyUI-LoHa.nodes.host.hooks"].create
    model, no_clip = build(UNET), SimpleNamespace(cond_stage_model=torch.nn.Module())
    pairs = [adapter_for(model, no_clip, options.rank) for _ in range(2)]
    hooks: dict[str, list[Any]] = {
        NONE: [None, None],
        NATIVE: [create_hook_lora(tensors, 1.0, 0.0) for _, tensors in pairs],
        OURS: [create(adapter, 1.0, 0.0) for adapter, _ in pairs],
    }
    before = digest(model)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, rank {options.rank}")
    print("Seconds per step    first: ComfyUI  ours         next: ComfyUI  ours         keyframes: ComfyUI  ours")
    print("  latents  no adapter                                                                        largest error")
    for size in map(int, options.sizes.split(",")):
        print(row(model, hooks, size, options.steps, options.repeats), flush=True)
    print("weights as they were" if digest(model) == before else "THE WEIGHTS HAVE CHANGED")


if __name__ == "__main__":
    main()
