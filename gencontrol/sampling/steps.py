"""One-step Gaussian samplers: euler, heun, ddim and two of the SDE, stateless, for any schedule and prediction type.

euler and heun integrate dx/dt = da·x0 + ds·eps in t (Lipman et al. 2023; Karras et al. 2022 alg. 1 in these
coordinates), ddim is Song et al. 2020 eq. 12, sde is derived below; `multistep` has those that remember.
All return the clean prediction x0 exactly when t_next = 0, also on a schedule that ends at sigma_min.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.models.denoiser import Pred
from gencontrol.process.gaussian import GaussianProcess, Time, sqrt
from gencontrol.process.schedule import Scalar, column
from gencontrol.rng import randn
from gencontrol.sampling.state import Generators, State, Step, gaussian_log_prob
from gencontrol.types import Cond


@dataclass(frozen=True)
class GaussianStep(Step):
    """A deterministic step unless a subclass says otherwise."""

    kind: ClassVar[Literal["gaussian", "masked"]] = "gaussian"

    @property
    def stochastic(self) -> bool:
        """False: a deterministic step."""
        return False

    def draw(self, x: Float[Tensor, "b *d"], generator: Generators) -> Float[Tensor, "b *d"] | None:
        """Return standard normal noise like x, or None for a deterministic step."""
        return randn(x.shape, generator, x.device, x.dtype) if self.stochastic else None


@dataclass(frozen=True)
class Euler(GaussianStep):
    """First order in t: x' = x + (t' - t)·velocity; exact for one straight path (Linear schedule)."""

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next."""
        pred = model(state.x, t, cond)
        if is_zero(t_next):
            return State(pred.x0)
        span = _span(t, t_next, state.x)
        return State(clean_where(t_next, pred, _add(state.x, span, pred.velocity)))


@dataclass(frozen=True)
class Heun(GaussianStep):
    """Second order in t by the trapezoidal rule, two model calls; one, returning x0, when t_next = 0."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next."""
        pred = model(state.x, t, cond)
        if is_zero(t_next):
            return State(pred.x0)
        span = _span(t, t_next, state.x)
        first = pred.velocity
        # items that arrive at 0 in a mixed batch keep x0; their second call only has to be finite
        inner = t_next if not isinstance(t_next, Tensor) else torch.where(t_next == 0, t, t_next)
        second = model(_add(state.x, span, first), inner, cond).velocity
        return State(clean_where(t_next, pred, _add(state.x, 0.5 * span, first + second)))


