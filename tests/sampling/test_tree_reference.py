"""The tree against the algorithm of the paper, written out rollout by rollout with plain objects
(docs/methods/dts.md#algorithm and docs/methods/dts.md#batching).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gencontrol.rng import Keyed, row_keys
from gencontrol.sampling import State
from gencontrol.sampling.steps import Sde
from gencontrol.sampling.tree.rules import Boltzmann, Uct
from gencontrol.sampling.tree.tree import DiffusionTree
from tests.helpers.tree_toys import Shrink, first, grown

STEPS, SEED = 6, 5
GRID = [1 - i / STEPS for i in range(STEPS)] + [0.0]


@dataclass
class Node:
    """A state of the reference's tree."""

    level: int
    x: Tensor | None = None
    value: float = 0.0
    visits: int = 1
    children: list[Node] = field(default_factory=list)
    pending: int = 0


class Reference:
    """K rollouts are chosen one by one with frozen values, then run one by one, then backed up."""

    def __init__(self, branch: list[int], rule: str, widening: tuple[float, float], temperature: float, *, hard: bool):
        self.branch, self.rule, self.widening, self.lam, self.hard = branch, rule, widening, 1 / temperature, hard
        self.root, self.made, self.nfe, self.log_w = Node(0), 0, 0, []

    def build(self, budget: int, leaves: int) -> None:
        while (room := (budget - self.nfe) // STEPS) > 0:
            picks = [self.select(self.made + k) for k in range(min(room, leaves))]
            for path, _ in picks:  # virtual visits and pending children end with the selection
                for node in path:
                    node.visits -= 1
                path[-1].pending = 0
            results = [self.rollout(path, self.made + k) for k, (path, _) in enumerate(picks)]
            for (path, log_w), extra in zip(picks, results, strict=True):
                full = path + extra
                for node, child in zip(path[-1:] + extra, extra):
                    node.children.append(child)
                for node in full[:-1]:
                    node.visits += 1
                self.log_w.append(log_w + self.lam * full[-1].value)
            for (path, _), extra in zip(picks, results, strict=True):
                for node in reversed((path + extra)[:-1]):
                    self.back_up(node)
            self.made += len(picks)

    def select(self, number: int) -> tuple[list[Node], float]:
        """Path to the node that is expanded, or to a leaf; log of share/probability of the choices."""
        keys = row_keys(SEED, "tree/select", torch.tensor([0]), torch.tensor([number]))
        draws = Keyed(keys).uniform((1, len(self.branch)))[0].tolist()
        path, log_w = [self.root], 0.0
        while True:
            node = path[-1]
            node.visits += 1
            if node.level == len(self.branch):
                return path, log_w
            constant, alpha = self.widening
            here = node.visits - 1
            if len(node.children) + node.pending < constant * here**alpha or not node.children:
                node.pending += 1
                return path, log_w
            child, ratio = self.choose(node, here, draws[node.level])
            path.append(child)
            log_w += ratio

    def choose(self, node: Node, visits: int, draw: float) -> tuple[Node, float]:
        if self.rule == "uct":
            bounds = [c.value + math.sqrt(math.log(visits) / c.visits) for c in node.children]
            return node.children[bounds.index(max(bounds))], math.nan
        power, floor = {"boltzmann": (1, 0), "uniform": (0, 0), "tempered": (0.5, 0.1)}[self.rule]
        top = max(c.value for c in node.children)
        weights = [math.exp(power * self.lam * (c.value - top)) for c in node.children]
        count, left = len(weights), draw
        for child, weight in zip(node.children, weights, strict=True):
            chance = (1 - floor) * weight / sum(weights) + floor / count
            left -= chance
            if left < 0:
                return child, -math.log(count * chance)
        raise AssertionError("probabilities do not sum to 1")

    def rollout(self, path: list[Node], number: int) -> list[Node]:
        """New nodes below the end of the path; the last holds the reward."""
        node, made, model = path[-1], [], Shrink()
        keys = row_keys(SEED, "tree", torch.tensor([0]), torch.tensor([number]))
        x = node.x if node.level else model.process.prior((1, 2), Keyed(keys))
        for level in range(node.level, len(self.branch)):
            for i in range(self.branch[level - 1] if level else 0, self.branch[level]):
                noise = Sde().draw(x, Keyed(keys, i + 1))
                x = Sde()(model, State(x), GRID[i], GRID[i + 1], None, noise).x
                self.nfe += 1
            made.append(Node(level + 1, x))
        if made:
            made[-1].value = float(first(x)[0])
        return made

    def back_up(self, node: Node) -> None:
        values = [child.value for child in node.children]
        top = max(values)
        mean = sum(math.exp(self.lam * (v - top)) for v in values) / len(values)
        node.value = top if self.hard else top + math.log(mean) / self.lam


def compare(tree: DiffusionTree, reference: Reference, place: int, node: Node) -> None:
    """Node for node; children in the order in which they were made."""
    nodes = tree.nodes
    assert int(nodes["visits"][place]) == node.visits and int(nodes["level"][place]) == node.level
    assert float(nodes["value"][place]) == pytest.approx(node.value, rel=1e-10, abs=1e-10)
    children = nodes.children(np.array([place])).ids
    assert len(children) == len(node.children) == int(nodes["drawn"][place])
    if node.level:
        x = tree.pools[node.level - 1].take(nodes["row"][[place]], torch.device("cpu"))
        torch.testing.assert_close(x, node.x, rtol=1e-6, atol=1e-6)  # rounding of another batch size
    for child, expected in zip(children.tolist(), node.children, strict=True):
        assert nodes["parent"][child] == place
        compare(tree, reference, child, expected)


RULES: dict[str, Any] = {"uct": Uct(1.0, scaled=False), "tempered": Boltzmann(0.5, 0.1)}


@pytest.mark.parametrize("leaves", [1, 6])
@pytest.mark.parametrize(
    ("rule", "backup", "widening", "branch"),
    [
        ("boltzmann", "soft", (2.0, 0.8), 5),
        ("boltzmann", "soft", (1.0, 0.5), "all"),
        ("uct", "soft", (1.0, 0.5), 5),
        ("uct", "max", (2.0, 0.7), "all"),
        ("uniform", "soft", (1.0, 0.5), [1.0, 0.5]),
        ("tempered", "max", (1.5, 0.6), 3),
    ],
)
def test_the_tree_is_the_papers_algorithm(rule: str, backup: str, widening: Any, branch: Any, leaves: int) -> None:
    options = {"temperature": 0.5, "widening": widening, "branch": branch, "generator": SEED, "steps": STEPS}
    tree = grown(300, select=RULES.get(rule, rule), backup=backup, leaf_batch=leaves, **options)
    reference = Reference(list(tree.config.branch), rule, widening, 0.5, hard=backup == "max")
    reference.build(300, leaves)
    compare(tree, reference, 0, reference.root)
    assert tree.nfe == reference.nfe and tree.rollouts.size == reference.made
    assert tree.rollouts["start"].max() > 0, "the budget never left the root: the test compares too little"
    np.testing.assert_allclose(tree.log_weights(), reference.log_w, rtol=1e-5, atol=1e-5)  # kept in float32
