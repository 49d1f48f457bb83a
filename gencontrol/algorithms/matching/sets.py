"""Which generations go into the positive set D+ and which into the negative set D−  (DRAGON, arXiv 2504.15217).

Groups are the generations of one prompt.  An item reward ranks the members of a group.  A set reward is climbed by
exchanges inside a group, so that both sets keep the same prompts and the contrast carries no prompt bias.  The paper
fixes "score, split into a positive and a negative set"; the exchange rule, the accept tests and the treatment of more
than two generations are ours (derived in docs/methods/dragon.md#sets).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gencontrol.algorithms.online.rollout import Scores, reward_of
from gencontrol.rewards.base import Features, Reward, SetReward, SetState, as_set_reward

Rule = Literal["positive", "gap", "influence", "random"]
Grouping = Literal["best_worst", "halves"]

#: An exchange that changes the reward by less than this share of its size is a tie (rounding of incremental sums).
TIE = 1e-10


@dataclass(frozen=True)
class Sets:
    """Aligned rows of the pool: `positive[p]` and `negative[p]` share a prompt; ties and invalid groups are left out.

    `metrics`: `reward/positive`, `reward/negative` = R(D+), R(D−) and `reward/model` = R(D_θ), all three on sets of
    equal size before ties are dropped; `sets/pairs`, `sets/ties`, `sets/invalid`, `sets/swap_acceptance`.
    """

    positive: Int64[Tensor, " p"]
    negative: Int64[Tensor, " p"]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class _Split:
    """Rows [n, k] of D+ and D− before ties (`tied` [n, k]) are dropped, and the share of proposals accepted."""

    positive: Int64[Tensor, "n k"]
    negative: Int64[Tensor, "n k"]
    tied: Bool[Tensor, "n k"]
    acceptance: float = float("nan")


def rank_split(values: Float[Tensor, "n g"], groups: Int64[Tensor, "n g"], grouping: Grouping) -> _Split:
    """Split each group by value: best against worst, or the j-th best against the j-th worst of each half."""
    count = 1 if grouping == "best_worst" else groups.shape[1] // 2
    order = values.argsort(dim=1, descending=True, stable=True)
    top, bottom = order[:, :count], order.flip(1)[:, :count]
    tied = values.gather(1, top) == values.gather(1, bottom)
    return _Split(groups.gather(1, top), groups.gather(1, bottom), tied)


class _Gap:
    """The state of R(D+) − R(D−) under exchanges between the two sets, with the surface of a SetState."""

    def __init__(self, reward: SetReward, pool: Features, plus: Tensor, minus: Tensor) -> None:
        self.up, self.down = reward.state(pool, plus), reward.state(pool, minus)
        self.plus = plus.tolist()
        self.slot_of = {row: slot for slot, row in enumerate(minus.tolist())}

    def value(self) -> float:
        return self.up.value() - self.down.value()

    def propose(self, slot: int, candidate: int) -> float:
        return self.up.propose(slot, candidate) - self.down.propose(self.slot_of[candidate], self.plus[slot])

    def swap(self, slot: int, candidate: int) -> None:
        mine, place = self.plus[slot], self.slot_of.pop(candidate)
        self.up.swap(slot, candidate)
        self.down.swap(place, mine)
        self.plus[slot], self.slot_of[mine] = candidate, place


def climb(
    state: SetState | _Gap,
    rows: Int64[Tensor, "n k"],
    rivals: Int64[Tensor, "n r"],
    *,
    sign: int,
    sweeps: int,
    generator: torch.Generator,
) -> tuple[Int64[Tensor, "n k"], Int64[Tensor, "n r"], Bool[Tensor, "n k"], float]:
    """Visit the slots in random order and exchange each for the best rival of its group while sign·R rises.

    Slot s of `state` is `rows.flatten()[s]`.  Returns the final rows and rivals, which slots were ties at their last
    visit, and the share of visits that were accepted.  sign·R never falls.
    """
    rows, rivals, width = rows.clone(), rivals.clone(), rows.shape[1]
    tied = torch.zeros(rows.numel(), dtype=torch.bool)
    current, accepted, visits = sign * state.value(), 0, 0
    for _ in range(sweeps):
        before = accepted
        for slot in torch.randperm(rows.numel(), generator=generator).tolist():
            group, place = divmod(slot, width)
            proposals = [sign * state.propose(slot, row) for row in rivals[group].tolist()]
            best = max(proposals)
            margin = TIE * max(abs(current), abs(best))
            tied[slot] = abs(best - current) <= margin
            visits += 1
            if best > current + margin:
                other = proposals.index(best)
                mine, theirs = int(rows[group, place]), int(rivals[group, other])
                state.swap(slot, theirs)
                rows[group, place], rivals[group, other] = theirs, mine
                current, accepted = best, accepted + 1
        if accepted == before:
            break
    return rows, rivals, tied.view(rows.shape), accepted / max(visits, 1)


def swap_split(
    reward: SetReward,
    pool: Features,
    groups: Int64[Tensor, "n g"],
    *,
    rule: Literal["positive", "gap"],
    sweeps: int,
    grouping: Grouping,
    generator: torch.Generator,
) -> _Split:
    """Climb a set reward by exchanges inside the groups.

    Two generations, or "halves": D+ starts as the first half of each group and exchanges with D−, the other half, while
    R(D+) (rule "positive") or R(D+) − R(D−) (rule "gap") rises.  "best_worst" of three or more: D+ takes one member per
    group and climbs R, then D− takes one of the others and descends it, which serves both rules.
    """
    if grouping == "halves" or groups.shape[1] == 2:
        half = groups.shape[1] // 2
        plus, minus = groups[:, :half], groups[:, half:]
        state: SetState | _Gap = reward.state(pool, plus.reshape(-1))
        if rule == "gap":
            state = _Gap(reward, pool, plus.reshape(-1), minus.reshape(-1))
        return _Split(*climb(state, plus, minus, sign=1, sweeps=sweeps, generator=generator))
    state = reward.state(pool, groups[:, 0])
    best, rest, tied, up = climb(state, groups[:, :1], groups[:, 1:], sign=1, sweeps=sweeps, generator=generator)
    state = reward.state(pool, rest[:, 0])
    worst, _, _, down = climb(state, rest[:, :1], rest[:, 1:], sign=-1, sweeps=sweeps, generator=generator)
    return _Split(best, worst, tied, (up + down) / 2)


def _split(
    reward: Reward | SetReward,
    scores: Scores,
    groups: Int64[Tensor, "n g"],
    *,
    rule: Rule,
    sweeps: int,
    grouping: Grouping,
    generator: torch.Generator,
) -> _Split:
    """Apply the rule to the usable groups."""
    if rule == "random":
        values = torch.rand(groups.shape, generator=generator, dtype=torch.float64)
        return rank_split(values, groups, grouping)
    if scores.values is not None:
        return rank_split(scores.values[groups], groups, grouping)
    assert scores.features is not None
    reward = as_set_reward(reward)
    if rule == "influence":
        influence = reward.state(scores.features, groups.reshape(-1)).influence()
        return rank_split(influence.view(groups.shape), groups, grouping)
    return swap_split(reward, scores.features, groups, rule=rule, sweeps=sweeps, grouping=grouping, generator=generator)


def build_sets(
    reward: Reward | SetReward,
    scores: Scores,
    generations: int,
    *,
    rule: Rule,
    sweeps: int,
    grouping: Grouping,
    generator: torch.Generator,
) -> Sets:
    """Build D+ and D− from a pool whose rows are groups of `generations` consecutive samples of one prompt.

    A group with an invalid member is dropped and counted.  `rule`: "positive" and "gap" are accept tests of exchanges
    for set rewards (item rewards rank, where both tests coincide), "influence" ranks by R(S) − R(S∖i), "random" is
    the control.

    Raises:
        ValueError: fewer than two generations, a pool that is no multiple of them, or an odd number with "halves".
    """
    if generations < 2 or len(scores.valid) % generations or (grouping == "halves" and generations % 2):
        raise ValueError(
            f"a pool of {len(scores.valid)} samples does not split into groups of {generations} ({grouping})"
        )
    groups = torch.arange(len(scores.valid)).view(-1, generations)
    usable = scores.valid.view(-1, generations).all(1)
    groups = groups[usable]
    counts = {"sets/invalid": float((~usable).sum()), "sets/pairs": 0.0, "sets/ties": 0.0}
    if not len(groups):
        empty = torch.empty(0, dtype=torch.int64)
        return Sets(empty, empty, counts)
    split = _split(reward, scores, groups, rule=rule, sweeps=sweeps, grouping=grouping, generator=generator)
    plus, minus, keep = split.positive.reshape(-1), split.negative.reshape(-1), ~split.tied.reshape(-1)
    model = groups[:, : split.positive.shape[1]].reshape(-1)
    metrics = counts | {
        "reward/positive": reward_of(reward, scores, plus),
        "reward/negative": reward_of(reward, scores, minus),
        "reward/model": reward_of(reward, scores, model),
        "sets/pairs": float(keep.sum()),
        "sets/ties": float((~keep).sum()),
    }
    if split.acceptance == split.acceptance:
        metrics["sets/swap_acceptance"] = split.acceptance
    return Sets(plus[keep], minus[keep], metrics)
