"""Many adapters: what ComfyUI's page waits for, beside ComfyUI's own loader.

    python -m benchmarks.files [--files 2000] [--folders 110] [--repeats 15]

A ComfyUI of its own, with that many small files in that many folders. Medians of several, in turn, as other work on the
machine weighs on all alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.comfyui import Server, find

WORDS = ("neon", "soft", "dark", "film", "grainy", "pastel", "vivid", "wet", "old", "new")


def fill(root: Path, files: int, folders: int) -> str:
    """Adapters by links to one file; returns a name."""
    root.mkdir(parents=True, exist_ok=True)
    factors = {f"lora_unet_mid_block_x.hada_{name}": torch.ones(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    save_file(factors, first := root / "first.safetensors")
    for number in range(files - 1):
        group, kind = divmod(number % folders, len(WORDS))
        folder = root / WORDS[kind] / f"set_{group}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{WORDS[number // folders % len(WORDS)]}_{number:05d}.safetensors").hardlink_to(first)
    return "first.safetensors"


def measured(asked: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(repeats):
        for name, ask in asked.items():
            began = time.perf_counter()
            ask()
            times[name].append(1000 * (time.perf_counter() - began))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--folders", type=int, default=110)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        name = fill(Path(base, "models", "loras"), options.files, options.folders)
        with Server(find(), base=Path(base)) as server:
            asked: dict[str, Callable[[], object]] = {
                f"/object_info/{kind}": lambda kind=kind: server.object_info(kind)  # type: ignore[misc]
                for kind in ("LoraLoader", "LoHaLoader", "LoHaLoadAdapter", "LoHaStack")
            }
            routes = ("adapters", f"info?name={name}", "blocks", "problem?node=LoHaGrid&inputs={}")
            for route in routes:
                asked[f"/loha/{route}"] = lambda route=route: server.get(f"/loha/{route}")  # type: ignore[misc]
            measured(asked, 2)
            times = measured(asked, options.repeats)
    print(f"{options.files} files in {options.folders} folders, median (best) of {options.repeats} in ms:")
    for name, found in times.items():
        print(f"  {name:48} {statistics.median(found):8.1f} ({min(found):.1f})")


if __name__ == "__main__":
    main()
