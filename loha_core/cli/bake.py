"""``loha bake``."""

from __future__ import annotations

import argparse

from ..models.bake import apply_to_checkpoint
from .options import add_adapters, add_blocks, add_output, blocks, loaded, one_or_each
from .output import outcome, progress_bar

HELP = "adapters written into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=".safetensors checkpoint, which stays as it is")
    add_adapters(parser, "files", "+")
    parser.add_argument("--strengths", nargs="+", type=float, default=[1.0], help="one for each file, or one for all")
    add_blocks(parser)
    add_output(parser)


def run(o: argparse.Namespace) -> str:
    adapters = [loaded(file, o) for file in o.files]
    with progress_bar("bake") as progress:
        reports = apply_to_checkpoint(
            o.checkpoint,
            adapters,
            one_or_each(o.strengths),
            o.output,
            blocks=blocks(o),
            overwrite=o.force,
            dry_run=o.dry_run,
            progress=progress,
        )
    return "\n".join([*(report.text(limit=10) for report in reports), outcome(o)])
