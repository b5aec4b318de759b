"""Pictures by LoHa Grid: the example workflow of grids on the demo's model, asked for a digit."""

from typing import Any

import numpy as np

from . import comfyui, digits
from .workflows import CHECKPOINT, GRID, Values, job


def every_picture(server: comfyui.Server, digit: int, batch: int, **grid: Any) -> np.ndarray:
    """With these inputs of LoHa Grid and so many seeds, row by row of the plan: (n, h, w, 3) uint8."""
    prompt = _drawing(server, digit, batch, grid)
    decoded = next(key for key, node in prompt.items() if node["class_type"] == "VAEDecode")
    saved = next(node for node in prompt.values() if node["class_type"] == "SaveImage")
    saved["inputs"]["images"] = [decoded, 0]
    prompt = {key: node for key, node in prompt.items() if node["class_type"] != "LoHaGridImage"}
    return server.images(server.queue(prompt, timeout=1800))


def labelled(server: comfyui.Server, digit: int, batch: int, **grid: Any) -> np.ndarray:
    """The same as one labelled picture, of LoHa Grid Image: (h, w, 3) uint8."""
    prompt = _drawing(server, digit, batch, grid)
    outputs = server.queue(prompt)["outputs"]
    [picture] = server.images({"outputs": {k: o for k, o in outputs.items() if prompt[k]["class_type"] == "SaveImage"}})
    return picture


def _drawing(server: comfyui.Server, digit: int, batch: int, grid: dict[str, Any]) -> comfyui.Json:
    settings: Values = {
        "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
        "EmptyLatentImage": {"batch_size": batch},
        "LoHaGrid": grid,
    }
    prompt = job(server, GRID, settings)
    positive = next(node["inputs"]["positive"][0] for node in prompt.values() if node["class_type"] == "KSampler")
    prompt[positive]["inputs"]["text"] = digits.prompt(digit)
    return prompt
