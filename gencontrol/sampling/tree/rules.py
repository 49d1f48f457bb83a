"""How a tree chooses where the next rollout starts: progressive widening, and the choice among a node's children.

DTS draws a child ∝ exp(λ v̂) and DTS* takes the largest upper confidence bound (arXiv 2506.20701, §4); the shrunk, the
tempered and floored laws and the uniform one are ours (they keep the importance weights tame).  K rollouts choose
together: values are frozen, but each pick sees the visits and pending children of the picks before it, exactly as if
they had come one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gencontrol.errors import UsageError, nearest
from gencontrol.sampling.tree.nodes import Floats, Ints, Nodes, ranks

_BELOW_ONE = 1.0 - 1e-12
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Widening:
    """A node may have up to C·N^alpha children (drawn ones, also those under way).

    Args:
        constant: C > 0.
        alpha: in (0, 1].
    """

    constant: float = 2.0
    alpha: float = 0.8

    def __post_init__(self) -> None:
        if self.constant <= 0 or not 0 < self.alpha <= 1:
            raise UsageError(
                f"widening C·N^alpha needs C > 0 and alpha in (0, 1], not {self.constant} and {self.alpha}."
            )

    def room(self, drawn: Ints, visits: Ints) -> NDArray[np.bool_]:
        """Whether a node with so many children and visits gets another child."""
        return drawn < self.constant * visits.astype(np.float64) ** self.alpha


#: "paper" is DTS's setting for images (found); text used alpha 0.7 (found).  "small" searches from the third rollout
#: on, where the paper's is best-of-N for the first 36 (docs/methods/dts.md#p3, derived).
#: "steady" is ours for "shrunk" (docs/methods/dts.md#shrunk, chosen in pilots on other targets).
WIDENINGS = {
    "paper": Widening(2.0, 0.8),
    "text": Widening(2.0, 0.7),
    "small": Widening(1.0, 0.5),
    "steady": Widening(1.0, 0.65),
}


@dataclass(frozen=True)
class Standing:
    """What picks see where they stand.

    Args:
        nodes: node of each pick, [m].
        visits: its visits before this pick, [m].
        draws: uniform numbers, [m].
        inverse_temperature: λ.
        scale: spread of the rewards in the pick's tree, [m].
    """

    nodes: Ints
    visits: Ints
    draws: Floats
    inverse_temperature: float
    scale: Floats


@runtime_checkable
class Rule(Protocol):
    """Chooses a child for each pick and adds the pick's visit to it."""

    @property
    def greedy(self) -> bool:
        """Whether reading out takes the best child instead of drawing one."""
        ...

    def choose(self, nodes: Nodes, at: Standing) -> tuple[Ints, Floats]:
        """Return (children [m], log of (share among the children / probability of the choice) [m])."""
        ...


@dataclass(frozen=True)
class Boltzmann:
    """Draw a child ∝ exp(power·λ·v̂), mixed with a uniform draw.

    Args:
        power: 1 is DTS, 0 uniform; 0.5 is tempered.
        floor: share of the uniform draw, in [0, 1].  It is over all children; without it a child that has no valid
            leaf yet (its reward failed) is never tried again.
    """

    power: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.power < 0 or not 0 <= self.floor <= 1:
            raise UsageError(f"selection needs power >= 0 and floor in [0, 1], not {self.power} and {self.floor}.")

    @property
    def greedy(self) -> bool:
        """False."""
        return False

    def probabilities(self, nodes: Nodes, ids: Ints, inverse_temperature: float) -> tuple[Ints, Ints, Floats, Floats]:
        """Return (children, offsets, probabilities, shares) of nodes: share is a child's weight in the plain mean."""
        children = nodes.children(ids)
        weights = nodes.weights(children.ids)
        with np.errstate(divide="ignore", invalid="ignore"):
            logits = self.power * nodes.scores(children.ids, inverse_temperature) + np.log(weights)
        logits = np.where(weights > 0, logits, -np.inf)
        chance = np.exp(logits - children.spread(children.logsumexp(logits)))
        share = nodes.shares(children)
        return children.ids, children.offsets, (1 - self.floor) * chance + self.floor * share, share

    def choose(self, nodes: Nodes, at: Standing) -> tuple[Ints, Floats]:
        """Draw by the inverse distribution function, all picks at once."""
        return _draw(self, nodes, at)


