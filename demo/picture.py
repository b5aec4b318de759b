"""Lay pictures out in a labelled grid."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN, _GAP = 12, 4


def grid(
    rows: Sequence[np.ndarray], row_labels: Sequence[str], column_labels: Sequence[str], title: str, zoom: int = 3
) -> Image.Image:
    """Draw pictures with labels at the left of the rows and above the columns.

    Args:
        rows: per row an array (columns, height, width, 3) uint8, all of one size.
        row_labels: one per row; "" where a row belongs to the one above.
        column_labels: one per column.
        zoom: how much larger the pictures are drawn, without smoothing.
    """
    font, large = ImageFont.load_default(15), ImageFont.load_default(18)
    height, width = rows[0].shape[1] * zoom, rows[0].shape[2] * zoom
    left = _MARGIN + max(int(font.getlength(label)) for label in row_labels) + _MARGIN
    top = 72
    size = (
        max(left + len(column_labels) * (width + _GAP), _MARGIN + int(large.getlength(title))) + _MARGIN,
        top + len(rows) * (height + _GAP) + _MARGIN,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, "black", large)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + _GAP) + width / 2, top - 8), label, "black", font, anchor="ms")
    for row, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + row * (height + _GAP)
        draw.text((_MARGIN, y + height / 2), label, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (width + _GAP), y))
    return sheet
