"""`python -m demo.impact`: which blocks of the demo's LoHa matter, and what is left of the sevens without the others.

An example workflow ranks the blocks, by pictures and by the size of the update, and saves a LoHa with the half of
them that pictures chose. The table says how often the judge sees the digit that was asked for.
"""

import argparse
import sys

import numpy as np

from . import comfyui, digits
from .__main__ import CONTROL, SAMPLES, drawn
from .grid import every_picture
from .prepare import served, train_lohas
from .workflows import IMPACT, LOADER, job

PRUNED = "loha_demo_seven_pruned"
AT_LEAST = 0.90
"""The share of the whole LoHa's sevens that half of its blocks must keep."""

Part = tuple[str, float, float, bool]  # name, impact, norm, whether it is kept


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.impact", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()

    def run(server: comfyui.Server) -> int:
        train_lohas(server, digits.TARGET)
        return compare(server)

    return served(run)


def compare(server: comfyui.Server) -> int:
    """Print the ranking and the table; 0 if the promise is kept."""
    parts = [part for part in rank(server) if part[0] != "BASE"]
    off = {name for name, _, _, kept in parts if not kept}
    by_norm = {name for name, *_ in sorted(parts, key=lambda part: part[2])[: len(off)]}
    settings = {
        "no LoHa": "NONE",
        "all blocks": "ALL",
        "half, by pictures": without(off),
        "half, by norm": without(by_norm),
        "the half left out": without({name for name, *_ in parts} - off),
    }
    judge, asked = digits.Judge(), (digits.TARGET, CONTROL)
    tables = {digit: by_setting(server, settings, digit) for digit in asked}
    loader = job(server, LOADER)
    for digit in asked:
        saved = {"lora_name": f"{PRUNED}.safetensors", "strength_model": 1.0}
        tables[digit]["half, its file"] = drawn(server, loader, digit, "pruned", **saved)
    print(f"\nOf {SAMPLES} pictures, the judge sees\n{'':<20}" + "".join(f"{digits.WORDS[d]:>8}" for d in asked))
    sevens = {}
    for name in tables[asked[0]]:
        shares = [float(np.mean(judge.read(tables[d][name].mean(axis=3) / 255) == d)) for d in asked]
        sevens[name] = shares[0]
        print(f"{name:<20}" + "".join(f"{share:>8.0%}" for share in shares))
    if sevens["half, its file"] >= AT_LEAST * sevens["all blocks"]:
        return 0
    print(f"Expected at least {AT_LEAST:.0%} of the sevens with half of the blocks.", file=sys.stderr)
    return 1


def without(names: set[str]) -> str:
    return ", ".join(f"{name}=0" for name in sorted(names))


def rank(server: comfyui.Server) -> list[Part]:
    """Run the workflow, print its ranking, and leave the pruned LoHa among the others."""
    prompt = job(server, IMPACT, {"LoHaSave": {"filename": PRUNED, "overwrite": True}})
    outputs = server.queue(prompt)["outputs"]
    [node] = [key for key, node in prompt.items() if node["class_type"] == "LoHaImpact"]
    print(outputs[node]["text"][0])
    return [tuple(part) for part in outputs[node]["parts"]]


def by_setting(server: comfyui.Server, settings: dict[str, str], digit: int) -> dict[str, np.ndarray]:
    """What ComfyUI draws by LoHa Grid with each of the block settings: (SAMPLES, h, w, 3) uint8."""
    lines = "\n".join(f"{name}: {setting}" for name, setting in settings.items())
    pictures = every_picture(server, digit, SAMPLES, strengths="1", block_settings=lines)
    return {name: pictures[n * SAMPLES :][:SAMPLES] for n, name in enumerate(settings)}


if __name__ == "__main__":
    sys.exit(main())
