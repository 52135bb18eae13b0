"""Bar charts as inline SVG: no plotting library, no script, readable in light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 12, 12, 44, 46
_MOST_LABELS, _MOST_NUMBERS = 12, 16


def bar_chart(title: str, bars: Sequence[tuple[str, int]], x_label: str = "", marked_from: int | None = None) -> str:
    """Draw counts as bars.

    Args:
        title: Above the chart.
        bars: Label and count of each; where they are many, not every label is written.
        x_label: Below the labels.
        marked_from: The bars from this one on are drawn in the colour of a warning.

    Returns:
        An `<svg>` element whose bars say label and count when pointed at; an empty string if all counts are 0.
    """
    most = max((count for _, count in bars), default=0)
    if not most:
        return ""
    step = (WIDTH - _LEFT - _RIGHT) / len(bars)
    floor = HEIGHT - _BOTTOM
    shown = escape(title)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{shown}">'
        f'<text class="title" x="{_LEFT}" y="18">{shown}</text>',
        f'<line class="grid" x1="{_LEFT}" y1="{floor}" x2="{WIDTH - _RIGHT}" y2="{floor}"/>',
    ]
    every = -(-len(bars) // _MOST_LABELS)
    for k, (label, count) in enumerate(bars):
        x, high = _LEFT + k * step, round(count / most * (floor - _TOP), 1)
        kind = "bar over" if marked_from is not None and k >= marked_from else "bar"
        box = f'x="{x + step * 0.06:.1f}" y="{floor - high:.1f}" width="{step * 0.88:.1f}" height="{high}"'
        parts.append(f'<rect class="{kind}" {box}><title>{escape(label)}: {count:,}</title></rect>')
        middle = f'x="{x + step / 2:.1f}" text-anchor="middle"'
        if count and len(bars) <= _MOST_NUMBERS:
            parts.append(f'<text class="tick" {middle} y="{floor - high - 4:.1f}">{_short(count)}</text>')
        if k % every == 0:
            parts.append(f'<text class="tick" {middle} y="{floor + 15}">{escape(label)}</text>')
    if x_label:
        parts.append(
            f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>'
        )
    return "".join([*parts, "</svg>"])


def binned(
    histogram: Mapping[int, int], edge: int | None = None, most_bars: int = 24
) -> tuple[list[tuple[str, int]], int]:
    """Put a histogram of whole numbers into a few bars of one width; the highest hundredth gets one if it is far out.

    Args:
        histogram: Count of each number from 0 on.
        edge: A bar ends at this number, so that what is above it can be told apart.
        most_bars: About how many.

    Returns:
        Label and count of each bar, and how many bars there are up to `edge`.
    """
    if not histogram:
        return [], 0
    total, seen, high = sum(histogram.values()), 0, 0
    for value in sorted(histogram):
        seen += histogram[value]
        high = value
        if seen >= 0.99 * total:
            break
    if max(histogram) <= 1.5 * high:
        high = max(histogram)
    inside = edge is not None and edge < max(histogram)
    if edge is not None and inside:
        high = max(high, edge)
    width = max(1, -(-(high + 1) // most_bars))
    if edge is not None and inside:
        while (edge + 1) % width:
            width = width + 1 if width < edge + 1 else edge + 1
    last = (min(high // width, 2 * most_bars) + 1) * width
    counts = [0] * (last // width)
    rest = 0
    for value, count in histogram.items():
        if value >= last:
            rest += count
        else:
            counts[value // width] += count
    bars = [(str(k * width) if width == 1 else f"{k * width}–{k * width + width - 1}", n) for k, n in enumerate(counts)]
    marked = len(bars) if edge is None else min(len(bars), (edge + 1) // width)
    return ([*bars, (f"≥ {last}", rest)] if rest else bars), marked


def _short(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"
