"""Weighted sums of rewards.

A sum of item rewards is an item reward; a sum with at least one set reward is a set reward, in which an item reward
counts with the mean over the set.  An item is valid when every part could score it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.base import (
    Features,
    ItemAsSet,
    OfSets,
    Reward,
    SetReward,
    SetState,
    as_set_reward,
    broadcast,
    checked,
)
from gencontrol.types import RewardContext, RewardOut

Part = TypeVar("Part", bound=Reward)


@dataclass(frozen=True)
class _Weighted(Generic[Part]):
    """Rewards with their weights."""

    parts: tuple[Part, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """Weights and names of the parts, e.g. "0.7*clap+0.3*fad"."""
        return "+".join(f"{weight:g}*{part.name}" for part, weight in zip(self.parts, self.weights, strict=True))


@dataclass(frozen=True)
class WeightedItems(_Weighted[Reward]):
    """Item reward Σ w_i·r_i; `extras["parts"]` holds the values of each part by name, "reasons" why items lack."""

    kind: ClassVar[Literal["item", "set"]] = "item"

    @property
    def differentiable(self) -> bool:
        """Whether every part is."""
        return all(part.differentiable for part in self.parts)

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """The weighted sum; valid where all parts are."""
        outs = [part(samples, context) for part in self.parts]
        total = torch.stack([weight * out.values for weight, out in zip(self.weights, outs, strict=True)]).sum(0)
        valid = torch.stack([out.valid for out in outs]).all(0)
        result = checked(self.name, total, len(valid), valid)
        values = {part.name: out.values.detach() for part, out in zip(self.parts, outs, strict=True)}
        reasons = sum((Counter(out.extras.get("reasons", {})) for out in outs), Counter[str]())
        return RewardOut(result.values, result.valid, {"parts": values, "reasons": dict(reasons)})


@dataclass(frozen=True)
class WeightedState:
    """Weighted sum of the states of the parts; they hold the same members in the same slots."""

    states: tuple[SetState, ...]
    weights: tuple[float, ...]

    def value(self) -> float:
        """Weighted sum of the values."""
        return sum(w * state.value() for w, state in zip(self.weights, self.states, strict=True))

    def propose(self, slot: int, candidate: int) -> float:
        """Weighted sum of the proposals; −inf when a part refuses the candidate, whatever the sign of its weight."""
        total = 0.0
        for weight, state in zip(self.weights, self.states, strict=True):
            part = state.propose(slot, candidate)
            if part == float("-inf"):
                return part
            total += weight * part
        return total

    def swap(self, slot: int, candidate: int) -> None:
        """Exchange in every part."""
        for state in self.states:
            state.swap(slot, candidate)

    def influence(self) -> Float[Tensor, " n"]:
        """Weighted sum of the influences."""
        parts = [w * state.influence() for w, state in zip(self.weights, self.states, strict=True)]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class WeightedSets(_Weighted[SetReward], OfSets):
    """Set reward Σ w_i·R_i(S); `extras["parts"]` holds the value of each part by name."""

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """The set's value on every valid item."""
        features = self.features(samples, context)
        values = {part.name: part.evaluate(self._of(features, i)) for i, part in enumerate(self.parts)}
        return broadcast(self.name, self.evaluate(features), features, {"parts": values})

    def features(self, samples: Any, context: RewardContext) -> dict[str, Tensor]:
        """Features of all parts under "i/key", and their common "valid"."""
        merged: dict[str, Tensor] = {}
        masks = []
        for index, part in enumerate(self.parts):
            features = part.features(samples, context)
            masks.append(features["valid"])
            merged |= {f"{index}/{key}": value for key, value in features.items() if key != "valid"}
        return {**merged, "valid": torch.stack(masks).all(0)}

    def _of(self, features: Features, index: int) -> dict[str, Tensor]:
        """Features of one part, with the common mask."""
        prefix = f"{index}/"
        own = {key.removeprefix(prefix): value for key, value in features.items() if key.startswith(prefix)}
        return {**own, "valid": features["valid"]}

    def evaluate(self, features: Features) -> float:
        """Weighted sum over the valid rows."""
        values = [part.evaluate(self._of(features, i)) for i, part in enumerate(self.parts)]
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def state(self, pool: Features, chosen: Int64[Tensor, " n"]) -> SetState:
        """Incremental states of all parts."""
        states = tuple(part.state(self._of(pool, i), chosen) for i, part in enumerate(self.parts))
        return WeightedState(states, self.weights)


def weighted(parts: Sequence[tuple[Reward, float]]) -> Reward:
    """Return Σ w_i·r_i of rewards; a single reward of weight 1 is returned as it is.

    Raises:
        UsageError: no reward, or a weight that is 0 or not finite.
    """
    if not parts:
        raise UsageError("no reward was given; name at least one, e.g. clap.")
    for reward, weight in parts:
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(
                f"the weight of reward '{reward.name}' is {weight}; expected a finite number other than 0."
            )
    rewards, weights = tuple(r for r, _ in parts), tuple(float(w) for _, w in parts)
    if len(rewards) == 1 and weights[0] == 1.0:
        return rewards[0]
    if all(reward.kind == "item" for reward in rewards):
        return WeightedItems(rewards, weights)
    sets = tuple(ItemAsSet(reward) if reward.kind == "item" else as_set_reward(reward) for reward in rewards)
    return WeightedSets(sets, weights)
