"""docs/methods/dts.md#e-dts-5: which method draws from p(x)·exp(r(x)) with the smallest error at equal model calls.

Eighteen targets (`battery`, and two classes of the bundled digits).  An entry is the mean over seeds of the squared
distance to the target, MMD² or Σ (p − q)² for tokens, over that of the better of importance sampling and SMC on the
same target: 2 means about twice the calls.  Seeds below 100 are reported; no setting was chosen on these targets.

"pilot choice" spends a quarter of the calls on both peers, and the rest on the one with more effective starts per call;
it is here because it looks like the natural default and is not a good one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.bench.base import Check, kept, table
from gencontrol.bench.dts.battery import Problem, gaussians, tables
from gencontrol.bench.dts.measure import Law, grow, over, sample_mmd2, tree_law
from gencontrol.models.exact import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rng import stream_seed
from gencontrol.sampling.particles import Target, spend
from gencontrol.sampling.particles.islands import grouped_size
from gencontrol.sampling.particles.resampling import normalised
from gencontrol.sampling.particles.steering import POTENTIALS, resampling_levels, settle, travel
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.stats import Estimate

SNIS, SMC, ISLANDS, WEIGHTED, PAPER, CHOICE = (
    "importance sampling", "SMC", "islands", "tree, weighted", "tree, paper", "pilot choice"
)  # fmt: skip
METHODS = (SNIS, SMC, ISLANDS, WEIGHTED, PAPER, CHOICE)
PEERS = (SNIS, SMC)
#: trees: selection, widening, read-out
TREES = {WEIGHTED: ("shrunk", "steady", "weighted"), PAPER: ("boltzmann", "paper", "boltzmann")}
#: share of the calls that each peer gets as a pilot
PILOT = 0.125
#: leaves per round of a tree, as `gencontrol search` takes
LEAF_BATCH = 8

#: squared error and log Ẑ − log Z, by budget, one entry per seed
Rows = dict[str, dict[str, list[float]]]
#: rows by target and method
AllRows = Mapping[str, Mapping[str, Rows]]


def target_of(problem: Problem, seed: int) -> Target:
    """What a particle sampler works on."""
    scorer = Scorer(problem.reward, batch=4096, **problem.options)
    return Target(problem.chain, scorer, 1.0, seed, 8192)


def particles_row(problem: Problem, method: str, nfe: int, seed: int) -> tuple[float, float]:
    """Squared error and error of log Z of one run."""
    name = {SNIS: "snis", SMC: "smc", ISLANDS: "islands"}[method]
    options = {} if method == SNIS else {"resample_at": problem.branch}
    found = spend(name, target_of(problem, seed), nfe // problem.price, **options)
    return problem.error(Law.of(found.samples, found.log_weights)), found.log_z - problem.log_z


def choice_row(problem: Problem, nfe: int, seed: int) -> tuple[float, float]:
    """A pilot of both peers, then the one with more effective starts per call; its pilot counts in the result."""
    n = nfe // problem.price // problem.chain.steps
    pilot = max(2, round(PILOT * n))
    first = {trust: fixed(problem, pilot, trust, stream_seed(seed, "pilot", trust)) for trust in (0, 1)}
    best = max(first, key=lambda trust: first[trust][2])
    rest = fixed(problem, n - 2 * pilot, best, stream_seed(seed, "rest"))
    x = torch.cat([first[best][0], rest[0]])
    log = torch.cat([first[best][1], rest[1]])
    log_z = normalised(log)[1] - math.log(len(log))
    return problem.error(Law.of(x, log)), log_z - problem.log_z


def fixed(problem: Problem, n: int, trust: int, seed: int) -> tuple[Tensor, Float[Tensor, " n"], float]:
    """Run importance sampling (trust 0) or SMC (1): states, weights whose mean exp is Ẑ, effective starts."""
    target = target_of(problem, seed)
    levels = resampling_levels(target, problem.branch)
    cloud, scores = travel(target, n, levels, 0.5, POTENTIALS["diff"], lambda index, values: trust * values)
    settle(target, cloud, scores)
    log = cloud.log_weights + cloud.log_z + math.log(n)
    return cloud.x, log, grouped_size(log, cloud.origin)


def tree_rows(problem: Problem, method: str, budgets: Sequence[int], seeds: Sequence[int]) -> Rows:
    """A forest, one tree per seed, grown through all budgets."""
    select, widening, rule = TREES[method]
    options = dict(problem.options)
    if "context" in options:
        options["context"] = options["context"].rows([0] * len(seeds))
    chain = problem.chain
    tree = DiffusionTree(
        chain.model,
        problem.reward,
        (len(seeds), *chain.item_shape),
        branch=problem.branch,
        select=select,
        widening=widening,
        leaf_batch=LEAF_BATCH,
        generator=seeds[0],
        step=chain.step,
        times=chain.grid,
        reward_batch=4096,
        **options,
    )
    rows: Rows = {}
    for nfe in budgets:
        grow(tree, nfe // problem.price)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = [tree.stats(root) for root in range(tree.roots)]
        log_z = [each["log_z_tree" if rule == "boltzmann" else "log_z_iw"] for each in stats]
        errors = [problem.error(tree_law(tree, root, rule)) for root in range(tree.roots)]
        rows[str(nfe)] = {"error": errors, "log_z": [value - problem.log_z for value in log_z]}
    return rows


def method_rows(problem: Problem, method: str, budgets: Sequence[int], seeds: Sequence[int]) -> Rows:
    """All budgets and seeds of a method on a target."""
    if method in TREES:
        return tree_rows(problem, method, budgets, seeds)
    rows: Rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for nfe in budgets:
            if method == CHOICE:
                pairs = [choice_row(problem, nfe, seed) for seed in seeds]
            else:
                pairs = [particles_row(problem, method, nfe, seed) for seed in seeds]
            rows[str(nfe)] = {"error": [pair[0] for pair in pairs], "log_z": [pair[1] for pair in pairs]}
    return rows


# ---- digits -------------------------------------------------------------------------------------------------------


def digits(classes: Sequence[str], reference: int) -> list[Problem]:
    """Posteriors of two classes under the bundled digit flow; truth is a large weighted sample of the chain itself."""
    from gencontrol.bench.dts.digits import BANDWIDTHS, World, truths
    from gencontrol.types import RewardContext

    world = World.bundled()
    laws, share = truths(world, classes, reference)
    chain = world.chain()
    return [
        Problem(
            f"digits: {name}",
            chain,
            world.class_reward,
            1,
            5,
            math.nan,
            lambda law, name=name: sample_mmd2(law, laws[name], BANDWIDTHS),  # type: ignore[misc]
            share[name],
            {"decode": world.decode, "context": RewardContext(prompts=[name])},
        )
        for name in classes
    ]


# ---- two laws that everybody asks about ---------------------------------------------------------------------------


def probes(seeds: Sequence[int], part: int = 1) -> dict[str, dict[str, Any]]:
    """Shares of modes on the chains that users run: a pair of modes in one dimension (20 steps), four in two (50).

    part: divides the work (a smoke test).
    """
    line = GaussianMixture(
        torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1, 1) * 0.1, torch.tensor([0.8, 0.2]), GaussianProcess(Linear())
    )
    corners = 1.5 * torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    four = GaussianMixture(
        corners,
        0.4**2 * torch.eye(2).expand(4, 2, 2),
        torch.tensor([0.7, 0.15, 0.1, 0.05]),
        GaussianProcess(Linear()),
    )
    slope = torch.tensor([0.78, 0.78])  # the rarest mode gets 62 % of the tilted law
    return {
        "pair of modes": _probe(line, lambda x: x[:, 0], 20, 20_000, seeds, part),
        "four modes": _probe(four, lambda x: x @ slope.to(x), 50, 40_000, seeds, part),
    }


def _probe(
    base: GaussianMixture, reward: Callable[[Tensor], Tensor], steps: int, nfe: int, seeds: Sequence[int], part: int
) -> dict[str, Any]:
    """Mode shares of the chain itself (120,000 weighted paths), and every method's distance to them."""
    from gencontrol.sampling.chain import make_chain

    chain = make_chain(base, (base.means.shape[1],), steps=steps)

    def shares(law: Law) -> Float[Tensor, " k"]:
        nearest = torch.cdist(law.x, base.means).argmin(1)
        return torch.zeros(len(base.means), dtype=torch.float64).index_add_(0, nearest, law.weights)

    def of(found: Any) -> Float[Tensor, " k"]:
        return shares(Law.of(found.samples, found.log_weights))

    size, nfe = 20_000 // part, nfe // part
    many = [spend("snis", Target(chain, Scorer(reward, batch=size), 1.0, 900 + i), size * steps) for i in range(6)]
    truth = torch.stack([of(found) * math.exp(found.log_z) for found in many]).sum(0)
    truth = truth / truth.sum()
    last: list[float] = []

    def distance(law: Law) -> float:
        """Total variation; the share of the last mode is kept beside it."""
        last.append(float(shares(law)[-1]))
        return float((shares(law) - truth).abs().sum() / 2)

    problem = Problem("", chain, reward, 1, 5, 0.0, distance, 0.0, {})
    found: dict[str, Any] = {}
    for method in METHODS:
        last.clear()
        found[method] = {"tv": method_rows(problem, method, [nfe], seeds)[str(nfe)]["error"], "last": [*last]}
    return {"truth": truth.tolist(), "nfe": nfe, "methods": found}


