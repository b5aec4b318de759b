"""``loha``: the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, modules
from ..blocks import FAMILIES, BlockStrength
from ..errors import LoHaError
from ..formats import load_adapter, save_adapter
from ..formats.describe import describe, printable
from ..formats.lycoris import as_one_file
from ..models.bake import apply_to_checkpoint
from ..models.extract import extract
from ..naming.readers import unread
from ..naming.spelling import STYLES
from ..transform import convert
from ..transform.compress import KINDS
from ..transform.compress import METHODS as FORMS
from ..transform.merge import METHODS, Made, Progress, merge
from ..transform.sparse import SIGNS

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ADAPTER = ".safetensors/.sft file, or PEFT folder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after a LoHaError, whose text goes to stderr."""
    parser = argparse.ArgumentParser(prog="loha", description="LoHa adapters on the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
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


# One function a command: it adds its arguments, and `run`, which does the work and returns what to print.


def _inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="say what is in an adapter file or PEFT folder")
    parser.add_argument("file", help=_ADAPTER)
    _legacy(parser)
    parser.set_defaults(run=lambda o: describe(_loaded(o.file, o)))


def _merge(commands: Any) -> None:
    parser = commands.add_parser("merge", help="several adapters as one")
    parser.add_argument("files", nargs="+", help=_ADAPTER)
    parser.add_argument("--weights", nargs="+", type=float, default=[1.0], help="one for each file, or one for all")
    parser.add_argument("--method", choices=METHODS, default="exact")
    parser.add_argument("--factor", choices=("svd", "fit"), default="svd", help="for methods that work by elements")
    parser.add_argument("--kind", choices=KINDS, default="loha", help="kind of the layers that are written")
    parser.add_argument("--density", type=float, default=0.5, help="share of the elements that pruning keeps")
    parser.add_argument("--majority-sign", choices=SIGNS, default="total")
    parser.add_argument("--seed", type=int, default=0)
    _bounds(parser)
    _block_options(parser)
    _output(parser)
    _legacy(parser)

    def run(o: argparse.Namespace) -> str:
        weights = o.weights * len(o.files) if len(o.weights) == 1 else o.weights
        adapters = [_loaded(file, o) for file in o.files]
        with _bar("merge") as progress:
            made = merge(
                adapters,
                weights,
                method=o.method,
                **_bound(o),
                factor=o.factor,
                kind=o.kind,
                density=o.density,
                majority_sign=o.majority_sign,
                blocks=_blocks(o),
                family=o.family,
                dtype=_DTYPES.get(o.dtype),
                seed=o.seed,
                progress=progress,
            )
        return _saved(made, o, o.files, cast=False)

    parser.set_defaults(run=run)


def _resize(commands: Any) -> None:
    parser = commands.add_parser("resize", help="a lower rank")
    parser.add_argument("file", help=_ADAPTER)
    parser.add_argument("--method", choices=("svd", "fit"), default="svd")
    _bounds(parser)
    _output(parser)
    _legacy(parser)

    def run(o: argparse.Namespace) -> str:
        adapter = _loaded(o.file, o)
        with _bar("resize") as progress:
            made = convert.resize(adapter, **_bound(o), method=o.method, progress=progress)
        return _saved(made, o, [o.file])

    parser.set_defaults(run=run)


def _convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="another kind, spelling, alpha or dtype; blocks written in")
    parser.add_argument("file", help=_ADAPTER)
    parser.add_argument("--to", choices=("lora", "loha"), help="the kind of its layers")
    parser.add_argument("--method", choices=FORMS, help="from LoRA: how; exact by default, svd with a bound")
    parser.add_argument(
        "--unet", choices=("keep", "diffusers", "ldm"), default="keep", help="kohya's names with whose U-Net blocks"
    )
    alpha = parser.add_mutually_exclusive_group()
    alpha.add_argument("--alpha", type=float, help="the same update with this alpha")
    alpha.add_argument("--scale", type=float, help="the same update with this alpha/rank")
    _bounds(parser)
    _block_options(parser)
    _output(parser)
    _legacy(parser)
    parser.set_defaults(run=_run_convert)


