"""All charts: curves with bands, histograms, intervals, weights, search trees, as SVG without script.

A chart is a `Drawing`.  In a page it writes itself as a figure whose colours come from the page, dark mode included;
`svg_file` puts several side by side into a file of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from gencontrol.reports.page import number, render, superscript

if TYPE_CHECKING:
    from gencontrol.stats import Estimate  # it loads torch, which a page does without

#: Margins of the plot in the drawing: right, top, bottom; the left one makes room for the longest tick label.
RIGHT, TOP, BOTTOM = 14, 12, 46
_MOST_POINTS, _MARKED, _MOST_BINS = 400, 40, 24
#: distinct colours of `curves`; further curves are dashed
_COLOURS = 8


def tag(name: str, *inside: str, **attributes: Any) -> Markup:
    """Return an element; texts are escaped, floats get one decimal, `class_` is class, `a_b` is a-b."""
    written = ""
    for key, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else escape(value)
        written += f' {key.removesuffix("_").replace("_", "-")}="{text}"'
    content = Markup("").join(inside)
    return Markup(f"<{name}{written}>{content}</{name}>" if inside else f"<{name}{written}/>")


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        label: for the legend; empty leaves it out.
        x, y: points with finite coordinates, x rising.
        style: CSS class: "tuned", "base", "train", "faint", or "c0" to "c7", these perhaps with " dash".
        low, high: the interval at each point; empty for none.
        marked: whether the points are marked where there are few.
        joined: False draws points with intervals and no line between them.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "tuned"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marked: bool = True
    joined: bool = True


class Size(NamedTuple):
    """Width and height of a drawing in its own units, which are pixels at the page's usual width."""

    width: float
    height: float


SMALL, WIDE = Size(480, 270), Size(1000, 380)


@dataclass(frozen=True)
class Drawing:
    """A chart.

    Args:
        title: caption; also the accessible name.
        size: of the drawing.
        body: what is drawn; empty where there is nothing to show.
        about: what the drawing shows, for those who do not see it.
        key: (style, name) of the legend.
        note: a line under the caption.
        scale: a legend of its own.
        kind: further CSS classes of the figure.
    """

    title: str
    size: Size = SMALL
    body: Markup = Markup("")
    about: str = ""
    key: Sequence[tuple[str, str]] = ()
    note: str = ""
    scale: Markup = Markup("")
    kind: str = ""

    def __html__(self) -> str:
        """Return the figure for a page; templates call this."""
        return render("figure.html.j2", drawing=self, svg=self.svg() if self.body else None)

    def __str__(self) -> str:
        """Return the figure as HTML."""
        return self.__html__()

    def svg(self, **place: float) -> Markup:
        """Return the drawing alone; `place` puts it into another one."""
        view = f"0 0 {self.size.width:g} {self.size.height:.0f}"
        return tag("svg", self.body, viewBox=view, role="img", aria_label=f"{self.title}: {self.about}", **place)


def svg_file(drawings: Iterable[Drawing], columns: int = 3) -> str:
    """Return an SVG document of charts with titles and legends, `columns` in a row, in colours for light paper."""
    width, line, gap, parts = 0.0, 17.0, 12.0, []
    x, y, tallest = gap, gap, 0.0
    for index, drawing in enumerate(drawings):
        if index and index % columns == 0:
            x, y, tallest = gap, y + tallest + gap, 0.0
        below = y + 24 + drawing.size.height
        parts.append(tag("text", drawing.title, class_="title", x=x + 6, y=y + 16))
        parts.append(drawing.svg(x=x, y=y + 24, width=drawing.size.width, height=drawing.size.height))
        for row, (style, name) in enumerate(drawing.key):
            at = below + line * row + 8
            parts.append(tag("line", class_=f"line {style}", x1=x + 12, x2=x + 34, y1=at, y2=at))
            parts.append(tag("text", name, x=x + 42, y=at + 4))
        x += drawing.size.width + gap
        width, tallest = max(width, x), max(tallest, below + line * len(drawing.key) - y)
    height = y + tallest + gap
    style = tag("style", Markup(render("chart.css.j2", fixed=True)))
    paper = tag("rect", class_="paper", width=width, height=height)
    size = {"viewBox": f"0 0 {width:.0f} {height:.0f}", "width": width, "height": height}
    return str(tag("svg", style, paper, *parts, xmlns="http://www.w3.org/2000/svg", class_="chart", **size)) + "\n"


