"""Multistep Gaussian samplers: they remember earlier predictions, and start as one-step methods where there are none.

dpm++ 2m is Lu et al. 2022 alg. 2 in half log-SNR, its SDE twin eq. 19 there; plms is PNDM (Liu et al. 2022) without
Runge–Kutta warm-up, lms Adams–Bashforth in the noise level (Karras et al. 2022, k-diffusion).  All four follow the
schedulers of diffusers step for step (tests/golden/test_golden_samplers.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.models.denoiser import Pred
from gencontrol.process.gaussian import Time, sqrt
from gencontrol.process.schedule import Scalar
from gencontrol.sampling.state import State, gaussian_log_prob
from gencontrol.sampling.steps import GaussianStep, clean_where, is_zero
from gencontrol.types import Cond


@dataclass(frozen=True)
class DpmPp2M(GaussianStep):
    """DPM-Solver++(2M): second-order multistep in half log-SNR, one model call; its first step is ddim(0).

    history = (x0 of the last step, its half log-SNR).
    """

    order: ClassVar[int] = 2

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next."""
        pred = model(state.x, t, cond)
        if is_zero(t_next):
            return State(pred.x0)
        here, there = pred.coeffs, model.process.landing(t_next, state.x)
        estimate, history = _extrapolated(pred, there.half_logsnr, state)
        shrink = there.s / here.s
        x = shrink * state.x + (there.a - here.a * shrink) * estimate
        return State(clean_where(t_next, pred, x), None, history)


@dataclass(frozen=True)
class SdeDpmPp2M(GaussianStep):
    """SDE-DPM-Solver++(2M), level 1 of `Sde` with the second-order estimate of `DpmPp2M`; its first step is `Sde()`.

    x' = (s'/s)·e^(−h)·x + a'·(1 − e^(−2h))·D + s'·sqrt(1 − e^(−2h))·noise, h the step in half log-SNR, D extrapolated.
    """

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next with the log-density of the step.

        Raises:
            ValueError: no noise was given.
        """
        pred = model(state.x, t, cond)
        if is_zero(t_next):
            return State(pred.x0, pred.x0.new_zeros(len(pred.x0)))
        if noise is None:
            raise ValueError("SdeDpmPp2M is stochastic: give noise like x (step.draw(x, generator))")
        here, there = pred.coeffs, model.process.landing(t_next, state.x)
        estimate, history = _extrapolated(pred, there.half_logsnr, state)
        decay = (here.a * there.s) / (there.a * here.s)  # e^(−h), finite where a = 0
        std = there.s * sqrt(1.0 - decay * decay)
        mean = (there.s / here.s) * decay * state.x + (there.a * (1.0 - decay * decay)) * estimate
        x = clean_where(t_next, pred, mean + std * noise)
        return State(x, gaussian_log_prob(x, mean, std), history)


@dataclass(frozen=True)
class Plms(GaussianStep):
    """Pseudo linear multistep (PNDM): ddim(0) along an Adams–Bashforth mean of up to four predictions of noise.

    The first step calls the model twice and takes the mean of its two ends; every other step once.
    history = (eps of the last step, of the one before, …).
    """

    order: ClassVar[int] = 2

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next."""
        pred = model(state.x, t, cond)
        if is_zero(t_next) and not state.history:
            return State(pred.x0)
        known = (pred.eps, *state.history[:3])
        if len(known) == 1:
            middle = self._moved(model, pred, pred.eps, t_next)
            mean = 0.5 * (pred.eps + model(middle, t_next, cond).eps)
        else:
            weights = {2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}[len(known)]
            mean = sum(w * eps for w, eps in zip(weights, known)) / sum(weights)
        return State(self._moved(model, pred, mean, t_next), None, known)

    def _moved(self, model: Any, pred: Pred, eps: Float[Tensor, "b *d"], t_next: Time) -> Float[Tensor, "b *d"]:
        """The ddim(0) step with this prediction of noise."""
        here, there = pred.coeffs, model.process.landing(t_next, pred.xt)
        x0 = (pred.xt - here.s * eps) / here.a
        return there.a * x0 + there.s * eps


@dataclass(frozen=True)
class Lms(GaussianStep):
    """Linear multistep in the noise level σ = s/a: dx̃/dσ = eps for x̃ = x/a, integrated through up to four predictions.

    At t = 0 it lands where the polynomial does, as diffusers' scheduler, not on the last clean prediction.
    history = (eps, σ of the last step, eps, σ of the one before, …).
    """

    order: ClassVar[int] = 4

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next."""
        pred = model(state.x, t, cond)
        here, there = pred.coeffs, model.process.landing(t_next, state.x)
        sigma, goal = here.s / here.a, there.s / there.a
        history = (pred.eps, sigma, *state.history[:6])
        levels, noises = history[1::2], history[0::2]
        moved = sum(_integral(levels, j, goal) * eps for j, eps in enumerate(noises))
        return State(there.a * (state.x / here.a + moved), None, history)


def _integral(levels: tuple[Scalar, ...], j: int, goal: Scalar) -> Scalar:
    """∫ from levels[0] to goal of the Lagrange polynomial that is 1 at levels[j] and 0 at the others (degree ≤ 3)."""
    half, middle, total = 0.5 * (goal - levels[0]), 0.5 * (goal + levels[0]), 0.0
    for node in (-(3**-0.5), 3**-0.5):  # Gauss–Legendre with two nodes is exact up to degree 3
        value: Any = half
        for k, other in enumerate(levels):
            if k != j:
                value = value * (middle + half * node - other) / (levels[j] - other)
        total = total + value
    return total


def _extrapolated(
    pred: Pred, arrival: Scalar, state: State
) -> tuple[Float[Tensor, "b *d"], tuple[Float[Tensor, "b *d"], Scalar]]:
    """Return the second-order estimate of x0 over the step to half log-SNR `arrival`, and the history to keep."""
    x0, now = pred.x0, pred.coeffs.half_logsnr
    if not state.history:
        return x0, (x0, now)
    before, then = state.history
    ratio = _finite_ratio(arrival - now, now - then)  # h/(h of the last step)
    return x0 + (0.5 * ratio) * (x0 - before), (x0, now)


def _finite_ratio(span: Scalar, before: Scalar) -> Scalar:
    """span/before, 0 where either is infinite: no second-order term next to pure noise or clean data."""
    if isinstance(span, Tensor) or isinstance(before, Tensor):
        ratio = torch.as_tensor(span) / torch.as_tensor(before)
        return torch.where(torch.isfinite(ratio), ratio, torch.zeros_like(ratio))
    return span / before if math.isfinite(span) and math.isfinite(before) else 0.0
