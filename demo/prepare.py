"""Make the demo's two files, a checkpoint and a LoHa, unless they are there and up to date."""

import hashlib
import logging
from pathlib import Path

from safetensors import safe_open

from . import digits
from .comfyui import Server, importable

HERE = Path(__file__).parent
BASE = HERE / "base.safetensors"
CHECKPOINT = "loha_demo_digits.safetensors"
LOHA = f"loha_demo_{digits.WORDS[digits.TARGET]}.safetensors"
_MADE_FROM = "demo_made_from"


def prepare(server: Server) -> tuple[Path, Path]:
    """Put checkpoint and LoHa where the (not yet started) server looks for them; returns both paths.

    Takes about a minute the first time. A file is made again when the code or the weights that
    it was made from have changed.
    """
    checkpoint = server.path("models", "checkpoints", CHECKPOINT)
    loha = server.path("models", "loras", LOHA)
    checkpoint_key = _digest("model.py", BASE.name)
    loha_key = _digest("model.py", BASE.name, "digits.py", "train_base.py", "train_loha.py")
    stale_checkpoint, stale_loha = _made_from(checkpoint) != checkpoint_key, _made_from(loha) != loha_key
    if stale_checkpoint or stale_loha:
        importable()
        logging.getLogger().setLevel(logging.ERROR)  # ComfyUI warns of parts of it that are not used here
        from . import model, train_loha  # they need ComfyUI on the path

        weights = model.load_int8(BASE)
        if stale_checkpoint:
            print(f"Writing the checkpoint {checkpoint.name} …")
            model.save_checkpoint(weights, checkpoint, {_MADE_FROM: checkpoint_key})
        if stale_loha:
            print(f"Training the LoHa {loha.name} …")
            train_loha.train(weights, digits.TARGET, loha, {_MADE_FROM: loha_key})
    return checkpoint, loha


def _digest(*names: str) -> str:
    """A hash over files of this folder."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in names)).hexdigest()


def _made_from(path: Path) -> str | None:
    """The digest that was written into a file when it was made."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_MADE_FROM)
