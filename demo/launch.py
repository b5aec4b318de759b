"""Run a ComfyUI's main.py: `python launch.py <ComfyUI folder> [its arguments]`.

ComfyUI imports torchvision and torchaudio at its start, and nothing here calls them. Beside a CPU build of torch
their compiled parts don't load, so what the imports need is declared first.
"""

import importlib.util
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def let_comfyui_import() -> None:
    """Make `import torchvision` and `import torchaudio` work. Call it before anything imports ComfyUI."""
    declare_torchvision_operators()
    stand_in_for_torchaudio()


def declare_torchvision_operators() -> None:
    """Declare the two operators whose shape functions torchvision registers, unless it brings its own."""
    import torch

    if torch.version.cuda or torch.version.hip:
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def stand_in_for_torchaudio() -> None:
    """An empty torchaudio where there is none: ComfyUI 0.33 does not start without."""
    if importlib.util.find_spec("torchaudio"):
        return
    for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    let_comfyui_import()
    # As `python main.py` would have it. Our own folder must not stay on the path.
    sys.path[0] = str(folder)
    sys.argv = [str(folder / "main.py"), *sys.argv[2:]]
    os.chdir(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
