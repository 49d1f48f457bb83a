"""A search tree as inline SVG: levels from the root at the left to the clean samples at the right.

Colour is a node's value, its size and the width of its edge are visits; the path to the sample of rank 1 is marked.
Siblings stand in the order of their values, best on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gencontrol.reports.parts import number

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


def tree_figure(tree: TreeData, *, value_label: str) -> str:
    """Return a figure with caption, key and drawing.

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
    return (
        '<figure class="chart tree"><figcaption>Tree</figcaption>'
        f'<p class="note">{note}</p>'
        f"{_key(low, high, value_label)}"
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(about)}">'
        f"{_levels(tree, height)}{_edges(tree, places)}{_circles(tree, places, low, high)}</svg></figure>"
    )


def _layout(tree: TreeData) -> tuple[list[tuple[float, float]], float]:
    """Positions of the nodes and the height: drawn tips at equal distances, parents in the middle of their children."""
    children: list[list[int]] = [[] for _ in tree.nodes]
    for place, node in enumerate(tree.nodes):
        if node.parent >= 0:
            children[node.parent].append(place)
    for row in children:
        row.sort(key=lambda place: -_order(tree.nodes[place]))
    tips = sum(1 for row in children if not row)
    gap = min(_GAP, _TALLEST / max(1, tips))
    rows: dict[int, float] = {}
    drawn, pending = 0, [(0, False)]
    while pending:  # children first, without recursion
        place, done = pending.pop()
        if done:
            rows[place] = sum(rows[child] for child in children[place]) / len(children[place])
        elif children[place]:
            pending.append((place, True))
            pending += [(child, False) for child in reversed(children[place])]
        else:
            rows[place] = gap * drawn
            drawn += 1
    across = (_WIDTH - _LEFT - _RIGHT) / max(1, len(tree.times) - 1)
    positions = [(_LEFT + node.level * across, _TOP + 8 + rows[place]) for place, node in enumerate(tree.nodes)]
    return positions, _TOP + 8 + max(tips - 1, 1) * gap + _BOTTOM


def _order(node: Node) -> float:
    return -math.inf if node.value is None else node.value


def _levels(tree: TreeData, height: float) -> str:
    """Names of the levels and faint lines under them."""
    across = (_WIDTH - _LEFT - _RIGHT) / max(1, len(tree.times) - 1)
    out = []
    for level, time in enumerate(tree.times):
        x = _LEFT + level * across
        name = "root" if level == 0 else "clean" if time == 0 else f"t = {time:.3g}"
        anchor = "start" if level == 0 else "middle"
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="26" y2="{height - 4:.1f}"/>')
        out.append(
            f'<text class="name" x="{x - 12 if level == 0 else x:.1f}" y="16" text-anchor="{anchor}">{name}</text>'
        )
    return "".join(out)


def _edges(tree: TreeData, places: Sequence[tuple[float, float]]) -> str:
    """Curves from parents to children; those of the marked path on top."""
    most = max(2, max((node.visits for node in tree.nodes if node.parent >= 0), default=2))
    marked = set(tree.path)
    plain: list[str] = []
    best: list[str] = []
    for place, node in enumerate(tree.nodes):
        if node.parent < 0:
            continue
        (x0, y0), (x1, y1) = places[node.parent], places[place]
        middle = (x0 + x1) / 2
        width = 0.8 + 4.2 * math.sqrt((node.visits - 1) / (most - 1))
        on_path = place in marked and node.parent in marked
        width = max(2.0, width) if on_path else width
        out = best if on_path else plain
        out.append(
            f'<path class="edge{" best" if on_path else ""}" stroke-width="{width:.1f}" '
            f'd="M{x0:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"/>'
        )
    return "".join(plain + best)


def _circles(tree: TreeData, places: Sequence[tuple[float, float]], low: float, high: float) -> str:
    """Nodes, and the value of the sample at the end of the marked path."""
    most = max(2, max((node.visits for node in tree.nodes if node.parent >= 0), default=2))
    marked = set(tree.path)
    out = []
    for place, node in enumerate(tree.nodes):
        x, y = places[place]
        radius = 2.6 + 5.4 * math.sqrt(max(0, min(node.visits, most) - 1) / (most - 1))
        style = "none" if node.value is None else f"v{shade(node.value, low, high)}"
        style += " best" if place in marked else ""
        out.append(
            f'<circle class="node {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
            f"<title>{escape(_about(tree, node))}</title></circle>"
        )
    if tree.path and (value := tree.nodes[tree.path[-1]].value) is not None:
        x, y = places[tree.path[-1]]
        out.append(f'<text class="mark" x="{x + 10:.1f}" y="{y + 4:.1f}">{number(value)}</text>')
    return "".join(out)


def _about(tree: TreeData, node: Node) -> str:
    """What the tip of the mouse says about a node."""
    where = (
        "root"
        if node.level == 0
        else "clean sample"
        if tree.times[node.level] == 0
        else f"time {tree.times[node.level]:.3g}"
    )
    value = "not scored" if node.value is None else f"value {node.value:.4g}"
    hidden = f", {node.hidden} children not drawn" if node.hidden else ""
    return f"{where}: {value}, {node.visits} visits{hidden}"


def shade(value: float, low: float, high: float) -> int:
    """Return the shade of a value, 0 for the lowest to 9 for the highest."""
    return SHADES - 1 if high <= low else min(SHADES - 1, max(0, int(SHADES * (value - low) / (high - low))))


def _key(low: float, high: float, value_label: str) -> str:
    """The colours with their ends, and the marked path."""
    boxes = "".join(f'<span class="shade v{index}"></span>' for index in range(SHADES))
    return (
        f'<ul class="legend"><li>{escape(value_label)}: {number(low)} <span class="shades">{boxes}</span> '
        f'{number(high)}</li><li class="base"><span class="key solid"></span>path to rank 1</li></ul>'
    )
