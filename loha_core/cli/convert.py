"""``loha convert``."""

from __future__ import annotations

import argparse

from ..errors import LoHaError
from ..transform.compress import KINDS, METHODS, Compression, Method
from ..transform.convert import convert
from .options import add_adapter_output, add_adapters, add_blocks, add_bounds, blocks, loaded
from .output import progress_bar, saved

HELP = "another kind, spelling, alpha or dtype; blocks written in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapters(parser)
    parser.add_argument("--to", choices=KINDS, help="the kind of its layers")
    parser.add_argument("--method", choices=METHODS, help="from LoRA: how; exact by default, svd with a bound")
    parser.add_argument(
        "--unet", choices=("keep", "diffusers", "ldm"), default="keep", help="kohya's names with whose U-Net blocks"
    )
    alpha = parser.add_mutually_exclusive_group()
    alpha.add_argument("--alpha", type=float, help="the same update with this alpha")
    alpha.add_argument("--scale", type=float, help="the same update with this alpha/rank")
    add_bounds(parser)
    add_blocks(parser)
    add_adapter_output(parser)


def run(o: argparse.Namespace) -> str:
    style = "kohya" if o.unet != "keep" and o.names == "keep" else o.names
    with progress_bar("convert") as progress:
        result = convert(
            loaded(o.file, o),
            blocks=blocks(o),
            compression=_compression(o),
            alpha=o.alpha,
            scale=o.scale,
            names=style if o.unet != "keep" else "keep",
            unet=o.unet,
            progress=progress,
        )
    return saved(result, o, [o.file])


def _compression(o: argparse.Namespace) -> Compression | None:
    has_bound = any(bound is not None for bound in (o.rank, o.energy, o.max_error))
    if o.to:
        method: Method = "svd" if has_bound else "exact"
        if o.method and o.to == "loha":
            method = o.method
        return Compression(method, o.rank, o.energy, o.max_error, o.to)
    if o.method or has_bound:
        raise LoHaError("--rank, --energy, --max-error and --method belong to --to; 'loha resize' changes ranks alone")
    return None
