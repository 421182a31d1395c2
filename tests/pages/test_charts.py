"""Curves: every finite point inside the picture, a colour a run, letters that a phone shows, and words."""

import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageColor

from tarflow_scale.pages.charts import Series, line_chart, line_chart_png, run_colour


def pictures(chart: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", chart)]


def test_points_are_inside_and_in_order_in_both_shapes() -> None:
    series = {"a<b": Series([(i, math.sin(i)) for i in range(5000)]), "c": Series([(0, math.nan), (7, 2.0)], 1)}
    chart = line_chart(series, "x", "y")
    wide, narrow = pictures(chart)
    for svg in (wide, narrow):
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        lines = [line.attrib["points"].split() for line in svg.iter() if line.tag.endswith("polyline")]
        assert len(lines) == 2
        assert len(lines[0]) <= 402
        for line in lines:
            points = [tuple(map(float, point.split(","))) for point in line]
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
            assert [x for x, _ in points] == sorted(x for x, _ in points)
        texts = [float(text.attrib["x"]) for text in svg.iter() if text.tag.endswith("text")]
        assert all(0 <= x <= width for x in texts)
        assert svg.attrib["aria-label"].startswith("y over x: a<b from 0 to ")
    assert float(narrow.attrib["viewBox"].split()[2]) <= 360  # so that a phone shows letters as large as they are
    assert "a&lt;b" in chart


@pytest.mark.parametrize("points", [[], [(1.0, math.inf)]])
def test_nothing_to_draw_is_no_chart(points: list[tuple[float, float]]) -> None:
    assert line_chart({"a": Series(points)}, "x", "y") == ""


def test_one_point_is_a_dot() -> None:
    assert re.search(r'<circle[^>]* cx="\d+\.\d" cy="\d+\.\d"', line_chart({"a": Series([(5.0, 5.0)])}, "x", "y"))


def test_every_run_has_a_colour_of_its_own() -> None:
    for dark in (False, True):
        colours = [ImageColor.getrgb(run_colour(run, dark)) for run in range(12)]
        gaps = [math.dist(a, b) for number, a in enumerate(colours) for b in colours[:number]]
        assert min(gaps) > 20
        paper = (18, 22, 27) if dark else (255, 255, 255)
        assert min(math.dist(colour, paper) for colour in colours) > 150


def test_the_picture_is_the_same_chart() -> None:
    """As many points of each colour as the lines are long; a dashed line has about half of them."""
    line = [(float(x), float(x)) for x in range(10)]
    both = {"a": Series(line, 0), "b": Series([(x, 9 - y) for x, y in line], 1, dashed=True)}
    content = line_chart_png(both, "images seen", "bits/dim")
    assert content == line_chart_png(both, "images seen", "bits/dim")
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    solid, dashed = ((image[:430] == ImageColor.getrgb(run_colour(run))).all(axis=2).sum() for run in (0, 1))
    assert 0.35 < dashed / solid < 0.65
    assert Image.open(io.BytesIO(line_chart_png({}, "x", "y"))).size[0] == image.shape[1]
