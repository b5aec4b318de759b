"""A run of `loha train` on each of `reduced_families.PIPELINES`. As a program, for tests where there is no diffusers:

.venv-peers/bin/python -m tests.core.trained FOLDER FAMILY …     # writes FOLDER/FAMILY/out/mine.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from loha_core.training.diffusers import run

from . import pipelines

TABLES: dict[str, dict[str, Any]] = {
    "model": {"path": "model", "dtype": "bf16"},
    "data": {"folder": "pictures", "resolution": 32, "step": 16},
    "network": {"r": 2, "alpha": 2.0},
    "optimizer": {"lr": 0.01, "schedule": "constant"},
    "training": {"steps": 2, "batch_size": 2, "gradient_checkpointing": True},
    "output": {"folder": "out", "name": "mine"},
}


def train(root: Path, family: str, **changes: dict[str, Any]) -> Path:
    """Train the family's pipeline in a folder with changes to TABLES; the adapter's file."""
    if not (root / "model").exists():
        pipelines.build(family).save_pretrained(root / "model")
        (root / "pictures").mkdir(parents=True)
        for number, caption in enumerate(("a cat", "two dogs, old")):
            shades = Image.linear_gradient("L").rotate(90 * number).resize((48, 32))
            shades.convert("RGB").save(root / "pictures" / f"{number}.png")
            (root / "pictures" / f"{number}.txt").write_text(caption)
    lines = []
    for name, table in TABLES.items():
        values = table | changes.get(name, {})
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (root / "config.toml").write_text("\n".join(lines), "utf-8")
    return run.train(root / "config.toml")


if __name__ == "__main__":
    folder, *families = sys.argv[1:]
    for each in families:
        train(Path(folder) / each, each)
