"""A forest (one tree per prompt) and one round of its growth: select K leaves, denoise together, score, back up.

Split from `tree`, which holds the public surface.  arXiv 2506.20701, §4 and its pseudocode; batching is dts.md §9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rng import Keyed, row_keys
from gencontrol.sampling.chain import Chain, Twist
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.tree.nodes import Floats, Ints, Lookup, Nodes, StatePool, Table
from gencontrol.sampling.tree.rules import Picks, Rule, Widening, select, undo


@dataclass(frozen=True)
class TreeConfig:
    """The choices that make a tree; stored in its file.

    Args:
        temperature: τ > 0 of the target p(x)·exp(r(x)/τ); λ = 1/τ.
        branch: indices into the time grid where the levels 1, 2, … lie; the last is the clean end.
        select: rule while building.
        hard: back the maximum up instead of the soft maximum.
        widening: children per node.
        leaf_batch: leaves per round and root, K.
        seed: of everything drawn.
        guidance, max_grad_norm: of the gradient proposal; 0 is none.
        retilted: temperature or reward were changed after the build, so that visits follow another law.
    """

    temperature: float
    branch: tuple[int, ...]
    select: Rule
    hard: bool
    widening: Widening
    leaf_batch: int
    seed: int
    guidance: float = 0.0
    max_grad_norm: float | None = None
    retilted: bool = False

    @property
    def inverse_temperature(self) -> float:
        """λ."""
        return 1.0 / self.temperature

    @property
    def last(self) -> int:
        """Level of clean samples."""
        return len(self.branch)


@dataclass(frozen=True)
class _Grown:
    """New states of a round: per level the picks (rows), their states and log p/q; and the model calls of each pick."""

    rows: list[Ints]
    states: list[Tensor | None]
    edges: list[Floats]
    calls: Ints


class Forest:
    """What a tree holds, and how it grows by a round.

    Args:
        chain: the base law, with one condition per root.
        scorer: of clean states.
        config: the choices.
        store: device of the stored states.
    """

    def __init__(self, chain: Chain, scorer: Scorer, config: TreeConfig, store: torch.device) -> None:
        self.chain, self.scorer, self.config, self.store = chain, scorer, config, store
        roots = chain.roots
        for name, entries in {"prompts": scorer.context.prompts, **scorer.context.metadata}.items():
            if entries is not None and len(entries) != roots:
                raise UsageError(f"the context has {len(entries)} {name}; give one per prompt, {roots}.")
        self.nodes = Nodes(roots)
        self.rollouts = Table({"leaf": np.int32, "log_ratio": np.float32, "start": np.int16})
        self.pools = [StatePool(store) for _ in range(config.last)]
        self.counts = Table(
            {
                "made": np.int64,
                "nfe": np.int64,
                "valid": np.int64,
                "mean": np.float64,
                "m2": np.float64,
                "best": np.float64,
                "base": np.int64,
                "log_w": np.float64,
                "log_w2": np.float64,
            }
        )
        self.counts.add(roots, best=math.nan, log_w=-math.inf, log_w2=-math.inf)
        self.siblings, self.sequences = Lookup(), Lookup()
        self.seeds = {config.seed}
        self.rounds = 0

    @property
    def roots(self) -> int:
        """Number of prompts."""
        return self.chain.roots

    @property
    def nfe(self) -> int:
        """Model calls so far, one per row and step, all roots together; a guided call (two network rows) counts one."""
        return int(self.counts["nfe"].sum())

    @property
    def reward_calls(self) -> int:
        """Samples scored so far."""
        return self.scorer.calls

    @property
    def leaves(self) -> Ints:
        """Clean nodes, those whose reward failed too."""
        return self.nodes.at_level(self.config.last)

    def bytes(self) -> int:
        """Host memory in use, states left out."""
        rollouts = self.rollouts.size * self.rollouts.bytes_per_row()
        return self.nodes.bytes() + rollouts + self.siblings.bytes() + self.sequences.bytes()

    def grow(self, width: Ints, poll: Callable[[], None] | None) -> None:
        """Select width[r] leaves of each root, denoise them together, score, back up."""
        config = self.config
        roots = np.repeat(np.arange(self.roots), width)
        number = np.concatenate([self.counts["made"][r] + np.arange(n) for r, n in enumerate(width)])
        keys = row_keys(config.seed, "tree", torch.from_numpy(roots), torch.from_numpy(number))
        draws = Keyed(row_keys(config.seed, "tree/select", torch.from_numpy(roots), torch.from_numpy(number)))
        picks = select(
            self.nodes,
            roots,
            draws.uniform((len(roots), config.last)).numpy(),
            rule=config.select,
            widening=config.widening,
            inverse_temperature=config.inverse_temperature,
            scale=self.reward_scale()[roots],
            last=config.last,
        )
        counters = self.scorer.counters()
        try:
            grown = self._denoise(picks, roots, keys, poll)
            scores = self._score(grown, roots)
            for pool, states in zip(self.pools, grown.states, strict=True):
                if states is not None:
                    pool.reserve(states)
        except BaseException:
            undo(self.nodes, picks, config.last)
            self.scorer.set_counters(counters)
            raise
        self._commit(picks, grown, scores, roots)
        np.add.at(self.counts["made"], roots, 1)
        np.add.at(self.counts["nfe"], roots, grown.calls)
        self.rounds += 1

    def _denoise(self, picks: Picks, roots: Ints, keys: Tensor, poll: Callable[[], None] | None) -> _Grown:
        """Run all rollouts level by level, so that a step is one batch of those that are there."""
        config, chain = self.config, self.chain
        grown = _Grown([], [], [], np.zeros(len(roots), np.int64))
        rows = np.zeros(0, np.int64)
        x: Tensor | None = None
        for level in range(config.last):
            joining = np.flatnonzero(picks.start == level)
            if len(joining):
                if level == 0:
                    fresh = chain.prior(keys[torch.from_numpy(joining)])
                else:
                    ids = picks.path[joining, level]
                    fresh = self.pools[level - 1].take(self.nodes["row"][ids], chain.device)
                x = fresh if x is None else torch.cat([x, fresh])
                rows = np.concatenate([rows, joining])
            if x is not None:
                index = torch.from_numpy(rows)
                span = (config.branch[level - 1] if level else 0, config.branch[level])
                walk = chain.advance(x, torch.from_numpy(roots)[index], keys[index], span, poll)
                x = walk.x
                grown.calls[rows] += walk.calls.numpy()
                grown.edges.append(walk.log_ratio.numpy())
            else:
                grown.edges.append(np.zeros(0))
            grown.rows.append(rows)
            grown.states.append(x)
        return grown

    def _score(self, grown: _Grown, roots: Ints) -> tuple[Floats, NDArray[np.bool_]]:
        """Rewards and validity of the new leaves (rows of the last level); a sequence of tokens is scored once."""
        x, owners = grown.states[-1], roots[grown.rows[-1]]
        if x is None:
            return np.zeros(0), np.zeros(0, np.bool_)
        if not self.chain.masked:
            scores = self.scorer(x, torch.from_numpy(owners))
            return scores.values.numpy(), scores.valid.numpy()
        keys = hashes(owners, x)
        known = self.sequences.find(keys)
        values, valid = self.nodes["value"][known], self.nodes["ready"][known]
        unseen = np.flatnonzero(known < 0)
        _, first, back = np.unique(keys[unseen], return_index=True, return_inverse=True)
        fresh = torch.from_numpy(unseen[first])
        scores = self.scorer(x[fresh.to(x.device)], torch.from_numpy(owners)[fresh])
        values[unseen], valid[unseen] = scores.values.numpy()[back], scores.valid.numpy()[back]
        return values, valid

    def _commit(self, picks: Picks, grown: _Grown, scores: tuple[Floats, NDArray[np.bool_]], roots: Ints) -> None:
        """Put the round's states into the tree and back their rewards up; nothing here can fail."""
        nodes, last = self.nodes, self.config.last
        path = picks.path
        for level in range(last):
            rows, states = grown.rows[level], grown.states[level]
            if states is None:
                continue
            parents = path[rows, level]
            continued = picks.start[rows] < level
            np.add.at(nodes["drawn"], parents[continued], 1)
            path[rows, level + 1] = self._attach(level + 1, parents, states, grown.edges[level])
            if level + 1 < last:
                np.add.at(nodes["visits"], path[rows, level + 1], 1)
        rows = grown.rows[-1]
        self.enter_rewards(path[rows, last], roots[rows], *scores)
        if self.chain.masked and grown.states[-1] is not None:
            self.sequences.add(hashes(roots[rows], grown.states[-1]), path[rows, last])
        for level in range(last - 1, -1, -1):
            touched = np.unique(path[:, level])
            nodes.back_up(touched[touched >= 0], self.config.inverse_temperature, hard=self.config.hard)
        ratio = picks.log_ratio + nodes["edge"][path[:, 1:]].sum(1)
        self.rollouts.add(len(path), leaf=path[:, last], log_ratio=ratio, start=picks.start)
        self._tally(slice(-len(path), None), roots)

    def _attach(self, level: int, parents: Ints, states: Tensor, edges: Floats) -> Ints:
        """Add children and return their nodes; equal siblings become one node of larger multiplicity.

        Gaussian states are never equal; token states are compared by a 64-bit hash of (parent, tokens).
        """
        nodes = self.nodes
        order = np.arange(len(parents))
        ids, twin = np.full(len(parents), -1), order
        if self.chain.masked:
            keys = hashes(parents, states)
            ids = self.siblings.find(keys)
            _, first, back = np.unique(keys, return_index=True, return_inverse=True)
            twin = first[back]
        new = np.flatnonzero((ids < 0) & (twin == order))
        rows = self.pools[level - 1].add(states[torch.from_numpy(new).to(states.device)])
        ids[new] = nodes.add(len(new), parent=parents[new], level=level, visits=1, row=rows, edge=edges[new])
        nodes.link(parents[new], ids[new])
        ids = ids[twin]
        np.add.at(nodes["multiplicity"], ids, 1)
        if self.chain.masked:
            self.siblings.add(keys, ids)
        return ids

    def remember_tokens(self) -> None:
        """Find equal siblings and scored sequences anew, after nodes came from elsewhere."""
        self.siblings, self.sequences = Lookup(), Lookup()
        if not self.chain.masked:
            return
        for level, pool in enumerate(self.pools, 1):
            ids, states = self.nodes.at_level(level), pool.all()
            if states is None:
                continue
            states = states[torch.from_numpy(self.nodes["row"][ids].astype(np.int64)).to(states.device)]
            self.siblings.add(hashes(self.nodes["parent"][ids], states), ids)
            if level == self.config.last:
                self.sequences.add(hashes(self.nodes.root_of(ids), states), ids)

    def enter_rewards(self, leaves: Ints, roots: Ints, values: Floats, valid: NDArray[np.bool_]) -> None:
        """Write rewards into leaves; best, mean and spread of each root follow."""
        self.nodes["value"][leaves] = np.where(valid, values, 0.0)
        self.nodes["ready"][leaves] = valid
        counts = self.counts
        roots, values = roots[valid], values[valid]
        new, mean, squares = np.bincount(roots, minlength=self.roots), np.zeros(self.roots), np.zeros(self.roots)
        np.add.at(mean, roots, values / new[roots])
        np.add.at(squares, roots, (values - mean[roots]) ** 2)
        combine_moments(counts, new, mean, squares)
        np.fmax.at(counts["best"], roots, values)

    def back_up_all(self) -> None:
        """Recompute every value from the leaves, and what is counted of the rollouts that started at the roots."""
        for level in range(self.config.last - 1, -1, -1):
            self.nodes.back_up(self.nodes.at_level(level), self.config.inverse_temperature, hard=self.config.hard)
        self.counts["base"][:] = 0
        self.counts["log_w"][:] = self.counts["log_w2"][:] = -math.inf
        self._tally(slice(None), self.nodes.root_of(self.rollouts["leaf"].astype(np.int64)))

    def log_weights(self, rollouts: slice | NDArray[np.bool_] = slice(None)) -> Floats:
        """log w of rollouts: λ·r + log p/q of the path − Σ log(probability/share of its choices).

        −inf for an invalid leaf, NaN for a descent by UCT.  mean(w) estimates Z, and {(leaf, w)} is a weighted sample
        of the target (dts.md §8, derived).
        """
        leaf = self.rollouts["leaf"][rollouts]
        log_w = self.config.inverse_temperature * self.nodes["value"][leaf] + self.rollouts["log_ratio"][rollouts]
        return np.where(self.nodes["ready"][leaf], log_w, -np.inf)

    def _tally(self, rollouts: slice, roots: Ints) -> None:
        """Add rollouts that started at a root (plain samples of the base law) to the sums of w and w² of their root."""
        base = self.rollouts["start"][rollouts] == 0
        log_w, roots = self.log_weights(rollouts)[base], roots[base]
        np.add.at(self.counts["base"], roots, 1)
        np.logaddexp.at(self.counts["log_w"], roots, log_w)
        np.logaddexp.at(self.counts["log_w2"], roots, 2 * log_w)

    def reward_scale(self) -> Floats:
        """Standard deviation of the leaf rewards of each root; 1 where there is none beyond rounding."""
        spread = np.sqrt(self.counts["m2"] / np.maximum(self.counts["valid"], 1))
        return np.where(spread > 1e-9 * np.abs(self.counts["mean"]), spread, 1.0)


