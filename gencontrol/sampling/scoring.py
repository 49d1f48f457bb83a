"""Scoring of clean samples for searches: decode, reward, and what to do with samples that cannot be scored.

A search must not die of one bad sample: NaN makes a sample invalid, and if the reward raises on a batch the samples are
scored one by one so that those that raise are excluded, counted and named.  A reward that breaks its contract (wrong
number of values) is an error at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from gencontrol.errors import RewardError, UsageError
from gencontrol.rewards.base import Reward, checked
from gencontrol.rewards.loading import UserItemReward
from gencontrol.sampling.samplers import NO_GRADIENT
from gencontrol.types import RewardContext

#: After this many samples without one valid score the search stops (ours).
PATIENCE = 64


def as_item_reward(reward: Any) -> Reward:
    """Return an item reward: one of ours as it is, a function of samples or of (samples, context) wrapped.

    Raises:
        UsageError: a set reward, or something that cannot be called.
    """
    if isinstance(reward, Reward):
        if reward.kind != "item":
            raise UsageError(
                f"reward '{reward.name}' scores whole sets; a search scores single samples. Use an item reward, e.g. "
                "the per-clip 'fad' instead of 'fad-set'."
            )
        return reward
    if not callable(reward):
        raise UsageError(f"the reward is a {type(reward).__name__}; give a reward of load_reward or a function.")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = [p for p in inspect.signature(reward).parameters.values() if p.kind in kinds and p.default is p.empty]
    name = getattr(reward, "__name__", type(reward).__name__)
    if len(takes) >= 2:
        return UserItemReward(name, reward, differentiable=True)
    return UserItemReward(name, lambda samples, context: reward(samples), differentiable=True)


@dataclass(frozen=True)
class Scores:
    """Values [b] float64 (NaN where invalid) and the mask, on the CPU."""

    values: Float[Tensor, " b"]
    valid: Bool[Tensor, " b"]


@dataclass
class Scorer:
    """Clean states → reward values, with counters.

    Args:
        reward: item reward, or a function of (decoded) samples.
        decode: clean states [b *d] → samples that the reward takes; None passes the states.
        context: prompts and metadata with one entry per root; the scorer picks those of the rows.
        batch: samples per decode and reward call.
        repeats: calls averaged per sample, for a reward with noise in it.
    """

    reward: Any
    decode: Callable[[Tensor], Any] | None = None
    context: RewardContext = field(default_factory=RewardContext)
    batch: int = 64
    repeats: int = 1
    calls: int = 0
    scored: int = 0
    excluded: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.repeats < 1:
            raise UsageError(f"batch and repeats must be at least 1, not {self.batch} and {self.repeats}.")
        self.reward = as_item_reward(self.reward)

    @torch.no_grad()
    def __call__(self, x0: Shaped[Tensor, "b *d"], roots: Int64[Tensor, " b"]) -> Scores:
        """Score clean states; `calls` grows by b·repeats, `scored` by the valid ones, `excluded` by the others.

        Raises:
            RewardError: the reward breaks its contract, or nothing valid came in the first `PATIENCE` samples.
        """
        parts = [self._score(x0[i : i + self.batch], roots[i : i + self.batch]) for i in range(0, len(x0), self.batch)]
        if not parts:
            return Scores(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
        values = torch.cat([part.values for part in parts])
        valid = torch.cat([part.valid for part in parts])
        self.scored += int(valid.sum())
        self.excluded += int((~valid).sum())
        if self.excluded >= PATIENCE and not self.scored:
            why = "; ".join(f"{reason} ({count})" for reason, count in self.reasons.items())
            raise RewardError(f"reward '{self.reward.name}' scored none of the first {self.excluded} samples: {why}")
        return Scores(values, valid)

    def counters(self) -> dict[str, Any]:
        """What was counted so far, for `set_counters` and files."""
        return {"calls": self.calls, "scored": self.scored, "excluded": self.excluded, "reasons": dict(self.reasons)}

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Count on from what `counters` returned."""
        self.calls, self.scored, self.excluded = counters["calls"], counters["scored"], counters["excluded"]
        self.reasons = dict(counters["reasons"])

    def add_counters(self, counters: Mapping[str, Any]) -> None:
        """Add what another scorer counted."""
        self.calls += counters["calls"]
        self.scored += counters["scored"]
        self.excluded += counters["excluded"]
        for reason, count in counters["reasons"].items():
            self._reason(reason, count)

    def differentiable(self, x0: Float[Tensor, "b *d"], roots: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Values with their graph, NaN where invalid; for gradient proposals.  Counts calls like any other.

        Raises:
            UsageError: the reward is not differentiable.
        """
        if not self.reward.differentiable:
            raise UsageError(
                f"reward '{self.reward.name}' is not differentiable; choose a sampler that needs no gradient: "
                f"{NO_GRADIENT}."
            )
        self.calls += len(x0)
        samples = x0 if self.decode is None else self.decode(x0)
        return checked(self.reward.name, self.reward(samples, self._context(roots)), len(x0)).values

    def _context(self, roots: Int64[Tensor, " b"]) -> RewardContext:
        """The context's entries of the rows."""
        return self.context.rows(roots.tolist())

    def _score(self, x0: Tensor, roots: Tensor) -> Scores:
        """One decode, `repeats` reward calls, averaged over the valid ones."""
        samples = x0 if self.decode is None else self.decode(x0)
        total = torch.zeros(len(x0), dtype=torch.float64)
        count = torch.zeros(len(x0), dtype=torch.float64)
        for _ in range(self.repeats):
            scores = self._call(samples, roots)
            total += torch.where(scores.valid, scores.values, torch.zeros_like(total))
            count += scores.valid
        return Scores(total / count.masked_fill(count == 0, float("nan")), count > 0)

    def _call(self, samples: Any, roots: Tensor) -> Scores:
        """The reward on a batch, one by one where it raises.

        Raises:
            RewardError: it returned something else than one number per sample.
        """
        size = len(roots)
        self.calls += size
        try:
            out = checked(self.reward.name, self.reward(samples, self._context(roots)), size)
        except Exception as error:
            if isinstance(error, UsageError) or isinstance(error, RewardError) and error.__cause__ is None:
                raise
            if size == 1:
                self._reason(str(error).splitlines()[0] if str(error) else type(error).__name__)
                return Scores(torch.full((1,), float("nan"), dtype=torch.float64), torch.zeros(1, dtype=torch.bool))
            self.calls -= size
            single = [self._call(samples[i : i + 1], roots[i : i + 1]) for i in range(size)]
            return Scores(torch.cat([s.values for s in single]), torch.cat([s.valid for s in single]))
        valid = out.valid.cpu()
        if missing := size - int(valid.sum()):
            named = out.extras.get("reasons", {})
            for reason, count in named.items():
                self._reason(reason, count)
            if (rest := missing - sum(named.values())) > 0:
                self._reason("returned NaN or infinity", rest)
        return Scores(out.values.detach().double().cpu(), valid)

    def _reason(self, text: str, count: int = 1) -> None:
        """Count why samples were excluded."""
        self.reasons[text] = self.reasons.get(text, 0) + count