def _run_convert(o: argparse.Namespace) -> str:
    """Each step that the options ask for, in this order."""
    bound = _bound(o)
    if not o.to and (o.method or any(value is not None for value in bound.values())):
        raise LoHaError("--rank, --energy, --max-error and --method belong to --to; 'loha resize' changes ranks alone")
    steps: list[Callable[[Adapter], Made]] = []
    with _bar("convert") as progress:
        if blocks := _blocks(o):
            steps.append(lambda a: convert.bake_blocks(a, blocks, o.family))
        if o.to == "lora":
            steps.append(lambda a: convert.to_lora(a, **bound, progress=progress))
        if o.to == "loha":
            method: Any = o.method or ("svd" if any(value is not None for value in bound.values()) else "exact")
            steps.append(lambda a: convert.from_lora(a, **bound, method=method, progress=progress))
        if o.alpha is not None or o.scale is not None:
            steps.append(lambda a: convert.change_alpha(a, alpha=o.alpha, scale=o.scale))
        if o.unet != "keep":
            style = "kohya" if o.names == "keep" else o.names
            steps.append(lambda a: convert.respell(a, style, o.unet))
        made = Made(_loaded(o.file, o), convert.ErrorReport())
        reports = []
        for step in steps:
            made = step(made.adapter)
            reports.append(made.report)
    worst = max(reports, key=lambda report: report.error, default=convert.ErrorReport())
    notes = [note for report in reports for note in report.notes]
    return _saved(Made(made.adapter, convert.ErrorReport(worst.layers, notes)), o, [o.file])


def _extract(commands: Any) -> None:
    parser = commands.add_parser("extract", help="an adapter out of two checkpoints")
    parser.add_argument("base", help=".safetensors checkpoint")
    parser.add_argument("tuned", help=".safetensors checkpoint that was tuned from it")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--conv-rank", type=int, help="of convolutions; 0 leaves them out")
    parser.add_argument("--method", choices=("svd", "fit"), default="fit")
    parser.add_argument("--kind", choices=KINDS, default="loha")
    parser.add_argument("--only", help="regular expression that names must contain, such as 'attn|te_'")
    _output(parser)

    def run(o: argparse.Namespace) -> str:
        with _bar("extract") as progress:
            made = extract(
                o.base,
                o.tuned,
                rank=o.rank,
                conv_rank=o.conv_rank,
                method=o.method,
                kind=o.kind,
                only=o.only,
                dtype=_DTYPES.get(o.dtype),
                progress=progress,
            )
        return _saved(made, o, [o.base, o.tuned], cast=False)

    parser.set_defaults(run=run)


def _bake(commands: Any) -> None:
    parser = commands.add_parser("bake", help="adapters written into a checkpoint")
    parser.add_argument("checkpoint", help=".safetensors checkpoint, which stays as it is")
    parser.add_argument("files", nargs="+", help=_ADAPTER)
    parser.add_argument("--strengths", nargs="+", type=float, default=[1.0], help="one for each file, or one for all")
    _block_options(parser)
    _writing(parser)
    _legacy(parser)

    def run(o: argparse.Namespace) -> str:
        adapters = [_loaded(file, o) for file in o.files]
        strengths = o.strengths * len(adapters) if len(o.strengths) == 1 else o.strengths
        with _bar("bake") as progress:
            reports = apply_to_checkpoint(
                o.checkpoint,
                adapters,
                strengths,
                o.output,
                blocks=_blocks(o),
                overwrite=o.force,
                dry_run=o.dry_run,
                progress=progress,
            )
        text = "\n".join(report.text(limit=10) for report in reports)
        return f"{text}\n{_outcome(o)}"

    parser.set_defaults(run=run)


def _train(commands: Any) -> None:
    parser = commands.add_parser("train", help="a new LoHa: pictures in a folder, and a diffusers model")
    parser.add_argument("config", type=Path, help="TOML; examples/train.toml has every key")

    def run(o: argparse.Namespace) -> str:
        from ..training.diffusers.run import train  # imports much that the other commands have no use for

        return f"wrote {train(o.config)}"

    parser.set_defaults(run=run)


COMMANDS: list[Callable[[Any], None]] = [_inspect, _merge, _resize, _convert, _extract, _bake, _train]


def _legacy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--legacy-tucker", action="store_true", help="rebuild both halves from t1, as LyCORIS did before October 2023"
    )


