"""What merging two adapters and baking one into a checkpoint take: seconds, and memory above what was there before.

    PYTHONPATH=. python -m benchmarks.merge [--model SD1.5] [--rank 8] [--gigabytes 2] [--threads 2] [--folder DIR]

Random factors and weights of the real shapes, every linear layer and convolution. `wall` is what a clock says, `CPU`
what this process's threads worked: on a machine with other work to do, the first also measures the neighbours.
Writing and copying both end with fsync.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from loha_core import (
    Adapter,
    Compression,
    LoHaFactors,
    Sparse,
    apply_to_checkpoint,
    load_adapter,
    merge,
    save_adapter,
)
from loha_core.transform.merge import Combination

from . import memory
from .shapes import MODELS, Shape


def layers(model: str) -> Iterator[tuple[str, str, Shape]]:
    """(module, weight's key, shape), the names made up in LDM's style."""
    for shape, count in MODELS[model].items():
        for index in range(count):
            name = f"blocks.{index}.{'x'.join(map(str, shape))}"
            yield f"lora_unet_{name.replace('.', '_')}", f"model.diffusion_model.{name}.weight", shape


def random_adapter(model: str, rank: int, seed: int) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    factors = {}
    for name, _, shape in layers(model):
        sizes = [(shape[0], rank), (rank, prod(shape[1:]))] * 2
        factors[name] = LoHaFactors(*(torch.randn(s, generator=random) * 0.1 for s in sizes), alpha=rank / 2)
    return Adapter(factors, source=f"adapter {seed}")


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print wall and CPU seconds, and by how much resident memory peaked above what was held at the start."""
    memory.reset_peak()
    before, cpu, wall = memory.resident(), time.process_time(), time.perf_counter()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"  {what:<44} wall {wall:7.2f} s   CPU {cpu:7.2f} s   memory +{memory.peak() - before:6.0f} MiB", flush=True)


def merges(model: str, rank: int, folder: Path, with_fit: bool) -> None:
    for seed in (0, 1):
        save_adapter(random_adapter(model, rank, seed), folder / f"{seed}.safetensors")
    sources = [load_adapter(folder / f"{seed}.safetensors") for seed in (0, 1)]
    print(f"merge of two {model} adapters, rank {rank}, {len(sources[0].layers)} layers (wanted: at most 20 s)")
    cases: dict[str, tuple[Combination, Compression]] = {
        "exact": ("sum", Compression("exact")),
        f"svd, rank {2 * rank}": ("sum", Compression(rank=2 * rank)),
        "svd, energy 0.5": ("sum", Compression(energy=0.5)),
        "slerp, exact": ("slerp", Compression(max_error=0.0)),
        f"ties, svd of rank {2 * rank}": (Sparse("ties", 0.5), Compression(rank=2 * rank)),
    }
    if with_fit:
        cases[f"fit, rank {rank}"] = "sum", Compression("fit", rank=rank)
    for name, (combine, compression) in cases.items():
        with measured(name):
            merged, report = merge(sources, [0.6, 0.7], compression, combine=combine)
        print(f"  {'':<44} {next(report.lines())}")
        if report.lora_error is not None:
            print(f"  {'':<44} {list(report.lines())[1]}")
        if name == "exact":
            with measured("  saved"):
                save_adapter(merged, folder / "merged.safetensors")
        del merged


def bakes(rank: int, gigabytes: float, folder: Path) -> None:
    """A checkpoint of SD1.5's shapes in fp16, filled up with tensors that no adapter touches."""
    random = torch.Generator().manual_seed(0)
    state = {key: (torch.randn(shape, generator=random) * 0.02).half() for _, key, shape in layers("SD1.5")}
    size, left = sum(t.numel() * 2 for t in state.values()), 0
    while size < gigabytes * 1e9:
        state[f"first_stage_model.{left}"] = torch.zeros(50_000_000, dtype=torch.float16)
        size, left = size + 100_000_000, left + 1
    source, out = folder / "model.safetensors", folder / "out.safetensors"
    save_file(state, source)
    del state
    adapter = random_adapter("SD1.5", rank, 0)
    print(f"bake into a checkpoint of {size / 1e9:.1f} GB, {len(adapter.layers)} layers of rank {rank}")
    walls = []
    for what, call in _taking_turns(source, out, adapter):
        start = time.perf_counter()
        with measured(what):
            call()
        walls.append(time.perf_counter() - start)
        out.unlink()
    copies, baked = min(walls[::2]), min(walls[1::2])
    print(f"  baking / copying: {baked / copies:.2f} (wanted: at most 3)")


def _taking_turns(source: Path, out: Path, adapter: Adapter) -> Iterator[tuple[str, Callable[[], object]]]:
    def copy() -> None:
        with open(source, "rb") as old, open(out, "wb") as new:
            shutil.copyfileobj(old, new, 8 << 20)
            os.fsync(new.fileno())

    for _ in range(2):
        yield "copy", copy
        yield "apply_to_checkpoint", lambda: apply_to_checkpoint(source, [adapter], 0.8, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="SD1.5")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files lie while it runs; the system's by default")
    parser.add_argument("--fit", action="store_true", help="fit, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{os.cpu_count()} CPUs, {options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        merges(options.model, options.rank, Path(name), options.fit)
        bakes(options.rank, options.gigabytes, Path(name))


if __name__ == "__main__":
    main()
