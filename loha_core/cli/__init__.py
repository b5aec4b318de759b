"""``loha``: the command line, a module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import LoHaError
from ..formats.describe import printable
from . import bake, convert, extract, fed, inspect, merge, resize, train

COMMANDS = {module.__name__.rpartition(".")[2]: module for module in (
    inspect, merge, resize, convert, extract, bake, train, fed,
)}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after a LoHaError, whose text goes to stderr."""
    options = parser().parse_args(arguments)
    try:
        text = options.run(options)
    except LoHaError as error:
        print(printable(f"loha: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loha: stopped", file=sys.stderr)
        return 130
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))  # not every terminal has every letter
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; a parsed command's ``run`` does the work and returns what to print."""
    parser = argparse.ArgumentParser(prog="loha", description="LoHa adapters on the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command_parser = commands.add_parser(name, help=command.HELP)
        command.add_arguments(command_parser)
        command_parser.set_defaults(run=command.run)
    return parser
