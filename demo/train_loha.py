"""Teach the base model a held-back digit: through ComfyUI, with the nodes that anybody has."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

from . import comfyui, digits, workflows

KNOWN_EACH = 40
"""Pictures of each known digit, for regularisation: they keep in memory what the model can do already."""
KNOWN_FOLDER = "loha_demo_known"
SIDE = 4
"""A digit's pixel is this many pixels wide in its picture, as the VAE wants it."""


def folder(target: int) -> str:
    """Where the pictures of a held-back digit lie in ComfyUI's input folder."""
    return f"loha_demo_{digits.WORDS[target]}"


def pairs_folder(target: int) -> str:
    """Where as many pictures lie of one held-back digit as of the other."""
    return f"loha_demo_pairs_{digits.WORDS[target]}"


def write_pictures(server: comfyui.Server) -> None:
    """Real digits as PNG with a caption beside each: two folders for each held-back digit, one for the known ones."""
    data = digits.load()[0]
    for target in digits.HELD_BACK:
        shown = data.only((target,))
        write_digits(shown, server.path("input", folder(target), ""))
        pairs = digits.Digits(shown.pictures[:KNOWN_EACH], shown.labels[:KNOWN_EACH])
        write_digits(pairs, server.path("input", pairs_folder(target), ""))
    known = [data.only((digit,)) for digit in digits.KNOWN]
    first = [digits.Digits(d.pictures[:KNOWN_EACH], d.labels[:KNOWN_EACH]) for d in known]
    every = digits.Digits(np.concatenate([d.pictures for d in first]), np.concatenate([d.labels for d in first]))
    write_digits(every, server.path("input", KNOWN_FOLDER, ""))


def without_known(prompt: comfyui.Json) -> comfyui.Json:
    """The training workflow without the pictures of what is to be kept."""
    known = next(k for k, n in prompt.items() if n["inputs"].get("folder") == KNOWN_FOLDER)
    rest = {key: node for key, node in prompt.items() if key != known}
    for node in rest.values():
        node["inputs"] = {k: v for k, v in node["inputs"].items() if not (isinstance(v, list) and v[0] == known)}
    return rest


def write_digits(data: digits.Digits, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for number, (picture, label) in enumerate(zip(data.pictures, data.labels, strict=True)):
        large = np.kron((picture * 255).round().astype(np.uint8), np.ones((SIDE, SIDE), np.uint8))
        Image.fromarray(large).convert("RGB").save(to / f"{number:04d}.png")
        (to / f"{number:04d}.txt").write_text(digits.prompt(int(label)), "utf-8")


def train(server: comfyui.Server, target: int, lora_name: str, metadata: dict[str, str]) -> None:
    """Run the training workflow in the started server; the LoHa lies in its loras folder afterwards.

    Args:
        metadata: goes into the file.
    """
    prompt = workflows.job(server, workflows.TRAIN)
    name = lora_name.removesuffix(".safetensors")
    for node in prompt.values():
        inputs = node["inputs"]
        if inputs.get("folder") == folder(digits.TARGET):
            inputs["folder"] = folder(target)
        if node["class_type"] == "CLIPTextEncode" and inputs["text"]:
            inputs["text"] = digits.prompt(target)
        if node["class_type"] == "LoHaTrainer":
            # Each begins elsewhere, as adapters of different people do.
            seed = digits.HELD_BACK[::-1].index(target)
            inputs |= {"name": name, "resume": False, "training_seed": seed}
        if node["class_type"] == "LoHaSave":
            words = {"trigger_words": digits.prompt(target), "metadata": json.dumps(metadata)}
            inputs |= {"filename": name, "overwrite": True, **words}
    print(f"Training {lora_name} by {workflows.TRAIN.stem} …")
    started = time.monotonic()
    server.queue(prompt, timeout=1800)
    print(f"Trained, saved and tried in {time.monotonic() - started:.0f} s")
