"""Weights of a composition, chosen by rollouts on validation seeds and reported on fresh ones.

The paper reports the best of a grid on the trials that chose it, which inflates success by 5 to 7 points where nothing
is gained (docs/methods/gpc.md#p1, derived).  Here the seeds of the choice and of the report are disjoint, every arm
meets the same seeds (common random numbers), and the report pairs the chosen weights with every parent on the fresh
seeds.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gencontrol.config import build
from gencontrol.errors import UsageError
from gencontrol.robotics.composition.policy import ComposedPolicy
from gencontrol.robotics.envs.seeding import unseeded
from gencontrol.robotics.envs.types import EnvSource
from gencontrol.robotics.evaluate import Settings, evaluate
from gencontrol.stats import Estimate, Pairs, pair, rate, wilson

#: (policy, seeds) → success of each episode, in the order of the seeds
Rollouts = Callable[[Any, Sequence[int]], Sequence[bool]]
Weighting = tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One weighting on the validation seeds: its successes, in the order of the seeds that it met."""

    weights: Weighting
    outcomes: tuple[bool, ...]

    @property
    def rate(self) -> Estimate:
        """Success with its exact interval."""
        return rate(sum(self.outcomes), len(self.outcomes))


@dataclass(frozen=True)
class WeightFit:
    """What `fit_weights` found.

    Args:
        names: of the parents.
        method: how arms were dropped.
        arms: every weighting that was tried, on validation seeds.
        best: the chosen weighting.
        test: row → outcomes on the test seeds; "composed" and the name of every parent.
        validation_seeds, test_seeds: disjoint.
    """

    names: tuple[str, ...]
    method: str
    arms: tuple[Arm, ...]
    best: Weighting
    test: dict[str, tuple[bool, ...]]
    validation_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]

    @property
    def rate(self) -> Estimate:
        """Success of the chosen weights on fresh seeds with its exact interval."""
        return rate(sum(self.test["composed"]), len(self.test_seeds))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `rate`."""
        return self.rate.low, self.rate.high

    @property
    def best_parent(self) -> str:
        """The parent with most successes on the fresh seeds; the choice favours the parents."""
        return max(self.names, key=lambda name: sum(self.test[name]))

    @property
    def pairs(self) -> Pairs:
        """The best parent (first) and the chosen weights (second) on the fresh seeds."""
        return pair(self.test[self.best_parent], self.test["composed"])

    @property
    def gain(self) -> Estimate:
        """Success of the chosen weights minus the best parent's, with the 95 % interval of the paired difference."""
        return self.pairs.difference

    @property
    def undecided(self) -> str:
        """Why the fresh seeds say nothing of a gain, as a sentence; "" where they do."""
        if max(self.best) == 1.0:
            return f"The chosen weights are those of {self.names[self.best.index(1.0)]} alone; nothing is composed."
        return self.pairs.undecided

    def table(self) -> str:
        """Return the arms and the result as Markdown tables."""
        head = "| " + " | ".join([*self.names, "episodes", "success", "95 %"]) + " |"
        lines = [f"Validation seeds ({self.method}); these numbers chose the weights and are not a result.", "", head]
        lines.append("|" + "---|" * (len(self.names) + 3))
        for arm in self.arms:
            cells = [f"{w:.2f}" for w in arm.weights]
            lines.append("| " + " | ".join([*cells, str(len(arm.outcomes)), *_cells(arm.rate)]) + " |")
        lines += ["", f"{len(self.test_seeds)} fresh seeds, the same for every row.", "", "| policy | success | 95 % |"]
        lines.append("|---|---|---|")
        for name, outcomes in self.test.items():
            label = f"composed {tuple(round(w, 3) for w in self.best)}" if name == "composed" else name
            lines.append("| " + " | ".join([label, *_cells(rate(sum(outcomes), len(outcomes)))]) + " |")
        gain = self.gain
        lines += ["", f"gain over {self.best_parent}: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"]
        lines += ["", self.undecided] if self.undecided else []
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return everything as a JSON text."""
        value = {
            "names": self.names,
            "method": self.method,
            "best": self.best,
            "rate": vars(self.rate),
            "gain": {"over": self.best_parent, **vars(self.gain), "discordant": [self.pairs.second, self.pairs.first]},
            "arms": [{"weights": arm.weights, "outcomes": [int(x) for x in arm.outcomes]} for arm in self.arms],
            "test": {name: [int(x) for x in outcomes] for name, outcomes in self.test.items()},
            "validation_seeds": self.validation_seeds,
            "test_seeds": self.test_seeds,
        }
        return json.dumps(value, indent=1)


def simplex_grid(parents: int, step: float) -> list[Weighting]:
    """Return all convex weightings whose entries are multiples of `step`, the parents themselves among them.

    Raises:
        UsageError: 1/step is no whole number, or there are more than 1000 weightings.
    """
    count = round(1 / step) if step > 0 else 0
    if count < 1 or abs(count * step - 1) > 1e-9:
        raise UsageError(f"step is {step}; it must divide 1, e.g. 0.1.")
    if math.comb(count + parents - 1, parents - 1) > 1000:
        raise UsageError(f"{parents} parents at step {step} are more than 1000 weightings; use a larger step.")
    found = []
    for bars in itertools.combinations(range(count + parents - 1), parents - 1):
        edges = (-1, *bars, count + parents - 1)
        found.append(tuple((b - a - 1) / count for a, b in itertools.pairwise(edges)))
    return found


def fit_weights(
    policy: ComposedPolicy,
    env: EnvSource | None = None,
    *,
    validation_seeds: Sequence[int],
    test_seeds: Sequence[int],
    method: Literal["grid", "halving", "bandit"] = "halving",
    step: float = 0.1,
    num_envs: int = 1,
    evaluation: Mapping[str, Any] | None = None,
    rollouts: Rollouts | None = None,
) -> WeightFit:
    """Choose convex weights by success on validation seeds, then measure them and every parent on the test seeds.

    Args:
        policy: its weights are not used.
        env: environment of `gencontrol.robotics.evaluate`; not needed with `rollouts`.
        validation_seeds: of the search; "grid" runs every arm on all of them, "halving" starts with a few and keeps
            the better half of the arms while it doubles the seeds, "bandit" gives the next seeds to the arm with the
            highest upper confidence bound (UCB1), as many rollouts in all as "halving" makes.
        test_seeds: of the report.
        step: of the grid of weights.
        num_envs: environments at once.
        evaluation: further arguments of `evaluate`, e.g. {"rows_at_once": 8, "isolation": "inline"}.
        rollouts: instead of an environment, what runs a policy on seeds.

    The result is a function of the arguments: nothing is drawn.

    Raises:
        UsageError: seeds overlap or repeat, neither env nor rollouts is given, or an episode could not be run.
    """
    validation, test = _seeds(validation_seeds, "validation"), _seeds(test_seeds, "test")
    common = set(validation) & set(test)
    if common:
        raise UsageError(f"seed {min(common)} is a validation and a test seed; the report needs fresh seeds.")
    if method not in SEARCHES:
        raise UsageError(f"unknown method '{method}'; known: {', '.join(SEARCHES)}.")
    if rollouts is None:
        if env is None:
            raise UsageError("fit_weights needs an environment: give env, or rollouts.")
        # a search makes dozens of short evaluations: one environment needs no process of its own to start each time
        isolation = "inline" if num_envs == 1 else "process"
        given: dict[str, Any] = {"num_envs": num_envs, "isolation": isolation, **(evaluation or {})}

        settings = build(Settings, given, "evaluation")
        with settings.envs(env, 1) as one:
            fault = None if settings.allow_unseeded else unseeded(one, validation[0])
        if fault is not None:
            raise UsageError(f"{fault}; arms must meet equal episodes. --allow-unseeded fits all the same.")

        def rollouts(policy: Any, seeds: Sequence[int]) -> Sequence[bool]:
            report = evaluate(policy, env, seeds=seeds, **given)
            for episode in report.episodes:
                if not episode.valid:  # arms must meet equal seeds
                    raise UsageError(
                        f"seed {episode.seed} of {episode.env_id} could not be run ({episode.invalid}); leave it out."
                    )
            return [episode.success for episode in report.episodes]

    table = _Table(policy, rollouts, validation)
    best = SEARCHES[method](table, simplex_grid(len(policy.parents), step))
    rows = {"composed": tuple(map(bool, rollouts(policy.with_weights(best), test)))}
    for index, name in enumerate(policy.names):
        corner = tuple(float(i == index) for i in range(len(policy.parents)))
        rows[name] = rows["composed"] if corner == best else _outcomes(policy, rollouts, corner, test)
    arms = tuple(Arm(weights, tuple(outcomes)) for weights, outcomes in table.found.items())
    return WeightFit(policy.names, method, arms, best, rows, validation, test)


class _Table:
    """Outcomes of the arms so far; an arm always meets the validation seeds in the same order."""

    def __init__(self, policy: ComposedPolicy, rollouts: Rollouts, seeds: tuple[int, ...]) -> None:
        self.policy, self.rollouts, self.seeds = policy, rollouts, seeds
        self.found: dict[Weighting, list[bool]] = {}

    def extend(self, arm: Weighting, count: int) -> None:
        """Run an arm until it has met `count` seeds."""
        known = self.found.setdefault(arm, [])
        fresh = self.seeds[len(known) : count]
        if fresh:
            known.extend(_outcomes(self.policy, self.rollouts, arm, fresh))

    def score(self, arm: Weighting) -> tuple[float, int, float]:
        """Order of preference: success, then episodes, then nearness to equal weights."""
        outcomes = self.found[arm]
        return sum(outcomes) / len(outcomes), len(outcomes), -sum(w * w for w in arm)


def _grid(table: _Table, arms: list[Weighting]) -> Weighting:
    """Every arm on every seed."""
    for arm in arms:
        table.extend(arm, len(table.seeds))
    return max(arms, key=table.score)


def _halving_counts(arms: int, seeds: int) -> list[int]:
    """Seeds met by the arms that are left in each round: doubled until all seeds are used."""
    rounds = max(1, math.ceil(math.log2(arms)))
    return [max(1, seeds // 2 ** (rounds - 1 - index)) for index in range(rounds)]


def _halving(table: _Table, arms: list[Weighting]) -> Weighting:
    """Drop the worse half of the arms after every round."""
    left = arms
    for count in _halving_counts(len(arms), len(table.seeds)):
        for arm in left:
            table.extend(arm, count)
        left = sorted(left, key=table.score, reverse=True)[: max(1, math.ceil(len(left) / 2))]
    return left[0]


def _bandit(table: _Table, arms: list[Weighting]) -> Weighting:
    """UCB1 (Auer et al. 2002) in pulls of a few seeds, with the rollouts of `_halving` as budget."""
    budget, left, met = 0, len(arms), 0
    for count in _halving_counts(len(arms), len(table.seeds)):
        budget += left * (count - met)
        left, met = max(1, math.ceil(left / 2)), count
    pull = max(1, budget // (8 * len(arms)))
    for arm in arms:
        table.extend(arm, pull)
    while True:
        spent = sum(map(len, table.found.values()))
        # an arm that met every seed has no more to say
        open_arms = [arm for arm in arms if len(table.found[arm]) < len(table.seeds)]
        if spent >= budget or not open_arms:
            break

        def bound(arm: Weighting, spent: int = spent) -> tuple[float, float]:
            rate, count, spread = table.score(arm)
            return rate + math.sqrt(2 * math.log(spent) / count) / 2, spread

        chosen = max(open_arms, key=bound)
        table.extend(chosen, len(table.found[chosen]) + min(pull, budget - spent))
    return max(arms, key=lambda arm: (wilson(sum(table.found[arm]), len(table.found[arm])).low, *table.score(arm)))


SEARCHES: dict[str, Callable[[_Table, list[Weighting]], Weighting]] = {
    "grid": _grid,
    "halving": _halving,
    "bandit": _bandit,
}


def _outcomes(policy: ComposedPolicy, rollouts: Rollouts, arm: Weighting, seeds: Sequence[int]) -> tuple[bool, ...]:
    """Run one weighting.

    Raises:
        UsageError: the rollouts did not give one outcome per seed.
    """
    found = tuple(map(bool, rollouts(policy.with_weights(arm), seeds)))
    if len(found) != len(seeds):
        raise UsageError(f"rollouts gave {len(found)} outcomes for {len(seeds)} seeds; give one each.")
    return found


def _seeds(seeds: Sequence[int], what: str) -> tuple[int, ...]:
    """Seeds as a tuple, refused when empty or repeated."""
    values = tuple(int(seed) for seed in seeds)
    if not values or len(set(values)) != len(values):
        raise UsageError(f"{len(values)} {what} seeds, {len(set(values))} different; give at least one, none twice.")
    return values


def _cells(share: Estimate) -> tuple[str, str]:
    return f"{share.value:.3f}", f"{share.low:.3f} – {share.high:.3f}"
