"""A picture of a data set: what training will see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

from .charts import FAINT, INK, NEGATIVE, PANEL, Canvas, ramp

# Pictures on the sheet; the others are counted.
MAX_SHOWN = 40
COLUMNS, THUMB, GAP, TOP, LINE, CAPTION_LINES = 8, 150, 14, 60, 15, 3
CELL = THUMB + 10 + LINE * (1 + CAPTION_LINES) + GAP


@dataclass(frozen=True)
class Shown:
    """One picture on the sheet.

    Args:
        picture: (h, w, 3) in 0…1, as it is seen after cropping.
        caption: as it is seen, when nothing of it is shuffled or dropped.
        marks: its size and what else sets it apart, such as "10 times" or "flip".
        mask: (h, w) in 0…1; what is not learned is shown darker.
        regularisation: framed in another colour.
    """

    picture: Tensor
    caption: str
    marks: Sequence[str]
    mask: Tensor | None = None
    regularisation: bool = False


def contact_sheet(title: str, subtitle: str, shown: Sequence[Shown], more: int) -> Tensor:
    """Thumbnails with captions, and how many more there are: (1, height, width, 3) float32 in 0…1."""
    columns = min(COLUMNS, max(3, len(shown)))
    bottom = TOP + CELL * ceil(len(shown) / columns)
    canvas = Canvas(GAP + (THUMB + GAP) * columns, bottom + (24 if more > 0 else 0), title, subtitle)
    for place, entry in enumerate(shown):
        row, column = divmod(place, columns)
        _cell(canvas, entry, GAP + (THUMB + GAP) * column, TOP + CELL * row)
    if more > 0:
        canvas.text((GAP, bottom), f"… and {more} more", FAINT)
    return canvas.image()


def _cell(canvas: Canvas, entry: Shown, left: int, top: int) -> None:
    canvas.draw.rectangle((left, top, left + THUMB - 1, top + THUMB - 1), PANEL)
    picture = entry.picture if entry.mask is None else entry.picture * (0.2 + 0.8 * entry.mask[:, :, None])
    thumb = thumbnail(picture, THUMB)
    canvas.picture.paste(thumb, (left + (THUMB - thumb.width) // 2, top + (THUMB - thumb.height) // 2))
    if entry.regularisation:
        canvas.draw.rectangle((left - 2, top - 2, left + THUMB + 1, top + THUMB + 1), outline=NEGATIVE, width=2)
    text_top = top + THUMB + 6
    canvas.text((left, text_top), ", ".join(entry.marks), NEGATIVE if entry.regularisation else ramp(0.75), size=11)
    for number, line in enumerate(_wrapped(canvas, entry.caption or "(no caption)"), 1):
        canvas.text((left, text_top + LINE * number), line, INK if entry.caption else FAINT, size=11)


def thumbnail(picture: Tensor, size: int) -> Image.Image:
    """A picture (h, w, 3) in 0…1 with its longer side as long as ``size``."""
    image = Image.fromarray((picture.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8))
    scale = size / max(image.size)
    # Enlarged pixels stay pixels: a small picture looks like one.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)


def _wrapped(canvas: Canvas, text: str) -> list[str]:
    """Lines as wide as a thumbnail; what does not fit into the last one ends in …"""
    font = ImageFont.load_default(11)
    fits = lambda line: canvas.draw.textlength(line, font) <= THUMB  # noqa: E731
    lines, line = [], ""
    for word in text.split()[:100]:
        longer = f"{line} {word}".lstrip()
        if line and not fits(longer):
            lines.append(line)
            longer = word
        line = longer
    lines.append(line)
    if len(lines) > CAPTION_LINES:
        lines[CAPTION_LINES - 1 :] = [lines[CAPTION_LINES - 1] + " …"]
    return [cut(line, fits) for line in lines]


def cut(line: str, fits: Callable[[str], bool]) -> str:
    """As much of a line as fits, with … for the rest."""
    while len(line) > 1 and not fits(line):
        line = line.rstrip("…")[:-1] + "…"
    return line


def latent_picture(latent: Tensor) -> Tensor:
    """A latent (c, h, w) or (c, t, h, w) for the eye, as no VAE is at hand: three channels as red, green, blue."""
    frame = latent if latent.ndim == 3 else latent[:, latent.shape[1] // 2]
    low, high = torch.aminmax(frame[:3])
    picture = ((frame[:3] - low) / (high - low).clamp(min=1e-6)).movedim(0, -1)
    return picture if picture.shape[-1] == 3 else picture[:, :, :1].expand(-1, -1, 3)
