"""Arguments that several commands share, and the values that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..adapter import Adapter
from ..blocks import FAMILIES, BlockStrength
from ..formats import load_adapter
from ..naming.spelling import STYLES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_adapters(parser: argparse.ArgumentParser, name: str = "file", nargs: str | None = None) -> None:
    parser.add_argument(name, nargs=nargs, help=".safetensors/.sft file, or PEFT folder")
    parser.add_argument(
        "--legacy-tucker", action="store_true", help="rebuild both halves from t1, as LyCORIS did before October 2023"
    )


def loaded(file: str, o: argparse.Namespace) -> Adapter:
    return load_adapter(file, legacy_tucker=o.legacy_tucker)


def one_or_each(values: Sequence[float]) -> Sequence[float] | float:
    """A single number is for all files."""
    return values[0] if len(values) == 1 else values


def add_bounds(parser: argparse.ArgumentParser) -> None:
    bounds = parser.add_mutually_exclusive_group()
    bounds.add_argument("--rank", type=int, help="the rank of the result")
    bounds.add_argument("--energy", type=float, help="share of the squared norm to keep, such as 0.99")
    bounds.add_argument("--max-error", type=float, help="largest relative error, such as 0.05")


def add_blocks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", default="", help="strengths by block, such as 'IN=0.5, OUT03-OUT05=0' or a vector")
    parser.add_argument("--rules", nargs="*", default=[], help="strengths by layer name, such as 'attn2: 0.3'")
    parser.add_argument("--family", choices=FAMILIES, help="the model that the blocks are of")


def blocks(o: argparse.Namespace) -> BlockStrength | None:
    if not o.blocks and not o.rules:
        return None
    return BlockStrength.parse(o.family, o.blocks, "\n".join(o.rules))


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, help="what to write")
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, with the errors; write nothing")


def add_adapter_output(parser: argparse.ArgumentParser) -> None:
    add_output(parser)
    parser.add_argument("--format", choices=("lycoris", "peft"), default="lycoris", help="one file, or a PEFT folder")
    parser.add_argument(
        "--names",
        choices=("keep", *STYLES, "lycoris", "peft"),
        default="keep",
        help="of modules: as the (first) file spells them, or kohya's (lycoris: the same), diffusers', ComfyUI's own; "
        "peft: --format peft",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors that are written")
