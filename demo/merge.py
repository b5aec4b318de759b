"""`make demo-merge`: two LoHas, for two digits that the model never saw, merged into one; does it know both?

Each is trained in ComfyUI on its own. The table says how often the judge sees the digit that was asked for, over
pictures made by ComfyUI with each merged file. The parameters are those of the file.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from loha_core import Adapter, Compression, ErrorReport, Result, Sparse, load_adapter, merge, save_adapter

from . import comfyui, digits
from .__main__ import CONTROL, drawn
from .prepare import served, train_lohas
from .workflows import LOADER, job

ASKED = (*digits.HELD_BACK, CONTROL)
AT_LEAST = 0.70
"""What both prompts must reach at half the exact rank."""
HALF = 64
"""Half the exact rank: Σr² of two LoHas of rank 8 is 128."""


def averaged(adapters: list[Adapter]) -> Result:
    """The usual advice, which is wrong: factors averaged one by one, here doubled to stand for a sum."""
    first, second = adapters
    layers = {
        name: replace(
            f,
            **{k: (t.float() + second.layers[name].tensors()[k].float()) / 2 for k, t in f.tensors().items()},  # type: ignore[arg-type]
            alpha=2 * f.alpha,
        )
        for name, f in first.layers.items()
    }
    return Result(replace(first, layers=layers), ErrorReport())


WAYS: dict[str, Callable[[list[Adapter]], Result]] = {
    "seven alone": lambda a: Result(a[1], ErrorReport()),
    "three alone": lambda a: Result(a[0], ErrorReport()),
    "exact, rank 128": merge,
    "svd, rank 64": lambda a: merge(a, 1.0, Compression(rank=HALF)),
    "LoRA svd, rank 64": lambda a: merge(a, 1.0, Compression(rank=HALF, kind="lora")),
    "LoRA svd, rank 16 (as a parent)": lambda a: merge(a, 1.0, Compression(rank=16, kind="lora")),
    "ties, rank 64": lambda a: merge(a, 1.0, Compression(rank=HALF), combine=Sparse("ties", 0.5)),
    "factors averaged": averaged,
    "fit, rank 8 (as a parent)": lambda a: merge(a, 1.0, Compression("fit", rank=8)),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.merge", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()

    def run(server: comfyui.Server) -> int:
        names = train_lohas(server, *digits.HELD_BACK)
        adapters = [load_adapter(server.path("models", "loras", name)) for name in names]
        return table(server, adapters)

    return served(run)


def table(server: comfyui.Server, adapters: list[Adapter]) -> int:
    """Print what each way of merging gives; 0 if the promise is kept."""
    judge = digits.Judge()
    prompt = job(server, LOADER)
    print(f"{'':<32}{'numbers':>9}{'error':>9}" + "".join(f"{digits.WORDS[d]:>8}" for d in ASKED))
    kept = False
    for way, make in WAYS.items():
        result = make(adapters)
        path = server.path("models", "loras", "loha_demo_merged.safetensors")
        save_adapter(result.adapter, path)
        accuracies = [accuracy(server, prompt, path, judge, digit) for digit in ASKED]
        numbers = result.adapter.parameter_count() + sum(t.numel() for t in result.adapter.extras.values())
        error = f"{result.report.error:.3f}" if result.report.layers else ""
        print(f"{way:<32}{numbers / 1e6:>8.2f}M{error:>9}" + "".join(f"{a:>8.0%}" for a in accuracies), flush=True)
        if way == f"svd, rank {HALF}":
            kept = min(accuracies[:2]) >= AT_LEAST
    if not kept:
        print(f"Expected at least {AT_LEAST:.0%} on both digits at rank {HALF}.", file=sys.stderr)
    return 0 if kept else 1


def accuracy(server: comfyui.Server, prompt: comfyui.Json, lora: Path, judge: digits.Judge, digit: int) -> float:
    """The fraction of the pictures that show the digit that ComfyUI was asked for."""
    pictures = drawn(server, prompt, digit, "merged", lora_name=lora.name, strength_model=1.0, mode="merge")
    return float(np.mean(judge.read(pictures.mean(axis=3) / 255) == digit))


if __name__ == "__main__":
    sys.exit(main())
