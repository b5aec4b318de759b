"""`python -m demo.slider`: a LoHa whose strength is a slider from one digit to another, learned without a picture.

The example workflow of sliders trains it from two prompts, for pictures without a prompt. Each strength is then set on
Load LoHa in a real ComfyUI; the table says what the judge reads, and how often ComfyUI loaded weights for it.
"""

import argparse
import json
import re
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from . import comfyui, digits
from .prepare import BASE, HERE, is_made, made_from, served
from .workflows import CHECKPOINT, GRID, LOADER, SLIDER, Values, job

LOHA = "loha_demo_slider.safetensors"
LOW, HIGH = 6, 2
"""What strength -1 and 1 show, as the workflow has it."""
STRENGTHS = (-1.0, -0.67, -0.33, 0.0, 0.33, 0.67, 1.0)
SAMPLES, SHOWN = 32, 4
AT_MOST, AT_LEAST = 0.10, 0.80
"""The share of the high digit at strength -1 and at 1."""
LOADED = re.compile("loaded (completely|partially)")
"""What ComfyUI logs when it has loaded weights."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.slider", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=comfyui.CACHE / "slider.png", help="the pictures")
    out = parser.parse_args().out

    def run(server: comfyui.Server) -> int:
        _train(server)
        return slide(server, out)

    return served(run)


def _train(server: comfyui.Server) -> None:
    """The workflow without its grid, unless the LoHa is there already."""
    made = made_from(HERE / "model.py", BASE, HERE / "workflows.py", SLIDER)
    if is_made(server.path("models", "loras", LOHA), made):
        return
    saved = {"overwrite": True, "metadata": json.dumps(made)}
    prompt = job(server, SLIDER, {"LoHaTrainer": {"resume": False}, "LoHaSave": saved})
    shown = {"LoHaGrid", "LoHaGridImage", "CLIPTextEncode", "KSampler", "VAEDecode", "SaveImage"}
    prompt = {name: node for name, node in prompt.items() if node["class_type"] not in shown}
    print(f"Training {LOHA} …", flush=True)
    started = time.monotonic()
    server.queue(prompt, timeout=1800)
    print(f"Trained from two prompts in {time.monotonic() - started:.0f} s", flush=True)


def slide(server: comfyui.Server, out: Path) -> int:
    """Print the table and save the picture; 0 if the promise is kept."""
    judge = digits.Judge()
    shutil.rmtree(server.base / "output", ignore_errors=True)
    print(f"Of {SAMPLES} pictures without a prompt, the judge reads")
    print(f"{'strength':>8}{digits.WORDS[LOW]:>8}{digits.WORDS[HIGH]:>8}{'loads':>8}{'seconds':>9}")
    shares, loads = [], []
    for strength in STRENGTHS:
        before, started = _loads(server), time.monotonic()
        pictures = server.images(server.queue(_drawing(server, strength)))
        seconds = time.monotonic() - started
        loads.append(_loads(server) - before)
        read = judge.read(pictures.mean(axis=3) / 255)
        low, high = (float(np.mean(read == digit)) for digit in (LOW, HIGH))
        shares.append(high)
        print(f"{strength:>8.2f}{low:>8.0%}{high:>8.0%}{loads[-1]:>8}{seconds:>9.1f}", flush=True)
    _save_picture(server, out)
    rises = all(one <= other for one, other in pairwise(shares))
    if rises and shares[0] <= AT_MOST and shares[-1] >= AT_LEAST and not any(loads[1:]):
        return 0
    print(
        f"Expected at most {AT_MOST:.0%} at -1, at least {AT_LEAST:.0%} at 1, never less than at the strength below, "
        "and no weights loaded after the first.",
        file=sys.stderr,
    )
    return 1


def _loads(server: comfyui.Server) -> int:
    return len(LOADED.findall(server.log()))


def _drawing(server: comfyui.Server, strength: float) -> comfyui.Json:
    loader = {"lora_name": LOHA, "strength_model": strength, "strength_clip": 0.0, "mode": "live"}
    settings: Values = {
        "LoHaLoader": loader,
        "EmptyLatentImage": {"batch_size": SAMPLES},
        "CLIPTextEncode": {"text": ""},
        "KSampler": {"cfg": 1.0},
        "SaveImage": {"filename_prefix": "slider"},
    }
    return job(server, LOADER, settings)


def _save_picture(server: comfyui.Server, out: Path) -> None:
    """All strengths by LoHa Grid, as one labelled picture."""
    settings: Values = {
        "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
        "LoHaLoadAdapter": {"lora_name": LOHA},
        "LoHaGrid": {"strengths": ", ".join(map(str, STRENGTHS))},
        "EmptyLatentImage": {"batch_size": SHOWN},
        "CLIPTextEncode": {"text": ""},
        "KSampler": {"cfg": 1.0},
    }
    prompt = job(server, GRID, settings)
    outputs = server.queue(prompt)["outputs"]
    saved = {key: output for key, output in outputs.items() if prompt[key]["class_type"] == "SaveImage"}
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(server.images({"outputs": saved})[0]).save(out)
    print(f"\nThe pictures: {out.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
