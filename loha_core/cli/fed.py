"""``loha fed``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "many clients, one model: a Flower app by a configuration file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML; examples/federated.toml has every key")


def run(o: argparse.Namespace) -> str:
    from ..federated.flower.run import run  # imports much that the other commands have no use for

    return run(o.config)
