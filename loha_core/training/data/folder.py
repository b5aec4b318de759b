"""Pictures with captions in a folder, as trainers on the command line take them. Needs Pillow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import LoHaError

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTIONS = (".txt", ".caption")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Entry:
    """A picture in a folder, not read yet.

    Attributes:
        path: where it is.
        name: its path inside the folder, for messages.
        caption: what it shows.
        mask: a picture of the same size, white where it is learned; None: all of it is.
        repeats: how often it is seen in an epoch.
    """

    path: Path
    name: str
    caption: str
    mask: Path | None = None
    repeats: int = 1

    def load(self) -> tuple[Tensor, Tensor | None]:
        """The picture (h, w, 3) and its mask (h, w), float32 in 0…1.

        The orientation that a camera noted is applied, and transparent places are white.

        Raises:
            LoHaError: one of the files is broken, or the mask has another size.
        """
        picture = _read(self.path, _rgb)
        if self.mask is None:
            return picture, None
        mask = _read(self.mask, _grey)
        if mask.shape != picture.shape[:2]:
            raise LoHaError(
                f"{self.mask}: the mask has {mask.shape[1]}×{mask.shape[0]} pixels, its picture {self.name} "
                f"{picture.shape[1]}×{picture.shape[0]}; they must be alike"
            )
        return picture, mask


def read_folder(folder: Path, masks: Path | None = None) -> list[Entry]:
    """The pictures in a folder and in the folders inside it, in the order of their names.

    ``cat.png`` has its caption in ``cat.txt``, ``cat.caption``, ``cat.png.txt`` or ``cat.png.caption``; capitals in
    these suffixes don't matter. Pictures in a folder named ``10_name`` are seen ten times in an epoch, and ``name`` is
    the caption of those that have none.

    Args:
        folder: where to look. Hidden files and folders are passed over.
        masks: a folder in which masks lie at the same places under the same names, with any suffix of a picture.

    Raises:
        LoHaError: there is no such folder or no picture in it, a file is no picture or not UTF-8, a picture has two
            captions that differ, a mask is missing for some pictures only, or Pillow is not installed.
    """
    for place in (folder, masks):
        if place is not None and not place.is_dir():
            raise LoHaError(f"{place}: there is no such folder")
    files = sorted(folder.rglob("*"))
    paths = [path for path in files if _is_picture(path, folder, masks)]
    if not paths:
        raise LoHaError(f"{folder}: there is no picture in it; these are read: {', '.join(SUFFIXES)}")
    # By what they are captions of: a picture, or a picture less its suffix.
    captions: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in CAPTIONS and path.is_file():
            captions[path.with_suffix("")].append(path)
    entries = [_entry(path, folder, masks, captions) for path in paths]
    without = [entry.name for entry in entries if entry.mask is None]
    if masks is not None and without:
        raise LoHaError(f"{masks}: no mask for {without[0]} and {len(without) - 1} more; make a white one to learn all")
    return entries


def _is_picture(path: Path, folder: Path, masks: Path | None) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    is_mask = masks is not None and masks != folder and masks in path.parents
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden and not is_mask


def _entry(path: Path, folder: Path, masks: Path | None, captions: Mapping[Path, list[Path]]) -> Entry:
    inside = path.relative_to(folder)
    numbered = re.fullmatch(r"(\d+)_(.*)", path.parent.name) if path.parent != folder else None
    repeats = int(numbered[1]) if numbered else 1
    if repeats < 1:
        raise LoHaError(f"{path.parent}: the name asks for 0 repeats; move the folder elsewhere to leave it out")
    caption = _caption(path, [*captions.get(path.with_suffix(""), ()), *captions.get(path, ())])
    if caption is None:
        caption = numbered[2] if numbered else ""
    _read(path, _head)
    mask = None
    if masks is not None:
        places = ((masks / inside).with_suffix(suffix) for suffix in SUFFIXES)
        mask = next((place for place in places if place.is_file()), None)
    return Entry(path, inside.as_posix(), caption, mask, repeats)


def _caption(picture: Path, files: list[Path]) -> str | None:
    """What the files beside a picture say; None where there are none."""
    said: dict[str, Path] = {}
    for file in files:
        try:
            said.setdefault(file.read_text("utf-8-sig").strip(), file)
        except (OSError, UnicodeDecodeError) as error:
            raise LoHaError(f"{file}: cannot be read as UTF-8 text ({error}); save it anew") from None
    if len(said) > 1:
        where = " and ".join(file.name for file in said.values())
        raise LoHaError(f"{picture}: has captions that differ, in {where}; keep the one that is meant")
    return next(iter(said), None)


def without_caption(entries: list[Entry]) -> str | None:
    """What to say of a folder in which most pictures have no caption, or None."""
    silent = [entry.name for entry in entries if not entry.caption]
    if 2 * len(silent) <= len(entries):
        return None
    return (
        f"{len(silent)} of {len(entries)} pictures have no caption ({silent[0]}, …) and are trained on an empty one; "
        f"captions lie beside them, as cat.txt or cat.caption for cat.png"
    )


# --- Pillow -------------------------------------------------------------------------------------


def _read(path: Path, convert: Callable[[Image], Tensor]) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise LoHaError("reading pictures needs Pillow: pip install 'comfyui-loha[train]'") from None
    try:
        with Image.open(path) as opened:
            return convert(opened if convert is _head else ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LoHaError(f"{path}: cannot be read as a picture ({error}); replace it or take it out") from None


def _head(image: Image) -> Tensor:
    """Nothing more than Pillow reads to know what it has: enough to stop early at what is no picture."""
    return torch.tensor(image.size)


def _rgb(image: Image) -> Tensor:
    if image.mode.startswith("I"):
        return _grey(image)[:, :, None].expand(-1, -1, 3)
    if not image.has_transparency_data:
        return _bytes(image.convert("RGB"), 3)
    color, alpha = _bytes(image.convert("RGBA"), 4).split([3, 1], dim=-1)
    return color * alpha + (1 - alpha)


def _grey(image: Image) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        wide = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
        return wide.reshape(image.height, image.width).float().div(65535).clamp(0, 1)
    return _bytes(image.convert("L"), 1)[:, :, 0]


def _bytes(image: Image, channels: int) -> Tensor:
    found = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return found.reshape(image.height, image.width, channels).float().div(255)
