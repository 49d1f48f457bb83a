"""Small worlds for the tests of CRD, DiffusionNFT and AWM: a task with guidance, and a one-dimensional Gaussian."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.toys import toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.types import Prediction
from tests.helpers.dragon_worlds import PROMPTS, FirstAxis, make_task

SMALL = {
    "prompts_per_round": 4,
    "generations": 3,
    "updates_per_round": 2,
    "train_times": 2,
    "demo_steps": 3,
    "eval_steps": 3,
    "kl_guidance": 2.0,
}


def guided_task() -> PromptTask:
    """`make_task` with an unconditional condition."""
    return replace(make_task(), uncond=torch.zeros(1, len(PROMPTS)))


def make(kind: Any, reward: Any = None, *, lora: LoraConfig | None = None, task: Any = None, **options: Any) -> Any:
    """A small run of a method; equal at each call."""
    task = guided_task() if task is None else task
    config = kind.Config(**(SMALL | options))
    roles = Roles(task.denoiser.network, kind.role_names(config), lora)
    return kind(task, reward or FirstAxis(), config, roles=roles, seed=0)


def move(roles: Any, size: float, *names: str) -> None:
    """Shift the weights of these roles by different amounts, so that no two are equal."""
    with torch.no_grad():
        for number, role in enumerate(names, 1):
            for name, weight in roles.state_dict()[role].items():
                generator = torch.Generator().manual_seed(len(name) + number)
                weight.add_(size * number * torch.randn(weight.shape, generator=generator))


class Shifted(nn.Module):
    """Velocity of the standard normal law plus Δ(t) = Σ c_j φ_j(t), φ = t, t², …: what a linear reward asks for."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(terms, dtype=torch.float64))

    def shift(self, t: Tensor) -> Tensor:
        """Δ(t)."""
        return sum(c * t ** (j + 1) for j, c in enumerate(self.c))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        t = t.double()[:, None]
        return (2 * t - 1) / (t.square() + (1 - t).square()) * xt.double() + self.shift(t)


def gaussian_task(terms: int) -> PromptTask:
    """Base law N(0, 1) as an exact rectified flow."""
    return toy_task(Denoiser(Shifted(terms), GaussianProcess(Linear()), Prediction.VELOCITY), 1)


def mean_shift(network: Shifted, steps: int = 4000) -> float:
    """Mean of the flow's samples, by the midpoint rule on the ODE of the mean from t = 1 to 0."""
    mean, h = 0.0, 1.0 / steps
    with torch.no_grad():
        for i in range(steps):
            t = 1.0 - i * h

            def slope(at: float, m: float) -> float:
                return (2 * at - 1) / (at * at + (1 - at) ** 2) * m + float(network.shift(torch.tensor(at)))

            mean -= h * slope(t - h / 2, mean - h / 2 * slope(t, mean))
    return mean
