"""Diffusion Tree Sampling and Search (DTS, DTS*; arXiv 2506.20701): samples of p(x)·exp(r(x)/temperature), no training.

A rollout walks down the tree by the values backed up so far, expands a node that has room for a child, draws the rest
of a path from the model, scores the clean sample and backs the reward up the path with a soft maximum.  All states that
were paid for stay in the tree, so more model calls improve one estimate (anytime), and reading samples out is free.

K leaves are made per round and denoised together, level by level.  What a rollout draws is a pure function of (seed,
root, its number), so results depend on (seed, K) alone and a loaded tree goes on bit for bit.  Levels are the branch
times; level 0 is a dummy root whose children are fresh draws from the prior, denoised to the first branch time.
Batching is docs/methods/dts.md#batching.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.rng import Keyed, row_keys, seed_of
from gencontrol.sampling.chain import Twist, branch_indices, make_chain
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree.nodes import Floats, Ints, Lookup, hashes
from gencontrol.sampling.tree.readout import Forest, Progress, TreeConfig
from gencontrol.sampling.tree.rules import RULES, WIDENINGS, Picks, Rule, Widening, named, select, undo
from gencontrol.sampling.tree.store import identity, read_tree, restored, stored, write_tree
from gencontrol.types import Cond, RewardContext

#: Leaves that are moved to the device together when all are scored again.
_PART = 1024


@dataclass(frozen=True)
class _Grown:
    """New states of a round: per level the picks (rows), their states, log p/q and log p; model calls of each pick."""

    rows: list[Ints]
    states: list[Tensor | None]
    edges: list[Floats]
    chances: list[Floats]
    calls: Ints


#: Rounds in a row that only chose finished leaves; then the build stops (docs/methods/dts.md#p7; the number is ours).
MAX_IDLE_ROUNDS = 10_000


class DiffusionTree(Forest):
    """A tree (one per root) over the states of a stochastic sampler.

    Args:
        model: any Model, controls included; Gaussian or masked.
        reward: item reward, or a function of the (decoded) samples that returns one number each.
        shape: (number of prompts, *shape of one state); (n,) is short for (1, n).
        steps: sampler steps of a whole path.
        branch: number of equal segments, or the times in (0, 1] where levels lie (1 makes x_T a level of its own), or
            "all" for every time of the grid.  The paper's: 50 steps, levels at 40, 30, 20, 10: the default 5 segments.
        temperature: τ > 0; smaller follows the reward more.
        select: "shrunk" (ours), "boltzmann" (the paper's DTS), "uct" (DTS*), "uniform", "tempered", or a rule object.
        backup: "soft" or "max" (the limit τ → 0; the paper's choice for text).
        widening: "steady" (N^0.65, ours), "paper" (2·N^0.8), "text" (2·N^0.7), "small" (N^0.5), (C, alpha) or a
            Widening.
        leaf_batch: K, leaves per round and prompt.
        generator: torch.Generator or int; gives the seed of the tree.
        cond: condition with one row per prompt, or None.
        step, times: as in `sample`; the step must be stochastic (None: sde or ancestral).
        decode: clean states → what the reward takes.
        context: prompts and metadata for the reward, one entry per prompt.
        repeats: reward calls averaged per leaf.
        reward_batch: samples per decode and reward call.
        autocast: context of the model calls.
        max_grad_norm: for `guidance`.
        guidance: > 0 moves every transition by guidance·std²·∇r(x0 estimate)/τ (needs a differentiable reward); the
            log-ratio p/q enters backup and selection, so that the target stays the same
            (docs/methods/dts.md#gradient-proposals, derived).
        store: device of the stored states; None is the model's.

    Raises:
        UsageError: a deterministic step, a branch time that is not in the grid or where siblings would be equal,
            temperature ≤ 0, an unknown name, or a count below 1.
    """

    def __init__(
        self,
        model: Any,
        reward: Any,
        shape: Sequence[int],
        *,
        steps: int | None = None,
        branch: int | str | Sequence[float] = 5,
        temperature: float = 1.0,
        select: str | Rule = "shrunk",
        backup: str = "soft",
        widening: str | tuple[float, float] | Widening = "steady",
        leaf_batch: int = 16,
        generator: torch.Generator | int | None = None,
        cond: Cond = None,
        step: str | Step | None = None,
        times: str | Sequence[float] | Tensor | None = None,
        decode: Callable[[Tensor], Any] | None = None,
        context: RewardContext | None = None,
        repeats: int = 1,
        reward_batch: int = 64,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        guidance: float = 0.0,
        max_grad_norm: float | None = None,
        store: torch.device | str | None = None,
    ) -> None:
        whole = (1, *shape) if len(shape) == 1 else tuple(shape)
        if not math.isfinite(temperature) or temperature <= 0:
            raise UsageError(
                f"temperature is {temperature}; it must be > 0 (for the limit 0 use backup='max', select='uct')."
            )
        if backup not in ("soft", "max"):
            raise UsageError(f"unknown backup '{backup}'.{nearest(backup, ('soft', 'max'))} Known: soft, max.")
        if leaf_batch < 1 or whole[0] < 1 or guidance < 0:
            raise UsageError(
                f"leaf_batch {leaf_batch} and the number of prompts {whole[0]} must be at least 1, guidance "
                f"{guidance} at least 0."
            )
        scorer = Scorer(reward, decode, context or RewardContext(), reward_batch, repeats)
        chain = make_chain(
            model,
            whole[1:],
            roots=whole[0],
            steps=steps,
            step=step,
            times=times,
            cond=cond,
            autocast=autocast,
            twist=_twist(scorer, guidance / temperature, max_grad_norm),
        )
        rule = select if not isinstance(select, str) else named(RULES, select, "selection rule")
        if isinstance(widening, str):
            room = named(WIDENINGS, widening, "widening")
        else:
            room = widening if isinstance(widening, Widening) else Widening(*widening)
        levels = branch_indices(chain, branch)
        seed = seed_of(generator)
        config = TreeConfig(temperature, levels, rule, backup == "max", room, leaf_batch, seed, guidance, max_grad_norm)
        super().__init__(chain, scorer, config, torch.device(store) if store is not None else chain.device)

    def build(
        self, nfe: int, *, poll: Callable[[], None] | None = None, total: bool = False, idle: int = MAX_IDLE_ROUNDS
    ) -> Iterator[Progress]:
        """Spend up to `nfe` model calls per root; yields after every round, and may be left and resumed at will.

        A rollout is started while a whole path still fits.  An exception inside a round (a reward that fails, Ctrl-C
        raised by `poll`) leaves the tree as it was before that round.

        Args:
            nfe: budget per root, of this call.
            poll: called before every round and between sampler steps; may raise.
            total: the budget counts from the very beginning of the tree.  So the rounds are the same, and with them
                the bits, however often a search was interrupted and called again.
            idle: the build ends, with a warning, after so many rounds in a row that only chose finished leaves.

        Raises:
            UsageError: the budget is smaller than one path.
            RewardError: the reward broke its contract, or nothing it scored was valid.
        """
        if nfe < self.chain.steps:
            raise UsageError(
                f"nfe is {nfe}, less than the {self.chain.steps} model calls of one path; give at least that many."
            )
        return self._rounds(nfe if total else self.counts["nfe"] + nfe, poll, idle)

    def _rounds(self, limit: int | Ints, poll: Callable[[], None] | None, most: int) -> Iterator[Progress]:
        """The rounds of `build`, which checks its arguments at once and not at the first round."""
        idle = 0
        while True:
            if poll is not None:
                poll()
            room = (limit - self.counts["nfe"]) // self.chain.steps
            width = np.clip(room, 0, self.config.leaf_batch)
            if not width.any():
                return
            spent = self.nfe
            self.grow(width, poll)
            idle = idle + 1 if self.nfe == spent else 0
            if idle >= most:
                warnings.warn(
                    f"the last {idle} rounds chose finished leaves only, so the build stops at {self.nfe} model calls: "
                    "the tree holds all it will find; a wider tree (larger C or alpha) goes on.",
                    stacklevel=2,
                )
                return
            yield self.progress()

    def grow(self, width: Ints, poll: Callable[[], None] | None) -> None:
        """Run one round: select width[r] leaves of each root, denoise them together, score, back up."""
        config, chain = self.config, self.chain
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
        grown = _Grown([], [], [], [], np.zeros(len(roots), np.int64))
        rows, x = np.zeros(0, np.int64), None
        try:
            for level in range(config.last):  # level by level, so that a step is one batch of those that are there
                joining = np.flatnonzero(picks.start == level)
                if len(joining):
                    fresh = self._starts(picks, joining, level, keys)
                    x = fresh if x is None else torch.cat([x, fresh])
                    rows = np.concatenate([rows, joining])
                edges = chances = np.zeros(0)
                if x is not None:
                    index = torch.from_numpy(rows)
                    span = (config.branch[level - 1] if level else 0, config.branch[level])
                    walk = chain.advance(x, torch.from_numpy(roots)[index], keys[index], span, poll)
                    x, edges, chances = walk.x, walk.log_ratio.numpy(), walk.log_prob.numpy()
                    grown.calls[rows] += walk.calls.numpy()
                grown.edges.append(edges)
                grown.chances.append(chances)
                grown.rows.append(rows)
                grown.states.append(x)
            scores = self._score(grown, roots)
            for pool, states in zip(self.pools, grown.states, strict=True):
                if states is not None:
                    pool.reserve(states)
        except BaseException:
            undo(self.nodes, picks, config.last)
            self.scorer.set_counters(counters)
            raise
        self._commit(picks, grown, scores, roots)

    def _starts(self, picks: Picks, joining: Ints, level: int, keys: Tensor) -> Tensor:
        """States of the picks that start at a level: fresh ones from the prior, or those of their nodes."""
        if level == 0:
            return self.chain.prior(keys[torch.from_numpy(joining)])
        ids = picks.path[joining, level]
        return self.pools[level - 1].take(self.nodes["row"][ids], self.chain.device)

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
            path[rows, level + 1] = self._attach(level + 1, parents, states, grown.edges[level], grown.chances[level])
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
        np.add.at(self.counts["made"], roots, 1)
        np.add.at(self.counts["nfe"], roots, grown.calls)
        self.rounds += 1

    def _attach(self, level: int, parents: Ints, states: Tensor, edges: Floats, chances: Floats) -> Ints:
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
        facts = {"parent": parents[new], "row": rows, "edge": edges[new], "log_p": chances[new]}
        ids[new] = nodes.add(len(new), level=level, visits=1, **facts)
        nodes.link(parents[new], ids[new])
        ids = ids[twin]
        np.add.at(nodes["multiplicity"], ids, 1)
        if self.chain.masked:
            self.siblings.add(keys, ids)
        return ids

    def _remember_tokens(self) -> None:
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
        roots, values = roots[valid], values[valid]
        new, mean, squares = np.bincount(roots, minlength=self.roots), np.zeros(self.roots), np.zeros(self.roots)
        np.add.at(mean, roots, values / new[roots])
        np.add.at(squares, roots, (values - mean[roots]) ** 2)
        self._add_moments(new, mean, squares)
        np.fmax.at(self.counts["best"], roots, values)

    def back_up_all(self) -> None:
        """Recompute every value from the leaves, and what is counted of the rollouts that started at the roots."""
        for level in range(self.config.last - 1, -1, -1):
            self.nodes.back_up(self.nodes.at_level(level), self.config.inverse_temperature, hard=self.config.hard)
        self.counts["base"][:] = 0
        self.counts["log_w"][:] = self.counts["log_w2"][:] = -math.inf
        self._tally(slice(None), self.nodes.root_of(self.rollouts["leaf"].astype(np.int64)))

    def _add_moments(self, new: Ints, mean: Floats, squares: Floats) -> None:
        """Join further rewards (number, mean, squared deviations of each root) to the counted (Chan et al. 1979)."""
        counts = self.counts
        gap, share = mean - counts["mean"], new / np.maximum(counts["valid"] + new, 1)
        counts["m2"][:] += squares + gap**2 * counts["valid"] * share
        counts["mean"][:] += gap * share
        counts["valid"][:] += new

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

    def retilt(self, temperature: float | None = None, reward: Any = None) -> DiffusionTree:
        """Set a new temperature or score the stored leaves by a new reward, and back up again; no model call.

        The tree itself changes and is returned.  The descents' probabilities stay those of the build.

        Raises:
            UsageError: temperature ≤ 0, or a tree grown with gradient guidance gets another reward (its log-ratios
                belong to the chain and stay valid, but new rollouts would follow the old gradient).
        """
        if temperature is not None and (not math.isfinite(temperature) or temperature <= 0):
            raise UsageError(f"temperature is {temperature}; it must be > 0.")
        if reward is not None:
            if self.config.guidance > 0:
                raise UsageError("this tree was grown along its reward's gradient; build a new one for another.")
            self._score_again(reward)
        if temperature is not None:
            self.config = replace(self.config, temperature=temperature)
            twist = _twist(self.scorer, self.config.guidance / temperature, self.config.max_grad_norm)
            self.chain = replace(self.chain, twist=twist)
        self.config = replace(self.config, retilted=True)
        self.back_up_all()
        return self

    def _score_again(self, reward: Any) -> None:
        """Score every stored leaf by a new reward; the tree changes only when all are scored."""
        nodes, old = self.nodes, self.scorer
        scorer = Scorer(reward, old.decode, old.context, old.batch, old.repeats, calls=old.calls)
        leaves = self.leaves
        roots = nodes.root_of(leaves)
        found = []
        for first in range(0, len(leaves), _PART):
            part = slice(first, first + _PART)
            x = self.pools[-1].take(nodes["row"][leaves[part]], self.chain.device)
            found.append(scorer(x, torch.from_numpy(roots[part])))
        self.scorer = scorer
        for name, value in {"valid": 0, "mean": 0.0, "m2": 0.0, "best": math.nan}.items():
            self.counts[name][:] = value
        if found:
            values, valid = torch.cat([part.values for part in found]), torch.cat([part.valid for part in found])
            self.enter_rewards(leaves, roots, values.numpy(), valid.numpy())

    def merge(self, other: DiffusionTree) -> DiffusionTree:
        """Take over the rollouts of another tree of the same problem and another seed.

        Root children are independent draws, so this is what one larger tree could have drawn
        (docs/methods/dts.md#batching, derived).

        Raises:
            UsageError: model, grid, branch, temperature, prompts or reward differ, or the seeds are equal.
        """
        mine, theirs = self._identity(), other._identity()
        for key, value in mine.items():
            if theirs[key] != value:
                raise UsageError(f"these trees cannot be merged: their {key} differs.")
        if shared := self.seeds & other.seeds:
            raise UsageError(f"both trees hold the rollouts of seed {min(shared)}; build them with different seeds.")
        nodes, added, roots = self.nodes, other.nodes, self.roots
        shift = nodes.size - roots
        rows = added["row"].copy()
        for level, pool in enumerate(other.pools, 1):
            states = pool.all()
            if states is not None:
                rows[added["level"] == level] += self.pools[level - 1].add(states)[0] if len(states) else 0
        columns = {name: column[roots:] for name, column in added.arrays().items()}
        parent = np.where(columns["parent"] < roots, columns["parent"], columns["parent"] + shift)
        ids = nodes.add(added.size - roots, **(columns | {"parent": parent, "row": rows[roots:]}))
        nodes["start"][ids] = nodes["count"][ids] = 0
        nodes.link(parent, ids)
        nodes["drawn"][:roots] += added["drawn"][:roots]
        nodes["visits"][:roots] += added["visits"][:roots] - 1
        columns = other.rollouts.arrays()
        self.rollouts.add(other.rollouts.size, **(columns | {"leaf": columns["leaf"] + shift}))
        counts = other.counts
        self._add_moments(counts["valid"], counts["mean"], counts["m2"])
        self.counts["best"][:] = np.fmax(self.counts["best"], counts["best"])
        self.counts["nfe"][:] += counts["nfe"]
        self.rounds += other.rounds
        self.scorer.add_counters(other.scorer.counters())
        self.seeds |= other.seeds
        self._remember_tokens()
        self.back_up_all()
        return self

    # ---- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the tree to one safetensors file, atomically.

        Raises:
            UsageError: the rule or step is not one of ours and has no name to store.
            DiskError: the disk is full or the folder cannot be written.
        """
        facts = {
            "identity": self._identity(),
            "config": asdict(self.config) | {"select": stored(self.config.select)},
            "step": stored(self.chain.step),
            "grid": self.chain.grid,
            "item_shape": self.chain.item_shape,
            "roots": self.roots,
            "rounds": self.rounds,
            "seeds": sorted(self.seeds),
            "repeats": self.scorer.repeats,
            "scorer": self.scorer.counters(),
        }
        tables = {"nodes": self.nodes, "rollouts": self.rollouts, "counts": self.counts}
        arrays = {f"{name}.{key}": column for name, table in tables.items() for key, column in table.arrays().items()}
        arrays["slots"] = self.nodes.slots()
        tensors = {key: torch.from_numpy(np.ascontiguousarray(value).copy()) for key, value in arrays.items()}
        for level, pool in enumerate(self.pools):
            if (states := pool.all()) is not None:
                tensors[f"states.{level}"] = states.cpu()
        write_tree(path, facts, tensors)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        reward: Any,
        *,
        cond: Cond = None,
        decode: Callable[[Tensor], Any] | None = None,
        context: RewardContext | None = None,
        reward_batch: int = 64,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        store: torch.device | str | None = None,
    ) -> DiffusionTree:
        """Read a tree; building goes on as if it had never stopped.

        Raises:
            UsageError: not a tree file, or one of another model, condition, prompt or reward (the message says which).
        """
        facts, tensors = read_tree(path)
        config, grid = facts["config"], facts["grid"]
        tree = cls(
            model,
            reward,
            (facts["roots"], *facts["item_shape"]),
            branch=[grid[index] for index in config["branch"]],
            temperature=config["temperature"],
            select=restored(config["select"]),
            backup="max" if config["hard"] else "soft",
            widening=Widening(**config["widening"]),
            leaf_batch=config["leaf_batch"],
            generator=config["seed"],
            cond=cond,
            step=restored(facts["step"]),
            times=grid,
            decode=decode,
            context=context,
            repeats=facts["repeats"],
            reward_batch=reward_batch,
            autocast=autocast,
            guidance=config["guidance"],
            max_grad_norm=config["max_grad_norm"],
            store=store,
        )
        tree.config = replace(tree.config, retilted=config["retilted"])
        for key, value in tree._identity().items():
            if facts["identity"][key] != value:
                raise UsageError(
                    f"this tree was built with another {key} ({facts['identity'][key]}, now {value}); "
                    f"give the same {key}, or build a new tree."
                )
        for name, table in {"nodes": tree.nodes, "rollouts": tree.rollouts, "counts": tree.counts}.items():
            if "nodes.log_p" not in tensors:  # a tree of version 0.1.0, which did not keep them
                tensors["nodes.log_p"] = torch.full((len(tensors["nodes.parent"]),), math.nan)
            columns = {key: tensors[f"{name}.{key}"].numpy() for key in table.arrays()}
            table.size = 0
            table.add(len(next(iter(columns.values()))), **columns)
        tree.nodes.set_slots(tensors["slots"].numpy())
        for level, pool in enumerate(tree.pools):
            if f"states.{level}" in tensors:
                pool.add(tensors[f"states.{level}"])
        tree._remember_tokens()
        tree.rounds, tree.seeds = facts["rounds"], set(facts["seeds"])
        tree.scorer.set_counters(facts["scorer"])
        return tree

    def _identity(self) -> dict[str, str]:
        """What must agree for two trees to speak of the same problem."""
        law = (repr(self.chain.step), self.config.branch, self.config.guidance)
        return identity(self.chain, self.scorer, law, self.config.temperature)


def _twist(scorer: Scorer, strength: float, max_norm: float | None) -> Twist | None:
    """The proposal that climbs the reward with `strength` (guidance/temperature); None for 0."""
    return Twist(scorer.differentiable, lambda t: strength, max_norm) if strength > 0 else None