# ---------------------------------------------------------------- axes


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to [0, 1], evenly or by the logarithm."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Place of a value."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self, *, whole: bool = False, power: int = 0) -> list[tuple[float, str]]:
        """Values and texts of the ticks; `whole` keeps to whole numbers, 10^`power` is taken out of the texts."""
        if self.log:
            return [(value, number(value, 0) if value >= 1 else f"{value:g}") for value in self._powers()]
        values = ticks(self.low, self.high)
        step = (values[1] - values[0] if len(values) > 1 else abs(values[0])) / 10.0**power
        if whole:
            values, step = [value for value in values if value == int(value)] or [self.low], 1.0
        return [(value, label(value / 10.0**power, step)) for value in values]

    def _powers(self) -> list[float]:
        """Powers of ten in the range, with 2 and 5 times them where those alone would be few."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 3 else (1,)
        found = [factor * 10.0**k for k in range(first, last + 1) for factor in factors]
        return [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)] or [self.low]


@dataclass(frozen=True)
class Frame:
    """Maps data to the drawing."""

    horizontal: Axis
    vertical: Axis
    size: Size

    @property
    def power(self) -> int:
        """The power of ten that is taken out of the vertical axis."""
        return 0 if self.vertical.log else power_of(self.vertical.low, self.vertical.high)

    @cached_property
    def left(self) -> float:
        """Where the plot begins: behind the name and the longest label, digits being 7 units wide."""
        return 36.0 + 7.0 * max(4, *(len(text) for _, text in self.vertical.marks(power=self.power)))

    def x(self, value: float) -> float:
        return self.left + self.horizontal.at(value) * (self.size.width - self.left - RIGHT)

    def y(self, value: float) -> float:
        return self.size.height - BOTTOM - self.vertical.at(value) * (self.size.height - TOP - BOTTOM)


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


def _axes(frame: Frame, x_label: str, y_label: str, *, whole: bool = False) -> list[Markup]:
    """Draw grid, ticks and names of both axes; `whole` keeps the horizontal ticks to whole numbers."""
    left, right, base = frame.left, frame.size.width - RIGHT, frame.size.height - BOTTOM
    out = []
    for value, text in frame.vertical.marks(power=frame.power):
        y = frame.y(value)
        out.append(tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        out.append(tag("text", text, class_="tick", x=left - 8, y=y + 4, text_anchor="end"))
    for value, text in frame.horizontal.marks(whole=whole):
        x = frame.x(value)
        out.append(tag("line", class_="axis", x1=x, x2=x, y1=base, y2=base + 4))
        out.append(tag("text", text, class_="tick", x=x, y=base + 18, text_anchor="middle"))
    unit = f"{y_label}  (×10{superscript(frame.power)})" if frame.power else y_label
    middle, height = (left + right) / 2, (TOP + base) / 2
    out.append(tag("line", class_="axis", x1=left, x2=right, y1=base, y2=base))
    out.append(tag("text", x_label, class_="name", x=middle, y=frame.size.height - 6, text_anchor="middle"))
    turned = f"rotate(-90 13 {height})"
    out.append(tag("text", unit, class_="name", x=13, y=height, text_anchor="middle", transform=turned))
    return out


# ---------------------------------------------------------------- curves


def thin(line: Line, most: int = _MOST_POINTS) -> Line:
    """Average neighbouring points so that at most `most` remain."""
    if len(line.x) <= most:
        return line
    size = math.ceil(len(line.x) / most)

    def averaged(values: Sequence[float]) -> list[float]:
        parts = [values[i : i + size] for i in range(0, len(values), size)]
        return [sum(part) / len(part) for part in parts]

    thinned = {name: averaged(getattr(line, name)) for name in ("x", "y", "low", "high")}
    return replace(line, **thinned)  # type: ignore[arg-type]  # the four are sequences of numbers


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the `window` values that end at each point (fewer at the start)."""
    result, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append(total / min(i + 1, window))
    return result


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    y_label: str,
    x_label: str = "training step",
    size: Size = SMALL,
    log_x: bool = False,
    log_y: bool = False,
) -> Drawing:
    """Draw curves; a chart without points says so.

    Args:
        lines: drawn in order, the last on top.
        title: caption; also the accessible name.
        y_label: quantity and unit of the vertical axis.
        x_label: of the horizontal axis.
        size: of the drawing.
        log_x, log_y: logarithmic axes, for positive numbers; bands are clipped to the axis.
    """
    drawn = [line if log_x else thin(line) for line in lines if len(line.x)]  # a mean would move the ends
    if not drawn:
        return Drawing(title, size)
    xs = [value for line in drawn for value in line.x]
    ys = [value for line in drawn for value in (*line.y, *line.low, *line.high) if math.isfinite(value)]
    ys = [value for value in ys if value > 0] if log_y else ys
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = (x0 / 1.5, x1 * 1.5) if log_x else (x0 - 0.5, x1 + 0.5)
    frame = Frame(Axis(x0, x1, log_x), _padded(min(ys), max(ys), log=log_y), size)
    whole = not log_x and all(value == int(value) for value in xs)
    parts = _axes(frame, x_label, y_label, whole=whole)
    parts += [mark for line in drawn for mark in _band(line, frame)]
    parts += [mark for line in drawn for mark in _curve(line, frame, x_label)]
    shown = [line for line in drawn if line.style != "faint"]
    about = "; ".join(f"{line.label or title} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in shown)
    named = [line for line in drawn if line.label]
    alone = len(named) == 1 and not named[0].low  # a single line without an interval is named by the title
    key = [] if alone else [(line.style, line.label) for line in named]
    return Drawing(title, size, Markup("").join(parts), about, key)


def _padded(low: float, high: float, *, log: bool) -> Axis:
    """The vertical axis with some air, from 0 where that is near."""
    if log:
        air = max(1.05, (high / low) ** 0.04)
        return Axis(low / air, high * air, log=True)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = (low - abs(low) * 0.05, high + abs(high) * 0.05) if low else (-1.0, 1.0)
    pad = 0.06 * (high - low)
    return Axis(0.0 if low >= 0 and low - pad < 0 else low - pad, high + pad)


def _band(line: Line, frame: Frame) -> list[Markup]:
    """The interval as an area, or as a bar at each point, where it is finite."""
    floor = frame.vertical.low if frame.vertical.log else -math.inf
    rows = [
        (frame.x(x), frame.y(max(low, floor)), frame.y(max(high, floor)))
        for x, low, high in zip(line.x, line.low, line.high)
        if math.isfinite(low) and math.isfinite(high)
    ]
    if len(rows) == 1 or not line.joined:
        return [tag("line", class_=f"bar {line.style}", x1=x, x2=x, y1=low, y2=high) for x, low, high in rows]
    outline = [(x, high) for x, _, high in rows] + [(x, low) for x, low, _ in reversed(rows)]
    return [tag("polygon", class_=f"band {line.style}", points=_points(outline))] if rows else []


def _curve(line: Line, frame: Frame, x_label: str) -> list[Markup]:
    places = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    drawn = [tag("polyline", class_=f"line {line.style}", points=_points(places))] if line.joined else []
    if len(places) > _MARKED or not line.marked or (line.joined and line.style in ("faint", "base")):
        return drawn
    for (px, py), x, y in zip(places, line.x, line.y, strict=True):
        text = tag("title", f"{line.label} at {x_label} {x:g}: {y:.5g}")
        drawn.append(tag("circle", text, class_=f"dot {line.style}", cx=px, cy=py, r=3.2))
    return drawn


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def curves(title: str, x_label: str, rows: Mapping[str, Mapping[float, float | Estimate]]) -> Drawing:
    """Draw measurements of several methods against a budget, with bands where they are estimates.

    Args:
        rows: {method: {budget > 0: value}}; the vertical axis is logarithmic where all are positive and span a factor
            of 20.
    """
    lines, every = [], []
    for index, (name, points) in enumerate(rows.items()):
        x, low, high = sorted(points), [], []
        y = [p if isinstance(p := points[k], (int, float)) else p.value for k in x]
        for p in (points[k] for k in x):
            low.append(math.nan if isinstance(p, (int, float)) else p.low)
            high.append(math.nan if isinstance(p, (int, float)) else p.high)
        style = f"c{index % _COLOURS}" + (" dash" if index >= _COLOURS else "")
        lines.append(Line(name, x, y, style, low, high, marked=len(x) < 12))
        every += y
    log_y = bool(every) and min(every) > 0 and max(every) > 20 * min(every)
    log_x = all(k > 0 for line in lines for k in line.x)
    return line_chart(lines, title=title, y_label="", x_label=x_label, size=Size(480, 330), log_x=log_x, log_y=log_y)


# ---------------------------------------------------------------- intervals


def intervals(rows: Sequence[tuple[str, float, float, float]], *, title: str, x_label: str) -> Drawing:
    """Draw shares with their intervals as percent, one under the other.

    Args:
        rows: (name, share in [0, 1], ends of its interval); those without a value are left out.
        title: caption; also the accessible name.
        x_label: quantity and unit.
    """
    shown = [row for row in rows if all(map(math.isfinite, row[1:]))]
    if not shown:
        return Drawing(title, WIDE)
    left, gap, width = 12.0 + 7.0 * min(40, max(len(name) for name, *_ in shown)), 26.0, WIDE.width
    size = Size(width, TOP + gap * len(shown) + BOTTOM)
    base, parts = size.height - BOTTOM, []

    def across(share: float) -> float:
        return left + share * (width - left - RIGHT - 60)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(share)
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=TOP, y2=base))
        parts.append(tag("text", f"{100 * share:.0f}", class_="tick", x=x, y=base + 18, text_anchor="middle"))
    middle = (across(0.0) + across(1.0)) / 2
    parts.append(tag("text", x_label, class_="name", x=middle, y=size.height - 6, text_anchor="middle"))
    for row, (name, value, low, high) in enumerate(shown):
        y, short = TOP + gap * (row + 0.5), name if len(name) <= 40 else f"…{name[-39:]}"
        parts.append(tag("text", short, class_="name", x=left - 12, y=y + 4, text_anchor="end"))
        parts.append(tag("line", class_="bar tuned", x1=across(low), x2=across(high), y1=y, y2=y))
        parts.append(tag("circle", class_="dot tuned", cx=across(value), cy=y, r=4.2))
        parts.append(tag("text", f"{100 * value:.1f}", class_="name", x=width - RIGHT, y=y + 4, text_anchor="end"))
    about = "; ".join(f"{name} {100 * value:.1f}" for name, value, _, _ in shown)
    return Drawing(title, size, Markup("").join(parts), about)


