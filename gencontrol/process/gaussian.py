"""The Gaussian process x_t = a·x0 + s·eps: prior, corruption, the statistics of a backward step and path KL.

The step is the DDIM family (Song et al. 2020, eq. 12 and 16), written for any (a, s):
std = eta·(s'/s)·sqrt(s² - (a/a')²·s'²), mean = a'·x0 + sqrt(s'² - std²)·eps; eta = 1 is the DDPM posterior, eta = 0
deterministic.  Times are floats (scalars of the whole batch, no tensor algebra) or tensors [b].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.process.convert import combine
from gencontrol.process.schedule import Coeffs, Scalar, Schedule, column
from gencontrol.rng import Keyed, randn

#: A time: a float in [0, 1] for the whole batch, or one value per item.
Time = float | Tensor


@dataclass(frozen=True)
class GaussianProcess:
    """Noise law of a diffusion or flow model.

    Args:
        schedule: gives a(t) and s(t).
    """

    schedule: Schedule

    def at(self, t: Time, like: Tensor) -> Coeffs:
        """Return the schedule's values at t, ready to broadcast against `like` [b *d].

        A float, or a scalar tensor on the CPU, gives Python floats (remembered); a tensor [b] gives tensors [b 1 ... 1]
        on the device of `like`, in its dtype (at least float32).
        """
        if _is_batch(t):
            return self._tensors(t).view(like)
        return self.schedule.at(float(t))

    def _tensors(self, t: Tensor) -> Coeffs[Tensor]:
        """Values shaped like t, computed in float32 or, for a float64 t, in float64."""
        return self.schedule.coeffs(t if t.dtype == torch.float64 else t.float())

    def times(self, steps: int) -> Sequence[float] | None:
        """Return the model's own grid of decreasing times for that many sampler steps, or None for equal ones."""
        return None

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | Keyed | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "b *d"]:
        """Draw x at t = 1: s(1) times standard normal noise, one generator or one per sample."""
        return self.schedule.at(1.0).s * randn(shape, generator, device, dtype)

    def corrupt(self, x0: Float[Tensor, "b *d"], t: Time, noise: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return x_t = a(t)·x0 + s(t)·noise."""
        coeffs = self.at(t, x0)
        return combine(coeffs.a, x0, coeffs.s, noise)

    def transition(
        self,
        x0: Float[Tensor, "b *d"],
        eps: Float[Tensor, "b *d"],
        t: Time,
        t_next: Time,
        eta: float = 0.0,
    ) -> tuple[Float[Tensor, "b *d"], Scalar]:
        """Return mean and standard deviation of the step t → t_next of the DDIM family for a predicted (x0, eps).

        Args:
            eta: in [0, 1]; 0 deterministic, 1 the DDPM posterior.

        At t_next = 0 the mean is x0 and the deviation 0, also for a schedule that ends at sigma_min.
        """
        w0, w1, std = self.step_weights(t, t_next, eta, x0)
        return combine(w0, x0, w1, eps), std

    def step_weights(self, t: Time, t_next: Time, eta: float, like: Tensor) -> tuple[Scalar, Scalar, Scalar]:
        """Return (w0, w1, std) of the step t → t_next: mean = w0·x0 + w1·eps; see `transition`.

        Raises:
            ValueError: eta is not in [0, 1].
        """
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
        here, there = self.at(t, like), self.landing(t_next, like)
        if eta == 0.0:
            return there.a, there.s, 0.0 * there.s
        ratio = (here.a / there.a) * (there.s / here.s)
        std = eta * there.s * sqrt(1.0 - ratio * ratio)
        return there.a, sqrt(there.s * there.s - std * std), std

    def landing(self, t_next: Time, like: Tensor) -> Coeffs:
        """`at`, but with t = 0 meaning clean data exactly (a = 1, s = 0): where a step arrives."""
        if _is_batch(t_next):
            found, clean = self._tensors(t_next).view(like), column(t_next, like) == 0
            a = torch.where(clean, torch.ones_like(found.a), found.a)
            s = torch.where(clean, torch.zeros_like(found.s), found.s)
            return Coeffs(a, s, found.da, found.ds, found.t, found.schedule)
        found = self.schedule.at(float(t_next))
        if t_next == 0:
            return Coeffs(1.0, 0.0, found.da, found.ds, found.t, found.schedule)
        return found

    def matched(self, t: Time, schedule: Schedule) -> tuple[Time, Scalar]:
        """Return (t', scale): the time of `schedule` at equal signal-to-noise ratio, and x'/x there (shaped like t).

        x/sqrt(a² + s²) has the same law at equal ratio.  Where `schedule` does not reach the ratio, t' is its end.
        """
        if _is_batch(t):
            here = self._tensors(t)
            other = schedule.time_of(2 * here.half_logsnr)
            return other, torch.sqrt(schedule.coeffs(other).scale2 / here.scale2)
        at = self.schedule.at(float(t))
        time = schedule.time_at(2 * at.half_logsnr)
        return time, math.sqrt(schedule.at(time).scale2 / at.scale2)

    @staticmethod
    def path_kl(mean_p: Float[Tensor, "b *d"], mean_q: Float[Tensor, "b *d"], std: Scalar) -> Float[Tensor, " b"]:
        """Return KL(p‖q) [b] of Gaussian steps of equal std: |mean_p - mean_q|²/(2·std²), summed over *d in float32.

        Raises:
            ValueError: std is 0 (a deterministic step has no density); looked at for floats only.
        """
        if not isinstance(std, Tensor) and std <= 0:
            raise ValueError(f"path KL of a step with standard deviation {std}; only stochastic steps have one")
        wide = torch.promote_types(mean_p.dtype, torch.float32)
        return (((mean_p.to(wide) - mean_q.to(wide)) / std) ** 2).flatten(1).sum(1) / 2


@dataclass(frozen=True)
class GridProcess(GaussianProcess):
    """A process whose model brings its own time grid (a scheduler of diffusers: spacing and shift of noise levels).

    `sample` takes this grid wherever the caller names none, so that rollouts of training are those of the model's own
    pipeline.  The grid may start a little below t = 1; the prior there has the deviation of noise and unit-variance
    data, sqrt(a(1)² + s(1)²), which for variance-preserving and flow schedules is the same at all such times.

    Args:
        grid: number of steps → decreasing times in [0, 1].
    """

    grid: Callable[[int], Sequence[float]] = field(kw_only=True, repr=False, compare=False)

    def times(self, steps: int) -> Sequence[float]:
        """Return the model's own grid."""
        return self.grid(steps)

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | Keyed | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "b *d"]:
        """Draw x at the first time of the grid."""
        return math.sqrt(self.schedule.at(1.0).scale2) * randn(shape, generator, device, dtype)


def sqrt(value: Scalar) -> Scalar:
    """Square root of a float or tensor, with rounding below zero taken as zero."""
    return value.clamp_min(0).sqrt() if isinstance(value, Tensor) else math.sqrt(max(value, 0.0))


def _is_batch(t: Time) -> TypeGuard[Tensor]:
    """Whether t must stay a tensor: a time per item, or a scalar on an accelerator (reading it would stall)."""
    return isinstance(t, Tensor) and (t.ndim > 0 or t.device.type != "cpu")