# ---- tables and verdicts ------------------------------------------------------------------------------------------


def run(
    *,
    budgets: Sequence[int],
    seeds: Sequence[int],
    reference: int,
    keep: Path | None,
    say: Callable[[str], None],
    few: bool = False,
) -> dict[str, Any]:
    """Run all methods on all targets; rows that an interrupted run has written are not drawn again.

    Args:
        budgets: model calls.
        seeds: of every method and target.
        reference: paths of the truth about digits.
        keep: folder of the rows.
        few: only one target of each kind (a smoke test).
    """
    exact = [*gaussians()[:1], *tables()[:1]] if few else [*gaussians(), *tables()]
    found: dict[str, dict[str, Rows]] = {}
    share = {}

    def measure(problem: Problem) -> None:
        share[problem.name] = problem.share
        found[problem.name] = {}
        for method in METHODS:
            settings = {"target": problem.name, "method": method, "budgets": list(budgets), "seeds": list(seeds)}
            make = partial(method_rows, problem, method, budgets, seeds)
            found[problem.name][method] = kept(keep, "row", settings, make)
        last = ratios(found[problem.name], budgets[-1])
        say(f"posterior {problem.name}: " + ", ".join(f"{name} {value:.2f}" for name, value in last.items()))

    for problem in exact:
        measure(problem)
    for problem in digits(("4", "7"), reference):
        measure(problem)
    shown = kept(keep, "probes", {"seeds": list(seeds)}, lambda: probes(seeds, 50 if few else 1))
    return {
        "rows": found,
        "share": share,
        "probes": shown,
        "checks": _checks(found, budgets, shown),
        "table": _printed(found, share, budgets, shown),
        "curves": {},
    }


