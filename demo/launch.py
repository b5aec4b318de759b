"""Run a ComfyUI's main.py: `python launch.py <ComfyUI folder> [its arguments]`.

Beside a CPU build of torch, torchvision's compiled operators don't load, and `import torchvision`
fails on the two whose shape functions it registers. ComfyUI only needs the import to work, so
their names are declared first.
"""

import os
import runpy
import sys
from pathlib import Path


def declare_torchvision_operators() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms`, unless torchvision brings its own.

    Call it before anything imports torchvision.
    """
    import torch

    if torch.version.cuda or torch.version.hip:
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    declare_torchvision_operators()
    # As `python main.py` would have it. Our own folder must not stay on the path.
    sys.path[0] = str(folder)
    sys.argv = [str(folder / "main.py"), *sys.argv[2:]]
    os.chdir(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
