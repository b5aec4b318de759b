"""Extracting a LoHa from two SD1.5 checkpoints, next to a LoRA by the dense SVD of each difference.

    PYTHONPATH=. python -m benchmarks.extract [--rank 8] [--every 1] [--threads 2] [--true] [--no-dense] [--folder DIR]

Random weights of the real shapes, in fp16; the tuned model has full-rank noise in it, or with --true a known LoHa of
the rank that is looked for. Every n-th layer only with --every. Memory is that above what was held at the start.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from loha_core import extract
from loha_core.models.tensor_file import TensorFile

from .merge import layers, measured, random_adapter


def checkpoints(folder: Path, rank: int, every: int, true: bool) -> tuple[Path, Path]:
    random = torch.Generator().manual_seed(0)
    known = random_adapter("SD1.5", rank, 1) if true else None
    dtype = torch.float32 if true else torch.float16
    base, tuned = {}, {}
    for name, key, shape in list(layers("SD1.5"))[::every]:
        weight = torch.randn(shape, generator=random) * 0.02
        if known is not None:
            change = known.layers[name].delta().reshape(shape)
        else:
            # What training leaves: a decaying spectrum, and noise.
            wide = torch.randn(shape[0], 32, generator=random) * 0.8 ** torch.arange(32)
            change = (wide @ torch.randn(32, prod(shape[1:]), generator=random)).reshape(shape) * 1e-3
            change += torch.randn(shape, generator=random) * 2e-4
        base[key], tuned[key] = weight.to(dtype), (weight + change).to(dtype)
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, state in zip(paths, (base, tuned), strict=True):
        save_file(state, path)
    return paths


def dense(base: Path, tuned: Path, rank: int) -> float:
    """A LoRA of ``rank`` by the SVD of each difference, as extraction scripts do it; the relative error."""
    before, after = TensorFile(base), TensorFile(tuned)
    lost = total = 0.0
    for key in before:
        change = (after[key].float() - before[key].float()).flatten(1)
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        lora = (u[:, :rank] * s[:rank]) @ v[:rank]
        lost += float((change - lora).square().sum())
        total += float(change.square().sum())
    return (lost / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--true", action="store_true", help="the difference is a LoHa of this rank, in fp32")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense SVD out")
    parser.add_argument("--folder", type=Path, help="where the files lie while it runs; the system's by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rank = options.rank
    print(f"{os.cpu_count()} CPUs, {options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        base, tuned = checkpoints(Path(name), rank, options.every, options.true)
        count = len(TensorFile(base).entries)
        print(f"{count} layers, {base.stat().st_size / 1e9:.2f} GB each; memory wanted: at most 1500 MiB")
        for what, settings in {
            f"LoHa of rank {rank}, fit": {"rank": rank},
            f"LoRA of rank {2 * rank}, same size": {"rank": 2 * rank, "method": "svd", "kind": "lora"},
        }.items():
            with measured(what):
                _, report = extract(base, tuned, **settings)  # type: ignore[arg-type]
            print("\n".join(f"    {line}" for line in report.lines(3)), flush=True)
        if not options.no_dense:
            with measured(f"LoRA of rank {2 * rank}, dense SVD"):
                error = dense(base, tuned, 2 * rank)
            print(f"    relative error {error:.3g}")


if __name__ == "__main__":
    main()
