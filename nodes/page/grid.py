"""One labelled picture out of many: columns are strengths, rows what else was tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageFont
from torch import Tensor

from loha_core import LoHaError

from .charts import FAINT, PANEL, Canvas
from .contact_sheet import cut, thumbnail

GAP, MARGIN = 6, 14
# Labels grow with the pictures; a row's take at most so much of a picture's width.
MIN_TEXT, MAX_TEXT, LABEL_WIDTH = 12, 40, 1.5
# What PNG and browsers still show.
MAX_SIDE = 16_384

Label = tuple[str, ...]  # a line each


@dataclass(frozen=True)
class GridPlan:
    """What the pictures of a grid are, row by row from the left.

    Attributes:
        title: what all of them have in common.
        columns, rows: labels, and what each axis is.
    """

    title: str
    column_axis: str
    columns: Sequence[str]
    row_axis: str
    rows: Sequence[Label]

    @property
    def count(self) -> int:
        return len(self.columns) * len(self.rows)


def draw(plan: GridPlan, pictures: Sequence[Tensor], size: int) -> Tensor:
    """(1, height, width, 3) float32 in 0…1.

    Args:
        pictures: (h, w, 3 or 4) in 0…1, as the plan lists them; of as many frames for each, the middle one is shown.
        size: of a picture's longer side as it is drawn; 0 is its own.

    Raises:
        LoHaError: another number of pictures than was planned, or too large a result.
    """
    frames, missing = divmod(len(pictures), plan.count)
    if missing or not frames:
        raise LoHaError(
            f"{len(pictures)} pictures for a grid of {len(plan.rows)}×{len(plan.columns)} = {plan.count}: connect all "
            "that were sampled with this plan, and no others"
        )
    pictures = pictures[frames // 2 :: frames]
    size = size or max(side for picture in pictures for side in picture.shape[:2])
    tiles = [thumbnail(picture[..., :3], size) for picture in pictures]
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    text = min(max(MIN_TEXT, min(width, height) // 12), MAX_TEXT)
    font, line = ImageFont.load_default(text), round(text * 1.35)
    widest = max(font.getlength(part) for label in ((plan.row_axis,), *plan.rows) for part in label)
    left = MARGIN + (min(round(widest), max(round(LABEL_WIDTH * width), 12 * text)) + MARGIN if widest else 0)
    top = MARGIN + round(line * (3.5 if plan.title else 2))
    columns, rows = len(plan.columns), len(plan.rows)
    total = left + columns * (width + GAP) - GAP + MARGIN, top + rows * (height + GAP) - GAP + MARGIN
    if max(total) > MAX_SIDE:
        raise LoHaError(f"the grid would be {total[0]}×{total[1]} pixels; set size to a smaller one than {size}")

    fits = lambda room: lambda part: font.getlength(part) <= room  # noqa: E731
    canvas = Canvas(max(total[0], left + 12 * text), total[1], "", "")
    whole = canvas.picture.width - 2 * MARGIN
    if plan.title:
        canvas.text((MARGIN, MARGIN), cut(plan.title, fits(whole)), size=text)
    middle = left + (columns * (width + GAP) - GAP) / 2
    canvas.text((middle, top - 2 * line - 2), cut(plan.column_axis, fits(whole - left)), FAINT, size=text, anchor="ma")
    for column, label in enumerate(plan.columns):
        at = (left + column * (width + GAP) + width / 2, top - 4)
        canvas.text(at, cut(label, fits(width)), size=text, anchor="ms")
    canvas.text((MARGIN, top - 4), cut(plan.row_axis, fits(left - 2 * MARGIN)), FAINT, size=text, anchor="ls")
    for row, parts in enumerate(plan.rows):
        y = top + row * (height + GAP)
        shown = parts[: max(1, height // line)]
        for number, part in enumerate(shown):
            above = y + (height - line * len(shown)) / 2 + line * number
            canvas.text((MARGIN, above), cut(part, fits(left - 2 * MARGIN)), size=text)
        for column, tile in enumerate(tiles[row * columns : (row + 1) * columns]):
            x = left + column * (width + GAP)
            canvas.draw.rectangle((x, y, x + width - 1, y + height - 1), PANEL)
            canvas.picture.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
    return canvas.image()
