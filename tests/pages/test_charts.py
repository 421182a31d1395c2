"""Curves: every finite point inside the picture, and words for those who do not see it."""

import math
import re
from xml.etree import ElementTree

import pytest

from tarflow_scale.pages.charts import line_chart


def test_points_are_inside_and_in_order() -> None:
    chart = line_chart({"a<b": [(i, math.sin(i)) for i in range(5000)], "c": [(0, math.nan), (7, 2.0)]}, "x", "y")
    svg = ElementTree.fromstring(chart[: chart.index("</svg>") + 6])
    lines = [line.attrib["points"].split() for line in svg.iter() if line.tag.endswith("polyline")]
    assert len(lines) == 2
    assert len(lines[0]) <= 402
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line]
        assert all(0 <= x <= 640 and 0 <= y <= 260 for x, y in points)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert "a&lt;b" in chart
    assert svg.attrib["aria-label"].startswith("y over x: a<b from 0 to ")


@pytest.mark.parametrize("points", [[], [(1.0, math.inf)]])
def test_nothing_to_draw_is_no_chart(points: list[tuple[float, float]]) -> None:
    assert line_chart({"a": points}, "x", "y") == ""


def test_one_point_has_room() -> None:
    assert re.search(r'points="\d+\.\d,\d+\.\d"', line_chart({"a": [(5.0, 5.0)]}, "x", "y"))
