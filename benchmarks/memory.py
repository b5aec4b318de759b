"""This process's resident memory in MiB, as Linux counts it; nan where the kernel doesn't say."""

from __future__ import annotations

import ctypes
import math
from contextlib import suppress
from pathlib import Path

PROCESS = Path("/proc/self")


def resident() -> float:
    return _status("VmRSS")


def peak() -> float:
    """The most since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Hand back what was freed before, which is not what the next call will need, and count the peak from here."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def _status(name: str) -> float:
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
