"""``loha merge``."""

from __future__ import annotations

import argparse

from ..transform import compress
from ..transform.compress import Compression
from ..transform.merge import METHODS, combination, merge
from ..transform.sparse import SIGNS
from .options import DTYPES, add_adapter_output, add_adapters, add_blocks, add_bounds, blocks, loaded, one_or_each
from .output import progress_bar, saved

HELP = "several adapters as one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapters(parser, "files", "+")
    parser.add_argument("--weights", nargs="+", type=float, default=[1.0], help="one for each file, or one for all")
    parser.add_argument("--method", choices=METHODS, default="exact")
    parser.add_argument("--factor", choices=("svd", "fit"), default="svd", help="for methods that work by elements")
    parser.add_argument("--kind", choices=compress.KINDS, default="loha", help="kind of the layers that are written")
    parser.add_argument("--density", type=float, default=0.5, help="share of the elements that pruning keeps")
    parser.add_argument("--majority-sign", choices=SIGNS, default="total")
    parser.add_argument("--seed", type=int, default=0)
    add_bounds(parser)
    add_blocks(parser)
    add_adapter_output(parser)


def run(o: argparse.Namespace) -> str:
    method = o.method if o.method in compress.METHODS else o.factor
    compression = Compression(method, o.rank, o.energy, o.max_error, o.kind, DTYPES.get(o.dtype), o.seed)
    combine = combination(o.method, o.density, o.majority_sign, o.seed)
    adapters = [loaded(file, o) for file in o.files]
    with progress_bar("merge") as progress:
        result = merge(
            adapters, one_or_each(o.weights), compression, combine=combine, blocks=blocks(o), progress=progress
        )
    return saved(result, o, o.files, is_cast=True)