def _loaded(file: str, o: argparse.Namespace) -> Adapter:
    return load_adapter(file, legacy_tucker=o.legacy_tucker)


def _bounds(parser: argparse.ArgumentParser) -> None:
    bounds = parser.add_mutually_exclusive_group()
    bounds.add_argument("--rank", type=int, help="the rank of the result")
    bounds.add_argument("--energy", type=float, help="share of the squared norm to keep, such as 0.99")
    bounds.add_argument("--max-error", type=float, help="largest relative error, such as 0.05")


def _bound(o: argparse.Namespace) -> dict[str, Any]:
    return {"rank": o.rank, "energy": o.energy, "max_error": o.max_error}


def _block_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", default="", help="strengths by block, such as 'IN=0.5, OUT03-OUT05=0' or a vector")
    parser.add_argument("--rules", nargs="*", default=[], help="strengths by layer name, such as 'attn2: 0.3'")
    parser.add_argument("--family", choices=FAMILIES, help="the model that the blocks are of")


def _blocks(o: argparse.Namespace) -> BlockStrength | None:
    if not o.blocks and not o.rules:
        return None
    return BlockStrength.parse(o.family, o.blocks, "\n".join(o.rules))


def _writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, help="what to write")
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, with the errors; write nothing")


def _output(parser: argparse.ArgumentParser) -> None:
    _writing(parser)
    parser.add_argument("--format", choices=("lycoris", "peft"), default="lycoris", help="one file, or a PEFT folder")
    parser.add_argument(
        "--names",
        choices=("keep", *STYLES, "lycoris", "peft"),
        default="keep",
        help="of modules: as the (first) file spells them, or kohya's (lycoris: the same), diffusers', ComfyUI's own; "
        "peft: --format peft",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the tensors that are written")


def _saved(made: Made, o: argparse.Namespace, inputs: Sequence[str], cast: bool = True) -> str:
    """Write what was made, unless it would go over an input or, without --force, over anything."""
    output = Path(o.output)
    if o.names == "peft":
        o.format, o.names = "peft", "diffusers"
    for name in inputs:
        if output.exists() and Path(name).exists() and os.path.samefile(output, name):
            raise LoHaError(f"{output}: is an input, which is never changed; choose another name")
    if output.exists() and not o.force:
        raise LoHaError(f"{output}: exists already; choose another name, or --force to overwrite it")
    if cast and o.dtype:
        rounded = convert.to_dtype(made.adapter, _DTYPES[o.dtype])
        worse = max(made.report, rounded.report, key=lambda report: report.error)
        made = Made(rounded.adapter, convert.ErrorReport(worse.layers, [*made.report.notes, *rounded.report.notes]))
    made = Made(_spelled(made.adapter, o), made.report)
    if o.format == "lycoris" and (warning := unread(modules(made.adapter))):
        print(printable(f"loha: {warning}; --names kohya has names that both know"), file=sys.stderr)
    if not o.dry_run:
        save_adapter(made.adapter, output, format=o.format)
    return "\n".join([describe(made.adapter), *made.report.lines(), _outcome(o)])


def _spelled(adapter: Adapter, o: argparse.Namespace) -> Adapter:
    """With the names that will be in the file."""
    if o.format == "peft":
        if o.names not in ("keep", "diffusers"):
            raise LoHaError(f"--names {o.names}: PEFT's folders have the dotted names of diffusers; leave it out")
        return convert.to_peft(adapter).adapter
    adapter = as_one_file(adapter)
    return adapter if o.names == "keep" else convert.respell(adapter, o.names).adapter


def _outcome(o: argparse.Namespace) -> str:
    return f"dry run: {o.output} was not written" if o.dry_run else f"wrote {o.output}"


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress bar on stderr: tqdm's where it is installed, else a line for every percent."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _Lines(title)
        return
    with tqdm(desc=title, unit="layer", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.n = done
            bar.refresh()

        yield progress


class _Lines:
    """Progress in plain lines."""

    def __init__(self, title: str) -> None:
        self.title, self.last = title, -1

    def __call__(self, done: int, total: int, name: str) -> None:
        percent = 100 * done // max(1, total)
        if sys.stderr.isatty() and percent > self.last:
            print(f"{self.title}: {percent} %", file=sys.stderr)
            self.last = percent
