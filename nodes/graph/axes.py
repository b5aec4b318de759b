"""The axes of a grid, as people write them: strengths, adapters, and blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import folder_paths

from loha_core import Adapter, LoHaError, load_adapter
from loha_core.blocks import PRESETS, BlockStrength
from loha_core.errors import about, check_number

from ..host import files
from .strength import shorten
from .trainer import FOLDER

MAX_STRENGTHS = 100
EXAMPLE = "0, 0.5, 1 or -1…1 x 8"
_NUMBER = r"[-+−]?\d*[.]?\d+(?:e[-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*(?:…|\.\.\.?|to)\s*({_NUMBER})\s*[x×*]\s*(\d+)", re.IGNORECASE)
_STEP = re.compile(r"step_(\d+)")


def strengths(text: str) -> list[float]:
    """'0, 0.5, 1' or '-1…1 x 5', which is -1, -0.5, 0, 0.5, 1; both may be mixed.

    Raises:
        LoHaError: says what cannot be read, and what to write.
    """
    found: list[float] = []
    for entry in filter(None, map(str.strip, re.split(r"[,;\n]", text))):
        if match := _RANGE.fullmatch(entry):
            count = int(match[3][:9])
            if not 2 <= count <= MAX_STRENGTHS:
                raise LoHaError(f"strengths: {entry!r} asks for {match[3]}; expected 2 to {MAX_STRENGTHS} of a range")
            first, last = _number(match[1]), _number(match[2])
            found += [round(first + (last - first) * n / (count - 1), 10) for n in range(count)]
        else:
            found.append(_number(entry))
    if not 1 <= len(found) <= MAX_STRENGTHS:
        raise LoHaError(f"strengths has {len(found)} numbers; write 1 to {MAX_STRENGTHS}, such as {EXAMPLE}")
    return found


def _number(text: str) -> float:
    try:
        value = float(text.replace("−", "-"))
    except ValueError:
        raise LoHaError(f"strengths: cannot read {text!r:.80}; write numbers or a range, such as {EXAMPLE}") from None
    check_number("strengths", value)
    return value


def adapters(connected: Iterable[Adapter], names: str, run: str) -> list[tuple[str, Adapter]]:
    """Label and adapter: the connected ones, files of the loras folder by line, and what a training run saved.

    Raises:
        LoHaError: there is none, or one of them is not there.
    """
    found = [(Path(adapter.source).stem or "loha", adapter) for adapter in connected]
    found += [(Path(name).stem, files.load(name)) for name in lines(names)]
    for label, path in saved_steps(run):
        found.append((label, load_adapter(path)))
        found[-1][1].source = f"{run.strip()}, {label}"
    if not found:
        raise LoHaError("there is no adapter to try: connect loha_1, or name files or a run")
    labels = [label for label, _ in found]
    return [
        (f"{label} ({labels[:place].count(label) + 1})" if labels.count(label) > 1 else label, adapter)
        for place, (label, adapter) in enumerate(found)
    ]


def saved_steps(run: str) -> list[tuple[str, Path]]:
    """Label and file of the adapters that Train LoHa saved under a name, in the order of their steps; '' has none.

    Raises:
        LoHaError: no run of that name has saved any.
    """
    name = run.strip()
    if not name:
        return []
    root = Path(folder_paths.get_output_directory(), FOLDER).resolve()
    folder = root / name if Path(name).name == name and "\0" not in name else root
    if folder.resolve().parent != root or not folder.is_dir():
        runs = sorted(path.name for path in root.glob("*") if path.is_dir())
        there = f"there are {shorten(', '.join(runs))}" if runs else "there is none yet: Train LoHa makes them"
        raise LoHaError(f"run is {name!r:.80}, and output/{FOLDER} has no such folder; {there}")
    found = ((path, _STEP.fullmatch(path.stem)) for path in sorted(folder.glob("*.safetensors")))
    steps = [(f"step {int(match[1])}", path) for path, match in found if match]
    last = folder / f"{name}.safetensors"
    steps += [("end", last)] if last.is_file() else []
    if any(path.is_symlink() for _, path in steps):
        raise LoHaError(f"run {name!r}: a saved step is a link to a file elsewhere; put the file in its place")
    if not steps:
        raise LoHaError(f"run {name!r} has saved no adapter yet; set save_every in Train LoHa, or let it end")
    return steps


def blocks(model: Any, text: str, connected: Sequence[BlockStrength]) -> list[tuple[str, BlockStrength | None]]:
    """Label and strengths by block: a line each of a preset's name, a vector or named blocks, then the connected ones.

    A line may begin with a name and a colon. Without any, all blocks are at 1.

    Raises:
        LoHaError: says which line cannot be understood.
    """
    found: list[tuple[str, BlockStrength | None]] = []
    keys = list(model.model.state_dict()) if text.strip() else []
    for line in lines(text):
        label, _, setting = line.rpartition(":")
        is_preset = setting.strip().upper() in PRESETS
        with about(f"block_settings, line {line!r:.80}"):
            if is_preset:
                strength = BlockStrength.parse(keys, preset=setting.strip().upper())
            else:
                strength = BlockStrength.parse(keys, setting)
        found.append((label.strip() or shorten(setting.strip()), strength))
    found += [(f"blocks {number}", strength) for number, strength in enumerate(connected, 1)]
    return found or [("", None)]


def lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]


def fingerprint(names: str, run: str) -> str:
    """Changes when one of the files does."""
    saved = (path.stat() for _, path in saved_steps(run))
    return "|".join([*map(files.fingerprint, lines(names)), *(f"{s.st_mtime_ns}:{s.st_size}" for s in saved)])