def ratios(rows: Mapping[str, Rows], nfe: int) -> dict[str, float]:
    """Mean squared error of every method over that of the better peer."""
    mean = {method: float(np.mean(row[str(nfe)]["error"])) for method, row in rows.items()}
    best = min(mean[peer] for peer in PEERS)
    return {method: value / best for method, value in mean.items()}


def overall(found: AllRows, method: str, nfe: int) -> tuple[float, float, str]:
    """Geometric mean over targets, worst case, and where that is."""
    each = {name: ratios(rows, nfe)[method] for name, rows in found.items()}
    worst = max(each, key=lambda name: each[name])
    return math.exp(float(np.mean(np.log(list(each.values()))))), each[worst], worst


def evidence(found: AllRows, method: str, nfe: int) -> tuple[float, float, float]:
    """Mean of Ẑ/Z over targets, its distance from 1 in standard errors, and the largest of a single target."""
    means, variances, each = [], [], []
    for rows in found.values():
        value = np.exp(np.array(rows[method][str(nfe)]["log_z"], dtype=float))
        if not np.isfinite(value).all():
            continue
        means.append(value.mean())
        variances.append(value.var(ddof=1) / len(value))
        each.append((value.mean() - 1) / max(math.sqrt(variances[-1]), 1e-12))
    error = math.sqrt(sum(variances)) / len(means)
    largest = max(each, key=abs)
    return float(np.mean(means)), float((np.mean(means) - 1) / error), float(largest)


