"""Histograms of a few groups of numbers over one axis, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from gencontrol.reports.charts import SMALL, Frame, Line, Size, axes, legend, ticks
from gencontrol.reports.parts import number

_MOST_BINS = 24


def histogram(
    groups: Sequence[tuple[str, str, Sequence[float]]], *, title: str, x_label: str, size: Size = SMALL
) -> str:
    """Return a figure with the share of every group in each bin; groups lie over each other, half transparent.

    Args:
        groups: (label, CSS class "base" or "tuned", finite values); empty groups are left out.
        title: caption; also the accessible name.
        x_label: quantity and unit of the values.
    """
    drawn = [(label, style, list(values)) for label, style, values in groups if len(values)]
    if not drawn:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p>No values yet.</p></figure>'
    edges = bins([value for _, _, values in drawn for value in values])
    shares = [_shares(values, edges) for _, _, values in drawn]
    frame = Frame(edges[0], edges[-1], 0.0, 100.0 * max(max(row) for row in shares) * 1.06, size)
    bars = "".join(_bars(row, edges, frame, label, style) for row, (label, style, _) in zip(shares, drawn, strict=True))
    names = [f"{label} ({len(values)}, mean {number(sum(values) / len(values))})" for label, _, values in drawn]
    key = legend([Line(name, (), (), style, (0.0,)) for name, (_, style, _) in zip(names, drawn, strict=True)])
    about = escape(f"{title}: " + "; ".join(names))
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{key}'
        f'<svg viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{about}">'
        f"{axes(frame, x_label, 'share of the group, %', whole=False)}{bars}</svg></figure>"
    )


def bins(values: Sequence[float]) -> list[float]:
    """Return round edges, at most 24 bins and about √n of them; a few far outliers count in the bins at the ends."""
    low, high = _range(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        half = 0.05 * abs(low) or 0.5
        return [low - half, low + half]
    wanted = min(_MOST_BINS, max(6, math.ceil(math.sqrt(len(values)))))
    marks = ticks(low, high, wanted)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [k * step for k in range(first, last + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Least and largest value, or the middle 98 % where the rest would take two thirds of the axis."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    return (low, high) if 0 < 3 * (high - low) < ordered[-1] - ordered[0] else (ordered[0], ordered[-1])


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Share of the values in each bin."""
    width = (edges[-1] - edges[0]) / (len(edges) - 1)
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(len(counts) - 1, max(0, int((value - edges[0]) / width + 1e-9)))] += 1
    return [count / len(values) for count in counts]


def _bars(shares: Sequence[float], edges: Sequence[float], frame: Frame, label: str, style: str) -> str:
    """The bars of one group."""
    base, out = frame.y(0.0), []
    for share, low, high in zip(shares, edges, edges[1:]):
        if share:
            x, top = frame.x(low), frame.y(100 * share)
            width = max(0.5, frame.x(high) - x - 1)
            about = f"{escape(label)}: {100 * share:.0f} % from {low:.4g} to {high:.4g}"
            out.append(
                f'<rect class="column {style}" x="{x + 0.5:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{base - top:.1f}"><title>{about}</title></rect>'
            )
    return "".join(out)
