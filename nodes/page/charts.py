"""Pictures that nodes show: one palette, one canvas, and the charts of bars and curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from math import ceil

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, PANEL, GRID = (24, 26, 31), (33, 36, 43), (60, 64, 74)
INK, FAINT = (225, 228, 232), (128, 134, 143)
# A perceptual ramp from little to much, and a colour for what pushes the other way.
RAMP = np.array([(38, 42, 54), (40, 92, 130), (38, 152, 140), (140, 196, 90), (248, 226, 72)], dtype=np.float64)
NEGATIVE = (214, 96, 88)
HELD_OUT = (240, 166, 74)
EDGE = 16

Color = tuple[int, int, int]


class Canvas:
    """A dark picture with a title and a line below it; `draw` on it, then take the `image`."""

    def __init__(self, width: int, height: int, title: str, subtitle: str) -> None:
        self.picture = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.picture)
        self.text((12, 10), title, size=14)
        self.text((12, 30), subtitle, FAINT)

    def text(
        self, at: tuple[float, float], text: str, color: Color = INK, *, size: int = 12, anchor: str = "la"
    ) -> None:
        self.draw.text(at, text, color, ImageFont.load_default(size), anchor=anchor)

    def image(self) -> torch.Tensor:
        """(1, height, width, 3) float32 in 0…1, as ComfyUI's IMAGE."""
        return torch.from_numpy(np.asarray(self.picture, dtype=np.float32) / 255.0)[None]


