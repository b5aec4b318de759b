"""Which blocks a model has that is not loaded yet: from the header of its file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import folder_paths

from loha_core import LoHaError
from loha_core.blocks import Layout
from loha_core.models.tensor_file import TensorFile

from .blocks import spell

# ComfyUI's folders of the files that its loaders of models name.
FOLDERS = ("checkpoints", "diffusion_models")
# What a whole checkpoint's diffusion model begins with, and what it is called in ComfyUI.
_IN_FILE, _IN_MODEL = "model.diffusion_model.", "diffusion_model."


def layout_of(folder: str, name: str) -> str:
    """What `spell` writes of a model; "" where only the loaded model can tell.

    Args:
        folder: one of FOLDERS.
        name: as ComfyUI's loaders have it.

    Raises:
        LoHaError: no such file.
    """
    path = folder_paths.get_full_path(folder, name) if folder in FOLDERS and "\0" not in name else None
    if path is None:
        raise LoHaError(f"{name!r}: no such model in ComfyUI's folders; refresh the list and choose again")
    stat = Path(path).stat()
    return _layout_of(Path(path), f"{stat.st_mtime_ns}:{stat.st_size}")


@lru_cache(maxsize=64)
def _layout_of(path: Path, fingerprint: str) -> str:
    try:
        keys = list(TensorFile(path))
        within = [key.removeprefix(_IN_FILE) for key in keys if key.startswith(_IN_FILE)]
        # A bare file has nothing else.
        layout = Layout.of_keys(_IN_MODEL + key.removeprefix(_IN_MODEL) for key in within or keys)
    except LoHaError:
        return ""
    spelled = spell(layout)
    # By names that are nobody's, ComfyUI may call the model's parts otherwise.
    return "" if layout.table is None and "IN" not in dict(layout.parts) else spelled
