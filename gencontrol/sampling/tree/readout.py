"""What a tree says without a model call: leaf law, samples, best leaves, effective sizes, three estimates of log Z.

The tree's own estimate λ·v̂(root) is biased down when selection follows the values: a branch that looked poor at first
is not visited again (dts.md P1, measured).  The importance-weighted estimate (dts.md §8, derived) divides every descent
by the probability of its choices; the base estimate uses the rollouts that started at the root, which are plain samples
of the model.

Reading out ∝ exp(λ v̂) (the paper's rule) has a fault of its own, which the mean over trees shows and the median hides
(measured, `bench dts` part mixture): a node drawn a moment ago whose first leaf is lucky takes most of the mass, since
only further visits correct its value.  "robust" (ours) trusts a value as far as it has been visited.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.rng import seed_of, stream_seed
from gencontrol.sampling.tree.growth import Forest
from gencontrol.sampling.tree.nodes import Children, Floats, Ints
from gencontrol.sampling.tree.rules import Boltzmann

READOUTS = ("boltzmann", "robust", "argmax")
#: "robust": a child's weight has the factor N/(N + 16), and its probability is at most 4 times its share of the visits.
#: Chosen on the trees of seed 500 of the three mixtures among 4, 16, 64 and 1.5, 2, 4, 8.
_TRUSTED_VISITS, _VISIT_CAP = 16.0, 4.0

#: Two estimates of log Z further apart than this are reported (nats; dts.md §8).
DISAGREEMENT = 0.5


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


def progress(tree: Forest) -> Progress:
    """Return what the tree has reached."""
    roots, counts = slice(tree.roots), tree.counts
    log_z = tree.config.inverse_temperature * tree.nodes["value"][roots]
    known = tree.nodes["ready"][roots] & (not tree.config.hard)
    return Progress(
        tree.nfe,
        tree.reward_calls,
        tuple(counts["best"].tolist()),
        tuple(np.where(known, log_z, math.nan).tolist()),
        tuple(base_shares(tree).tolist()),
        tree.rounds,
    )


def leaf_law(tree: Forest, root: int = 0, rule: str = "boltzmann") -> tuple[Ints, Floats]:
    """Return (valid leaves, probabilities) of the law that reading out by draws has; rule: "boltzmann" or "robust"."""
    leaves, log_law = _log_law(tree, root, rule)
    law = np.exp(log_law)
    return leaves, law / law.sum()


def _log_law(tree: Forest, root: int, rule: str) -> tuple[Ints, Floats]:
    """`leaf_law` in logarithms, which keep leaves apart whose probabilities round to 0."""
    nodes, last = tree.nodes, tree.config.last
    mass = np.full(nodes.size, -np.inf)
    ids = np.array([root])
    mass[root] = 0.0
    for level in range(1, last + 1):
        ids = ids[nodes["ready"][ids]]
        if not len(ids):
            break
        children = nodes.children(ids)
        with np.errstate(divide="ignore"):
            logits = nodes.scores(children.ids, tree.config.inverse_temperature) + np.log(nodes.weights(children.ids))
        if rule == "robust" and level < last:  # a leaf's reward needs no second visit
            logits = _trusted(tree, children, logits)
        mass[children.ids] = logits + children.spread(mass[ids] - children.logsumexp(logits))
        ids = children.ids
    ids = ids[nodes["ready"][ids]]
    return ids, mass[ids]


def _trusted(tree: Forest, children: Children, logits: Floats) -> Floats:
    """Bound what rarely visited children weigh; both bounds fade as visits grow.

    Where selection follows exp(λ v̂), the shares of the visits are that law averaged over the build: they tend to the
    same limit, and a cap above 1 leaves it alone.  Other selections have other shares; there is no cap then.
    """
    visits = np.maximum(tree.nodes["visits"][children.ids], 1).astype(np.float64)
    logits = logits + np.log(visits / (visits + _TRUSTED_VISITS))
    if tree.config.select != Boltzmann() or tree.config.retilted:
        return logits
    counted = np.where(np.isfinite(logits), np.log(visits), -np.inf)
    share = counted - children.spread(children.logsumexp(counted))
    return np.minimum(logits - children.spread(children.logsumexp(logits)), share + math.log(_VISIT_CAP))


def greedy_leaf(tree: Forest, root: int = 0) -> int:
    """Return the leaf that following the best child leads to; −1 if there is none."""
    nodes, here = tree.nodes, root
    for _ in range(tree.config.last):
        if not nodes["ready"][here]:
            return -1
        ids = nodes.children(np.array([here])).ids
        value = nodes["value"][ids] + nodes["edge"][ids] / tree.config.inverse_temperature
        here = int(ids[np.argmax(np.where(nodes["ready"][ids], value, -np.inf))])
    return here


def sample(
    tree: Forest,
    n: int,
    generator: torch.Generator | int | None = None,
    *,
    root: int = 0,
    rule: str | None = None,
    replace: bool = True,
) -> Leaves:
    """Read leaves out; see `DiffusionTree.sample`.

    Raises:
        UsageError: unknown rule, no valid leaf, fewer than n leaves without replacement, or no such root.
    """
    _check_root(tree, root)
    if n < 1:
        raise UsageError(f"{n} samples were asked for; give at least 1.")
    rule = rule or ("argmax" if tree.config.select.greedy else "boltzmann")
    if rule not in READOUTS:
        raise UsageError(f"unknown rule '{rule}'.{nearest(rule, READOUTS)} Known: {', '.join(READOUTS)}.")
    leaves, law = _log_law(tree, root, rule)
    if not len(leaves):
        raise UsageError("the tree holds no valid leaf yet; build it first: for _ in tree.build(nfe=...): pass")
    if rule == "argmax":
        if n > 1 and not replace:
            raise UsageError("argmax reads out one leaf; for distinct samples take rule='boltzmann' or best(k).")
        return gather(tree, np.full(n, greedy_leaf(tree, root)))
    seed = stream_seed(tree.config.seed, "tree/readout", root) if generator is None else seed_of(generator)
    draw = np.random.default_rng(seed)
    if not replace:
        if n > len(leaves):
            raise UsageError(f"{n} distinct samples were asked for, but the tree has {len(leaves)} valid leaves.")
        keys = law + draw.gumbel(size=len(law))
        return gather(tree, leaves[np.argsort(-keys)[:n]])
    chance = np.exp(law)
    return gather(tree, leaves[draw.choice(len(leaves), size=n, p=chance / chance.sum())])


def best(tree: Forest, k: int = 1, *, root: int = 0) -> Leaves:
    """Return the valid leaves with the largest rewards, best first; fewer than k if there are fewer."""
    _check_root(tree, root)
    leaves = tree.leaves[tree.nodes["ready"][tree.leaves]]
    leaves = leaves[tree.nodes.root_of(leaves) == root]
    order = np.argsort(-tree.nodes["value"][leaves], kind="stable")[:k]
    return gather(tree, leaves[order])


def gather(tree: Forest, leaves: Ints) -> Leaves:
    """Return states and rewards of leaves.

    Raises:
        UsageError: there is none.
    """
    if not len(leaves):
        raise UsageError("the tree holds no valid leaf yet; build it first: for _ in tree.build(nfe=...): pass")
    x = tree.pools[-1].take(tree.nodes["row"][leaves], tree.chain.device)
    return Leaves(x, torch.from_numpy(tree.nodes["value"][leaves].copy()), torch.from_numpy(leaves.astype(np.int64)))


def log_z_tree(tree: Forest, root: int = 0) -> float:
    """λ·v̂(root): biased down under adaptive selection; NaN with the max backup or before a valid leaf."""
    if tree.config.hard or not tree.nodes["ready"][root]:
        return math.nan
    return float(tree.config.inverse_temperature * tree.nodes["value"][root])


def rollout_weights(tree: Forest, root: int = 0) -> Floats:
    """log w of every rollout of a root; see `Forest.log_weights`."""
    return tree.log_weights(tree.nodes.root_of(tree.rollouts["leaf"].astype(np.int64)) == root)


def stats(tree: Forest, root: int = 0) -> dict[str, float]:
    """Return the numbers that a report of one root needs; warns where tree and importance-weighted log Z disagree.

    Keys: nfe, rollouts, leaves (distinct), excluded, best, base_ess and tree_ess (numbers of samples), base_ess_share,
    iw_ess, log_z_tree, log_z_iw, log_z_base (NaN where not defined), bytes_per_node.
    """
    _check_root(tree, root)
    leaves, law = leaf_law(tree, root)
    weights, failed = rollout_weights(tree, root), tree.leaves[~tree.nodes["ready"][tree.leaves]]
    base, share = float(tree.counts["base"][root]), float(base_shares(tree)[root])
    found = {
        "nfe": float(tree.counts["nfe"][root]),
        "rollouts": float(len(weights)),
        "leaves": float(len(leaves)),
        "excluded": float((tree.nodes.root_of(failed) == root).sum()),
        "best": float(tree.counts["best"][root]),
        "base_ess": share * base,
        "base_ess_share": share,
        "tree_ess": float(1.0 / (law**2).sum()) if len(law) else math.nan,
        "iw_ess": _share(weights) * len(weights),
        "log_z_tree": log_z_tree(tree, root),
        "log_z_iw": _log_mean(weights),
        "log_z_base": float(tree.counts["log_w"][root] - math.log(base)) if base else math.nan,
        "bytes_per_node": tree.bytes() / tree.nodes.size,
    }
    gap = abs(found["log_z_tree"] - found["log_z_iw"])
    if gap > DISAGREEMENT:
        warnings.warn(
            f"the estimates of log Z disagree by {gap:.2f} nats (tree {found['log_z_tree']:.2f}, importance-weighted "
            f"{found['log_z_iw']:.2f}): the tree has not converged; give more nfe or select='tempered' or 'uniform'.",
            stacklevel=3,
        )
    return found


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


def base_shares(tree: Forest) -> Floats:
    """Effective share of the rollouts that started at each root; NaN without a positive weight."""
    log_w, log_w2, base = (tree.counts[name] for name in ("log_w", "log_w2", "base"))
    known = np.isfinite(log_w)
    gap = np.where(known, 2 * np.where(known, log_w, 0.0) - log_w2, 0.0)
    return np.where(known, np.exp(gap) / np.maximum(base, 1), math.nan)


def _check_root(tree: Forest, root: int) -> None:
    """Raises UsageError where there is no such prompt."""
    if not 0 <= root < tree.roots:
        raise UsageError(f"root {root} does not exist; the tree has {tree.roots} prompts, 0 to {tree.roots - 1}.")