@dataclass(frozen=True)
class StochasticStep(GaussianStep):
    """A Gaussian transition: subclasses give its mean and deviation, this adds noise and the log-probability."""

    @abstractmethod
    def weights(self, process: GaussianProcess, t: Time, t_next: Time, like: Tensor) -> tuple[Scalar, Scalar, Scalar]:
        """Return (w0, w1, std): mean = w0·x0 + w1·eps."""

    def moments(
        self, model: Any, x: Float[Tensor, "b *d"], t: Time, t_next: Time, cond: Cond = None
    ) -> tuple[Float[Tensor, "b *d"], Scalar]:
        """Return mean [b *d] and standard deviation of the law of x at t_next, given x at t; one model call."""
        w0, w1, std = self.weights(model.process, t, t_next, x)
        pred = model(x, t, cond)
        if is_zero(t_next):
            return pred.x0, std
        return pred.mix(w0, w1), std

    def log_prob(
        self,
        model: Any,
        x: Float[Tensor, "b *d"],
        x_next: Float[Tensor, "b *d"],
        t: Time,
        t_next: Time,
        cond: Cond = None,
    ) -> Float[Tensor, " b"]:
        """Return the log-density [b] of a transition that was taken (policy gradients); 0 where it is deterministic."""
        mean, std = self.moments(model, x, t, t_next, cond)
        return gaussian_log_prob(x_next, mean, std)

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next with the log-density of the step.

        Raises:
            ValueError: the step is stochastic and no noise was given.
        """
        mean, std = self.moments(model, state.x, t, t_next, cond)
        if not self.stochastic:
            return State(mean)
        if is_zero(t_next):
            return State(mean, mean.new_zeros(len(mean)))
        if noise is None:
            raise ValueError(f"{type(self).__name__} is stochastic: give noise like x (step.draw(x, generator))")
        x = mean + std * noise
        return State(x, gaussian_log_prob(x, mean, std))


@dataclass(frozen=True)
class Ddim(StochasticStep):
    """x' = a'·x0 + sqrt(s'² - std²)·eps + std·noise; eta = 0 deterministic, eta = 1 the DDPM posterior.

    Args:
        eta: in [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"ddim eta is {self.eta}; it must lie in [0, 1]")

    @property
    def stochastic(self) -> bool:
        """Whether eta > 0."""
        return self.eta > 0

    def weights(self, process: GaussianProcess, t: Time, t_next: Time, like: Tensor) -> tuple[Scalar, Scalar, Scalar]:
        """Return (w0, w1, std) of the DDIM family."""
        return process.step_weights(t, t_next, self.eta, like)


@dataclass(frozen=True)
class Sde(StochasticStep):
    """Marginal-preserving SDE of noise level `level`, exponential integrator with (x0, eps) frozen over the step.

    The backward SDE dx = (velocity + g²·eps/(2s))·dt + g·dw keeps every marginal for any g (Song et al. 2021 eq. 14,
    Karras et al. 2022 eq. 6).  With g² = -level²·s²·d(logsnr)/dt the noise part y = (x - a·x0)/s follows an
    Ornstein-Uhlenbeck process, so the step is exact given (x0, eps): y' = rho·eps + sqrt(1 - rho²)·noise with
    rho = (a·s'/(a'·s))^(level²) (derived).  It is finite from a = 0 on.  level = 0 is ddim(0), level = 1 the DDPM
    posterior; Flow-GRPO's noise level eta on the Linear schedule is eta = sqrt(2)·level.

    Args:
        level: >= 0.
    """

    level: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.level < math.inf:
            raise ValueError(f"sde level is {self.level}; it must be >= 0 and finite")

    @property
    def stochastic(self) -> bool:
        """Whether level > 0."""
        return self.level > 0

    def weights(self, process: GaussianProcess, t: Time, t_next: Time, like: Tensor) -> tuple[Scalar, Scalar, Scalar]:
        """Return (w0, w1, std) of the step."""
        here, there = process.at(t, like), process.landing(t_next, like)
        rho = ((here.a / there.a) * (there.s / here.s)) ** (self.level**2)
        return there.a, there.s * rho, there.s * sqrt(1.0 - rho * rho)


@dataclass(frozen=True)
class EulerMaruyama(StochasticStep):
    """The SDE of `Sde` by one Euler–Maruyama step, as Flow-GRPO's official code takes it (PORT).

    With (x0, eps) and g frozen at t and the differences of a and s taken whole, so that no parametrisation of time
    matters: x' = a'·x0 + (s' − v/(2s))·eps + sqrt(v)·noise, v = 2·level²·s·(s·a' − a·s')/a.  On the Linear schedule
    that is the published step of noise level eta = sqrt(2)·level, v = eta²·t/(1 − t)·(t − t').  Where a = 0, at pure
    noise, the division is by a', as there.  With few steps its law lies a little wide of the model's, that of `Sde` a
    little narrow; they meet as steps grow.

    Args:
        level: > 0.
    """

    level: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.level < math.inf:
            raise ValueError(f"euler-maruyama level is {self.level}; it must be > 0 and finite")

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def weights(self, process: GaussianProcess, t: Time, t_next: Time, like: Tensor) -> tuple[Scalar, Scalar, Scalar]:
        """Return (w0, w1, std) of the step."""
        here, there = process.at(t, like), process.landing(t_next, like)
        below = _where(here.a == 0, there.a, here.a)
        variance = 2 * self.level**2 * here.s * (here.s * there.a - here.a * there.s) / below
        w1, std = there.s - variance / (2 * here.s), sqrt(variance)
        clean = column(t_next, like) == 0
        return there.a, _where(clean, there.s, w1), _where(clean, there.s, std)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, `no` elsewhere; floats stay floats."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def is_zero(t_next: Time) -> bool:
    """Whether the whole batch arrives at clean data; a time per item is decided elementwise instead."""
    return not isinstance(t_next, Tensor) and t_next == 0.0


def _span(t: Time, t_next: Time, x: Tensor) -> Scalar:
    """t_next - t, shaped for broadcasting against x."""
    return column(t_next - t, x)


def _add(x: Tensor, span: Scalar, direction: Tensor) -> Tensor:
    """x + span·direction."""
    return x + span * direction if isinstance(span, Tensor) else torch.add(x, direction, alpha=span)


def clean_where(t_next: Time, pred: Pred, x: Tensor) -> Tensor:
    """The clean prediction for the items that arrive at t = 0, x for the others."""
    if not isinstance(t_next, Tensor):
        return x
    return torch.where(column(t_next, x) == 0, pred.x0, x)
