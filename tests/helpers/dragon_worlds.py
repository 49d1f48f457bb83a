"""Small worlds for the tests of DRAGON and its peers: vectors, hand-made rewards, a two-atom law with one parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gencontrol.algorithms.matching.dragon import Dragon, DragonConfig
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.toys import toy_flow, toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rewards.base import Features
from gencontrol.types import Prediction, RewardContext, RewardOut

SIZE = 3
PROMPTS = [f"prompt {i}" for i in range(7)]


class FirstAxis:
    """Item reward: the first coordinate; the first `broken` calls mark all but every fourth item invalid."""

    name, differentiable = "first-axis", False
    kind: Literal["item", "set"] = "item"

    def __init__(self, broken: int = 0) -> None:
        self.broken, self.calls = broken, 0

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        self.calls += 1
        valid = torch.ones(len(samples), dtype=torch.bool)
        if self.calls <= self.broken:
            valid = torch.arange(len(samples)) % 4 == 0
        return RewardOut(torch.where(valid, samples[:, 0], torch.nan), valid)


class RecomputedState:
    """The plainest SetState: every value is taken anew from the whole set."""

    def __init__(self, reward: Any, pool: Features, chosen: Tensor) -> None:
        self.reward, self.pool, self.slots = reward, pool, chosen.tolist()

    def _value(self, rows: Sequence[int]) -> float:
        return self.reward.evaluate({key: value[list(rows)] for key, value in self.pool.items()})

    def value(self) -> float:
        return self._value(self.slots)

    def propose(self, slot: int, candidate: int) -> float:
        return self._value([candidate if i == slot else row for i, row in enumerate(self.slots)])

    def swap(self, slot: int, candidate: int) -> None:
        self.slots[slot] = candidate

    def influence(self) -> Tensor:
        rest = [self._value([r for j, r in enumerate(self.slots) if j != i]) for i in range(len(self.slots))]
        return self.value() - torch.tensor(rest, dtype=torch.float64)


class Share:
    """Set reward −(share of positive first coordinates − 1/2)²: a law's balance, which no item has."""

    name, differentiable = "share", False
    kind: Literal["item", "set"] = "set"

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        features = self.features(samples, context)
        return RewardOut(torch.full((len(samples),), self.evaluate(features)), features["valid"])

    def features(self, samples: Tensor, context: RewardContext) -> dict[str, Tensor]:
        return {"up": (samples[:, 0] > 0).double(), "valid": torch.ones(len(samples), dtype=torch.bool)}

    def evaluate(self, features: Features) -> float:
        return -float((features["up"].mean() - 0.5) ** 2)

    def state(self, pool: Features, chosen: Tensor) -> ShareState:
        return ShareState(pool["up"].tolist(), chosen.tolist())


class ShareState:
    """Incremental state of `Share` by counting."""

    def __init__(self, up: list[float], slots: list[int]) -> None:
        self.up, self.slots, self.count = up, slots, sum(up[row] for row in slots)

    def _value(self, count: float) -> float:
        return -((count / len(self.slots) - 0.5) ** 2)

    def value(self) -> float:
        return self._value(self.count)

    def propose(self, slot: int, candidate: int) -> float:
        return self._value(self.count + self.up[candidate] - self.up[self.slots[slot]])

    def swap(self, slot: int, candidate: int) -> None:
        self.count += self.up[candidate] - self.up[self.slots[slot]]
        self.slots[slot] = candidate

    def influence(self) -> Tensor:
        size = len(self.slots) - 1
        rest = [-(((self.count - self.up[row]) / size - 0.5) ** 2) for row in self.slots]
        return self.value() - torch.tensor(rest, dtype=torch.float64)


class TwoAtoms(nn.Module):
    """Exact posterior mean of a law with atoms ±1 and p(+1) = σ(logit): E[x0 | xt] = tanh(logit/2 + a·xt/s²)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        t = t[:, None]
        return torch.tanh(self.logit / 2 + (1 - t) * xt / t.square())

    def share(self) -> float:
        return torch.sigmoid(self.logit).item()


def two_atoms(share: float) -> PromptTask:
    """Task on the two-atom law; its samples end at ±1 up to the sampler's error."""
    return toy_task(Denoiser(TwoAtoms(share), GaussianProcess(Linear()), Prediction.X0), 1)


def encode(texts: Sequence[str]) -> Tensor:
    """One-hot conditions [b 7] by the prompt's number."""
    return torch.nn.functional.one_hot(torch.tensor([int(t.split()[1]) for t in texts]), len(PROMPTS)).float()


def make_task() -> PromptTask:
    """An untrained conditional flow on 3-d vectors; equal at each call."""
    return toy_task(
        toy_flow(SIZE, conditions=len(PROMPTS), width=16),
        SIZE,
        prompts=PROMPTS,
        eval_prompts=PROMPTS[:4],
        encode=encode,
    )


def make_dragon(reward: Any = None, *, seed: int = 0, **options: Any) -> Dragon:
    """DRAGON on `make_task` with few pairs and steps."""
    small = {"prompts_per_round": 6, "updates_per_round": 2, "demo_steps": 4, "eval_steps": 4}
    task = make_task()
    config = DragonConfig(**(small | options))
    return Dragon(task, reward or FirstAxis(), config, roles=Roles(task.denoiser.network), seed=seed)
