"""A long run of the training node on the demo's model: memory over its steps, and how soon Cancel acts.

    PYTHONPATH=. python -m benchmarks.train_run [--steps 1000] [--cancels 10] [--threads 2]

Memory is the process's resident set, every fiftieth of the run; Cancel is ComfyUI's own flag, raised by another thread
at a random moment, until the node has saved its state and returned.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import memory
from .strength import load_pack  # the import that puts ComfyUI on the path


def prepared() -> tuple[Any, Any]:
    """The demo's model, and its digits as a data set."""
    import comfy.sd

    from demo import digits, model, prepare
    from loha_core.training.data.dataset import Dataset, Item

    path = Path(tempfile.mkdtemp()) / prepare.CHECKPOINT
    model.save_checkpoint(model.load_int8(prepare.BASE), path, {})
    patcher, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)
    found = digits.load()[0].only((*digits.KNOWN, digits.TARGET))
    latents = model.to_latents(torch.from_numpy(found.pictures)) / model.SD15_FACTOR
    captions = [digits.prompt(int(label)) for label in found.labels]
    items = [Item(latent, caption) for latent, caption in zip(latents, captions, strict=True)]
    return patcher, Dataset(items, encode=lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text)))


def train(model: Any, dataset: Any, steps: int, name: str) -> None:
    nodes = {n: sys.modules[f"ComfyUI-LoHa.nodes.graph.{n}"] for n in ("trainer", "network")}
    nodes["trainer"].LoHaTrainer.execute(
        model, None, name, False, dataset=dataset, network=nodes["network"].network_config(), steps=steps, batch_size=4,
        mixed_precision="fp32",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--cancels", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_pack()
    import comfy.model_management
    import comfy.utils
    import folder_paths

    folder_paths.set_output_directory(tempfile.mkdtemp())
    times: list[float] = []
    sizes: list[float] = []

    def each(done: int, total: int, *_: Any, **__: Any) -> None:
        times.append(time.perf_counter())
        if done % max(1, total // 50) == 0:
            sizes.append(memory.resident())

    comfy.utils.set_progress_bar_global_hook(each)
    with torch.inference_mode():
        model, dataset = prepared()
        train(model, dataset, options.steps, "long")
        step = statistics.median(b - a for a, b in pairwise(times))
        tenth = len(sizes) // 10
        print(f"{options.steps} steps, {step * 1e3:.0f} ms each (median)")
        print(
            f"memory: {statistics.mean(sizes[tenth : 2 * tenth]):.0f} MiB over the second tenth of the run, "
            f"{statistics.mean(sizes[-tenth:]):.0f} MiB over the last, at most {max(sizes):.0f} MiB"
        )
        late = [cancel(model, dataset, number) for number in range(options.cancels)]
    print(
        f"Cancel: {statistics.median(late) * 1e3:.0f} ms (median of {len(late)}; at most {max(late) * 1e3:.0f} ms), "
        "its state saved"
    )


def cancel(model: Any, dataset: Any, number: int) -> float:
    """Seconds from Cancel until the node is done."""
    import comfy.model_management

    pressed = []

    def press() -> None:
        comfy.model_management.interrupt_current_processing()
        pressed.append(time.perf_counter())

    timer = threading.Timer(3 + random.Random(number).random(), press)
    timer.start()
    try:
        train(model, dataset, 100_000, f"cancelled {number}")
    except comfy.model_management.InterruptProcessingException:
        return time.perf_counter() - pressed[0]
    raise SystemExit("the run ended by itself")


if __name__ == "__main__":
    main()
