"""The smallest world with closed forms: data N(m, 1) on one axis, m the only parameter, any schedule."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.toys import toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import VP, GaussianProcess, Linear
from gencontrol.process.schedule import Schedule
from gencontrol.types import Prediction, RewardContext, RewardOut

SCHEDULES: dict[str, Schedule] = {"flow": Linear(), "vp": VP()}


class GaussianMean(nn.Module):
    """Exact posterior mean of N(m, 1): E[x0 | xt] = m + a·(xt − a·m)/(a² + s²)."""

    def __init__(self, schedule: Schedule, mean: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.schedule, self.mean = schedule, nn.Parameter(torch.tensor(mean, dtype=dtype))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        c = self.schedule.coeffs(t[:, None].to(xt.dtype))
        return self.mean + c.a * (xt - c.a * self.mean) / (c.a * c.a + c.s * c.s)


def gaussian_task(schedule: str = "flow", mean: float = 0.0, dtype: torch.dtype = torch.float32) -> PromptTask:
    """Task on N(mean, 1)."""
    law = SCHEDULES[schedule]
    return toy_task(Denoiser(GaussianMean(law, mean, dtype), GaussianProcess(law), Prediction.X0), 1)


class Parabola:
    """Differentiable item reward −(x − top)²."""

    name, differentiable = "parabola", True
    kind: Literal["item", "set"] = "item"

    def __init__(self, top: float = 0.0) -> None:
        self.top = top

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        values = -(samples - self.top).square().flatten(1).sum(1)
        return RewardOut(values, torch.ones(len(samples), dtype=torch.bool))