@dataclass(frozen=True)
class Shrunk:
    """Draw a child by its value shrunk towards the mean of its siblings, mixed with a uniform draw (ours).

    With T_c = exp(λ·v̂_c), m the mean of T over the children and n_c the rollouts through c, π(c) is a mixture of
    floor·share and (1 - floor) times the normalised share·(pseudo·m + n_c·T_c)/(pseudo + n_c).  So one rollout that did
    badly does not bury a child, and the weight of one level, share/π, is at most 1/floor.  Clean leaves, whose reward
    is no estimate, are not shrunk (docs/methods/dts.md#shrunk, derived).

    Args:
        pseudo: κ ≥ 0, rollouts that the siblings' mean counts.
        floor: in (0, 1].
    """

    pseudo: float = 8.0
    floor: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.pseudo < math.inf or not 0 < self.floor <= 1:
            raise UsageError(f"selection needs pseudo >= 0 and floor in (0, 1], not {self.pseudo} and {self.floor}.")

    @property
    def greedy(self) -> bool:
        """False."""
        return False

    def probabilities(self, nodes: Nodes, ids: Ints, inverse_temperature: float) -> tuple[Ints, Ints, Floats, Floats]:
        """Return (children, offsets, probabilities, shares) of nodes: share is a child's weight in the plain mean."""
        children = nodes.children(ids)
        share = nodes.shares(children)
        log_t = nodes.scores(children.ids, inverse_temperature)
        mean = children.spread(children.logsumexp(log_t + np.log(share)))
        # a clean leaf has no children; of the others' visits the first was not a rollout
        passed = nodes["visits"][children.ids] - 1.0
        clean = nodes["count"][children.ids] == 0
        trust = np.where(clean, 1.0, passed / np.maximum(self.pseudo + passed, 1e-300))
        with np.errstate(divide="ignore"):
            logits = np.logaddexp(np.log1p(-trust) + mean, np.log(trust) + log_t) + np.log(share)
        chance = np.exp(logits - children.spread(children.logsumexp(logits)))
        return children.ids, children.offsets, (1 - self.floor) * chance + self.floor * share, share

    def choose(self, nodes: Nodes, at: Standing) -> tuple[Ints, Floats]:
        """Draw by the inverse distribution function, all picks at once."""
        return _draw(self, nodes, at)


def _draw(rule: Boltzmann | Shrunk, nodes: Nodes, at: Standing) -> tuple[Ints, Floats]:
    """Children drawn by a rule's probabilities, with the log of share/probability."""
    places, group = np.unique(at.nodes, return_inverse=True)
    ids, offsets, chance, share = rule.probabilities(nodes, places, at.inverse_temperature)
    cumulative = np.cumsum(chance)
    before = np.concatenate([[0.0], cumulative])[offsets[:-1]]
    total = cumulative[offsets[1:] - 1] - before
    level = before[group] + at.draws * _BELOW_ONE * total[group]
    chosen = np.clip(np.searchsorted(cumulative, level, side="right"), offsets[group], offsets[group + 1] - 1)
    np.add.at(nodes["visits"], ids[chosen], 1)
    return ids[chosen], np.log(share[chosen]) - np.log(chance[chosen])


@dataclass(frozen=True)
class Uct:
    """Take the child with the largest v̂ + c·scale·sqrt(log N(node)/N(child)); DTS*.

    Args:
        exploration: c ≥ 0; the paper's value is unknown, 1 is ours.
        scaled: multiply by the standard deviation of the tree's leaf rewards, so that c has no unit (ours).
    """

    exploration: float = 1.0
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.exploration < 0:
            raise UsageError(f"UCT needs exploration >= 0, not {self.exploration}.")

    @property
    def greedy(self) -> bool:
        """True."""
        return True

    def choose(self, nodes: Nodes, at: Standing) -> tuple[Ints, Floats]:
        """Choose in the order of the picks; the choice has no probability, so the log-ratio is NaN."""
        chosen = np.zeros(len(at.nodes), np.int64)
        constant = self.exploration * (at.scale if self.scaled else np.ones(len(at.nodes)))
        rank, _ = ranks(at.nodes)
        for turn in range(int(rank.max()) + 1):
            picks = np.flatnonzero(rank == turn)
            children = nodes.children(at.nodes[picks])
            bonus = np.sqrt(
                children.spread(np.log(at.visits[picks])) / np.maximum(nodes["visits"][children.ids], 1)
            ) * children.spread(constant[picks])
            value = nodes["value"][children.ids] + nodes["edge"][children.ids] / at.inverse_temperature
            best = children.ids[children.argmax(np.where(nodes["ready"][children.ids], value + bonus, -np.inf))]
            nodes["visits"][best] += 1
            chosen[picks] = best
        return chosen, np.full(len(chosen), np.nan)


