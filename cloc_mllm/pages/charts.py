"""Charts as inline SVG: no plotting library, no script, readable in light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cloc_mllm.pages.drawing import PALETTE

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 34


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name and its points, x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, curves: Sequence[Curve], x_label: str = "step") -> str:
    """Draw curves over a common x axis.

    Args:
        title: Above the chart.
        curves: Points that are not finite are left out.
        x_label: Below the x axis.

    Returns:
        An `<svg>` element; an empty string if no curve has a point.
    """
    shown = [Curve(curve.name, [point for point in curve.points if _finite(point)]) for curve in curves]
    shown = [curve for curve in shown if curve.points]
    if not shown:
        return ""
    xs = [x for curve in shown for x, _ in curve.points]
    ys = [y for curve in shown for _, y in curve.points]
    x_ticks, y_ticks = nice_ticks(min(0.0, min(xs)), max(xs)), nice_ticks(min(0.0, min(ys)), max(ys))
    x_low, x_high = x_ticks[0], max(x_ticks[-1], max(xs))
    y_low, y_high = y_ticks[0], max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [_open(title)]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    for number, curve in enumerate(shown):
        colour = PALETTE[number % len(PALETTE)]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve.points))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        y = TOP + 14 * (number + 1)
        key = f'x1="{WIDTH - 128}" y1="{y - 4}" x2="{WIDTH - 112}" y2="{y - 4}"'
        parts.append(f'<line {key} stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text class="tick" x="{WIDTH - 107}" y="{y}">{escape(curve.name)}</text>')
    return "".join([*parts, "</svg>"])


def interval_bar(value: float, low: float, high: float, colour: str, floor: float | None = None) -> str:
    """Draw a share between 0 and 1 as a bar with its interval, and a tick where chance or the majority answer lies.

    Args:
        value: The share.
        low: Lower end of the interval.
        high: Upper end of the interval.
        colour: The bar's.
        floor: Where to draw the tick, if anywhere.

    Returns:
        An `<svg>` element.
    """
    width, height = 180, 16
    x_value, x_low, x_high = (round(width * min(max(share, 0.0), 1.0), 1) for share in (value, low, high))
    parts = [
        f'<svg class="bar" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{value:.3f}, 95 % interval {low:.3f} to {high:.3f}">',
        f'<rect class="track" x="0" y="3" width="{width}" height="10"/>',
        f'<rect x="0" y="3" width="{x_value}" height="10" fill="{colour}"/>',
        f'<line class="whisker" x1="{x_low}" y1="8" x2="{x_high}" y2="8"/>',
        f'<line class="whisker" x1="{x_low}" y1="4" x2="{x_low}" y2="12"/>',
        f'<line class="whisker" x1="{x_high}" y1="4" x2="{x_high}" y2="12"/>',
    ]
    if floor is not None:
        x = round(width * floor, 1)
        parts.append(f'<line class="floor" x1="{x}" y1="0" x2="{x}" y2="{height}"/>')
    return "".join([*parts, "</svg>"])


def difference_chart(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw differences with their intervals around a line at zero, one row each.

    Args:
        title: Above the chart.
        rows: Name, difference, lower and upper end of its interval; all in the same unit.

    Returns:
        An `<svg>` element; an empty string without rows.
    """
    if not rows:
        return ""
    step, left = 20, 170
    height = TOP + step * len(rows) + BOTTOM
    ends = [value for row in rows for value in row[1:]]
    ticks = nice_ticks(min(0.0, *ends), max(0.0, *ends))
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return round(left + (value - low) / (high - low) * (WIDTH - left - RIGHT), 1)

    parts = [_open(title, height)]
    for tick in ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{height - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    zero = across(0.0)
    parts.append(f'<line class="floor" x1="{zero}" y1="{TOP}" x2="{zero}" y2="{height - BOTTOM}"/>')
    for number, (name, value, lower, upper) in enumerate(rows):
        y = TOP + step * number + step // 2
        colour = PALETTE[2] if lower > 0 else PALETTE[0] if upper < 0 else "#8a949e"
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        span = f'x1="{across(lower)}" y1="{y}" x2="{across(upper)}" y2="{y}"'
        parts.append(f'<line {span} stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<circle cx="{across(value)}" cy="{y}" r="4.5" fill="{colour}"/>')
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that start at or below `low` and end at or above `high`.

    Args:
        low: Smallest value to cover.
        high: Largest value to cover; if it is not clearly above `low`, one unit is covered.
        count: How many steps are wanted.
    """
    span = high - low if high - low > 1e-9 * max(1.0, abs(low)) else 1.0
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil((low + span) / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _open(title: str, height: int = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>'
    )


def _finite(point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) for value in point)
