"""Line charts as inline SVG for a page, or as PNG.

The SVG needs no script and makes no request. It is drawn in two sizes, and the style sheet shows the size that fits the
screen, so that even on a phone its text is as large as the text of the page. Each run has a different colour.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from PIL import Image, ImageDraw

from tarflow_scale.pages.numbers import round_ticks, short_number, tick_labels

__all__ = ["Points", "Series", "line_chart", "line_chart_png", "run_colour"]

_WIDE, _NARROW, _PNG = (960, 340), (360, 280), (960, 480)
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 14, 46
_MOST_POINTS = 400
_INK, _FAINT, _PAPER = (28, 33, 40), (213, 219, 225), (255, 255, 255)
_DASH = 6
_KEY_HEIGHT = 22

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        points: ``(x, y)`` in order of x; points that are not finite are left out.
        run: number of the run, which determines the colour.
        dashed: whether the line is dashed; used for the second curve of a run.
    """

    points: Points
    run: int = 0
    dashed: bool = False


def run_colour(run: int, dark: bool = False) -> str:
    """Colour of a run as ``#rrggbb``, for a light or dark background.

    Hues of successive runs differ by the golden angle in OKLCH (https://bottosson.github.io/posts/oklab).
    """
    hue = math.radians((255 + 137.508 * run) % 360)
    lightness, chroma = (0.78 if dark else 0.52) + 0.05 * (run % 2), 0.14
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    cones = (
        (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    matrix = (
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    )
    linear = (min(max(sum(m * c for m, c in zip(row, cones, strict=True)), 0.0), 1.0) for row in matrix)
    return "#" + "".join(f"{round(255 * _gamma(value)):02x}" for value in linear)


def _gamma(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


@dataclass(frozen=True)
class _Placed:
    """A chart with all positions in pixels."""

    size: tuple[int, int]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[Series, list[tuple[float, float]]]]


def _finite(series: Mapping[str, Series]) -> dict[str, Series]:
    """Keep only finite points, at most a few hundred per curve; drop curves without finite points."""
    kept = {name: [p for p in curve.points if all(map(math.isfinite, p))] for name, curve in series.items()}
    return {
        name: Series(_thinned(points), series[name].run, series[name].dashed) for name, points in kept.items() if points
    }


def _place(series: Sequence[Series], size: tuple[int, int]) -> _Placed:
    (width, height), xs = size, [x for curve in series for x, _ in curve.points]
    (x0, x1), (low, high) = _span(xs), _span([y for curve in series for _, y in curve.points])
    y_ticks = round_ticks(low, high, max(3, height // 60))
    y0, y1 = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)
        return across, height - _BOTTOM - (y - y0) / (y1 - y0) * (height - _TOP - _BOTTOM)

    inside = round_ticks(x0, x1, max(5, width // 100), outside=False)
    return _Placed(
        size,
        [(place(tick, y0)[0], short_number(tick)) for tick in inside],
        [(place(x0, tick)[1], text) for tick, text in zip(y_ticks, tick_labels(y_ticks), strict=True)],
        [(curve, [place(*point) for point in curve.points]) for curve in series],
    )


def line_chart(series: Mapping[str, Series], x_label: str, y_label: str) -> str:
    """A line chart as SVG with a legend; an empty string if no point is finite.

    Args:
        series: curves by name.
        x_label: label of the x axis.
        y_label: label of the y axis.
    """
    shown = _finite(series)
    if not shown:
        return ""
    words = "; ".join(
        f"{name} from {short_number(curve.points[0][1])} to {short_number(curve.points[-1][1])}"
        for name, curve in shown.items()
    )
    label = escape(f"{y_label} over {x_label}: {words}", quote=True)
    pictures = "".join(
        _svg(_place(list(shown.values()), size), kind, label, x_label, y_label)
        for kind, size in (("wide", _WIDE), ("narrow", _NARROW))
    )
    keys = "".join(
        f'<li><span class="key{" dashed" * curve.dashed}"{_colours(curve.run)}></span>{escape(name)}</li>'
        for name, curve in shown.items()
    )
    return f'<div class="charts">{pictures}</div><ul class="keys">{keys}</ul>'


def _svg(placed: _Placed, kind: str, label: str, x_label: str, y_label: str) -> str:
    width, height = placed.size
    parts = [f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for down, text in placed.y_ticks:
        parts.append(f'<line class="rule" x1="{_LEFT}" y1="{down:.1f}" x2="{width - _RIGHT}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{text}</text>')
    for across, text in placed.x_ticks:
        parts.append(f'<text x="{across:.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{width - _RIGHT}" y="{height - 6}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="{height - 6}">{escape(y_label)}</text>')
    for curve, spots in placed.lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="series{" dashed" * curve.dashed}"{_colours(curve.run)} points="{path}"/>')
        if len(spots) == 1:
            parts.append(
                f'<circle class="series"{_colours(curve.run)} cx="{spots[0][0]:.1f}" cy="{spots[0][1]:.1f}" r="3"/>'
            )
    return "".join(parts) + "</svg>"


def _colours(run: int) -> str:
    return f' style="--light:{run_colour(run)};--dark:{run_colour(run, dark=True)}"'


def line_chart_png(series: Mapping[str, Series], x_label: str, y_label: str) -> bytes:
    """The chart of `line_chart` as a PNG with a legend; the chart is empty if no point is finite."""
    shown = _finite(series)
    canvas = Image.new("RGB", (_PNG[0], _PNG[1] + _KEY_HEIGHT * len(shown) + 8), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if shown:
        _draw(draw, _place(list(shown.values()), _PNG), x_label, y_label)
    for number, (name, curve) in enumerate(shown.items()):
        down = _PNG[1] + _KEY_HEIGHT * number + 10
        _line(draw, [(_LEFT, down), (_LEFT + 30, down)], curve)
        draw.text((_LEFT + 40, down), name, fill=_INK, font_size=14, anchor="lm")
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def _draw(draw: ImageDraw.ImageDraw, placed: _Placed, x_label: str, y_label: str) -> None:
    width, height = placed.size
    for down, text in placed.y_ticks:
        draw.line((_LEFT, down, width - _RIGHT, down), fill=_FAINT)
        draw.text((_LEFT - 6, down), text, fill=_INK, font_size=14, anchor="rm")
    for across, text in placed.x_ticks:
        draw.text((across, height - _BOTTOM + 6), text, fill=_INK, font_size=14, anchor="ma")
    draw.text((width - _RIGHT, height - 4), x_label, fill=_INK, font_size=14, anchor="rd")
    draw.text((4, height - 4), y_label, fill=_INK, font_size=14, anchor="ld")
    for curve, spots in placed.lines:
        _line(draw, spots, curve)


def _line(draw: ImageDraw.ImageDraw, spots: Sequence[tuple[float, float]], curve: Series) -> None:
    """Draw a curve as a line, or as a dot if it has a single point. Dash lengths are measured along the line."""
    colour, along = run_colour(curve.run), 0.0
    if len(spots) == 1:
        (x, y), *_ = spots
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    for (x0, y0), (x1, y1) in pairwise(spots):
        length = max(math.hypot(x1 - x0, y1 - y0), 1e-9)
        ends = [k * _DASH - along for k in range(math.floor(along / _DASH) + 1, math.ceil((along + length) / _DASH))]
        for start, end in pairwise([0.0, *ends, length]):
            if not curve.dashed or int((along + (start + end) / 2) / _DASH) % 2 == 0:
                cut = [(x0 + (x1 - x0) * at / length, y0 + (y1 - y0) * at / length) for at in (start, end)]
                draw.line(cut, fill=colour, width=2)
        along += length


def _thinned(points: Points) -> Points:
    step = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:step], points[-1]]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
