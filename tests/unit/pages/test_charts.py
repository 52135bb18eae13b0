"""The report's charts are well-formed, inside their frame, and say what they were given."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.pages.charts import HEIGHT, WIDTH, Curve, interval_bar, line_chart, nice_ticks

_numbers = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@given(low=_numbers, span=st.floats(min_value=0, max_value=1e6))
def test_ticks_cover_the_range_evenly(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    slack = 1e-6 * max(1.0, abs(low), span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= 8
    steps = {round(b - a, 6) for a, b in itertools.pairwise(ticks)}
    assert max(steps) - min(steps) <= slack


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 4, [0, 1, 2, 3, 4]), (0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5])])
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


@given(points=st.lists(st.tuples(st.floats(0, 1e5), _numbers), min_size=1, max_size=20))
def test_every_point_lies_in_the_frame(points: list[tuple[float, float]]) -> None:
    root = ElementTree.fromstring(line_chart("a < b", [Curve("x & y", sorted(points))]))
    drawn = root.find("polyline")
    assert drawn is not None
    pairs = [tuple(map(float, pair.split(","))) for pair in drawn.attrib["points"].split()]
    assert len(pairs) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pairs)


def test_higher_values_are_drawn_higher_and_nan_is_left_out() -> None:
    chart = line_chart("loss", [Curve("run", [(0, 5.0), (1, math.nan), (2, 1.0)])])
    found = re.search(r'points="([^"]*)"', chart)
    assert found
    (_, first), (_, last) = (tuple(map(float, pair.split(","))) for pair in found[1].split())
    assert first < last  # y grows downwards in SVG


def test_nothing_to_draw_draws_nothing() -> None:
    assert line_chart("loss", [Curve("run", []), Curve("other", [(0, math.inf)])]) == ""


def test_interval_bar_is_to_scale() -> None:
    root = ElementTree.fromstring(interval_bar(0.5, 0.4, 0.6, "#123456", floor=0.1))
    bars = root.findall("rect")
    assert float(bars[1].attrib["width"]) == pytest.approx(float(bars[0].attrib["width"]) / 2)
    whisker = root.findall("line")[0]
    assert [float(whisker.attrib[key]) for key in ("x1", "x2")] == pytest.approx([72, 108])
