"""Trees over tokens with an exact law: the distribution of leaves, and calls until the best sequence is found.

The base is an enumerable law whose sampler reveals one token per step (confidence order, temperature 1), which is
exact, so the tilted law and the best sequence are known.  Law: 3^3 sequences, random table and rewards.  Search: 4^5
sequences, rewards of neighbouring pairs (random, another problem per seed); DTS* as the paper sets it for text (C = 2,
α = 0.7, max backup), four leaves per round.

The size 3^3 was chosen on seeds 100-102: with 3^4 the noise of independent draws alone (SNIS) is 0.04 at 2e4 calls,
above the bound.  C = 1 was chosen on seeds 100-119; α = 0.5 stops there, since the four distinct tokens at the root are
drawn again and again and count as children.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.bench.base import Check, table
from gencontrol.bench.dts.measure import Law, Peer, grow, over, tree_law
from gencontrol.models.exact import EnumerableTokens
from gencontrol.process import MaskedProcess
from gencontrol.rng import stream
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.masked_steps import Confidence
from gencontrol.sampling.tree.nodes import Floats
from gencontrol.sampling.tree.rules import Uct
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.types import RewardContext, index_cond

STEP = Confidence(temperature=1.0)
SEARCHES: dict[str, tuple[float, float]] = {"DTS* (C=2, α=.7, max)": (2.0, 0.7), "DTS* (C=1, α=.7, max)": (1.0, 0.7)}


def random_tokens(vocabulary: int, length: int, seed: int) -> tuple[EnumerableTokens, Float[Tensor, "*v"]]:
    """A law ∝ exp of normal numbers, and normal rewards, by table."""
    generator = stream(seed, "dts/tokens")
    shape = (vocabulary,) * length
    table_, rewards = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return EnumerableTokens(table_.exp(), MaskedProcess(vocabulary, vocabulary)), rewards


def pair_rewards(vocabulary: int, length: int, seed: int) -> Float[Tensor, "*v"]:
    """Σ_i J_i[x_i, x_{i+1}] with normal J: partial sequences say something about the whole."""
    generator = stream(seed, "dts/pairs")
    total = torch.zeros((vocabulary,) * length, dtype=torch.float64)
    for i in range(length - 1):
        pair = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
        total += pair.reshape([vocabulary if axis in (i, i + 1) else 1 for axis in range(length)])
    return total


def looked_up(rewards: Float[Tensor, "*v"]) -> Callable[[Tensor], Tensor]:
    """The reward of a table."""
    return lambda x: rewards[tuple(x.unbind(1))]


# ---- the law ------------------------------------------------------------------------------------------------------


def law_part(*, nfe: int, seeds: Sequence[int], vocabulary: int = 3, length: int = 3) -> dict[str, Any]:
    """Total variation of the leaf law to the tilted law: of single trees and of the mean over trees."""
    rows: dict[str, Any] = {}
    shape = (vocabulary,) * length
    model, rewards = random_tokens(vocabulary, length, 0)
    target = model.tilt(rewards).table.flatten().numpy()

    def entry(laws: Sequence[Floats]) -> dict[str, Any]:
        each = over(np.abs(law - target).sum() / 2 for law in laws)
        return {"single": each, "mean": float(np.abs(np.mean(laws, 0) - target).sum() / 2)}

    for select, widening in (("boltzmann", "paper"), ("boltzmann", "text"), ("tempered", "text"), ("uniform", "text")):
        tree = DiffusionTree(
            model,
            looked_up(rewards),
            (len(seeds), length),
            steps=length,
            branch="all",
            select=select,
            widening=widening,
            step=STEP,
            leaf_batch=32,
            generator=seeds[0],
            reward_batch=1024,
        )
        grow(tree, nfe)
        for name, rule in (("read-out", "boltzmann"), ("robust read-out", "robust")):
            laws = [_histogram(tree_law(tree, root, rule), shape) for root in range(tree.roots)]
            rows[f"{select}, {widening}: {name}"] = entry(laws)
        rows[f"{select}, {widening}: weighted rollouts"] = entry(
            [_weighted(tree, root, shape) for root in range(tree.roots)]
        )
    chain = make_chain(model, (length,), steps=length, step=STEP)
    for peer in (Peer("SNIS", "snis", {}), Peer("SMC, weights carried", "smc", {})):
        runs = [peer.run(chain, looked_up(rewards), nfe, temperature=1.0, seed=seed) for seed in seeds]
        rows[peer.label] = entry([_histogram(Law.of(run.samples, run.log_weights), shape) for run in runs])
    return rows


def _histogram(law: Law, shape: tuple[int, ...]) -> Floats:
    """Probabilities of all sequences."""
    places = np.ravel_multi_index(tuple(law.x.long().numpy().T), shape)
    return np.bincount(places, law.weights.numpy(), math.prod(shape)).astype(np.float64)


def _weighted(tree: DiffusionTree, root: int, shape: tuple[int, ...]) -> Floats:
    """The law of a root's rollouts under their importance weights."""
    leaf = tree.rollouts["leaf"].astype(np.int64)
    leaf = leaf[tree.nodes.root_of(leaf) == root]
    x = tree.pools[-1].take(tree.nodes["row"][leaf], tree.chain.device)
    return _histogram(Law.of(x, torch.from_numpy(tree.rollout_weights(root))), shape)


