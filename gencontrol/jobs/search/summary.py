"""Numbers of one prompt's tree for tables and the report: statistics, rewards, curves, and the nodes to draw."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gencontrol.sampling.tree.nodes import Floats, Ints
    from gencontrol.sampling.tree.tree import DiffusionTree

#: Nodes of a tree that are drawn (ours: what fits on a page and can still be told apart).
MAX_DRAWN = 240
#: Rewards kept for the histogram.
_MAX_REWARDS = 4000


def summarise(tree: DiffusionTree, root: int, chosen: int | None) -> dict[str, Any]:
    """Return the summary of one root as plain values (JSON).

    Args:
        chosen: leaf of rank 1, whose path is marked; None where nothing is valid.

    Keys: stats, warnings, reward_calls, base_rewards, grown_rewards, curve and base_curve ([calls, best reward] where
    it rises), tree (see `drawn`).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats = tree.stats(root)
    rollouts = _Rollouts(tree, root)
    leaves = tree.nodes.at_level(tree.config.last)
    leaves = leaves[tree.nodes.root_of(leaves) == root]
    valid = leaves[tree.nodes["ready"][leaves]]
    grown = np.setdiff1d(valid, rollouts.leaf[rollouts.base])
    return {
        "stats": {key: clean(value) for key, value in stats.items()},
        "warnings": [str(item.message) for item in caught],
        "reward_calls": len(leaves) * tree.scorer.repeats,
        "base_rewards": _rewards(tree, rollouts.leaf[rollouts.base & rollouts.valid]),
        "grown_rewards": _rewards(tree, grown),
        "curve": rollouts.curve(rollouts.cost),
        "base_curve": rollouts.curve(rollouts.cost, rollouts.base),
        "tree": drawn(tree, root, chosen),
    }


def clean(value: float) -> float | None:
    """A finite number, else None: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _rewards(tree: DiffusionTree, leaves: Ints) -> list[float]:
    """Rewards of leaves, evenly thinned."""
    values = tree.nodes["value"][leaves]
    step = max(1, math.ceil(len(values) / _MAX_REWARDS))
    return [float(value) for value in values[::step]]


class _Rollouts:
    """The rollouts of a root in their order."""

    def __init__(self, tree: DiffusionTree, root: int) -> None:
        leaf = tree.rollouts["leaf"].astype(np.int64)
        mine = tree.nodes.root_of(leaf) == root
        self.leaf: Ints = leaf[mine]
        start = tree.rollouts["start"][mine].astype(np.int64)
        begins = np.array([0, *tree.config.branch])
        #: model calls of each rollout: the steps after the node that it started from
        self.cost: Ints = tree.chain.steps - begins[start]
        self.base = start == 0
        self.valid = tree.nodes["ready"][self.leaf]
        self._reward: Floats = np.where(self.valid, tree.nodes["value"][self.leaf], -np.inf)

    def curve(self, cost: Ints, rows: Sequence[bool] | Any = slice(None)) -> list[list[float]]:
        """[model calls, best reward so far] wherever it rises, and at the end, of the given rollouts alone."""
        calls, best = np.cumsum(cost[rows]), np.maximum.accumulate(self._reward[rows])
        if not len(best):
            return []
        rises = np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)
        places = np.union1d(rises, [len(best) - 1]) if len(rises) else rises
        return [[float(calls[i]), float(best[i])] for i in places]


def drawn(tree: DiffusionTree, root: int, chosen: int | None, most: int = MAX_DRAWN) -> dict[str, Any]:
    """Return the nodes to draw: the marked path, and on every level the most visited children of drawn nodes.

    Of equally visited ones the better are taken.  A level may use what the levels above it left of its share.

    Returns: times (of every level; the first is where the root's children are drawn from noise), nodes as
    [parent, level, value or None, visits, children that are not drawn], parents first; path (places in nodes),
    total (nodes of this root).
    """
    nodes, last = tree.nodes, tree.config.last
    path = _path(tree, chosen)
    kept: Ints = np.array([root])
    chosen_rows = [kept]
    for level in range(1, last + 1):
        room = (most - sum(len(row) for row in chosen_rows)) // (last + 1 - level)
        kept = _most_visited(tree, nodes.children(kept).ids, path, room)
        chosen_rows.append(kept)
    rows = np.concatenate(chosen_rows)
    place = {int(node): index for index, node in enumerate(rows)}
    shown = np.bincount(nodes["parent"][rows[1:]], minlength=nodes.size)
    grid = tree.chain.grid
    return {
        "times": [grid[0], *(grid[index] for index in tree.config.branch)],
        "nodes": [
            [
                place.get(int(nodes["parent"][node]), -1),
                int(nodes["level"][node]),
                float(nodes["value"][node]) if nodes["ready"][node] else None,
                int(nodes["visits"][node]),
                int(nodes["count"][node] - shown[node]),
            ]
            for node in rows
        ],
        "path": [place[node] for node in path],
        "total": int((nodes.root_of(np.arange(nodes.size)) == root).sum()),
    }


def _most_visited(tree: DiffusionTree, ids: Ints, path: Sequence[int], room: int) -> Ints:
    """The `room` nodes to draw of `ids`, those of the path first."""
    nodes = tree.nodes
    value = np.where(nodes["ready"][ids], nodes["value"][ids], -np.inf)
    order = np.lexsort((ids, -value, -nodes["visits"][ids].astype(np.int64), ~np.isin(ids, path)))
    return np.sort(ids[order[: max(room, 1)]])


def _path(tree: DiffusionTree, leaf: int | None) -> list[int]:
    """Nodes from the root to a leaf."""
    found: list[int] = []
    here = -1 if leaf is None else leaf
    while here >= 0:
        found.append(here)
        here = int(tree.nodes["parent"][here])
    return found[::-1]
