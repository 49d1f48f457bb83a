"""The positive and negative sets of DRAGON: agreement with ranking, partition, monotone climbs, controls."""

from __future__ import annotations

import pytest
import torch

from gencontrol.algorithms.matching.sets import build_sets, climb
from gencontrol.algorithms.online.rollout import Scores
from gencontrol.rewards.base import ItemAsSet
from gencontrol.rewards.sets.gaussian import Gaussian
from gencontrol.rewards.sets.states import FrechetState
from gencontrol.rng import stream
from tests.helpers.dragon_worlds import FirstAxis, RecomputedState, Share


class Frechet:
    """−FD of points against a reference, by the library's incremental state."""

    name, kind, differentiable = "fd", "set", False

    def __init__(self) -> None:
        self.law = Gaussian.of(torch.randn(200, 3, generator=stream(0, "test/reference")))

    def __call__(self, samples, context):
        raise NotImplementedError("sets are built from features")

    def features(self, samples, context):
        raise NotImplementedError("the tests give features")

    def evaluate(self, features):
        return -Gaussian.of(features["frames"].flatten(0, 1)).distance(self.law)

    def state(self, pool, chosen):
        return FrechetState(pool["frames"], pool["valid"], chosen, self.law)


def points(count: int, seed: int = 0) -> Scores:
    """Features of a pool that lies off the reference."""
    frames = 1.0 + 0.7 * torch.randn(count, 1, 3, generator=stream(seed, "test/points"))
    valid = torch.ones(count, dtype=torch.bool)
    return Scores(valid, features={"frames": frames, "valid": valid})


def build(reward, scores, generations=2, **options):
    settings = {"rule": "positive", "sweeps": 2, "grouping": "best_worst", "generator": stream(0, "test/sets")}
    return build_sets(reward, scores, generations, **(settings | options))


@pytest.mark.parametrize("rule", ["positive", "gap", "influence"])
def test_mean_reward_gives_the_argmax_of_each_pair(rule: str) -> None:
    """r_dist = mean(r) must give exactly the sets of ranking by r, for each accept rule; ties are dropped by both."""
    values = torch.randn(40, generator=stream(1, "test/values"))
    values[6] = values[7]
    valid = torch.ones(40, dtype=torch.bool)
    ranked = build(FirstAxis(), Scores(valid, values=values))
    swapped = build(ItemAsSet(FirstAxis()), Scores(valid, features={"values": values, "valid": valid}), rule=rule)
    pairs = values.view(-1, 2)
    expected = torch.arange(20) * 2 + pairs.argmax(1)
    expected = expected[pairs[:, 0] != pairs[:, 1]]
    assert torch.equal(ranked.positive, expected)
    assert torch.equal(swapped.positive, ranked.positive) and torch.equal(swapped.negative, ranked.negative)
    assert ranked.metrics["sets/ties"] == swapped.metrics["sets/ties"] == 1


@pytest.mark.parametrize("rule", ["positive", "gap", "influence", "random"])
def test_sets_are_a_partition_of_the_pairs(rule: str) -> None:
    sets = build(Frechet(), points(60), rule=rule)
    both = torch.stack([sets.positive, sets.negative], 1).sort(1).values
    assert torch.equal(both.flatten(), torch.arange(60))


def test_swaps_raise_the_reward_of_the_positive_set() -> None:
    """R(D+) > R(model) > R(D−) for a set reward that has room, and the metric is the true value of the set."""
    reward, scores = Frechet(), points(60)
    sets = build(reward, scores)
    found = sets.metrics
    assert found["reward/positive"] > found["reward/model"] + 0.05
    assert found["reward/negative"] < found["reward/model"] - 0.05
    assert found["reward/positive"] == reward.evaluate({"frames": scores.features["frames"][sets.positive]})
    assert 0 < found["sets/swap_acceptance"] < 1


def test_a_climb_never_lowers_the_reward() -> None:
    """Each accepted exchange raises R, seen at the state's own swap calls; the last value is that of the final rows."""

    class Watched(FrechetState):
        seen: list[float] = []

        def swap(self, slot: int, candidate: int) -> None:
            super().swap(slot, candidate)
            self.seen.append(self.value())

    reward, pool = Frechet(), points(40).features
    rows = torch.arange(40).view(-1, 2)
    state = Watched(pool["frames"], pool["valid"], rows[:, 0], reward.law)
    start = state.value()
    final, _, _, _ = climb(state, rows[:, :1], rows[:, 1:], sign=1, sweeps=3, generator=stream(0, "test/climb"))
    values = [start, *state.seen]
    assert len(values) > 3 and all(b > a for a, b in zip(values, values[1:]))
    # 1e-9: incremental sums against sums taken anew
    assert values[-1] == pytest.approx(reward.evaluate({"frames": pool["frames"][final.flatten()]}), abs=1e-9)


def test_gap_rule_reaches_a_larger_gap_than_its_start() -> None:
    sets = build(Frechet(), points(40), rule="gap", sweeps=3)
    plain = build(Frechet(), points(40), rule="random")
    gap = {name: s.metrics["reward/positive"] - s.metrics["reward/negative"] for name, s in (("g", sets), ("r", plain))}
    assert gap["g"] > gap["r"] + 0.2