def heatmap(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, title: str) -> Drawing:
    """Draw a matrix [row][column] as shades from its least to its largest value, with the names beside and below it."""
    flat = [value for row in values for value in row]
    low, high, cell = min(flat), max(flat), 22.0
    left, below = (16 + 7.0 * min(60, max(map(len, names))) for names in (rows, columns))
    parts = []
    for i, row in enumerate(values):
        y = TOP + cell * i
        parts.append(tag("text", rows[i][:60], class_="name", x=left - 6, y=y + 15, text_anchor="end"))
        for j, value in enumerate(row):
            share = (value - low) / (high - low) if high > low else 1.0
            about = tag("title", f"{rows[i]}, {columns[j]}: {value:.3g}")
            place = {"x": left + cell * j, "y": y, "width": cell - 1, "height": cell - 1}
            parts.append(tag("rect", about, class_="heat tuned", fill_opacity=f"{share:.3f}", **place))
    base = TOP + cell * len(rows)
    for j, name in enumerate(columns):
        x = left + cell * j + 15
        turned = {"text_anchor": "end", "transform": f"rotate(-90 {x:.1f} {base + 6:.1f})"}
        parts.append(tag("text", name[:60], class_="name", x=x, y=base + 6, **turned))
    size = Size(left + cell * len(columns) + RIGHT, base + below)
    return Drawing(title, size, Markup("").join(parts), f"values from {low:.3g} to {high:.3g}")


