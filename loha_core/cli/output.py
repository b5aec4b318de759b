"""What commands write: adapters into files, progress and warnings to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..adapter import Adapter, module_names
from ..errors import LoHaError, about
from ..formats import save_adapter
from ..formats.describe import describe, printable
from ..formats.lycoris import as_one_file
from ..naming.readers import unread
from ..transform.convert import convert
from ..transform.report import Progress, Result
from .options import DTYPES


def saved(result: Result, o: argparse.Namespace, inputs: Sequence[str], *, is_cast: bool = False) -> str:
    """Write the result under the names and in the dtype of the options; what to print about it.

    Args:
        inputs: files and folders that are never written over.
        is_cast: whether the result has its dtype already.

    Raises:
        LoHaError: the output is an input, or exists without --force.
    """
    _check_output(Path(o.output), inputs, o.force)
    is_peft = "peft" in (o.format, o.names)
    result = result.then(
        lambda adapter: _as_written(adapter, is_peft, o.names, None if is_cast else DTYPES.get(o.dtype))
    )
    if not is_peft and (warning := unread(module_names(result.adapter))):
        print(printable(f"loha: {warning}; --names kohya has names that both know"), file=sys.stderr)
    if not o.dry_run:
        save_adapter(result.adapter, o.output, format="peft" if is_peft else "lycoris")
    return "\n".join([describe(result.adapter), *result.report.lines(), outcome(o)])


def _check_output(output: Path, inputs: Sequence[str], overwrite: bool) -> None:
    if not output.exists():
        return
    with about(output):
        if any(Path(name).exists() and os.path.samefile(output, name) for name in inputs):
            raise LoHaError("is an input, which is never changed; choose another name")
        if not overwrite:
            raise LoHaError("exists already; choose another name, or --force to overwrite it")


def _as_written(adapter: Adapter, is_peft: bool, names: str, dtype: torch.dtype | None) -> Result:
    """With the names and the dtype of the file."""
    if not is_peft:
        return convert(as_one_file(adapter), dtype=dtype, names=names)
    if names not in ("keep", "diffusers", "peft"):
        raise LoHaError(f"--names {names}: PEFT's folders have the dotted names of diffusers; leave it out")
    return convert(adapter, dtype=dtype, names="peft")


def outcome(o: argparse.Namespace) -> str:
    return f"dry run: {o.output} was not written" if o.dry_run else f"wrote {o.output}"


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """tqdm's progress bar on stderr, where it is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done, total, name: None
        return
    with tqdm(desc=title, unit="layer", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.n = done
            bar.refresh()

        yield progress
