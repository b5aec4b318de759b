"""Make the demo's files, a checkpoint, pictures and LoHas, unless they are there and up to date."""

import hashlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from . import digits, train_loha, workflows
from .comfyui import ComfyUIError, Server, find, importable
from .workflows import CHECKPOINT, LOHA

__all__ = ["BASE", "CHECKPOINT", "HERE", "LOHA", "is_made", "made_from", "served", "train_lohas", "write_files"]

HERE = Path(__file__).parent
BASE = HERE / "base.safetensors"
_MADE_FROM = "demo_made_from"


def served(run: Callable[[Server], int], *write: Callable[[Server], None]) -> int:
    """What ``run`` returns of a started server that has the demo's files and those of ``write``; 2 if it fails."""
    try:
        server = Server(find())
        for each in (write_files, *write):
            each(server)
        with server:
            return run(server)
    except ComfyUIError as error:
        print(f"\nThe demo cannot go on: {error}", file=sys.stderr)
        return 2


def write_files(server: Server) -> None:
    """Put the checkpoint and the pictures to learn from where the (not yet started) server looks for them."""
    checkpoint = server.path("models", "checkpoints", CHECKPOINT)
    made = made_from(HERE / "model.py", BASE)
    if not is_made(checkpoint, made):
        importable()
        logging.getLogger().setLevel(logging.ERROR)  # ComfyUI warns of parts of it that are not used here
        from . import model  # it needs ComfyUI on the path

        print(f"Writing the checkpoint {checkpoint.name} …")
        model.save_checkpoint(model.load_int8(BASE), checkpoint, made)
    train_loha.write_pictures(server)


def train_lohas(server: Server, *targets: int) -> list[str]:
    """A LoHa for each of the digits, trained in the started server unless it is there already; their file names."""
    made = made_from(
        HERE / "model.py", BASE, HERE / "digits.py", HERE / "train_loha.py", HERE / "workflows.py", workflows.TRAIN
    )
    names = []
    for target in targets:
        names.append(f"loha_demo_{digits.WORDS[target]}.safetensors")
        if not is_made(server.path("models", "loras", names[-1]), made):
            train_loha.train(server, target, names[-1], made)
    return names


def made_from(*paths: Path) -> dict[str, str]:
    """Metadata for a file that is made anew when one of these changes."""
    return {_MADE_FROM: hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()}


def is_made(path: Path, made: dict[str, str]) -> bool:
    """Whether the file is there, with this metadata."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return made.items() <= (file.metadata() or {}).items()