# ---------------------------------------------------------------- histograms


def histogram(groups: Sequence[tuple[str, str, Sequence[float]]], *, title: str, x_label: str) -> Drawing:
    """Draw the share of every group in each bin; groups lie over each other, half transparent.

    Args:
        groups: (label, CSS class "base" or "tuned", finite values); empty groups are left out.
        title: caption; also the accessible name.
        x_label: quantity and unit of the values.
    """
    drawn = [(name, style, list(values)) for name, style, values in groups if len(values)]
    if not drawn:
        return Drawing(title)
    edges = bins([value for _, _, values in drawn for value in values])
    shares = [_shares(values, edges) for _, _, values in drawn]
    frame = Frame(Axis(edges[0], edges[-1]), Axis(0.0, 100.0 * max(map(max, shares)) * 1.06), SMALL)
    parts, base = _axes(frame, x_label, "share of the group, %"), frame.y(0.0)
    for row, (name, style, _) in zip(shares, drawn, strict=True):
        for share, low, high in zip(row, edges, edges[1:]):
            if share:
                x, top = frame.x(low) + 0.5, frame.y(100 * share)
                place = {"x": x, "y": top, "width": max(0.5, frame.x(high) - x - 0.5), "height": base - top}
                text = tag("title", f"{name}: {100 * share:.0f} % from {low:.4g} to {high:.4g}")
                parts.append(tag("rect", text, class_=f"column {style}", **place))
    key = [(style, f"{name} ({len(found)}, mean {number(sum(found) / len(found))})") for name, style, found in drawn]
    return Drawing(title, SMALL, Markup("").join(parts), "; ".join(name for _, name in key), key)


