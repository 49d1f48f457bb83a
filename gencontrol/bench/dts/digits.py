"""docs/methods/dts.md#e-dts-3 and docs/methods/dts.md#e-dts-4: digits of 8x8 pixels, posterior given a class and
maximum reward (docs/methods/dts.md#experiments).

The base law is the bundled unconditional digit flow walked by its marginal-preserving SDE step of level 1 in 30 steps;
the pilot took a diffusion with a cosine schedule: same posterior step, as many steps and levels, another schedule.
Posterior: reward log p(class | image) of the bundled classifier; truth is a large sample of the chain itself, weighted
by the reward, so that only steering is judged.  Maximum: "ink" 0.15·Σx and "template" 12·correlation with a test image.
Settings: DPS, TDS and DAS as their definitions say, gradients cut at length 10; DTS* explores with c = 0.2 or 1
standard deviations of its rewards.  Seed 100 was looked at while the parts were written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.bench.base import Check, table
from gencontrol.bench.dts.measure import (
    PAPER,
    READ_BY,
    TREE_ROWS,
    WIDENED,
    Law,
    Peer,
    grow,
    one_root,
    over,
    sample_mmd2,
    tree_law,
)
from gencontrol.rng import row_keys
from gencontrol.sampling.chain import Chain, make_chain
from gencontrol.sampling.tree.rules import Uct
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.stats import Estimate
from gencontrol.types import RewardContext

STEPS = 30
#: bandwidths (½, 1, 2)·4 in pixels of [-1, 1], where two digits are about 6 apart
BANDWIDTHS = (2.0, 4.0, 8.0)
PEERS = (
    Peer("SNIS", "snis", {}),
    Peer("SMC, weights carried", "smc", {}),
    Peer("DPS", "dps", {"max_norm": 10.0}),
    Peer("TDS", "tds", {"max_norm": 10.0}),
    Peer("DAS", "das", {"max_norm": 10.0}),
)
#: name → (widening, backup, exploration in standard deviations of the tree's rewards)
SEARCHES: dict[str, tuple[str, str, float]] = {
    "DTS* (C=1, α=.5, max)": ("small", "max", 1.0),
    "DTS* (C=1, α=.5, max, c=.2)": ("small", "max", 0.2),
    "DTS* (C=2, α=.8, max)": ("paper", "max", 1.0),
}


@dataclass(frozen=True)
class World:
    """What the parts need of the digits.

    Args:
        model: unconditional Model of states [b 1 8 8].
        decode: states → what the class reward takes.
        class_reward: differentiable item reward that reads the class from the prompts.
        template: an image [1 8 8] in [-1, 1].
    """

    model: Any
    decode: Callable[[Tensor], Tensor]
    class_reward: Any
    template: Float[Tensor, "1 8 8"]

    @classmethod
    def bundled(cls) -> World:
        """The bundled model and classifier; the template is the first 3 of the test images."""
        from gencontrol.pipelines import ClassToImagePipeline
        from gencontrol.recipes.digits.data import load_digit_images
        from gencontrol.rewards import load_reward

        pipe = ClassToImagePipeline.from_pretrained("bundled-digits")
        test = load_digit_images("test")
        reward = load_reward("digit-class", device="cpu")
        return cls(pipe.denoiser, pipe.decode, reward, test.images[test.labels == 3][0])

    def chain(self) -> Chain:
        """The base law of one prompt."""
        return make_chain(self.model, self.template.shape, steps=STEPS)


def base_samples(chain: Chain, count: int, batch: int = 1000) -> Float[Tensor, "n 1 8 8"]:
    """Draw from the base law."""
    parts = []
    for rows in torch.arange(count).split(batch):
        keys = row_keys(0, "dts/reference", rows)
        parts.append(chain.advance(chain.prior(keys), torch.zeros_like(rows), keys, (0, STEPS)).x)
    return torch.cat(parts)


# ---- E-DTS-3 ------------------------------------------------------------------------------------------------------


def truths(world: World, classes: Sequence[str], count: int) -> tuple[dict[str, Law], dict[str, float]]:
    """Weighted base samples as the target of every class, and the base's effective share."""
    x = base_samples(one_root(world.chain()), count)
    laws, share = {}, {}
    for name in classes:
        values = world.class_reward(world.decode(x), RewardContext(prompts=[name] * count)).values
        weights = torch.softmax(values.double(), 0)
        share[name] = float(1 / weights.square().sum()) / count
        order = weights.argsort(descending=True)
        kept = order[: int((weights[order].cumsum(0) < 1 - 1e-5).sum()) + 1]  # the rest weighs 1e-5 in all
        laws[name] = Law(x[kept].flatten(1).double(), weights[kept] / weights[kept].sum())
    return laws, share