def ramp(fraction: float) -> Color:
    """The colour for a fraction of the maximum, in 0…1."""
    place = min(max(fraction, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    mixed = RAMP[low] + (place - low) * (RAMP[low + 1] - RAMP[low])
    return int(mixed[0]), int(mixed[1]), int(mixed[2])


class Scale:
    """Values to heights in a panel, which always shows 0 and ``reference``."""

    def __init__(self, values: Sequence[float], top: int, bottom: int, reference: float = 1.0) -> None:
        self.low, self.high = min(0.0, *values), max(reference, *values)
        self.top, self.bottom = top, bottom

    def __call__(self, value: float) -> int:
        return round(self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top))


BAR, ROW, MAX_BARS, MIN_WIDTH, TOP = 30, 170, 30, 460, 56


def bars(
    title: str, subtitle: str, values: Mapping[str, float], notes: Sequence[str] = (), *, reference: float = 1.0
) -> torch.Tensor:
    """A bar for each value; ``reference`` is a value that is always shown, and has the same colour in every chart.

    Labels such as IN04 are grouped by what stands before their number.
    """
    rows = max(1, ceil(len(values) / MAX_BARS))
    per_row = ceil(len(values) / rows)
    letters = max((len(label) for label in values if not _group(label)[1]), default=0)
    bar = max(BAR, min(3 * BAR, (MIN_WIDTH - 2 * EDGE) // per_row), 8 * letters)
    width = max(2 * EDGE + bar * per_row, MIN_WIDTH)
    canvas = Canvas(width, TOP + ROW * rows + 18 * len(notes) + 12, title, subtitle)
    items = list(values.items())
    for row in range(rows):
        top = TOP + ROW * row
        scale = Scale(list(values.values()), top + 16, top + ROW - 58, reference)
        _bar_row(canvas, items[row * per_row : (row + 1) * per_row], top, bar, scale, reference)
    for line, note in enumerate(notes):
        canvas.text((12, TOP + ROW * rows + 18 * line), note, FAINT)
    return canvas.image()


def _bar_row(
    canvas: Canvas, items: list[tuple[str, float]], top: int, bar: int, scale: Scale, reference: float
) -> None:
    end = EDGE + bar * len(items) - 4
    canvas.draw.rectangle((EDGE, top, end, scale.bottom + 14), PANEL)
    for column, (label, value) in enumerate(items):
        x, y = EDGE + bar * column, scale(value)
        color = ramp(0.75 * value / reference) if value >= 0 else NEGATIVE
        canvas.draw.rectangle((x + 2, min(y, scale(0)), x + bar - 6, max(y, scale(0))), color)
        beyond = y - 7 if value >= 0 else y + 7
        canvas.text((x + bar // 2 - 2, beyond), f"{value:.3g}", size=10, anchor="mm")
        canvas.text((x + bar // 2 - 2, scale.bottom + 24), _group(label)[1], FAINT, size=11, anchor="mm")
    canvas.draw.line((EDGE, scale(0), end, scale(0)), FAINT)
    start = 0
    for group, members in groupby(items, key=lambda item: _group(item[0])[0]):
        length = len(list(members))
        left, right = EDGE + bar * start, EDGE + bar * (start + length) - 4
        canvas.draw.line((left + 2, scale.bottom + 34, right - 2, scale.bottom + 34), FAINT)
        canvas.text(((left + right) // 2, scale.bottom + 44), group, anchor="mm")
        start += length


def _group(label: str) -> tuple[str, str]:
    """'IN04' -> ('IN', '04'); other labels stand alone."""
    match = re.fullmatch(r"([^-\d]+)(\d+)", label)
    return (match[1], match[2]) if match else (label, "")


LINE, COLUMN, MAX_LINES = 20, 250, 60


def ranking(
    title: str, subtitle: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float], bool]]
) -> torch.Tensor:
    """Lines with a bar in each column, first to last; each column has a scale of its own, the others are counted.

    Args:
        rows: label, the columns' values, not negative, and whether it stands out.
    """
    shown = rows[:MAX_LINES]
    bottom = TOP + 22 + LINE * len(shown)
    height = bottom + (LINE + 8 if len(rows) > len(shown) else 12)
    start = EDGE + 14 + round(max((ImageFont.load_default(12).getlength(label) for label, *_ in shown), default=0))
    canvas = Canvas(start + COLUMN * len(columns), height, title, subtitle)
    for column, name in enumerate(columns):
        left, largest = start + COLUMN * column, max((values[column] for _, values, _ in rows), default=0.0)
        canvas.text((left, TOP), name, FAINT)
        for line, (_, values, stands_out) in enumerate(shown):
            y, length = TOP + 22 + LINE * line, round((COLUMN - 70) * values[column] / (largest or 1.0))
            canvas.draw.rectangle((left, y + 3, left + COLUMN - 70, y + LINE - 4), PANEL)
            canvas.draw.rectangle((left, y + 3, left + length, y + LINE - 4), ramp(0.75) if stands_out else FAINT)
            canvas.text((left + COLUMN - 62, y + LINE // 2), f"{values[column]:.3g}", size=11, anchor="lm")
    for line, (label, _, stands_out) in enumerate(shown):
        at = (start - 10, TOP + 22 + LINE * line + LINE // 2)
        canvas.text(at, label, INK if stands_out else FAINT, anchor="rm")
    if len(rows) > len(shown):
        canvas.text((EDGE, bottom), f"… and {len(rows) - len(shown)} more", FAINT)
    return canvas.image()


PLOT_WIDTH, PLOT_HEIGHT = 520, 300


def curve(
    title: str,
    subtitle: str,
    function: Callable[[float], float],
    points: Sequence[tuple[float, float]],
    active: tuple[float, float],
) -> torch.Tensor:
    """A function over 0…1 as a line, its given points as dots, and what lies outside ``active`` shaded."""
    canvas = Canvas(PLOT_WIDTH, PLOT_HEIGHT, title, subtitle)
    left, right, bottom = 52, PLOT_WIDTH - 24, PLOT_HEIGHT - 36
    samples = [(x / 1000, function(x / 1000)) for x in range(1001)]
    scale = Scale([value for _, value in samples], TOP + 8, bottom)
    across = lambda x: left + x * (right - left)  # noqa: E731
    canvas.draw.rectangle((left, TOP, right, bottom), PANEL)
    for start, end in ((0.0, active[0]), (active[1], 1.0)):
        if end > start:
            canvas.draw.rectangle((across(start), TOP, across(end), bottom), BACKGROUND)
    for x in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.draw.line((across(x), bottom, across(x), bottom + 4), FAINT)
        canvas.text((across(x), bottom + 14), f"{x:.0%}", FAINT, size=11, anchor="mm")
    for value in dict.fromkeys((0.0, 1.0, scale.low, scale.high)):
        canvas.draw.line((left, scale(value), right, scale(value)), FAINT if value == 0 else GRID)
        if value in (0, 1) or min(abs(scale(value) - scale(0)), abs(scale(value) - scale(1))) > 12:
            canvas.text((left - 8, scale(value)), f"{value:.3g}", FAINT, size=11, anchor="rm")
    canvas.draw.line([(across(x), scale(value)) for x, value in samples], ramp(0.75), width=3, joint="curve")
    for x, value in points:
        if active[0] <= x <= active[1]:
            canvas.draw.ellipse((across(x) - 4, scale(value) - 4, across(x) + 4, scale(value) + 4), ramp(1.0))
    return canvas.image()


def losses(
    title: str, subtitle: str, values: Sequence[float], validation: Sequence[tuple[int, float]] = ()
) -> torch.Tensor:
    """A run's losses, faint, and their moving average; the axis leaves out the worst hundredth.

    Args:
        validation: step and loss on held-out data; drawn as a second curve, whose lowest point is marked.
    """
    canvas = Canvas(PLOT_WIDTH, PLOT_HEIGHT, title, subtitle)
    left, right, bottom = 64, PLOT_WIDTH - 24, PLOT_HEIGHT - 36
    canvas.draw.rectangle((left, TOP, right, bottom), PANEL)
    if not values:
        return canvas.image()
    raw = np.asarray(values, dtype=np.float64)
    smooth = _moving_average(raw, max(1, len(raw) // 20))
    low, high = float(np.quantile(raw, 0.0)), float(np.quantile(raw, 0.99))
    held_out = [loss for _, loss in validation]
    low, high = min([low, *held_out]), max([high, *held_out])
    span = (high - low) or max(abs(high), 1e-9)
    low, high = max(0.0, low - 0.05 * span), high + 0.05 * span

    def across(step: float) -> float:
        return left + (step - 1) / max(1, len(raw) - 1) * (right - left)

    def height(loss: float) -> float:
        return bottom - (loss - low) / (high - low) * (bottom - TOP)

    def points(series: np.ndarray) -> list[tuple[float, float]]:
        # No more than one point for each pixel.
        places = np.unique(np.linspace(0, len(series) - 1, min(len(series), right - left)).astype(int))
        x = left + places / max(1, len(series) - 1) * (right - left)
        y = bottom - (np.clip(series[places], low, high) - low) / (high - low) * (bottom - TOP)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    for fraction in (0.0, 0.5, 1.0):
        y = bottom - fraction * (bottom - TOP)
        canvas.draw.line((left, y, right, y), GRID)
        canvas.text((left - 8, y), f"{low + fraction * (high - low):.3g}", FAINT, size=11, anchor="rm")
        x = left + fraction * (right - left)
        canvas.text((x, bottom + 14), f"{max(1, round(fraction * len(raw)))}", FAINT, size=11, anchor="mm")
    if len(raw) > 1:
        canvas.draw.line(points(raw), GRID, width=1)
        canvas.draw.line(points(smooth), ramp(0.75), width=3, joint="curve")
    if validation:
        canvas.draw.line([(across(s), height(loss)) for s, loss in validation], HELD_OUT, width=2, joint="curve")
        step, least = min(validation, key=lambda each: each[1])
        x, y = across(step), height(least)
        canvas.draw.ellipse((x - 4, y - 4, x + 4, y + 4), HELD_OUT)
        best = f"validation {validation[-1][1]:.4g}, lowest {least:.4g} at step {step}"
        canvas.text((right - 8, TOP + 28), best, HELD_OUT, size=11, anchor="rm")
    latest = f"last {raw[-1]:.4g}, mean of the last {min(len(raw), 20)}: {raw[-20:].mean():.4g}"
    canvas.text((right - 8, TOP + 12), latest, FAINT, size=11, anchor="rm")
    return canvas.image()


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Over at most ``width`` values up to each place."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
