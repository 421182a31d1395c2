"""Formats of numbers on pages, and axes with round numbers."""

import itertools
import math
from collections.abc import Sequence

__all__ = ["decimals_of", "fixed", "round_ticks", "short_number", "tick_labels"]

_MOST_DECIMALS = 6


def decimals_of(value: float) -> int:
    """Number of decimals needed for four significant digits of ``value``; at most `_MOST_DECIMALS`."""
    if value == 0 or not math.isfinite(value):
        return 3
    return min(max(3 - math.floor(math.log10(abs(value))), 0), _MOST_DECIMALS)


def fixed(value: float, decimals: int) -> str:
    """Format a number with a fixed number of decimals, such as ``1.897`` or ``12,345.6``."""
    return f"{value:,.{decimals}f}"


def short_number(value: float) -> str:
    """Format a number with three significant digits and a suffix, such as ``12.3 k``."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def round_ticks(low: float, high: float, most: int, outside: bool = True) -> list[float]:
    """Ticks of an axis: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: lower end of the range.
        high: upper end of the range.
        most: maximum number of ticks, at least 3.
        outside: whether the first and last tick enclose the range. If not, all ticks are inside the range, and there
            may be only one tick.
    """
    power = math.floor(math.log10((high - low) / most))
    first, last = (math.floor, math.ceil) if outside else (math.ceil, math.floor)
    for step in (factor * 10.0**exponent for exponent in itertools.count(power) for factor in (1, 2, 5)):
        numbers = range(
            first(low / step - (-1e-9 if outside else 1e-9)), last(high / step + (-1e-9 if outside else 1e-9)) + 1
        )
        if len(numbers) <= most:
            return [number * step for number in numbers]
    raise AssertionError("steps grow until few are left")


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of axis ticks, with as many decimals as their spacing needs; large numbers get suffixes."""
    if max(map(abs, ticks)) >= 10_000:
        return [short_number(tick) for tick in ticks]
    step = ticks[1] - ticks[0]
    return [fixed(tick, max(0, math.ceil(-math.log10(step) - 1e-9))) for tick in ticks]