def posterior(
    world: World,
    *,
    classes: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    reference: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """docs/methods/dts.md#e-dts-3: MMD² of all methods to the class posteriors; a seed's number is the mean over the
    classes.
    """
    laws, share = truths(world, classes, reference)
    rows: dict[str, dict[int, list[float]]] = {}
    prompts = [name for _ in seeds for name in classes]
    for label, widening in WIDENED.items():
        tree = DiffusionTree(
            world.model,
            world.class_reward,
            (len(prompts), *world.template.shape),
            steps=STEPS,
            widening=widening,
            generator=seeds[0],
            decode=world.decode,
            context=RewardContext(prompts=prompts),
            reward_batch=1024,
        )
        for nfe in budgets:
            grow(tree, nfe)
            for suffix, rule in READ_BY.items():
                found = [sample_mmd2(tree_law(tree, i, rule), laws[name], BANDWIDTHS) for i, name in enumerate(prompts)]
                rows.setdefault(label + suffix, {})[nfe] = np.reshape(found, (len(seeds), -1)).mean(1).tolist()
                say(f"digits {label}{suffix}: {nfe} {over(rows[label + suffix][nfe]).value:.4f}")
    for peer in PEERS:
        rows[peer.label] = {nfe: [_peer(world, peer, nfe, seed, laws) for seed in seeds] for nfe in budgets}
        say(f"digits {peer.label}: " + ", ".join(f"{nfe} {over(v).value:.4f}" for nfe, v in rows[peer.label].items()))
    return {
        "rows": rows,
        "base_effective_share": share,
        "checks": _posterior_checks(rows, budgets[-1]),
        "table": table(
            f"E-DTS-3. Digits given a class ({', '.join(classes)}; base effective share "
            f"{np.mean(list(share.values())):.3f}): MMD² by model calls, {len(seeds)} seeds "
            "(mean ± half the 95 % t interval)",
            ("method", *(f"{nfe:.0e}" for nfe in budgets)),
            [[label, *(over(row[nfe]) for nfe in budgets)] for label, row in rows.items()],
        ),
        "curves": {
            "digits given a class: MMD²": (
                "model calls",
                {label: {nfe: over(row[nfe]) for nfe in budgets} for label, row in rows.items()},
            )
        },
    }


def _peer(world: World, peer: Peer, nfe: int, seed: int, laws: dict[str, Law]) -> float:
    """Mean MMD² of a particle sampler over the classes."""
    values = []
    for place, (name, law) in enumerate(laws.items()):
        found = peer.run(
            one_root(world.chain()),
            world.class_reward,
            nfe,
            temperature=1.0,
            seed=seed * len(laws) + place,
            decode=world.decode,
            context=RewardContext(prompts=[name]),
        )
        values.append(sample_mmd2(Law.of(found.samples, found.log_weights), law, BANDWIDTHS))
    return float(np.mean(values))


def _posterior_checks(rows: dict[str, dict[int, list[float]]], nfe: int) -> list[Check]:
    """The numbers of docs/methods/dts.md#e-dts-3; DTS stands for the paper's widening, the other one is reported."""
    mean = {label: over(row[nfe]).value for label, row in rows.items()}
    smc, dps = mean["SMC, weights carried"], mean["DPS"]
    both = ", ".join(f"{label} {mean[label]:.4f}" for label in TREE_ROWS)
    return [
        Check(
            f"digits at {nfe:.0e}: MMD² of {PAPER} ≤ 0.6 × SMC with carried weights",
            f"{both}; SMC {smc:.4f}, ratio {mean[PAPER] / smc:.2f}; SNIS {mean['SNIS']:.4f}",
            mean[PAPER] <= 0.6 * smc,
        ),
        Check(f"digits at {nfe:.0e}: MMD² of {PAPER} < DPS", f"{both}; DPS {dps:.4f}", mean[PAPER] < dps),
    ]


# ---- E-DTS-4 ------------------------------------------------------------------------------------------------------


def rewards_of(world: World) -> dict[str, Callable[[Tensor], Float[Tensor, " b"]]]:
    """The rewards to maximise, functions of states in [-1, 1]."""
    template = world.template.flatten()
    template = (template - template.mean()) / template.std(correction=0)

    def correlation(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        return 12 * (centred @ template) / (centred.norm(dim=1) * len(template) ** 0.5).clamp_min(1e-12)

    return {"ink": lambda x: 0.15 * x.flatten(1).sum(1), "template": correlation}


@dataclass
class Climb:
    """Best reward so far against model calls: one row of `best` per recorded budget, one column per seed."""

    budgets: list[int]
    best: list[list[float]]

    def mean(self) -> Float[Tensor, " m"]:
        """Mean over seeds at each recorded budget."""
        return torch.tensor(self.best, dtype=torch.float64).mean(1)

    def reaches(self, level: float) -> float:
        """Model calls where the mean over seeds first reaches a level; infinite if it never does."""
        there = (self.mean() >= level).nonzero()
        return float(self.budgets[int(there[0])]) if len(there) else float("inf")

    def last(self) -> Estimate:
        """Best reward at the end, over seeds."""
        return over(self.best[-1])

    def thinned(self, points: int = 60) -> dict[float, Estimate]:
        """Points of a curve, evenly spaced in the logarithm of the budget."""
        wanted = np.unique(np.geomspace(1, len(self.budgets), points).astype(int)) - 1
        return {self.budgets[i]: over(self.best[i]) for i in wanted if not math.isnan(sum(self.best[i]))}


def climb_tree(world: World, reward: Any, kind: tuple[str, str, float], nfe: int, seeds: Sequence[int]) -> Climb:
    """Best leaf of DTS*, four leaves per round, the seeds as roots of one forest."""
    widening, backup, exploration = kind
    tree = DiffusionTree(
        world.model,
        reward,
        (len(seeds), *world.template.shape),
        steps=STEPS,
        select=Uct(exploration),
        backup=backup,
        widening=widening,
        leaf_batch=4,
        generator=seeds[0],
        reward_batch=1024,
    )
    spent: list[Any] = []
    best: list[Any] = []

    def look() -> bool:
        spent.append(tree.counts["nfe"].copy())
        best.append(tree.counts["best"].copy())
        return False

    grow(tree, nfe, look)
    grid = list(range(STEPS, nfe + 1, STEPS))
    columns = []
    for root in range(len(seeds)):
        calls = np.array([row[root] for row in spent])
        values = np.array([row[root] for row in best])
        # what the rounds that fit into a budget found; NaN before the first one
        columns.append(np.append(math.nan, values)[np.searchsorted(calls, grid, side="right")])
    return Climb(grid, np.stack(columns, 1).tolist())


def climb_base(world: World, reward: Any, nfe: int, seeds: Sequence[int]) -> Climb:
    """Best of the first n base samples, for every n."""
    peer = Peer("best-of-N", "best-of-n", {})
    chain = one_root(world.chain())
    runs = [peer.run(chain, reward, nfe, temperature=1.0, seed=seed).rewards for seed in seeds]
    best = torch.stack(runs, 1).cummax(0).values
    return Climb([STEPS * (i + 1) for i in range(len(best))], best.tolist())


def maximum(world: World, *, nfe: int, seeds: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """docs/methods/dts.md#e-dts-4: the largest reward found, and the model calls that DTS* needs for what best-of-N
    finds with `nfe`.
    """
    rows: dict[str, dict[str, Estimate]] = {}
    curves: dict[str, Any] = {}
    checks: list[Check] = []
    chain = one_root(world.chain())
    others = (
        Peer("SMC (max, λ=10)", "smc", {"potential": "max"}),
        Peer("beam (4 children)", "beam", {"children": 4}),
    )
    for name, reward in rewards_of(world).items():
        base = climb_base(world, reward, nfe, seeds)
        climbs = {label: climb_tree(world, reward, kind, nfe, seeds) for label, kind in SEARCHES.items()}
        rows[name] = {"best-of-N": base.last()} | {label: climb.last() for label, climb in climbs.items()}
        for peer in others:
            runs = [peer.run(chain, reward, nfe, temperature=0.1, seed=seed) for seed in seeds]
            rows[name][peer.label] = over(float(run.rewards.max()) for run in runs)
        curves[f"{name}: best reward"] = (
            "model calls",
            {"best-of-N": base.thinned()} | {label: climb.thinned() for label, climb in climbs.items()},
        )
        checks += _maximum_checks(name, nfe, base, climbs)
        main = rows[name][next(iter(SEARCHES))].value
        checks.append(
            Check(
                f"{name}: {next(iter(SEARCHES))} above the peers that climb one-step estimates",
                f"{main:.3f}; " + ", ".join(f"{peer.label} {rows[name][peer.label].value:.3f}" for peer in others),
                all(main > rows[name][peer.label].value for peer in others),
            )
        )
        say(f"digits {name}: " + ", ".join(f"{k} {v.value:.3f}" for k, v in rows[name].items()))
    printed = table(
        f"E-DTS-4. Largest reward with {nfe:.1e} model calls, {len(seeds)} seeds (mean ± half the 95 % t interval)",
        ("method", *rows),
        [[label, *(rows[name][label] for name in rows)] for label in next(iter(rows.values()))],
    )
    return {"rows": rows, "checks": checks, "table": printed, "curves": curves}


def _maximum_checks(name: str, nfe: int, base: Climb, climbs: dict[str, Climb]) -> list[Check]:
    """Model calls to reach best-of-N, and the margins of docs/methods/dts.md#e-dts-4."""
    level = float(base.mean()[-1])
    main = next(iter(SEARCHES))
    needs = {label: climb.reaches(level) for label, climb in climbs.items()}
    listed = ", ".join(f"{label} {calls:.0f} ({nfe / calls:.1f}x fewer)" for label, calls in needs.items())
    ahead = [a - b for a, b in zip(climbs[main].best[-1], base.best[-1], strict=True)]
    margin = {"ink": 0.6, "template": 0.3}[name]
    gain = over(ahead)
    return [
        Check(f"{name}: {main} reaches best-of-N at {nfe} with ≤ 1/2 of the calls", listed, needs[main] <= nfe / 2),
        Check(f"{name}: aim, with ≤ 1/5 of the calls", f"{main} {needs[main]:.0f}", needs[main] <= nfe / 5),
        Check(
            f"{name}: {main} above best-of-N by ≥ {margin}",
            f"{gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}]",
            gain.value >= margin,
        ),
    ]