def _printed(
    found: AllRows,
    share: Mapping[str, float],
    budgets: Sequence[int],
    shown: Mapping[str, Any],
) -> str:
    """All tables."""
    text = ""
    for nfe in budgets:
        rows: list[list[Any]] = [
            [name, share[name], *(ratios(each, nfe)[method] for method in METHODS)] for name, each in found.items()
        ]
        text += table(
            f"E-DTS-5 at {nfe:.0e} model calls: squared error over that of the better of the first two",
            ("target", "base share", *METHODS),
            rows,
        )
    text += table(
        "E-DTS-5: geometric mean of the ratios over targets (worst case)",
        ("method", *(f"{nfe:.0e}" for nfe in budgets)),
        [
            [method, *("{:.2f} ({:.1f}: {})".format(*overall(found, method, nfe)) for nfe in budgets)]
            for method in METHODS
        ],
    )
    text += table(
        "E-DTS-5: mean of Ẑ/Z over targets (distance from 1 in standard errors; the largest of a single target)",
        ("method", *(f"{nfe:.0e}" for nfe in budgets)),
        [
            [method, *("{:.3f} ({:+.1f}; {:+.1f})".format(*evidence(found, method, nfe)) for nfe in budgets)]
            for method in METHODS
        ],
    )
    for name, probe in shown.items():
        shares: list[list[Estimate | float | str]] = [
            [method, over(row["tv"]), max(row["tv"]), over(row["last"])] for method, row in probe["methods"].items()
        ]
        text += table(
            f"E-DTS-5, {name}, {probe['nfe']} calls of the ordinary chain: total variation of the mode shares "
            f"(truth {', '.join(f'{value:.3f}' for value in probe['truth'])}), and the share of the last mode",
            ("method", "mean total variation", "largest", "last mode"),
            shares,
        )
    return text


def _checks(found: AllRows, budgets: Sequence[int], shown: Mapping[str, Any]) -> list[Check]:
    """The goals of docs/methods/dts.md#e-dts-5."""
    checks = []
    for nfe in budgets[1:]:
        mean, worst, where = overall(found, ISLANDS, nfe)
        checks += [
            Check(f"islands at {nfe:.0e}: geometric mean ≤ 1", f"{mean:.2f}", mean <= 1),
            Check(f"islands at {nfe:.0e}: worst ≤ 4", f"{worst:.1f} ({where})", worst <= 4),
        ]
    for nfe in budgets:
        mean, error, largest = evidence(found, ISLANDS, nfe)
        checks.append(
            Check(
                f"islands at {nfe:.0e}: mean Ẑ/Z within 2 standard errors of 1",
                f"{mean:.3f}, {error:+.1f} (largest of a single target {largest:+.1f})",
                abs(error) <= 2,
            )
        )
    mean, worst, where = overall(found, WEIGHTED, budgets[-1])
    checks.append(Check(f"weighted tree at {budgets[-1]:.0e}: geometric mean ≤ 1.5", f"{mean:.2f}", mean <= 1.5))
    for nfe in budgets:
        choice, own = overall(found, CHOICE, nfe), overall(found, ISLANDS, nfe)
        checks.append(
            Check(
                f"choosing between the peers by a pilot does not do at {nfe:.0e}: it is worse than islands",
                f"{choice[0]:.2f} (worst {choice[1]:.1f}) for {own[0]:.2f} (worst {own[1]:.1f})",
                choice[0] > own[0],
            )
        )
    pair, four = shown["pair of modes"], shown["four modes"]
    for method in (ISLANDS, WEIGHTED):
        share, truth = over(pair["methods"][method]["last"]), pair["truth"][-1]
        claim = f"pair of modes: mean share of the right mode by {method} within .01 of the law"
        checks.append(Check(claim, f"{share.value:.4f} for {truth:.4f}", abs(share.value - truth) <= 0.01))
        tv = float(np.mean(four["methods"][method]["tv"]))
        checks.append(Check(f"four modes: mean total variation of {method} ≤ .03", f"{tv:.4f}", tv <= 0.03))
    return checks
