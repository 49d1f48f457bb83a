"""A Gaussian sampler for small networks, where the loop itself would cost as much as the network.

`sample` builds objects at every step (predictions, states); this one reduces a step to two linear combinations whose
numbers are computed once per grid, worked out in place.  Same numbers as `sample` with `ddim` or `euler` to rounding,
with `clip_x0(model, limit)` in the place of the model where x0 is clipped (tested against it).

With a network output r of any prediction type, x0 = p·x + q·r and the step is x' = keep·x + move·x0 + std·noise.  A
clipped x0 gives its own eps = (x − a·x0)/s (docs/methods/gpc.md#clipping; diffusers' `clip_sample` does the same for
DDPM).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.models.denoiser import Denoiser
from gencontrol.process.convert import convert_weights
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rng import Keyed
from gencontrol.sampling.steps import Ddim, Euler
from gencontrol.types import Prediction


@dataclass(frozen=True)
class StepTable:
    """The numbers of every step of a grid.

    Args:
        times: at which the network is asked.
        p, q: x0 = p·x + q·output.
        keep, move, std: x' = keep·x + move·x0 + std·noise.
        limit: x0 is clipped to ± this; infinity does not clip.
    """

    times: tuple[float, ...]
    p: tuple[float, ...]
    q: tuple[float, ...]
    keep: tuple[float, ...]
    move: tuple[float, ...]
    std: tuple[float, ...]
    limit: float

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise."""
        return any(self.std)


def step_table(
    denoiser: Denoiser, grid: Sequence[float], step: Ddim | Euler, *, limit: float = float("inf")
) -> StepTable:
    """Compute the table of a grid of decreasing times that ends at 0.

    Args:
        denoiser: its process and prediction type are used, its network is not called.
        step: `Ddim(eta)` or `Euler()`.
        limit: of the clean prediction.

    Raises:
        ValueError: a masked model, or an EDM network (its input is scaled).
    """
    process, prediction = denoiser.process, denoiser.prediction
    if not isinstance(process, GaussianProcess) or prediction in (None, Prediction.EDM):
        raise ValueError("the fast sampler needs a Gaussian denoiser of a prediction type other than EDM")
    assert prediction is not None
    asked = [min(t, denoiser.t_max) for t in grid]
    process.schedule.prepare([*grid, *asked])
    like = torch.empty(0)
    rows: list[tuple[float, ...]] = []
    for t, t_asked, t_next in zip(grid, asked, grid[1:]):
        at = process.schedule.at(t_asked)
        p, q = (float(value) for value in convert_weights(prediction, Prediction.X0, at))
        if t_next == 0.0:
            keep, move, std = 0.0, 1.0, 0.0
        elif isinstance(step, Euler):
            span = t_next - t
            keep, move, std = 1.0 + span * at.ds / at.s, span * (at.da - at.ds * at.a / at.s), 0.0
        else:
            w0, w1, std = (float(value) for value in process.step_weights(t, t_next, step.eta, like))
            keep, move = w1 / at.s, w0 - w1 * at.a / at.s
        rows.append((t_asked, p, q, keep, move, std))
    times, ps, qs, keeps, moves, stds = zip(*rows, strict=True)
    return StepTable(times, ps, qs, keeps, moves, stds, limit)


def run(
    table: StepTable,
    network: Callable[[Tensor, Any], Tensor],
    plan: Sequence[Any],
    x: Float[Tensor, "b *d"],
    noise: Sequence[Tensor] | None = None,
) -> Float[Tensor, "b *d"]:
    """Take all steps.

    Args:
        network: (x, entry of the plan) → the network's output there, which may share no memory with x.
        plan: one entry per step: what the network needs beside x, e.g. the time, or all that follows from it.
        x: the state at the first time; overwritten.
        noise: one [b *d] for each step but the last; needed where the table has a deviation.

    Returns:
        The clean sample; before the last clipping it is not kept.
    """
    x0, clip = torch.empty_like(x), table.limit != float("inf")
    for k, entry in enumerate(plan):
        raw = network(x, entry)
        torch.mul(x, table.p[k], out=x0).add_(raw, alpha=table.q[k])
        if clip:
            x0.clamp_(-table.limit, table.limit)
        if table.keep[k] == 0.0 and table.move[k] == 1.0:
            return x0
        x.mul_(table.keep[k]).add_(x0, alpha=table.move[k])
        if table.std[k]:
            assert noise is not None  # the caller asks `stochastic`
            x.add_(noise[k], alpha=table.std[k])
    return x


def step_noise(
    table: StepTable, shape: Sequence[int], noise: Keyed, device: torch.device | str = "cpu"
) -> Sequence[Tensor] | None:
    """Return the noise of all steps, that of step k being draw k + 1 of the rows' streams; None where none is needed.

    One hash serves all steps.
    """
    if not table.stochastic:
        return None
    count = len(table.times) - 1
    draws = noise.draws(range(1, count + 1)).normal((count * shape[0], *shape[1:]), device)
    return draws.view(count, *shape).unbind(0)
