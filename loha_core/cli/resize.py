"""``loha resize``."""

from __future__ import annotations

import argparse

from ..transform.compress import Compression
from ..transform.convert import resize
from .options import add_adapter_output, add_adapters, add_bounds, loaded
from .output import progress_bar, saved

HELP = "a lower rank"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapters(parser)
    parser.add_argument("--method", choices=("svd", "fit"), default="svd")
    add_bounds(parser)
    add_adapter_output(parser)


def run(o: argparse.Namespace) -> str:
    compression = Compression(o.method, o.rank, o.energy, o.max_error)
    adapter = loaded(o.file, o)
    with progress_bar("resize") as progress:
        result = resize(adapter, compression, progress=progress)
    return saved(result, o, [o.file])
