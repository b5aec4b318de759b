"""``loha train``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "a new LoHa: pictures in a folder, and a diffusers model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML; examples/train.toml has every key")


def run(o: argparse.Namespace) -> str:
    from ..training.diffusers.run import train  # imports much that the other commands have no use for

    return f"wrote {train(o.config)}"
