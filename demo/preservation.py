"""`python -m demo.preservation`: teach the seven, and see what becomes of the digits that the model knew.

The example workflow trains it three times: on sevens alone; beside prior pictures, real ones of the other digits; and
with output preservation, which needs no picture of them: the model itself says what they are. The table says how often
the judge reads the digit that was asked for.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from . import comfyui, digits, train_loha
from .__main__ import drawn
from .prepare import BASE, HERE, is_made, made_from, served
from .workflows import LOADER, TRAIN, job

WAYS = ("alone", "prior pictures", "output preservation")
BATCH = 8
"""Pictures in a step, fewer than the demo's: to forget, a LoHa needs no more."""
TRIGGER = digits.WORDS[digits.TARGET]
CLASSES = ", ".join(digits.WORDS[digit] for digit in digits.KNOWN)
KEPT, LEARNT = 0.95, 0.80
"""Of the base's right answers for the other digits, on average; and of sevens."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.preservation", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()

    def run(server: comfyui.Server) -> int:
        for way in WAYS:
            _train(server, way)
        return table(server)

    return served(run)


def _file(way: str) -> str:
    return f"loha_demo_kept_{way.split()[0]}.safetensors"


def _train(server: comfyui.Server, way: str) -> None:
    """The training workflow, without the prior pictures unless they are wanted."""
    made = made_from(HERE / "model.py", BASE, HERE / "workflows.py", Path(__file__), TRAIN)
    if is_made(server.path("models", "loras", _file(way)), made):
        return
    name = _file(way).removesuffix(".safetensors")
    run = {"name": name, "resume": False, "batch_size": BATCH, "save_every": 0}
    saved = {"filename": name, "overwrite": True, "metadata": json.dumps(made)}
    prompt = job(server, TRAIN, {"LoHaTrainer": run, "LoHaSave": saved})
    tried = {"CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode", "PreviewImage"}
    prompt = {name: node for name, node in prompt.items() if node["class_type"] not in tried}
    if way != "prior pictures":
        prompt = train_loha.without_known(prompt)
    if way == "output preservation":
        trainer = next(node for node in prompt.values() if node["class_type"] == "LoHaTrainer")
        words = {"trigger_word": TRIGGER, "class_word": CLASSES, "weight": 1.0}
        inputs = words | {"objective": trainer["inputs"]["objective"]}
        prompt["preservation"] = {"class_type": "LoHaPreservation", "inputs": inputs}
        trainer["inputs"]["objective"] = ["preservation", 0]
    started = time.monotonic()
    server.queue(prompt, timeout=1800)
    print(f"Trained in {time.monotonic() - started:.0f} s: {way}", flush=True)


def table(server: comfyui.Server) -> int:
    """Print what is read of each digit, by the base and by each LoHa; 0 if the promise is kept."""
    judge, loader = digits.Judge(), job(server, LOADER)
    asked = (*digits.KNOWN, digits.TARGET)
    print(f"{'right, of those asked for':<26}" + "".join(f"{digits.WORDS[d]:>7}" for d in asked) + f"{'kept':>8}")
    base, kept, learnt = 0.0, dict[str, float](), dict[str, float]()
    for way in ("base", *WAYS):
        lora = {"lora_name": _file(WAYS[0] if way == "base" else way), "strength_model": float(way != "base")}
        read = {d: judge.read(drawn(server, loader, d, "kept", **lora).mean(axis=3) / 255) for d in asked}
        shares = {digit: float(np.mean(found == digit)) for digit, found in read.items()}
        known = float(np.mean([shares[digit] for digit in digits.KNOWN]))
        base = base or known
        kept[way], learnt[way] = known / base, shares[digits.TARGET]
        print(f"{way:<26}" + "".join(f"{shares[d]:>7.0%}" for d in asked) + f"{kept[way]:>8.1%}", flush=True)
    if all(kept[way] >= KEPT and learnt[way] >= LEARNT for way in WAYS[1:]):
        return 0
    print(f"Expected at least {KEPT:.0%} kept and {LEARNT:.0%} of sevens, both ways.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