RULES: dict[str, Rule] = {
    "shrunk": Shrunk(),
    "boltzmann": Boltzmann(),
    "tempered": Boltzmann(power=0.5, floor=0.1),
    "uniform": Boltzmann(power=0.0, floor=1.0),
    "uct": Uct(),
}


@dataclass(frozen=True)
class Picks:
    """Where rollouts start.

    Args:
        path: [m levels] nodes from the root on, −1 beyond the start.
        start: [m] level of the node to expand; the last level means that a finished leaf was chosen again.
        log_ratio: [m] Σ log(share/probability) of the choices: the importance weight of the descent.
    """

    path: Ints
    start: Ints
    log_ratio: Floats


def select(
    nodes: Nodes,
    roots: Ints,
    draws: Floats,
    *,
    rule: Rule,
    widening: Widening,
    inverse_temperature: float,
    scale: Floats,
    last: int,
) -> Picks:
    """Walk from the roots down until a node has room for a child; adds the visits and pending children of the picks.

    Args:
        roots: [m] root of each pick, in the order of the picks.
        draws: [m last] uniform numbers, one per level.
        scale: [m] spread of rewards, for UCT.
        last: level of clean samples.
    """
    path = np.full((len(roots), last + 1), -1, np.int64)
    start = np.full(len(roots), last, np.int64)
    log_ratio = np.zeros(len(roots))
    here, active = roots.copy(), np.arange(len(roots))
    np.add.at(nodes["visits"], roots, 1)
    for level in range(last + 1):
        path[active, level] = here[active]
        if level == last:
            # a clean leaf keeps N = 1 (the paper's pseudocode); the visits above were virtual
            np.subtract.at(nodes["visits"], here[active], 1)
            break
        expands, before = _widen(nodes, here[active], widening)
        start[active[expands]] = level
        active, before = active[~expands], before[~expands]
        if not len(active):
            break
        at = Standing(here[active], before, draws[active, level], inverse_temperature, scale[active])
        child, ratio = rule.choose(nodes, at)
        here[active] = child
        log_ratio[active] += ratio
    return Picks(path, start, log_ratio)


def _widen(nodes: Nodes, at: Ints, widening: Widening) -> tuple[NDArray[np.bool_], Ints]:
    """Which picks expand the node they stand at, and its visits before each pick; counts the pending children."""
    expands = np.zeros(len(at), np.bool_)
    rank, size = ranks(at)
    before = nodes["visits"][at] - size + rank  # the visits of this level's picks are already counted
    for turn in range(int(rank.max()) + 1):
        picks = np.flatnonzero(rank == turn)
        ids = at[picks]
        expands[picks] = widening.room(nodes["drawn"][ids], before[picks]) | ~nodes["ready"][ids]
        nodes["drawn"][ids[expands[picks]]] += 1
    return expands, before


def undo(nodes: Nodes, picks: Picks, last: int) -> None:
    """Take back the visits and pending children of `select`, after a round that did not finish."""
    for level in range(last):
        ids = picks.path[:, level]
        np.subtract.at(nodes["visits"], ids[ids >= 0], 1)
    expanding = np.flatnonzero(picks.start < last)
    np.subtract.at(nodes["drawn"], picks.path[expanding, picks.start[expanding]], 1)


def named(table: dict[str, Choice], name: str, what: str) -> Choice:
    """Return an entry of a table by name.

    Raises:
        UsageError: no such name; the message gives the nearest and all.
    """
    if name not in table:
        raise UsageError(f"unknown {what} '{name}'.{nearest(name, table)} Known: {', '.join(table)}.")
    return table[name]
