"""Configuration files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import LoHaError


def read_toml(path: Path) -> dict[str, Any]:
    """A file's tables.

    Raises:
        LoHaError: it is not there or no TOML, or Python 3.10 lacks tomli; ``about`` names the file.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise LoHaError("reading TOML needs tomli on Python 3.10: pip install 'comfyui-loha[train]'") from None
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LoHaError(f"cannot be read as TOML ({error})") from None