def combine_moments(counts: Table, new: Ints, mean: Floats, squares: Floats) -> None:
    """Join further rewards (number, mean, squared deviations of each root) to the counted ones (Chan et al. 1979)."""
    gap, share = mean - counts["mean"], new / np.maximum(counts["valid"] + new, 1)
    counts["m2"][:] += squares + gap**2 * counts["valid"] * share
    counts["mean"][:] += gap * share
    counts["valid"][:] += new


def reward_twist(scorer: Scorer, strength: float, max_norm: float | None) -> Twist | None:
    """Return the proposal that climbs the reward with `strength` (guidance/temperature); None for 0."""
    return Twist(scorer.differentiable, lambda t: strength, max_norm) if strength > 0 else None


def branch_indices(chain: Chain, branch: int | str | Sequence[float]) -> tuple[int, ...]:
    """Return where in the time grid the levels lie; the last is the clean end.

    Raises:
        UsageError: a time that is not in the grid, or the one before a last step without noise, where siblings would be
            equal; a number of segments outside 1 … steps.
    """
    grid, steps = chain.grid, chain.steps
    equal = None if chain.step.stochastic_at(0.0) else steps - 1
    if branch == "all":
        return tuple(i for i in range(1, steps + 1) if i != equal)
    if isinstance(branch, int):
        if not 1 <= branch <= steps:
            raise UsageError(f"branch is {branch} segments, but the path has {steps} steps; give 1 to {steps}.")
        even = {round(i * steps / branch) for i in range(1, branch + 1)} - {0}
        return tuple(sorted(i for i in even if i != equal))
    if isinstance(branch, str):
        raise UsageError(f"unknown branch '{branch}'; give a number of segments, a list of times, or \"all\".")
    found = {steps}
    for time in branch:
        nearby = min(range(len(grid)), key=lambda i: abs(grid[i] - time))
        if abs(grid[nearby] - time) > 1e-6:
            raise UsageError(
                f"branch time {time:g} is not in the time grid; the nearest are {grid[nearby]:.6g} and "
                f"{grid[nearby + 1 if nearby < steps else nearby - 1]:.6g}."
            )
        if nearby == equal:
            raise UsageError(
                f"branch time {time:g} lies before the last step, which draws nothing: siblings there would be equal. "
                f"Take {grid[nearby - 1]:.6g} or leave it out."
            )
        found.add(nearby)
    return tuple(sorted(found))


def hashes(owners: Ints, tokens: Int64[Tensor, "b n"]) -> Ints:
    """64-bit hashes of (owner, tokens): a sum of hashes of (position, token), hashed with the owner."""
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    each = row_keys(0, "tree/token", places.flatten(), tokens.cpu().flatten())
    whole = each.reshape(tokens.shape).sum(1)
    return row_keys(0, "tree/sequence", torch.from_numpy(np.asarray(owners, np.int64)), whole).numpy()
