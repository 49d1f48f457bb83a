"""What a tree holds, and what it says without a model call: leaf law, samples, best leaves, estimates of log Z.

The tree's own estimate λ·v̂(root) is biased down when selection follows the values: a branch that looked poor at first
is not visited again (docs/methods/dts.md#p1, measured).  The importance-weighted estimate
(docs/methods/dts.md#estimates, derived) divides every descent by the probability of its choices; the base estimate uses
the rollouts that started at the root, which are plain samples of the model.

Reading out ∝ exp(λ v̂) (the paper's rule) takes every descent as if it had been uniform (docs/methods/dts.md#readout,
derived), so its law is biased wherever selection followed the values; and a node drawn a moment ago whose first leaf is
lucky takes most of the mass.  "robust" (ours) trusts a value as far as it has been visited.  "weighted" (ours) reads
the rollouts by their importance weights and is the default wherever descents have a probability.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.rng import seed_of, stream_seed
from gencontrol.sampling.chain import Chain
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.tree.nodes import Children, Floats, Ints, Lookup, Nodes, StatePool, Table
from gencontrol.sampling.tree.rules import Boltzmann, Rule, Shrunk, Widening

READOUTS = ("weighted", "boltzmann", "robust", "argmax")
#: "robust": a child's weight has the factor N/(N + 16), and its probability is at most 4 times its share of the visits.
#: Chosen on the trees of seed 500 of the three mixtures among 4, 16, 64 and 1.5, 2, 4, 8.
_TRUSTED_VISITS, _VISIT_CAP = 16.0, 4.0

#: Fewer effective rollouts than this are reported (an order of magnitude, derived).
FEW = 30.0


class Leaves(NamedTuple):
    """Clean samples of a tree: x [k *d], rewards [k] float64, nodes [k] (ids in the tree)."""

    x: Shaped[Tensor, "k *d"]
    rewards: Float[Tensor, " k"]
    nodes: Int64[Tensor, " k"]


@dataclass(frozen=True)
class Progress:
    """What a build has reached after a round.

    Args:
        nfe: model calls, one per row and step, all roots together (a guided call counts once).
        reward_calls: samples scored.
        best: largest reward of each root, NaN before the first valid leaf.
        log_z: λ·v̂ of each root, the tree's own, biased estimate of log Z; NaN with the max backup.
        ess: of each root, the effective share in (0, 1] of the rollouts that are plain base samples; NaN before one.
        rounds: rounds so far.
    """

    nfe: int
    reward_calls: int
    best: tuple[float, ...]
    log_z: tuple[float, ...]
    ess: tuple[float, ...]
    rounds: int


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


class Forest:
    """The data of a tree (one per prompt, so a forest) and all that is read from them.

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

    def log_weights(self, rollouts: slice | NDArray[np.bool_] = slice(None)) -> Floats:
        """log w of rollouts: λ·r + log p/q of the path − Σ log(probability/share of its choices).

        −inf for an invalid leaf, NaN for a descent by UCT.  mean(w) estimates Z, and {(leaf, w)} is a weighted sample
        of the target (docs/methods/dts.md#estimates, derived).
        """
        leaf = self.rollouts["leaf"][rollouts]
        log_w = self.config.inverse_temperature * self.nodes["value"][leaf] + self.rollouts["log_ratio"][rollouts]
        return np.where(self.nodes["ready"][leaf], log_w, -np.inf)

    def progress(self) -> Progress:
        """Return what the tree has reached."""
        roots, counts = slice(self.roots), self.counts
        log_z = self.config.inverse_temperature * self.nodes["value"][roots]
        known = self.nodes["ready"][roots] & (not self.config.hard)
        return Progress(
            self.nfe,
            self.reward_calls,
            tuple(counts["best"].tolist()),
            tuple(np.where(known, log_z, math.nan).tolist()),
            tuple(self.base_shares().tolist()),
            self.rounds,
        )

    @property
    def weighable(self) -> bool:
        """Whether descents had a probability, so that rollouts have importance weights (not by UCT)."""
        return not self.config.select.greedy

    def leaf_law(self, root: int = 0, rule: str | None = None) -> tuple[Ints, Floats]:
        """Return (valid leaves, probabilities) of the law of reading out.

        Args:
            rule: "weighted", "boltzmann" or "robust"; None is "weighted", for trees by UCT "boltzmann".
        """
        leaves, log_law = self._log_law(root, rule or ("weighted" if self.weighable else "boltzmann"))
        law = np.exp(log_law)
        return leaves, law / law.sum()

    def _weighted_law(self, root: int) -> tuple[Ints, Floats]:
        """Leaves with the log of their rollouts' weights; rollout m counts sqrt(m).

        Later rollouts descend by better values, and the square root is near the best of fixed coefficients whatever the
        rate of learning is (Owen & Zhou 2019); being fixed, they bring no bias.
        """
        mine = np.flatnonzero(self.nodes.root_of(self.rollouts["leaf"].astype(np.int64)) == root)
        log_w = self.log_weights()[mine] + 0.5 * np.log1p(np.arange(len(mine)))
        leaves, place = np.unique(self.rollouts["leaf"][mine].astype(np.int64), return_inverse=True)
        total = np.full(len(leaves), -np.inf)
        np.logaddexp.at(total, place, log_w)
        kept = np.isfinite(total)
        leaves, total = leaves[kept], total[kept]
        return leaves, total - total.max() if len(total) else total

    def _log_law(self, root: int, rule: str) -> tuple[Ints, Floats]:
        """`leaf_law` in logarithms of any scale, which keep leaves apart whose probabilities round to 0."""
        if rule == "weighted":
            return self._weighted_law(root)
        nodes, last = self.nodes, self.config.last
        mass = np.full(nodes.size, -np.inf)
        ids = np.array([root])
        mass[root] = 0.0
        for level in range(1, last + 1):
            ids = ids[nodes["ready"][ids]]
            if not len(ids):
                break
            children = nodes.children(ids)
            with np.errstate(divide="ignore"):
                logits = nodes.scores(children.ids, self.config.inverse_temperature)
                logits = logits + np.log(nodes.weights(children.ids))
            if rule == "robust" and level < last:  # a leaf's reward needs no second visit
                logits = self._trusted(children, logits)
            mass[children.ids] = logits + children.spread(mass[ids] - children.logsumexp(logits))
            ids = children.ids
        ids = ids[nodes["ready"][ids]]
        return ids, mass[ids]

    def _trusted(self, children: Children, logits: Floats) -> Floats:
        """Bound what rarely visited children weigh; both bounds fade as visits grow.

        Where selection follows exp(λ v̂), the shares of the visits are that law averaged over the build: they tend to
        the same limit, and a cap above 1 leaves it alone.  Other selections have other shares; there is no cap then.
        """
        visits = np.maximum(self.nodes["visits"][children.ids], 1).astype(np.float64)
        logits = logits + np.log(visits / (visits + _TRUSTED_VISITS))
        if self.config.select != Boltzmann() or self.config.retilted:
            return logits
        counted = np.where(np.isfinite(logits), np.log(visits), -np.inf)
        share = counted - children.spread(children.logsumexp(counted))
        return np.minimum(logits - children.spread(children.logsumexp(logits)), share + math.log(_VISIT_CAP))

    def greedy_leaf(self, root: int = 0) -> int:
        """Return the leaf that following the best child leads to; −1 if there is none."""
        nodes, here = self.nodes, root
        for _ in range(self.config.last):
            if not nodes["ready"][here]:
                return -1
            ids = nodes.children(np.array([here])).ids
            value = nodes["value"][ids] + nodes["edge"][ids] / self.config.inverse_temperature
            here = int(ids[np.argmax(np.where(nodes["ready"][ids], value, -np.inf))])
        return here

    def draw(
        self,
        n: int,
        generator: torch.Generator | int | None = None,
        *,
        root: int = 0,
        rule: str | None = None,
        replace: bool = True,
    ) -> Leaves:
        """Read leaves out without a model call.

        Args:
            generator: of the draws; None is a stream of the tree's seed (the same samples at each call).
            root: which prompt.
            rule: "weighted" takes rollouts by their importance weights (ours; the only one that is right in the limit
                of practicable budgets), "boltzmann" walks down ∝ exp(λ v̂) (the paper's), "robust" the same with bounds
                on what rarely visited nodes weigh (ours), "argmax" takes the best child (one leaf, repeated); None is
                "argmax" for a tree built by UCT, else "weighted".
            replace: False draws distinct leaves.

        Raises:
            UsageError: unknown rule, "weighted" on a tree built by UCT, no valid leaf, fewer than n leaves without
                replacement, or no such root.

        Warns where "boltzmann" or "robust" read a tree whose selection followed the values: they are biased there.
        """
        self._check_root(root)
        if n < 1:
            raise UsageError(f"{n} samples were asked for; give at least 1.")
        rule = rule or ("weighted" if self.weighable else "argmax")
        if rule not in READOUTS:
            raise UsageError(f"unknown rule '{rule}'.{nearest(rule, READOUTS)} Known: {', '.join(READOUTS)}.")
        if rule == "weighted" and not self.weighable:
            raise UsageError("a descent by UCT has no probability, so its rollouts have no weights; take another rule.")
        self._warn_of_bias(root, rule)
        leaves, law = self._log_law(root, rule)
        if not len(leaves):
            raise UsageError("the tree holds no valid leaf yet; build it first: for _ in tree.build(nfe=...): pass")
        if rule == "argmax":
            if n > 1 and not replace:
                raise UsageError("argmax reads out one leaf; for distinct samples take rule='boltzmann' or best(k).")
            return self.gather(np.full(n, self.greedy_leaf(root)))
        seed = stream_seed(self.config.seed, "tree/readout", root) if generator is None else seed_of(generator)
        draw = np.random.default_rng(seed)
        if not replace:
            if n > len(leaves):
                raise UsageError(f"{n} distinct samples were asked for, but the tree has {len(leaves)} valid leaves.")
            keys = law + draw.gumbel(size=len(law))
            return self.gather(leaves[np.argsort(-keys)[:n]])
        chance = np.exp(law)
        return self.gather(leaves[draw.choice(len(leaves), size=n, p=chance / chance.sum())])

    def _warn_of_bias(self, root: int, rule: str) -> None:
        """Say how far the values are from the weighted rollouts, where reading out follows adaptive values."""
        uniform = isinstance(self.config.select, Boltzmann | Shrunk) and self.config.select.floor == 1
        if rule in ("boltzmann", "robust") and self.weighable and not uniform and not self.config.hard:
            gap = _log_mean(self.rollout_weights(root)) - self.log_z_tree(root)
            whose = "the paper's read-out" if rule == "boltzmann" else "this read-out"
            warnings.warn(
                f"{whose} is biased on an adaptive tree: log Z weighted − log Z tree = {gap:+.2f}; rule='weighted' is "
                "not.",
                stacklevel=3,
            )

    def sample(
        self,
        n: int,
        generator: torch.Generator | int | None = None,
        *,
        root: int = 0,
        rule: str | None = None,
        replace: bool = True,
    ) -> Shaped[Tensor, "n *d"]:
        """Return the states alone of what `draw` reads out."""
        return self.draw(n, generator, root=root, rule=rule, replace=replace).x

    def best(self, k: int = 1, *, root: int = 0) -> Leaves:
        """Return the valid leaves with the largest rewards, best first; fewer than k if there are fewer."""
        self._check_root(root)
        leaves = self.leaves[self.nodes["ready"][self.leaves]]
        leaves = leaves[self.nodes.root_of(leaves) == root]
        order = np.argsort(-self.nodes["value"][leaves], kind="stable")[:k]
        return self.gather(leaves[order])

    def gather(self, leaves: Ints) -> Leaves:
        """Return states and rewards of leaves.

        Raises:
            UsageError: there is none.
        """
        if not len(leaves):
            raise UsageError("the tree holds no valid leaf yet; build it first: for _ in tree.build(nfe=...): pass")
        x = self.pools[-1].take(self.nodes["row"][leaves], self.chain.device)
        rewards = torch.from_numpy(self.nodes["value"][leaves].copy())
        return Leaves(x, rewards, torch.from_numpy(leaves.astype(np.int64)))

    def log_z_tree(self, root: int = 0) -> float:
        """λ·v̂(root): biased down under adaptive selection; NaN with the max backup or before a valid leaf."""
        if self.config.hard or not self.nodes["ready"][root]:
            return math.nan
        return float(self.config.inverse_temperature * self.nodes["value"][root])

    def rollout_weights(self, root: int = 0) -> Floats:
        """log w of every rollout of a root; see `log_weights`."""
        return self.log_weights(self.nodes.root_of(self.rollouts["leaf"].astype(np.int64)) == root)

    def stats(self, root: int = 0) -> dict[str, float]:
        """Return the numbers that a report of one root needs; warns where few rollouts carry the weighted law.

        Keys: nfe, rollouts, leaves (distinct), excluded, best, base_ess and tree_ess (numbers of samples),
        base_ess_share, iw_ess, log_z_tree, log_z_iw, log_z_base (NaN where not defined), bytes_per_node.
        """
        self._check_root(root)
        leaves, law = self.leaf_law(root)
        weights, failed = self.rollout_weights(root), self.leaves[~self.nodes["ready"][self.leaves]]
        base, share = float(self.counts["base"][root]), float(self.base_shares()[root])
        found = {
            "nfe": float(self.counts["nfe"][root]),
            "rollouts": float(len(weights)),
            "leaves": float(len(leaves)),
            "excluded": float((self.nodes.root_of(failed) == root).sum()),
            "best": float(self.counts["best"][root]),
            "base_ess": share * base,
            "base_ess_share": share,
            "tree_ess": float(1.0 / (law**2).sum()) if len(law) else math.nan,
            "iw_ess": _share(weights) * len(weights),
            "log_z_tree": self.log_z_tree(root),
            "log_z_iw": _log_mean(weights),
            "log_z_base": float(self.counts["log_w"][root] - math.log(base)) if base else math.nan,
            "bytes_per_node": self.bytes() / self.nodes.size,
        }
        if found["iw_ess"] < FEW:
            warnings.warn(
                f"few rollouts carry the law (effective number {found['iw_ess']:.1f}): shares are good to about "
                f"±{1 / math.sqrt(max(found['iw_ess'], 1)):.2f}; give more nfe, or raise the temperature.",
                stacklevel=2,
            )
        return found

    def base_shares(self) -> Floats:
        """Effective share of the rollouts that started at each root; NaN without a positive weight."""
        log_w, log_w2, base = (self.counts[name] for name in ("log_w", "log_w2", "base"))
        known = np.isfinite(log_w)
        gap = np.where(known, 2 * np.where(known, log_w, 0.0) - log_w2, 0.0)
        return np.where(known, np.exp(gap) / np.maximum(base, 1), math.nan)

    def _check_root(self, root: int) -> None:
        """Raises UsageError where there is no such prompt."""
        if not 0 <= root < self.roots:
            raise UsageError(f"root {root} does not exist; the tree has {self.roots} prompts, 0 to {self.roots - 1}.")


def _log_mean(log_w: Floats) -> float:
    """log mean exp; NaN without entries."""
    if not len(log_w) or np.isnan(log_w).any():
        return math.nan
    top = log_w.max()
    return float(top + np.log(np.exp(log_w - top).mean())) if np.isfinite(top) else -math.inf


def _share(log_w: Floats) -> float:
    """(Σw)²/(n Σw²), the effective share of a weighted sample; NaN without a positive weight."""
    if not len(log_w) or np.isnan(log_w).any() or not np.isfinite(log_w.max()):
        return math.nan
    w = np.exp(log_w - log_w.max())
    return float(w.sum() ** 2 / (w**2).sum() / len(w))
