"""Policies that were not made here: any network with a declared noise convention becomes a parent.

Time and sign conventions of flow models differ between code bases and cannot be seen in the weights
(docs/methods/gpc.md#conversions): some have time 1 at noise and regress eps − x0, others time 0 at noise and x0 − eps.
They are asked for, never guessed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import GaussianProcess, GridProcess, Linear, Table
from gencontrol.process.gaussian import Time
from gencontrol.process.schedule import Scalar
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.denoising import ChunkSampler, DenoisingPolicy, History
from gencontrol.robotics.policies.diffusion import diffusion_grid, squaredcos
from gencontrol.sampling.steps import Ddim, StochasticStep
from gencontrol.types import Cond, Prediction

#: (noisy chunks [b h a], the network's own time [b], condition) → output [b h a]
NetworkFn = Callable[[Tensor, Tensor, Cond], Tensor]

#: names of diffusers' `prediction_type`
PREDICTIONS = {"epsilon": Prediction.EPS, "sample": Prediction.X0, "v_prediction": Prediction.V}


class _Called(nn.Module):
    """A callable under a Denoiser: our time becomes its own, its output is multiplied by a sign."""

    def __init__(self, fn: NetworkFn, clock: Callable[[Tensor], Tensor], sign: float) -> None:
        super().__init__()
        self.fn, self.clock, self.sign = fn, clock, sign

    def forward(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the output in our sign."""
        output = self.fn(xt, self.clock(t), cond)
        return output if self.sign == 1.0 else self.sign * output


def velocity_model(fn: NetworkFn, *, time_at_noise: float, velocity_sign: int, time_scale: float = 1.0) -> Denoiser:
    """Return a rectified-flow network, x = (1 − u)·x0 + u·eps, as a Denoiser.

    Args:
        fn: the network; an nn.Module stays one.
        time_at_noise: its time at pure noise: 1 (LeRobot's flow policies, pi0, SmolVLA) or 0 (time runs to the data).
        velocity_sign: +1 if it outputs eps − x0, −1 if x0 − eps.
        time_scale: its time is multiplied by this (1000 for networks with diffusers' clock).

    Raises:
        UsageError: another value; the convention must be one of these.
    """
    if time_at_noise not in (0.0, 1.0) or velocity_sign not in (1, -1):
        raise UsageError(
            f"time_at_noise {time_at_noise} and velocity_sign {velocity_sign}: give 1 or 0 for the time at noise, and "
            f"+1 for eps − x0 or −1 for x0 − eps; the policy's training code says which."
        )

    def clock(t: Tensor) -> Tensor:
        return (t if time_at_noise == 1.0 else 1.0 - t) * time_scale

    return Denoiser(_Called(fn, clock, float(velocity_sign)), GaussianProcess(Linear()), Prediction.VELOCITY)


def noise_model(
    fn: NetworkFn,
    *,
    schedule: Table,
    prediction: str,
    trailing: bool = False,
) -> Denoiser:
    """Return a network of a discrete noise schedule (DDPM, DDIM) as a Denoiser; its time is the index into it.

    Args:
        schedule: `squaredcos(levels)` or `Table.from_alphas_cumprod(values)`.
        prediction: "epsilon", "sample" or "v_prediction", as diffusers names them.
        trailing: which levels a shorter sampler visits; False ("leading") is the default of diffusers.

    Raises:
        UsageError: an unknown prediction.
    """
    if prediction not in PREDICTIONS:
        raise UsageError(f"prediction '{prediction}' is unknown; the policy's config says {', '.join(PREDICTIONS)}.")
    grid = functools.partial(diffusion_grid, len(schedule.a), trailing=trailing)
    # every entry of the table was trained, so the first step is asked where it is
    return Denoiser(
        _Called(fn, functools.partial(_level_index, schedule), 1.0),
        GridProcess(schedule, grid=grid),
        PREDICTIONS[prediction],
        eps_floor=-math.inf,
    )


def _level_index(schedule: Table, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The index of a time, exactly whole where rounding alone says otherwise."""
    index = schedule.index_of(t)
    whole = index.round()
    return torch.where((index - whole).abs() < 1e-3, whole, index)


def named_schedule(name: str, levels: int, beta_start: float, beta_end: float) -> Table:
    """Return a noise schedule by its name in diffusers: "squaredcos_cap_v2" or "linear".

    Raises:
        UsageError: another schedule.
    """
    if name == "squaredcos_cap_v2":
        return squaredcos(levels)
    if name != "linear":
        raise UsageError(f"beta schedule '{name}' is unknown here; known: squaredcos_cap_v2, linear.")
    betas = torch.linspace(beta_start, beta_end, levels, dtype=torch.float64)
    return Table.from_alphas_cumprod((1 - betas).cumprod(0))


@dataclass(frozen=True)
class DiffusersDdim(StochasticStep):
    """DDIM as diffusers does it: the clean prediction is clipped, the noise prediction stays as it was.

    `Ddim` under `clip_x0` derives the noise from the clipped prediction instead, as DDPM does.

    Args:
        bound: of the clean prediction.
    """

    bound: float = 1.0

    @property
    def stochastic(self) -> bool:
        """False: eta = 0."""
        return False

    def weights(self, process: GaussianProcess, t: Time, t_next: Time, like: Tensor) -> tuple[Scalar, Scalar, Scalar]:
        """Return (w0, w1, 0) of DDIM."""
        return process.step_weights(t, t_next, 0.0, like)

    def moments(
        self, model: Any, x: Float[Tensor, "b *d"], t: Time, t_next: Time, cond: Cond = None
    ) -> tuple[Float[Tensor, "b *d"], Scalar]:
        """Return the next state and 0."""
        w0, w1, std = self.weights(model.process, t, t_next, x)
        pred = model(x, t, cond)
        return w0 * pred.x0.clamp(-self.bound, self.bound) + w1 * pred.eps, std


def diffusers_sampler(kind: str, steps: int, clip: float | None) -> ChunkSampler:
    """Return the sampler of a policy that was written for a scheduler of diffusers.

    Args:
        kind: "DDPM", or "DDIM" (deterministic).
        clip: bound of the clean prediction, or None.

    Raises:
        UsageError: another scheduler.
    """
    if kind not in ("DDPM", "DDIM"):
        raise UsageError(f"noise scheduler '{kind}' has no adapter; known: DDPM, DDIM.")
    if kind == "DDPM":
        return ChunkSampler(steps, Ddim(1.0), None, clip)
    return ChunkSampler(steps, Ddim(0.0) if clip is None else DiffusersDdim(clip), None, None)


class ForeignPolicy(DenoisingPolicy):
    """A policy from parts: any Gaussian model with a function that encodes the observations.

    Args:
        spec: what it reads and writes.
        denoiser: of `velocity_model` or `noise_model`, or any Model with a Gaussian process.
        action_normalizer: between normalised and environment units.
        sampler: how chunks are drawn.
        encoder: observations key → [b n_obs ...] to the denoiser's condition; None gives no condition.
    """

    def __init__(
        self,
        spec: PolicySpec,
        denoiser: Any,
        action_normalizer: Normalizer | None = None,
        sampler: ChunkSampler | None = None,
        encoder: Callable[[History], Cond] | None = None,
    ) -> None:
        identity = Normalizer(torch.zeros(spec.action_dim), torch.ones(spec.action_dim))
        super().__init__(spec, denoiser, action_normalizer or identity, sampler or ChunkSampler())
        self.encoder = encoder

    def encode(self, history: History) -> Cond:
        """Return the encoder's condition."""
        return None if self.encoder is None else self.encoder(history)
