"""`python -m demo`: train a LoHa in a real ComfyUI, sweep its strength and measure what the pictures show.

`python -m demo --ui` prepares the same and leaves ComfyUI running for you to play with.
"""

import argparse
import copy
import io
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import comfyui, digits
from .grid import every_picture, labelled
from .prepare import train_lohas, write_files
from .workflows import CHECKPOINT, EXAMPLES, GRID, LOADER, filled

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
TEXT = ", ".join(map(str, STRENGTHS))
SAMPLES, SHOWN = 32, 4
"""Pictures per strength, all from one seed, and how many of them the grid picture has."""
CONTROL = 2
"""A digit the base model knows: asking for it shows what the LoHa does to the rest."""
AT_MOST_WITHOUT, AT_LEAST_WITH = 0.15, 0.80
"""What the demo promises: the share of pictures that show the target at strength 0 and at 1."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--ui", action="store_true", help="leave ComfyUI running and print its address")
    parser.add_argument("--port", type=int, help="where ComfyUI listens (8188 with --ui, else any free one)")
    parser.add_argument("--out", type=Path, default=comfyui.CACHE / "demo.png", help="the grid picture")
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe too, progress is for watching
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by the exits that stop the server
    try:
        folder = comfyui.find()
        print(f"ComfyUI: {folder}")
        server = comfyui.Server(folder, port=args.port or (8188 if args.ui else 0))
        write_files(server)
        return serve(server) if args.ui else demonstrate(server, args.out)
    except comfyui.ComfyUIError as error:
        print(f"\nThe demo cannot go on: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(server: comfyui.Server) -> int:
    """Run ComfyUI until Ctrl-C, with the example workflows among the user's, on the demo's files."""
    for path in EXAMPLES.glob("[0-9]*.json"):
        text = json.dumps(filled(path, enlarged=True))
        server.path("user", "default", "workflows", f"Demo {path.name}").write_text(text, "utf-8")
    with server:
        train_lohas(server, *digits.HELD_BACK)
        print(f"\nComfyUI is running at {server.address}")
        print(f"Open the workflow Demo {LOADER.stem} (Workflows in the side bar, or key w), slide and run.")
        print("Ctrl-C ends it.")
        server.wait()
    return 0


def demonstrate(server: comfyui.Server, out: Path) -> int:
    """Sweep the strength, save the grid, print the table; 0 if the promise is kept."""
    judge = digits.Judge()
    shutil.rmtree(server.base / "output", ignore_errors=True)
    started = time.monotonic()
    with server:
        print(f"Started at {server.address} after {time.monotonic() - started:.0f} s")
        train_lohas(server, digits.TARGET)
        print(f"Sweeping the strength by {GRID.stem}")
        sweeps = {digit: sweep(server, digit) for digit in (digits.TARGET, CONTROL)}
        sheets = [labelled(server, digit, SHOWN, strengths=TEXT) for digit in sweeps]

    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(sheets)).save(out)
    shares = {
        digit: [float(np.mean(judge.read(p.mean(axis=3) / 255) == digit)) for p in by_strength]
        for digit, by_strength in sweeps.items()
    }
    report(judge, shares)
    print(f"\nThe grid: {out.resolve()}")

    without, with_loha = shares[digits.TARGET][STRENGTHS.index(0)], shares[digits.TARGET][STRENGTHS.index(1)]
    kept = without <= AT_MOST_WITHOUT and with_loha >= AT_LEAST_WITH
    if not kept:
        print(
            f"Expected at most {AT_MOST_WITHOUT:.0%} at strength 0 and at least {AT_LEAST_WITH:.0%} at 1.",
            file=sys.stderr,
        )
    return 0 if kept else 1


def sweep(server: comfyui.Server, digit: int) -> list[np.ndarray]:
    """Ask for `digit` at each strength; nothing else changes. (SAMPLES, 32, 32, 3) uint8 per strength."""
    started = time.monotonic()
    pictures = every_picture(server, digit, SAMPLES, strengths=TEXT)
    print(f'"{digits.prompt(digit)}": {len(pictures)} pictures in {time.monotonic() - started:.1f} s')
    return [pictures[column :: len(STRENGTHS)] for column in range(len(STRENGTHS))]


def drawn(server: comfyui.Server, prompt: comfyui.Json, digit: int, prefix: str, **loader: Any) -> np.ndarray:
    """What ComfyUI makes when asked for a digit, with these inputs of the loader: (SAMPLES, h, w, 3) uint8."""
    job = copy.deepcopy(prompt)
    settings = {
        "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
        "LoHaLoader": loader,
        "EmptyLatentImage": {"batch_size": SAMPLES},
        "SaveImage": {"filename_prefix": prefix},
    }
    for node in job.values():
        node["inputs"] |= settings.get(node["class_type"], {})
    positive = next(node["inputs"]["positive"][0] for node in job.values() if node["class_type"] == "KSampler")
    job[positive]["inputs"]["text"] = digits.prompt(digit)
    return server.images(server.queue(job))


def report(judge: digits.Judge, shares: dict[int, list[float]]) -> None:
    """Print the table: strength against the share of pictures that show what was asked for."""
    print(f"\nThe judge reads {judge.accuracy:.1%} of held-out real digits correctly. Of {SAMPLES} pictures, it sees")
    print(f"{'strength':>10}" + "".join(f"{digits.WORDS[d] + ' when asked for':>24}" for d in shares))
    for row, strength in enumerate(STRENGTHS):
        print(f"{strength:>10.2f}" + "".join(f"{share[row]:>24.0%}" for share in shares.values()))


if __name__ == "__main__":
    sys.exit(main())