# ---- the search ---------------------------------------------------------------------------------------------------


def search_part(*, cap: int, seeds: Sequence[int], vocabulary: int = 4, length: int = 5) -> dict[str, list[float]]:
    """Model calls until the best sequence is first drawn, a problem per seed; infinite beyond `cap`."""
    problems = [pair_rewards(vocabulary, length, seed) for seed in seeds]
    laws = [random_tokens(vocabulary, length, seed)[0].table for seed in seeds]
    flat = torch.full_like(laws[0], 1.0)
    model = EnumerableTokens(flat, MaskedProcess(vocabulary, vocabulary))
    cond = torch.stack(laws)  # factors on the flat table: every prompt has its own law
    tops = np.array([float(rewards.max()) for rewards in problems])  # rewards come back in float32
    values = torch.stack(problems)

    def reward(x: Tensor, context: RewardContext) -> Tensor:
        return values[(torch.tensor(context.metadata["problem"]), *x.unbind(1))]

    found: dict[str, list[float]] = {}
    numbers = list(range(len(seeds)))
    for label, widening in SEARCHES.items():
        tree = DiffusionTree(
            model,
            reward,
            (len(seeds), length),
            steps=length,
            branch="all",
            select=Uct(1.0),
            backup="max",
            widening=widening,
            step=STEP,
            leaf_batch=4,
            generator=seeds[0],
            cond=cond,
            context=RewardContext(metadata={"problem": numbers}),
        )
        hits = np.full(len(seeds), math.inf)

        def look(tree: DiffusionTree = tree, hits: Floats = hits) -> bool:
            there = (tree.counts["best"] >= tops - 1e-5) & np.isinf(hits)
            hits[there] = tree.counts["nfe"][there]
            return bool(np.isfinite(hits).all())

        grow(tree, cap, look)
        found[label] = hits.tolist()
    chain = make_chain(model, (length,), steps=length, step=STEP)
    found["best-of-N"] = []
    for i, seed in enumerate(seeds):
        one = replace(chain, cond=index_cond(cond, torch.tensor([i])))
        run = Peer("best-of-N", "best-of-n", {}).run(one, looked_up(problems[i]), cap, temperature=1.0, seed=seed)
        hit = (run.rewards >= tops[i] - 1e-5).nonzero()
        found["best-of-N"].append(float((int(hit[0]) + 1) * length) if len(hit) else math.inf)
    return found


def run(
    *, nfe: int, seeds: Sequence[int], searches: Sequence[int], cap: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run both; returns rows, checks and the printed tables."""
    laws = law_part(nfe=nfe, seeds=seeds)
    for name, row in laws.items():
        say(f"tokens {name}: TV {row['single'].value:.4f}, of the mean law {row['mean']:.4f}")
    calls = search_part(cap=cap, seeds=searches)
    medians = {label: float(np.median(values)) for label, values in calls.items()}
    printed = table(
        f"Tokens: total variation of the leaf law to the tilted law at {nfe:.0e} model calls, {len(seeds)} trees",
        ("method", "single tree", "mean law over trees"),
        [[name, row["single"], row["mean"]] for name, row in laws.items()],
    ) + table(
        f"Tokens: model calls until the best of 4^5 sequences is drawn, {len(searches)} problems",
        ("method", "median", "lower quartile", "upper quartile"),
        [
            [label, f"{medians[label]:.0f}", *(f"{q:.0f}" for q in np.quantile(v, (0.25, 0.75), method="nearest"))]
            for label, v in calls.items()
        ],
    )
    star = next(iter(SEARCHES))
    best = min(
        (name for name in laws if "," in name and "SMC" not in name), key=lambda name: laws[name]["single"].value
    )
    paper = laws["boltzmann, text: read-out"]
    unbiased = laws["uniform, text: read-out"]
    ratio = medians["best-of-N"] / medians[star]
    checks = [
        Check(
            f"tokens: leaf law of one tree, uniform selection, TV ≤ 0.03 at {nfe:.0e} model calls",
            f"{unbiased['single'].value:.4f} (mean law {unbiased['mean']:.4f}); "
            f"best {best} {laws[best]['single'].value:.4f}",
            unbiased["single"].value <= 0.03,
        ),
        Check(
            f"tokens: leaf law of one tree, the paper's Boltzmann selection, TV ≤ 0.03 at {nfe:.0e} model calls",
            f"{paper['single'].value:.4f} (mean law {paper['mean']:.4f})",
            paper["single"].value <= 0.03,
        ),
        Check(
            f"tokens: {star} draws the best sequence with fewer model calls than best-of-N (median)",
            ", ".join(f"{label} {calls_:.0f}" for label, calls_ in medians.items()) + f"; {ratio:.1f}x",
            medians[star] < medians["best-of-N"],
        ),
    ]
    return {"rows": laws, "calls": calls, "medians": medians, "checks": checks, "table": printed, "curves": {}}