def bins(values: Sequence[float]) -> list[float]:
    """Return round edges, at most 24 bins and about √n of them; a few far outliers count in the bins at the ends."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    if not 0 < 3 * (high - low) < ordered[-1] - ordered[0]:  # all values, unless 2 % of them take two thirds of it
        low, high = ordered[0], ordered[-1]
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        half = 0.05 * abs(low) or 0.5
        return [low - half, low + half]
    marks = ticks(low, high, min(_MOST_BINS, max(6, math.ceil(math.sqrt(len(values))))))
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [k * step for k in range(first, last + 1)]


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Share of the values in each bin."""
    width = (edges[-1] - edges[0]) / (len(edges) - 1)
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(len(counts) - 1, max(0, int((value - edges[0]) / width + 1e-9)))] += 1
    return [count / len(values) for count in counts]


# ---------------------------------------------------------------- search trees

SHADES = 10
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 1000, 26, 74, 44, 16
#: distance of neighbouring leaves and largest height of the drawing
_GAP, _TALLEST = 13.0, 1500.0


@dataclass(frozen=True)
class Node:
    """One drawn node: where it hangs, its level, value (None: not scored), visits, children that are not drawn."""

    parent: int
    level: int
    value: float | None
    visits: int
    hidden: int


@dataclass(frozen=True)
class TreeData:
    """A drawn tree.

    Args:
        times: of every level, from 1 down to 0.
        nodes: parents before their children; the first is the root.
        path: places of the marked nodes, from the root on.
        total: nodes that the tree has.
    """

    times: Sequence[float]
    nodes: Sequence[Node]
    path: Sequence[int]
    total: int

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> TreeData | None:
        """Return what search.json says; None where it is damaged."""
        try:
            nodes = [Node(*row) for row in table["nodes"]]
            tree = cls([float(t) for t in table["times"]], nodes, [int(i) for i in table["path"]], int(table["total"]))
            sound = all(node.parent < place and 0 <= node.level < len(tree.times) for place, node in enumerate(nodes))
            return tree if nodes and sound and all(0 <= i < len(nodes) for i in tree.path) else None
        except (KeyError, TypeError, ValueError):
            return None


def tree_figure(tree: TreeData, *, value_label: str) -> Drawing:
    """Draw levels from the root at the left to the clean samples at the right, siblings by value, the best on top.

    Colour is a node's value, its size and the width of its edge are visits; the path to the sample of rank 1 is marked.

    Args:
        value_label: what the values measure.
    """
    places, height = _layout(tree)
    values = [node.value for node in tree.nodes if node.value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    left_out = tree.total - len(tree.nodes)
    note = "Left: noise, right: clean samples. Thick and large: often visited."
    if left_out:
        note += f" Drawn are the {len(tree.nodes)} most visited of {tree.total} nodes; {left_out} are left out."
    about = f"Search tree of {tree.total} nodes on {len(tree.times) - 1} levels, values from {low:.4g} to {high:.4g}"
    boxes = tag("span", *(tag("span", "", class_=f"shade v{index}") for index in range(SHADES)), class_="shades")
    scale = tag("li", f"{value_label}: {number(low)} ", boxes, f" {number(high)}")
    parts = []
    for level, time in enumerate(tree.times):
        x = _LEFT + level * _across(tree)
        name, shift = ("root", -12) if level == 0 else ("clean" if time == 0 else f"t = {time:.3g}", 0)
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=26, y2=height - 4))
        parts.append(tag("text", name, class_="name", x=x + shift, y=16, text_anchor="middle" if level else "start"))
    parts += _edges(tree, places)
    parts += _circles(tree, places, low, high)
    key = [("base solid", "path to rank 1")]
    return Drawing("Tree", Size(_WIDTH, height), Markup("").join(parts), about, key, note, scale, "tree")


