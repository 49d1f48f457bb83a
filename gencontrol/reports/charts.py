"""Line charts as inline SVG: readable axes, a band for the interval, no script; colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

from gencontrol.reports.page import superscript

#: Margins of the plot in the drawing: right, top, bottom; the left one makes room for the longest tick label.
RIGHT, TOP, BOTTOM = 14, 12, 46
_MOST_POINTS = 400
_MARKED = 40


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        label: for the legend; empty leaves it out.
        x, y: points with finite coordinates, x rising.
        style: CSS class: "tuned", "base", "train" or "faint".
        low, high: the interval at each point; empty for none.
        marked: whether the points are marked where there are few.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "tuned"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marked: bool = True


@dataclass(frozen=True)
class Size:
    """Width and height of a drawing in its own units, which are pixels at the page's usual width."""

    width: int
    height: int


SMALL, WIDE = Size(480, 270), Size(1000, 380)


@dataclass(frozen=True)
class Frame:
    """Maps data to the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float
    size: Size

    @property
    def power(self) -> int:
        """The power of ten that is taken out of the vertical axis."""
        return power_of(self.y0, self.y1)

    def rows(self) -> list[tuple[float, str]]:
        """Values and texts of the vertical ticks."""
        values = ticks(self.y0, self.y1)
        step = (values[1] - values[0] if len(values) > 1 else abs(values[0])) / 10.0**self.power
        return [(value, label(value / 10.0**self.power, step)) for value in values]

    @cached_property
    def left(self) -> float:
        """Where the plot begins: behind the name and the longest label, digits being 7 units wide."""
        return 36.0 + 7.0 * max(4, *(len(text) for _, text in self.rows()))

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.size.width - self.left - RIGHT)

    def y(self, value: float) -> float:
        return self.size.height - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (self.size.height - TOP - BOTTOM)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], at most `most` + 1 of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float, step: float) -> str:
    """Write a tick with as many decimals as neighbours need to differ, thousands with a thin space, a true minus."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if 0 < step < 1 else 0
    return f"{value:,.{digits}f}".replace(",", "\u2009").replace("-", "−")


def power_of(low: float, high: float) -> int:
    """Return the power of ten to take out of an axis from low to high: 0 for numbers that read well as they are."""
    largest = max(abs(low), abs(high))
    if largest == 0 or 1e-2 <= largest < 1e5:
        return 0
    return math.floor(math.log10(largest))


def thin(line: Line, most: int = _MOST_POINTS) -> Line:
    """Average neighbouring points so that at most `most` remain."""
    if len(line.x) <= most:
        return line
    size = math.ceil(len(line.x) / most)

    def averaged(values: Sequence[float]) -> list[float]:
        parts = [values[i : i + size] for i in range(0, len(values), size)]
        return [sum(part) / len(part) for part in parts]

    return Line(line.label, averaged(line.x), averaged(line.y), line.style, averaged(line.low), averaged(line.high))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the `window` values that end at each point (fewer at the start)."""
    result, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append(total / min(i + 1, window))
    return result


def line_chart(
    lines: Sequence[Line], *, title: str, y_label: str, x_label: str = "training step", size: Size = SMALL
) -> str:
    """Return a figure with caption and legend; a chart without points says so.

    Args:
        lines: drawn in order, the last on top.
        title: caption; also the accessible name.
        y_label: quantity and unit of the vertical axis.
        x_label: of the horizontal axis.
        size: of the drawing.
    """
    drawn = [thin(line) for line in lines if len(line.x)]
    if not drawn:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p>No values yet.</p></figure>'
    frame = _frame(drawn, size)
    parts = [
        axes(frame, x_label, y_label),
        *(_band(line, frame) for line in drawn),
        *(_curve(line, frame, x_label) for line in drawn),
    ]
    summary = "; ".join(
        f"{line.label or title} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in drawn if line.style != "faint"
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend(drawn)}'
        f'<svg viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{escape(f"{title}: {summary}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _frame(lines: Sequence[Line], size: Size) -> Frame:
    xs = [value for line in lines for value in line.x]
    ys = [value for line in lines for value in (*line.y, *line.low, *line.high) if math.isfinite(value)]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    if y1 - y0 <= 1e-12 * max(abs(y0), abs(y1), 1e-300):
        y0, y1 = (y0 - abs(y0) * 0.05, y1 + abs(y1) * 0.05) if y0 else (-1.0, 1.0)
    pad = 0.06 * (y1 - y0)
    floor = 0.0 if y0 >= 0 and y0 - pad < 0 else y0 - pad
    return Frame(x0, x1, floor, y1 + pad, size)


def axes(frame: Frame, x_label: str, y_label: str, *, whole: bool = True) -> str:
    """Draw grid, ticks and names of both axes; `whole` keeps the horizontal ticks to whole numbers."""
    right, base = frame.size.width - RIGHT, frame.size.height - BOTTOM
    left, power = frame.left, frame.power
    out = []
    for value, text in frame.rows():
        y = frame.y(value)
        out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    marks = ticks(frame.x0, frame.x1)
    horizontal = [value for value in marks if not whole or value == int(value)] or [frame.x0]
    step = 1.0 if whole or len(marks) < 2 else marks[1] - marks[0]
    for value in horizontal:
        x = frame.x(value)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{label(value, step)}</text>')
    unit = f"{y_label}  (×10{superscript(power)})" if power else y_label
    middle, height = (left + right) / 2, (TOP + base) / 2
    out.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>')
    out.append(
        f'<text class="name" x="{middle}" y="{frame.size.height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    out.append(
        f'<text class="name" x="13" y="{height}" text-anchor="middle" transform="rotate(-90 13 {height})">'
        f"{escape(unit)}</text>"
    )
    return "".join(out)


def _band(line: Line, frame: Frame) -> str:
    """The interval as an area, over the points where it is finite."""
    if not line.low:
        return ""
    rows = [
        (x, low, high)
        for x, low, high in zip(line.x, line.low, line.high, strict=True)
        if math.isfinite(low) and math.isfinite(high)
    ]
    if not rows:
        return ""
    if len(rows) == 1:
        x, low, high = rows[0]
        ends = f'y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"'
        return f'<line class="bar {line.style}" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" {ends}/>'
    outline = [(x, high) for x, _, high in rows] + [(x, low) for x, low, _ in reversed(rows)]
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in outline)
    return f'<polygon class="band {line.style}" points="{points}"/>'


def _curve(line: Line, frame: Frame, x_label: str) -> str:
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
    drawn = f'<polyline class="line {line.style}" points="{points}"/>'
    if len(line.x) > _MARKED or line.style in ("faint", "base") or not line.marked:
        return drawn
    name, x_label = escape(line.label), escape(x_label)
    return drawn + "".join(
        f'<circle class="dot {line.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.2">'
        f"<title>{name} at {x_label} {x:g}: {y:.5g}</title></circle>"
        for x, y in zip(line.x, line.y, strict=True)
    )


def legend(lines: Sequence[Line]) -> str:
    """The names of the lines; none for a single line without an interval."""
    named = [line for line in lines if line.label]
    if not named or (len(named) == 1 and not named[0].low):
        return ""
    items = "".join(f'<li class="{line.style}"><span class="key"></span>{escape(line.label)}</li>' for line in named)
    return f'<ul class="legend">{items}</ul>'
