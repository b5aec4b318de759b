"""ComfyUI's door to the pack. Imports cleanly without ComfyUI; the nodes are imported when ComfyUI asks for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./web"


def _share_core() -> None:
    """Make ``import loha_core`` mean the copy in this folder, once, whether or not pip installed it.

    The folder itself must not go onto sys.path: our ``nodes`` would stand beside ComfyUI's own.
    """
    if "loha_core" in sys.modules:
        return
    folder = Path(__file__).parent / "loha_core"
    spec = importlib.util.spec_from_file_location(
        "loha_core", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loha_core"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["loha_core"]
        raise


async def comfy_entrypoint() -> Any:
    """The extension object that ComfyUI 0.3.75 and later asks a custom node pack for."""
    _share_core()
    from .nodes import LoHaExtension

    return LoHaExtension()
