"""A sampler step of your own, the midpoint rule, measured against an exact law beside Euler.

python examples/own_sampler_step.py
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gencontrol.models import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling import State, sample
from gencontrol.sampling.steps import GaussianStep


@dataclass(frozen=True)
class Midpoint(GaussianStep):
    """Second order in t: the velocity half-way; two model calls."""

    order, evaluations = 2, 2

    def __call__(
        self, model: Any, state: State, t: float, t_next: float, cond: Any = None, noise: Tensor | None = None
    ) -> State:
        first = model(state.x, t, cond)
        if t_next == 0:
            return State(first.x0)
        half = (t + t_next) / 2
        middle = state.x + (half - t) * first.velocity
        return State(state.x + (t_next - t) * model(middle, half, cond).velocity)


if __name__ == "__main__":
    law = GaussianMixture(torch.tensor([[1.0]]), torch.ones(1, 1, 1) * 0.04, torch.ones(1), GaussianProcess(Linear()))
    for step in ("euler", Midpoint()):
        x = sample(law, (4000, 1), steps=8, step=step, generator=torch.Generator().manual_seed(0))
        print(f"{step}: mean {float(x.mean()):.3f} (exact 1), deviation {float(x.std()):.3f} (exact 0.2)")
