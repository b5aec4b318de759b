"""``loha inspect``."""

from __future__ import annotations

import argparse

from ..formats.describe import describe
from .options import add_adapters, loaded

HELP = "say what is in an adapter file or PEFT folder"
add_arguments = add_adapters


def run(o: argparse.Namespace) -> str:
    return describe(loaded(o.file, o))
