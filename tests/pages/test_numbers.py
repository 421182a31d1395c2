"""Numbers: one format for what is compared, round ones on axes."""

import pytest

from tarflow_scale.pages.numbers import decimals_of, fixed, round_ticks, short_number, tick_labels


@pytest.mark.parametrize(
    ("best", "other", "text"),
    [(1.8974, 2.88, "2.880"), (18.84, 472.31234, "472.31"), (12345.6, 1.5, "2"), (0.0012345, 0.01, "0.010000")],
)  # fmt: skip
def test_numbers_that_are_compared_have_the_same_decimals(best: float, other: float, text: str) -> None:
    assert fixed(other, decimals_of(best)) == text


def test_ticks_are_round_and_enclose() -> None:
    assert round_ticks(1.861, 1.933, 5) == pytest.approx([1.86, 1.88, 1.9, 1.92, 1.94])
    assert tick_labels(round_ticks(1.861, 1.933, 5)) == ["1.86", "1.88", "1.90", "1.92", "1.94"]
    assert round_ticks(0, 112_000, 5) == [0, 50_000, 100_000, 150_000]
    assert tick_labels([0, 50_000, 100_000]) == ["0", "50 k", "100 k"]
    assert round_ticks(-3.0, -1.0, 3) == [-3.0, -2.0, -1.0]


def test_ticks_inside_a_range_stay_inside() -> None:
    assert round_ticks(1600, 12_800, 5, outside=False) == [5000, 10_000]
    assert round_ticks(0, 100, 5, outside=False) == [0, 50, 100]


@pytest.mark.parametrize(("value", "text"), [(12_345, "12.3 k"), (2e6, "2 M"), (3.21e9, "3.21 G"), (0.5, "0.5")])
def test_axes_have_suffixes(value: float, text: str) -> None:
    assert short_number(value) == text
