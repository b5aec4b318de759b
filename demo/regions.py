"""`python -m demo.regions`: an adapter that makes a seven of every digit, in one half of the picture only.

The demo's model is asked for a digit in pictures of two digits side by side. The table says what the judge reads in the
half with the mask, which should be sevens, and in the other half, which should be what was asked for.
"""

import argparse
import copy
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from . import comfyui, digits, train_loha
from .picture import grid
from .prepare import BASE, HERE, is_made, made_from, served
from .workflows import CHECKPOINT, LOADER, TRAIN, job

LOHA = "loha_demo_always_seven.safetensors"
ASKED = (2, 4)
"""Digits that the model, which was shown single ones, draws side by side without being taught to."""
STRENGTH = 1.6
"""Against a prompt that asks for another digit: at 1 four of five are sevens, wherever the LoHa acts."""
SAMPLES = 32
SIDE = 32
"""A digit's width and height in pixels."""
AT_LEAST = 0.80
"""Of the pictures: sevens where the mask is, and the asked digit elsewhere."""
WAYS: dict[str, dict[str, object] | None] = {
    "without the LoHa": None,
    "everywhere": {},
    "left half, off": {"x": 0, "text_layers": "off"},
    "right half, off": {"x": SIDE, "text_layers": "off"},
    "left half, share": {"x": 0, "text_layers": "share"},
    "left half, full": {"x": 0, "text_layers": "full"},
}
"""Where the adapter acts, and what layers without a place do."""
PROMISED = ("left half, off", "right half, off")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.regions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=comfyui.CACHE / "regions.png", help="the pictures")
    out = parser.parse_args().out

    def run(server: comfyui.Server) -> int:
        _train(server)
        return table(server, out)

    return served(run, _write_pictures)


def _write_pictures(server: comfyui.Server) -> None:
    """Two sevens side by side, as they will be asked for, under the captions of all digits that the model knows."""
    sevens = digits.load()[0].only((digits.TARGET,)).pictures
    others = np.random.default_rng(0).permutation(sevens)
    labels = np.resize(np.array(digits.KNOWN), len(sevens))
    pairs = digits.Digits(np.concatenate([sevens, others], axis=2), labels)
    train_loha.write_digits(pairs, server.path("input", _name(), ""))


def _name() -> str:
    return LOHA.removesuffix(".safetensors")


def _train(server: comfyui.Server) -> None:
    """As the training workflow does, without the pictures of what is to be kept."""
    made = made_from(HERE / "model.py", BASE, Path(__file__), HERE / "workflows.py", TRAIN)
    if is_made(server.path("models", "loras", LOHA), made):
        return
    saved = {"filename": _name(), "overwrite": True, "metadata": json.dumps(made)}
    prompt = job(server, TRAIN, {"LoHaTrainer": {"name": _name(), "resume": False}, "LoHaSave": saved})
    prompt = train_loha.without_known(prompt)
    for node in prompt.values():
        if node["inputs"].get("folder") == train_loha.folder(digits.TARGET):
            node["inputs"]["folder"] = _name()
    print(f"Training {LOHA} …", flush=True)
    server.queue(prompt, timeout=1800)


def table(server: comfyui.Server, out: Path) -> int:
    """Print what is read in both halves; 0 if the promise is kept."""
    judge = digits.Judge()
    prompt = job(server, LOADER)
    shutil.rmtree(server.base / "output", ignore_errors=True)
    print(f"Of {SAMPLES} pictures the judge reads, in the left and in the right half,")
    print(f"{'asked':>6}  {'the LoHa acts':<18}{'a seven':>14}{'what was asked':>17}{'seconds':>9}")
    kept, rows = True, []
    for asked in ASKED:
        shown = []
        for number, (way, where) in enumerate(WAYS.items()):
            started = time.monotonic()
            pictures = server.images(server.queue(_drawing(prompt, asked, where, f"regions_{asked}_{number}")))
            seconds = time.monotonic() - started
            read = [judge.read(half.mean(axis=3) / 255) for half in (pictures[:, :, :SIDE], pictures[:, :, SIDE:])]
            sevens = [float(np.mean(half == digits.TARGET)) for half in read]
            right = [float(np.mean(half == asked)) for half in read]
            cells = "".join(f"{f'{a:.0%} {b:.0%}':>{w}}" for (a, b), w in ((sevens, 14), (right, 17)))
            print(f"{asked:>6}  {way:<18}{cells}{seconds:>9.1f}", flush=True)
            shown.append(pictures[0])
            if way in PROMISED:
                masked = 0 if way.startswith("left") else 1
                kept &= min(sevens[masked], right[1 - masked]) >= AT_LEAST
        rows.append(np.stack(shown))
    out.parent.mkdir(parents=True, exist_ok=True)
    labels = [f'"{digits.prompt(asked)}"' for asked in ASKED]
    grid(rows, labels, list(WAYS), "A LoHa that makes sevens, in half of the picture").save(out)
    print(f"\nThe pictures: {out.resolve()}")
    if not kept:
        print(f"Expected at least {AT_LEAST:.0%} of both, with the mask on either half and off.", file=sys.stderr)
    return 0 if kept else 1


def _drawing(prompt: comfyui.Json, asked: int, where: dict[str, object] | None, prefix: str) -> comfyui.Json:
    """The loader's workflow for pictures of two digits, with a region where one is wanted."""
    prompt = copy.deepcopy(prompt)
    strength = 0.0 if where is None else STRENGTH
    settings = {
        "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
        "LoHaLoader": {"lora_name": LOHA, "strength_model": strength, "strength_clip": strength, "mode": "live"},
        "EmptyLatentImage": {"batch_size": SAMPLES, "width": 2 * SIDE, "height": SIDE},
        "SaveImage": {"filename_prefix": prefix},
    }
    for node in prompt.values():
        node["inputs"] |= settings.get(node["class_type"], {})
    positive = next(node["inputs"]["positive"][0] for node in prompt.values() if node["class_type"] == "KSampler")
    prompt[positive]["inputs"]["text"] = digits.prompt(asked)
    if where:
        size = {"width": SIDE, "height": SIDE}
        prompt["black"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 2 * SIDE, "height": SIDE}}
        prompt["white"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, **size}}
        place = {"destination": ["black", 0], "source": ["white", 0], "x": where["x"], "y": 0, "operation": "add"}
        prompt["mask"] = {"class_type": "MaskComposite", "inputs": place}
        region = {"mask": ["mask", 0], "feather": 0, "text_layers": where["text_layers"]}
        prompt["region"] = {"class_type": "LoHaRegion", "inputs": region}
        for node in prompt.values():
            if node["class_type"] == "LoHaLoader":
                node["inputs"]["region"] = ["region", 0]
    return prompt


if __name__ == "__main__":
    sys.exit(main())