def shade(value: float, low: float, high: float) -> int:
    """Return the shade of a value, 0 for the lowest to 9 for the highest."""
    return SHADES - 1 if high <= low else min(SHADES - 1, max(0, int(SHADES * (value - low) / (high - low))))


def _across(tree: TreeData) -> float:
    """Distance between levels."""
    return (_WIDTH - _LEFT - _RIGHT) / max(1, len(tree.times) - 1)


def _layout(tree: TreeData) -> tuple[list[tuple[float, float]], float]:
    """Positions of the nodes and the height: drawn tips at equal distances, parents in the middle of their children."""
    children: list[list[int]] = [[] for _ in tree.nodes]
    for place, node in enumerate(tree.nodes):
        if node.parent >= 0:
            children[node.parent].append(place)
    for row in children:
        row.sort(key=lambda place: math.inf if (value := tree.nodes[place].value) is None else -value)
    tips = sum(1 for row in children if not row)
    gap = min(_GAP, _TALLEST / max(1, tips))
    rows: dict[int, float] = {}
    drawn, pending = 0, [(0, False)]
    while pending:  # children first, without recursion: a chain of 3000 nodes is deeper than Python's stack
        place, done = pending.pop()
        if done:
            rows[place] = sum(rows[child] for child in children[place]) / len(children[place])
        elif children[place]:
            pending.append((place, True))
            pending += [(child, False) for child in reversed(children[place])]
        else:
            rows[place] = gap * drawn
            drawn += 1
    positions = [(_LEFT + node.level * _across(tree), _TOP + 8 + rows[place]) for place, node in enumerate(tree.nodes)]
    return positions, _TOP + 8 + max(tips - 1, 1) * gap + _BOTTOM


def _edges(tree: TreeData, places: Sequence[tuple[float, float]]) -> list[Markup]:
    """Curves from parents to children; those of the marked path on top."""
    most = max(2, max((node.visits for node in tree.nodes if node.parent >= 0), default=2))
    marked = set(tree.path)
    plain: list[Markup] = []
    best: list[Markup] = []
    for place, node in enumerate(tree.nodes):
        if node.parent < 0:
            continue
        (x0, y0), (x1, y1) = places[node.parent], places[place]
        middle = (x0 + x1) / 2
        width = 0.8 + 4.2 * math.sqrt((node.visits - 1) / (most - 1))
        on_path = place in marked and node.parent in marked
        curve = f"M{x0:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        kind, wide = ("edge best", max(2.0, width)) if on_path else ("edge", width)
        (best if on_path else plain).append(tag("path", class_=kind, stroke_width=wide, d=curve))
    return plain + best


def _circles(tree: TreeData, places: Sequence[tuple[float, float]], low: float, high: float) -> list[Markup]:
    """Nodes, what the tip of the mouse says about them, and the value of the sample at the end of the marked path."""
    most = max(2, max((node.visits for node in tree.nodes if node.parent >= 0), default=2))
    marked = set(tree.path)
    out = []
    for place, node in enumerate(tree.nodes):
        x, y = places[place]
        radius = 2.6 + 5.4 * math.sqrt(max(0, min(node.visits, most) - 1) / (most - 1))
        style = "none" if node.value is None else f"v{shade(node.value, low, high)}"
        style += " best" if place in marked else ""
        time = tree.times[node.level]
        where = "root" if node.level == 0 else "clean sample" if time == 0 else f"time {time:.3g}"
        value = "not scored" if node.value is None else f"value {node.value:.4g}"
        hidden = f", {node.hidden} children not drawn" if node.hidden else ""
        text = tag("title", f"{where}: {value}, {node.visits} visits{hidden}")
        out.append(tag("circle", text, class_=f"node {style}", cx=x, cy=y, r=radius))
    if tree.path and (end := tree.nodes[tree.path[-1]].value) is not None:
        x, y = places[tree.path[-1]]
        out.append(tag("text", number(end), class_="mark", x=x + 10, y=y + 4))
    return out
