"""``loha``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .describe import describe, printable
from .errors import LoHaError
from .formats import load_adapter


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after a LoHaError, whose text goes to stderr."""
    parser = argparse.ArgumentParser(prog="loha", description="LoHa adapters on the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what is in an adapter file or PEFT folder")
    inspect.add_argument("file", help=".safetensors/.sft file, or PEFT folder")
    inspect.add_argument(
        "--legacy-tucker", action="store_true", help="rebuild both halves from t1, as LyCORIS did before October 2023"
    )
    options = parser.parse_args(arguments)
    try:
        text = describe(load_adapter(options.file, legacy_tucker=options.legacy_tucker))
    except LoHaError as error:
        print(printable(f"loha: {error}"), file=sys.stderr)
        return 1
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))  # not every terminal has every letter
    return 0
