"""``loha extract``."""

from __future__ import annotations

import argparse

from ..models.extract import extract
from ..transform.compress import KINDS
from .options import DTYPES, add_adapter_output
from .output import progress_bar, saved

HELP = "an adapter out of two checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help=".safetensors checkpoint")
    parser.add_argument("tuned", help=".safetensors checkpoint that was tuned from it")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--conv-rank", type=int, help="of convolutions; 0 leaves them out")
    parser.add_argument("--method", choices=("svd", "fit"), default="fit")
    parser.add_argument("--kind", choices=KINDS, default="loha")
    parser.add_argument("--only", help="regular expression that names must contain, such as 'attn|te_'")
    add_adapter_output(parser)


def run(o: argparse.Namespace) -> str:
    with progress_bar("extract") as progress:
        result = extract(
            o.base,
            o.tuned,
            rank=o.rank,
            conv_rank=o.conv_rank,
            method=o.method,
            kind=o.kind,
            only=o.only,
            dtype=DTYPES.get(o.dtype),
            progress=progress,
        )
    return saved(result, o, [o.base, o.tuned], is_cast=True)
