"""Curves as inline SVG: no script, no request, colours of the page."""

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["Points", "line_chart", "short_number"]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 36
_TICKS = 4
_MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """A chart of one line a series; points that are not finite are left out.

    Args:
        series: ``(x, y)`` by name, in order of x.
        x_label: under the axis.
        y_label: of the values, and of the picture to those who hear it.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    shown = {name: _thinned(points) for name, points in finite.items() if points}
    if not shown:
        return ""
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    (x0, x1), (y0, y1) = _span(xs), _span(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"{y_label} over {x_label}: {_in_words(shown)}", quote=True)}">'
    ]
    for step in range(_TICKS + 1):
        x, y = x0 + (x1 - x0) * step / _TICKS, y0 + (y1 - y0) * step / _TICKS
        (left, down), (right, _) = place(x0, y), place(x1, y)
        parts.append(f'<line class="rule" x1="{left:.1f}" y1="{down:.1f}" x2="{right:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{down + 4:.1f}" text-anchor="end">{short_number(y)}</text>')
        anchor = "start" if step == 0 else "end" if step == _TICKS else "middle"
        across, _ = place(x, y0)
        parts.append(f'<text x="{across:.1f}" y="{_HEIGHT - 18}" text-anchor="{anchor}">{short_number(x)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    for number, points in enumerate(shown.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="series s{number % 4}" points="{path}"/>')
    parts.append("</svg>")
    keys = "".join(
        f'<li><span class="key s{number % 4}"></span>{escape(name)}</li>' for number, name in enumerate(shown)
    )
    return "".join(parts) + f'<ul class="keys">{keys}</ul>'


def _thinned(points: Points) -> Points:
    step = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:step], points[-1]]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _in_words(series: Mapping[str, Points]) -> str:
    return "; ".join(f"{name} from {short_number(p[0][1])} to {short_number(p[-1][1])}" for name, p in series.items())


def short_number(value: float) -> str:
    """Three digits and a suffix: ``12.3 k``."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
