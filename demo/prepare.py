"""Make the demo's files, a checkpoint, pictures and LoHas, unless they are there and up to date."""

import hashlib
import logging
from pathlib import Path

from safetensors import safe_open

from . import digits, train_loha, workflows
from .comfyui import Server, importable
from .workflows import CHECKPOINT, LOHA

__all__ = ["BASE", "CHECKPOINT", "LOHA", "train_lohas", "write_files"]

HERE = Path(__file__).parent
BASE = HERE / "base.safetensors"
_MADE_FROM = "demo_made_from"


def write_files(server: Server) -> None:
    """Put the checkpoint and the pictures to learn from where the (not yet started) server looks for them."""
    checkpoint = server.path("models", "checkpoints", CHECKPOINT)
    key = _digest(HERE / "model.py", BASE)
    if _made_from(checkpoint) != key:
        importable()
        logging.getLogger().setLevel(logging.ERROR)  # ComfyUI warns of parts of it that are not used here
        from . import model  # it needs ComfyUI on the path

        print(f"Writing the checkpoint {checkpoint.name} …")
        model.save_checkpoint(model.load_int8(BASE), checkpoint, {_MADE_FROM: key})
    train_loha.write_pictures(server)


def train_lohas(server: Server, *targets: int) -> list[str]:
    """A LoHa for each of the digits, trained in the started server unless it is there already; their file names."""
    key = _digest(
        HERE / "model.py", BASE, HERE / "digits.py", HERE / "train_loha.py", HERE / "workflows.py", workflows.TRAIN
    )
    names = []
    for target in targets:
        names.append(f"loha_demo_{digits.WORDS[target]}.safetensors")
        if _made_from(server.path("models", "loras", names[-1])) != key:
            train_loha.train(server, target, names[-1], {_MADE_FROM: key})
    return names


def _digest(*paths: Path) -> str:
    """A hash over files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _made_from(path: Path) -> str | None:
    """The digest that was written into a file when it was made."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_MADE_FROM)
