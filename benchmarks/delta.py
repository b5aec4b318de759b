"""Merging a LoHa into a weight: ours, ComfyUI's `calculate_weight` in the same process, and the floor.

    PYTHONPATH=. python -m benchmarks.delta [--quick] [--ranks 4,8,16,32] [--threads 2] [--seconds 1]

The floor is one read and one write of W, or the 4·o·i·r operations of both products at the speed of the machine's
fastest product, whichever takes longer. The three take turns. Figures are the fastest of the samples, as timeit's are:
on a machine with other work to do, each parallel region may wait for a whole time slice of somebody else's, and a
median then measures the neighbours. The medians' ratio is given beside it; on a quiet machine the two agree.

ComfyUI's way makes four temporaries of W's size. Where the allocator gives them fresh pages (as glibc's does for sizes
and at times of its choosing) that is most of its time; where it always has pages at hand, ours gains least:

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=100000000000 PYTHONPATH=. python -m benchmarks.delta

ComfyUI is found as demo/comfyui.py finds it (COMFYUI_PATH first).
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from loha_core import LoHaFactors, add_delta_, plan
from loha_core.ops import gemm, tiles

from . import memory
from .shapes import MODELS, Shape, distinct

QUICK: list[Shape] = [(320, 320), (640, 640, 1, 1), (1280, 1280), (320, 320, 3, 3), (3072, 3072), (10240, 1280)]
SAMPLE_SECONDS = 2e-3
MIN_SAMPLES, MAX_SAMPLES = 5, 40


class Row(NamedTuple):
    """Milliseconds (the fastest), ComfyUI / ours by medians, and MiB of memory beside the weight and the factors."""

    shape: Shape
    rank: int
    ours: float
    comfy: float
    floor: float
    median_ratio: float
    backend: str
    memory: float

    @property
    def ratio(self) -> float:
        return self.comfy / self.ours


def peak() -> float:
    """Operations per millisecond of a large product, at its fastest."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 4096)
    return 2 * a.numel() * b.shape[1] / min(take_turns([lambda: gemm.matmul(a, b)], 1.0)[0])


def measure(shape: Shape, rank: int, seconds: float, fastest: float) -> Row:
    from comfy.lora import calculate_weight
    from comfy.weight_adapter.loha import LoHaAdapter

    out, n = shape[0], math.prod(shape[1:])
    weight = torch.randn(shape)
    pairs = [torch.randn(out, rank), torch.randn(rank, n), torch.randn(out, rank), torch.randn(rank, n)]
    factors = LoHaFactors(*pairs, alpha=rank / 2)
    native = LoHaAdapter(set(), (pairs[0], pairs[1], rank / 2, pairs[2], pairs[3], None, None, None))
    patches = [(0.5, native, 1.0, None, None)]
    ways: list[Callable[[], object]] = [
        lambda: add_delta_(weight, factors, 0.5),
        lambda: calculate_weight(patches, weight, "weight"),
        lambda: weight.mul_(1.0),
    ]
    samples = take_turns(ways, seconds)
    ours, comfy, touched = map(min, samples)
    floor = max(touched, 4 * out * n * rank / fastest)
    median_ratio = statistics.median(samples[1]) / statistics.median(samples[0])
    return Row(shape, rank, ours, comfy, floor, median_ratio, plan(shape, factors).backend, extra_memory(ways[0]))


def take_turns(ways: list[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Samples of each way, in milliseconds; one lasts 2 ms or one call, whichever is longer."""
    counts = []
    for way in ways:
        way()
        start = time.perf_counter()
        way()
        counts.append(max(1, math.ceil(SAMPLE_SECONDS / (time.perf_counter() - start))))
    samples: list[list[float]] = [[] for _ in ways]
    began = time.perf_counter()
    while len(samples[0]) < MIN_SAMPLES or (len(samples[0]) < MAX_SAMPLES and time.perf_counter() - began < seconds):
        for way, count, of_way in zip(ways, counts, samples, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                way()
            of_way.append((time.perf_counter() - start) / count * 1e3)
    return samples


def extra_memory(call: Callable[[], object]) -> float:
    """How far a call lifts the process's resident memory, in MiB; nan where the kernel doesn't say (not Linux)."""
    call()  # the libraries' own buffers
    tiles._kept.memory = None  # what is kept from call to call counts
    memory.reset_peak()
    before = memory.resident()
    call()
    return max(memory.peak() - before, 0.0)


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def report(rows: list[Row]) -> None:
    by_shape = {(row.shape, row.rank): row for row in rows}
    print("\nmerging every layer of a model once, seconds (ComfyUI / ours = ratio)")
    for model, shapes in MODELS.items():
        for rank in sorted({row.rank for row in rows}):
            if all((shape, rank) in by_shape for shape in shapes):
                layers = [(by_shape[shape, rank], count) for shape, count in shapes.items()]
                comfy, ours = (sum(getattr(r, n) * c for r, c in layers) / 1e3 for n in ("comfy", "ours"))
                print(f"  {model:<7} rank {rank:>2}: {comfy:7.2f} / {ours:6.2f} = {comfy / ours:5.1f}x")
    print("\ngeometric mean of ComfyUI / ours, over distinct shapes")
    for rank in sorted({row.rank for row in rows}):
        print(f"  rank {rank:>2}: {geometric_mean([r.ratio for r in rows if r.rank == rank]):5.2f}x")
    print(f"  by medians instead of the fastest: {geometric_mean([row.median_ratio for row in rows]):.2f}x")
    worst = min(rows, key=lambda row: row.ratio)
    print(f"  all    : {geometric_mean([row.ratio for row in rows]):5.2f}x over {len(rows)} (target: 4x)")
    print(f"worst: {name(worst.shape)} rank {worst.rank}, {worst.ratio:.2f}x (target: none below 1x)")
    print(f"ours / floor, geometric mean: {geometric_mean([row.ours / row.floor for row in rows]):.1f}x")
    print(f"ComfyUI / floor, the most to gain: {geometric_mean([row.comfy / row.floor for row in rows]):.1f}x")
    print(f"peak extra memory: {max(row.memory for row in rows):.1f} MiB (target: at most 64)")


def name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six shapes, ranks 8 and 32")
    parser.add_argument("--ranks", default=None, help="comma-separated; 4,8,16,32 by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples per line; at least five in any case")
    options = parser.parse_args()

    from demo import comfyui

    comfyui.importable()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ranks = [int(r) for r in (options.ranks or ("8,32" if options.quick else "4,8,16,32")).split(",")]
    shapes = QUICK if options.quick else list(distinct())
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"float32; fastest in ms; memory in MiB; load average at the start {os.getloadavg()[0]:.1f}")
    print(f"{'weight':<16} rank     ours   ComfyUI    floor  ComfyUI/ours  ours/floor  memory  back end")
    rows = []
    with torch.inference_mode():
        fastest = peak()
        print(f"the fastest product: {fastest / 1e6:.0f} GFLOP/s")
        for shape in shapes:
            for rank in ranks:
                row = measure(shape, rank, options.seconds, fastest)
                rows.append(row)
                print(
                    f"{name(shape):<16} {rank:>4} {row.ours:8.3f} {row.comfy:9.3f} {row.floor:8.3f} "
                    f"{row.ratio:12.1f}x {row.ours / row.floor:10.1f}x {row.memory:7.1f}  {row.backend}",
                    flush=True,
                )
    report(rows)


if __name__ == "__main__":
    main()