def test_second_sweep_on_an_additive_reward_changes_nothing() -> None:
    """For a mean reward one sweep converges: acceptance halves exactly when a second sweep is added."""
    values = torch.randn(30, generator=stream(2, "test/values"))
    valid = torch.ones(30, dtype=torch.bool)
    scores = Scores(valid, features={"values": values, "valid": valid})
    one, two = (build(ItemAsSet(FirstAxis()), scores, sweeps=n) for n in (1, 2))
    assert torch.equal(one.positive, two.positive)
    assert two.metrics["sets/swap_acceptance"] == one.metrics["sets/swap_acceptance"] / 2


def test_identical_members_are_never_swapped() -> None:
    frames = points(20).features["frames"].repeat_interleave(2, 0)
    valid = torch.ones(40, dtype=torch.bool)
    sets = build(Frechet(), Scores(valid, features={"frames": frames, "valid": valid}))
    assert sets.metrics["sets/swap_acceptance"] == 0
    assert sets.metrics["sets/ties"] == 20 and len(sets.positive) == 0


def test_groups_with_an_invalid_member_are_dropped_and_counted() -> None:
    values = torch.randn(20, generator=stream(3, "test/values"))
    valid = torch.ones(20, dtype=torch.bool)
    valid[[3, 10]] = False
    sets = build(FirstAxis(), Scores(valid, values=torch.where(valid, values, torch.nan)))
    assert sets.metrics["sets/invalid"] == 2 and len(sets.positive) == 8
    assert not {2, 3, 10, 11} & set(torch.cat([sets.positive, sets.negative]).tolist())
    nothing = build(FirstAxis(), Scores(torch.zeros(20, dtype=torch.bool), values=values))
    assert len(nothing.positive) == 0 and nothing.metrics["sets/invalid"] == 10


def test_four_generations_best_worst_and_halves() -> None:
    values = torch.randn(24, generator=stream(4, "test/values"))
    scores = Scores(torch.ones(24, dtype=torch.bool), values=values)
    extreme, halves = build(FirstAxis(), scores, 4), build(FirstAxis(), scores, 4, grouping="halves")
    rows = values.view(-1, 4)
    assert torch.equal(values[extreme.positive], rows.max(1).values)
    assert torch.equal(values[extreme.negative], rows.min(1).values)
    order = rows.sort(1, descending=True).values
    assert torch.equal(values[halves.positive], order[:, :2].flatten())
    assert torch.equal(values[halves.negative], order[:, [3, 2]].flatten())


@pytest.mark.parametrize("grouping", ["best_worst", "halves"])
def test_four_generations_of_a_set_reward(grouping: str) -> None:
    """Set climbs with a mean reward agree with ranking: best and worst member, or the members of each half."""
    values = torch.randn(24, generator=stream(5, "test/values"))
    valid = torch.ones(24, dtype=torch.bool)
    ranked = build(FirstAxis(), Scores(valid, values=values), 4, grouping=grouping)
    scores = Scores(valid, features={"values": values, "valid": valid})
    climbed = build(ItemAsSet(FirstAxis()), scores, 4, grouping=grouping, sweeps=6)
    for mine, theirs in ((climbed.positive, ranked.positive), (climbed.negative, ranked.negative)):
        assert torch.equal(mine.sort().values, theirs.sort().values)
    fd = build(Frechet(), points(48), 4, grouping=grouping)
    assert fd.metrics["reward/positive"] > fd.metrics["reward/model"] > fd.metrics["reward/negative"]
    assert torch.equal(fd.positive // 4, fd.negative // 4), "both sets must hold the same prompts"


def test_random_split_depends_on_the_seed_alone() -> None:
    first = build(Frechet(), points(30, seed=1), rule="random")
    second = build(Frechet(), points(30, seed=2), rule="random")
    other = build(Frechet(), points(30, seed=1), rule="random", generator=stream(9, "test/sets"))
    assert torch.equal(first.positive, second.positive) and not torch.equal(first.positive, other.positive)


def test_influence_of_a_linear_functional_is_analytic() -> None:
    """R(S) = mean(r): R(S) − R(S∖i) = (r_i − mean r)/(n − 1), by plain recomputation and by the library."""
    values = torch.randn(9, generator=stream(6, "test/values")).double()
    valid = torch.ones(9, dtype=torch.bool)
    pool = {"values": values, "valid": valid}
    reward = ItemAsSet(FirstAxis())
    expected = (values - values.mean()) / 8
    for state in (reward.state(pool, torch.arange(9)), RecomputedState(reward, pool, torch.arange(9))):
        torch.testing.assert_close(state.influence(), expected, atol=1e-12, rtol=0)


def test_share_reward_balances_the_positive_set() -> None:
    """20 pairs of (+, −): any balance can be reached, so the climb must end at exactly one half."""
    up = torch.tensor([1.0, 0.0] * 20).double()
    valid = torch.ones(40, dtype=torch.bool)
    sets = build(Share(), Scores(valid, features={"up": up, "valid": valid}))
    assert sets.metrics["reward/positive"] == 0.0 and sets.metrics["reward/model"] == -0.25


def test_wrong_pools_are_refused() -> None:
    scores = Scores(torch.ones(9, dtype=torch.bool), values=torch.zeros(9))
    with pytest.raises(ValueError, match="groups of 2"):
        build(FirstAxis(), scores)
    with pytest.raises(ValueError, match="halves"):
        build(FirstAxis(), scores, 3, grouping="halves")
