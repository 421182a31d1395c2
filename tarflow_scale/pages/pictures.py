"""Line charts as PNG, with a logarithmic x axis and ticks at powers of two."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tarflow_scale.pages.charts import Points
from tarflow_scale.pages.numbers import short_number

__all__ = ["HEIGHT", "WIDTH", "Panel", "panels_png"]

WIDTH, HEIGHT = 1200, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 56, 46
_INK, _FAINT, _PAPER = (34, 34, 34), (221, 221, 221), (255, 255, 255)
_COLOURS = ((110, 110, 110), (22, 60, 112), (190, 80, 20))
_DECADES = 10


@dataclass(frozen=True)
class Panel:
    """One chart.

    Args:
        title: text above the chart.
        series: points ``(x, y)`` of each line in order of x, by name of the line; x > 0.
        x_label: label of the x axis.
        logarithmic: whether the y axis is logarithmic, with ticks at powers of ten; otherwise it starts at 0.
    """

    title: str
    series: Mapping[str, Points]
    x_label: str
    logarithmic: bool


def panels_png(panels: Sequence[Panel], heading: str) -> bytes:
    """A PNG of `WIDTH` x `HEIGHT` pixels with the panels side by side."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 10), heading, fill=_INK, font_size=15)
    width = WIDTH // len(panels)
    for number, panel in enumerate(panels):
        _draw_panel(draw, panel, number * width, width)
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, left: int, width: int) -> None:
    xs = [x for points in panel.series.values() for x, _ in points]
    ys = [y for points in panel.series.values() for _, y in points]
    x0, x1 = math.log2(min(xs)), math.log2(max(max(xs), 2 * min(xs)))
    if panel.logarithmic:
        low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)) + 1e-9)
        ticks = [10.0**power for power in range(low, max(high, low + 1) + 1)][: _DECADES + 1]
    else:
        top = max(1.0, max(ys))
        ticks = [top * step / 5 for step in range(6)]
    scale = math.log10 if panel.logarithmic else float
    y0, y1 = scale(ticks[0]), scale(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + _LEFT + (math.log2(x) - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - (scale(y) - y0) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM)

    draw.text((left + _LEFT, _TOP - 22), panel.title, fill=_INK, font_size=13)
    for tick in ticks:
        (start, height), (end, _) = place(2.0**x0, tick), place(2.0**x1, tick)
        draw.line((start, height, end, height), fill=_FAINT)
        draw.text((start - 6, height), short_number(tick), fill=_INK, font_size=12, anchor="rm")
    for power in range(math.ceil(x0), math.floor(x1) + 1):
        across, bottom = place(2.0**power, ticks[0])
        draw.text((across, bottom + 6), str(2**power), fill=_INK, font_size=12, anchor="ma")
    draw.text((left + width - _RIGHT, HEIGHT - 6), panel.x_label, fill=_INK, font_size=12, anchor="rd")
    for number, (name, points) in enumerate(panel.series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        spots = [place(*point) for point in points]
        if len(spots) > 1:
            draw.line(spots, fill=colour, width=1 if number == 0 else 3)
        for x, y in spots if number else ():
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        key = (left + _LEFT + 14, _TOP + 12 + 18 * number) if panel.logarithmic else (
            left + _LEFT + 14, HEIGHT - _BOTTOM - 14 - 18 * (len(panel.series) - number))  # fmt: skip
        draw.line((key[0], key[1] + 7, key[0] + 22, key[1] + 7), fill=colour, width=3)
        draw.text((key[0] + 30, key[1]), name, fill=_INK, font_size=12)
