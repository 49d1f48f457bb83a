"""Noise schedules of Gaussian processes: x_t = a(t)·x0 + s(t)·eps with t = 0 data and t = 1 noise.

A schedule returns (a, s, da/dt, ds/dt) together; everything else (prediction types, steps, losses) is algebra on these
four numbers.  Linear is rectified flow (Liu et al. 2022, with the timestep shift of Esser et al. 2024), Cosine is
x_t = cos·x0 + sin·eps (Nichol & Dhariwal 2021, without offset), VP is Song et al. 2021 eq. 29-33, Edm is Karras et al.
2022 with its rho-ramp as the map from t to sigma, Table interpolates any list of noise levels (a diffusers scheduler).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor

#: One number of a schedule: a Python float for a scalar time, else a tensor shaped for broadcasting.
Scalar = float | Tensor
Number = TypeVar("Number", float, Tensor)

_CACHE_SIZE = 8192
_LOGSNR_RANGE = 100.0


@overload
def column(value: float, like: Tensor) -> float: ...
@overload
def column(value: Tensor, like: Tensor) -> Tensor: ...
def column(value: Scalar, like: Tensor) -> Scalar:
    """Shape a per-item number [b] to broadcast against `like` [b *d], on its device, in its dtype or float32."""
    if not isinstance(value, Tensor):
        return value
    wide = torch.promote_types(like.dtype, torch.float32)
    return (value.reshape((-1,) + (1,) * (like.ndim - 1)) if value.ndim else value).to(like.device, wide)


@dataclass(frozen=True)
class Coeffs(Generic[Number]):
    """Values of a schedule at t: x_t = a·x0 + s·eps, dx/dt = da·x0 + ds·eps.

    Args:
        a, s, da, ds: floats, or tensors that broadcast against x.
        t, schedule: where they were taken, for error messages.
    """

    a: Number
    s: Number
    da: Number
    ds: Number
    t: Any = math.nan
    schedule: str = "a schedule"

    @property
    def scale2(self) -> Number:
        """a² + s²: one for variance-preserving schedules, never zero."""
        return self.a * self.a + self.s * self.s

    @property
    def half_logsnr(self) -> Number:
        """log(a/s), with ∓inf at pure noise and clean data."""
        if isinstance(self.a, Tensor):
            return torch.log(self.a) - torch.log(self.s)
        if self.a == 0.0 or self.s == 0.0:
            return -math.inf if self.a == 0.0 else math.inf
        return math.log(self.a) - math.log(self.s)

    def view(self, like: Tensor) -> Coeffs:
        """Shape per-item values [b] to broadcast against `like` [b *d], on its device; floats stay floats."""
        if not isinstance(self.a, Tensor):
            return self
        a, s, da, ds = (column(value, like) for value in (self.a, self.s, self.da, self.ds))
        return Coeffs(a, s, da, ds, self.t, self.schedule)

    def rows(self, index: slice) -> Coeffs:
        """Return the tensors' rows `index` of the batch axis; floats stay floats."""
        if not isinstance(self.a, Tensor) or self.a.ndim == 0:
            return self
        times = self.t[index] if isinstance(self.t, Tensor) and self.t.ndim else self.t
        return Coeffs(self.a[index], self.s[index], self.da[index], self.ds[index], times, self.schedule)


@dataclass(frozen=True, eq=False)
class Schedule(ABC):
    """A pair a(t), s(t) on t in [0, 1]; subclasses give the values and the inverse of the log-SNR."""

    _cache: dict[float, Coeffs[float]] = field(default_factory=dict, init=False, repr=False)
    _times: dict[float, float] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def _values(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (a, s, da, ds) at t."""

    @abstractmethod
    def _inverse(self, logsnr: Tensor) -> Tensor:
        """Return t for a finite log-SNR, unclamped."""

    def coeffs(self, t: Float[Tensor, "*b"]) -> Coeffs[Tensor]:
        """Return (a, s, da, ds) as tensors shaped like t, in t's dtype."""
        a, s, da, ds = self._values(t)
        return Coeffs(a, s, da, ds, t, type(self).__name__)

    def at(self, t: float) -> Coeffs[float]:
        """Return the values at one time as Python floats, computed in float64 and remembered."""
        found = self._cache.get(t)
        if found is None:
            self.prepare([t])
            found = self._cache[t]
        return found

    def prepare(self, times: Sequence[float]) -> None:
        """Compute `at` for a whole grid in one pass, so that a sampling loop does no schedule algebra."""
        wanted = [t for t in times if t not in self._cache]
        if not wanted:
            return
        bad = [t for t in wanted if not 0.0 <= t <= 1.0]
        if bad:
            raise ValueError(f"time {bad[0]} is outside [0, 1]; t = 0 is data and t = 1 is noise")
        if len(self._cache) + len(wanted) > _CACHE_SIZE:
            self._cache.clear()
        values = self._values(torch.tensor(wanted, dtype=torch.float64))
        rows = torch.stack(torch.broadcast_tensors(*values), dim=1).tolist()
        for t, (a, s, da, ds) in zip(wanted, rows):
            self._cache[t] = Coeffs(a, s, da, ds, t, type(self).__name__)

    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Return log(a²/s²); -inf where a = 0 and +inf where s = 0."""
        a, s, _, _ = self._values(t)
        return 2 * (torch.log(a) - torch.log(s))

    def time_of(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Return the time with this log-SNR, clamped to [0, 1] where the schedule does not reach it."""
        return self._inverse(logsnr.clamp(-_LOGSNR_RANGE, _LOGSNR_RANGE)).clamp(0.0, 1.0)

    def time_at(self, logsnr: float) -> float:
        """Return `time_of` for one Python float, computed in float64 and remembered."""
        found = self._times.get(logsnr)
        if found is None:
            if len(self._times) >= _CACHE_SIZE:
                self._times.clear()
            found = self._times[logsnr] = float(self.time_of(torch.tensor(logsnr, dtype=torch.float64)))
        return found


@dataclass(frozen=True, eq=False)
class Linear(Schedule):
    """Rectified flow: a = 1 - u, s = u with u = shift·t/(1 + (shift - 1)·t); shift > 1 spends more time at high noise.

    Args:
        shift: > 0; 1 is the plain straight line (3.0 in Stable Diffusion 3; Esser et al. 2024 eq. 23).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"Linear shift is {self.shift}; it must be > 0 (1 means no shift)")

    def _values(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        below = 1 + (self.shift - 1) * t
        s, ds = self.shift * t / below, self.shift / below**2
        return (1 - t) / below, s, -ds, ds

    def _inverse(self, logsnr: Tensor) -> Tensor:
        s = torch.sigmoid(-logsnr / 2)
        return s / (self.shift * torch.sigmoid(logsnr / 2) + s)


@dataclass(frozen=True, eq=False)
class Cosine(Schedule):
    """Angle proportional to time: a = cos(πt/2), s = sin(πt/2)."""

    def _values(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = math.pi / 2
        a, s = torch.sin(half * (1 - t)), torch.sin(half * t)  # sin(π(1-t)/2) is exactly 0 at t = 1
        return a, s, -half * s, half * a

    def _inverse(self, logsnr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-logsnr / 2)) * (2 / math.pi)


@dataclass(frozen=True, eq=False)
class VP(Schedule):
    """Variance-preserving diffusion with linear beta: log a = -(β1-β0)t²/4 - β0·t/2, s² = 1 - a² (Song et al. 2021).

    Its ds is infinite at t = 0, so a velocity there raises.

    Args:
        beta_min, beta_max: β0 and β1, 0 < β0 <= β1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"VP needs 0 < beta_min <= beta_max, not {self.beta_min} and {self.beta_max}")

    def _values(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slope = self.beta_max - self.beta_min
        log_a = -(slope * t / 4 + self.beta_min / 2) * t
        a, s = torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a))
        rate = -(self.beta_min + slope * t) / 2
        return a, s, a * rate, -a * a * rate / s

    def _inverse(self, logsnr: Tensor) -> Tensor:
        cost = -torch.nn.functional.logsigmoid(logsnr) / 2  # -log a
        half = self.beta_min / 2
        return 2 * cost / (half + torch.sqrt(half * half + (self.beta_max - self.beta_min) * cost))


@dataclass(frozen=True, eq=False)
class Edm(Schedule):
    """Variance exploding in Karras' coordinates: a = 1, s = sigma(t) on the rho-ramp (Karras et al. 2022 eq. 5).

    At t = 0 sigma is sigma_min, not 0; a step that ends at t = 0 nevertheless returns the clean prediction.

    Args:
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        rho: curvature of the ramp, > 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"Edm needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")
        if not self.rho > 0:
            raise ValueError(f"Edm rho is {self.rho}; it must be > 0")

    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _values(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = self._ends()
        ramp = low + t * (high - low)
        s, ds = ramp**self.rho, self.rho * (high - low) * ramp ** (self.rho - 1)
        return torch.ones_like(t), s, torch.zeros_like(t), ds

    def _inverse(self, logsnr: Tensor) -> Tensor:
        low, high = self._ends()
        return (torch.exp(-logsnr / (2 * self.rho)) - low) / (high - low)


@dataclass(frozen=True, eq=False)
class Table(Schedule):
    """Interpolates a list of (a, s), from the least to the most noise; exact at every entry.

    Entry i of T lies at t = (i + 1)/T and t = 0 is clean data (a = 1, s = 0), unless the first entry is clean itself;
    then entry i lies at i/(T - 1).  Between entries the angle atan(s/a) and log sqrt(a² + s²) are linear in t, which
    stays finite at both ends (zero terminal signal included).  Interpolation: ours.

    Args:
        a, s: signal and noise levels; a >= 0, s >= 0, s/a strictly increasing, at least two entries.
    """

    a: tuple[float, ...] = ()
    s: tuple[float, ...] = ()
    _angle: Tensor = field(init=False, repr=False, compare=False, default_factory=lambda: torch.empty(0))
    _log_scale: Tensor = field(init=False, repr=False, compare=False, default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", tuple(float(v) for v in self.a))
        object.__setattr__(self, "s", tuple(float(v) for v in self.s))
        if len(self.a) != len(self.s) or len(self.a) < 2:
            raise ValueError(f"Table needs a and s of one length >= 2, not {len(self.a)} and {len(self.s)}")
        a, s = torch.tensor(self.a, dtype=torch.float64), torch.tensor(self.s, dtype=torch.float64)
        if bool((a < 0).any() | (s < 0).any()):
            raise ValueError("Table entries must be >= 0")
        angle, log_scale = torch.atan2(s, a), 0.5 * torch.log(a * a + s * s)
        if self.s[0] > 0:
            angle, log_scale = (torch.cat([v.new_zeros(1), v]) for v in (angle, log_scale))
        if not bool((angle.diff() > 0).all()):
            raise ValueError("Table needs s/a strictly increasing: give the entries from the least to the most noise")
        object.__setattr__(self, "_angle", angle)
        object.__setattr__(self, "_log_scale", log_scale)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | Tensor) -> Table:
        """Variance-preserving table of a DDPM-like scheduler: a² = alphas_cumprod, s² = 1 - alphas_cumprod."""
        bars = [float(v) for v in alphas_cumprod]
        if not all(0 <= v <= 1 for v in bars):
            raise ValueError("alphas_cumprod must lie in [0, 1]")
        return cls(tuple(math.sqrt(v) for v in bars), tuple(math.sqrt(1 - v) for v in bars))

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[float] | Tensor) -> Table:
        """Variance-exploding table (a = 1, s = sigma) from sigmas in either order; zeros are dropped."""
        levels = sorted(float(v) for v in sigmas)
        if levels and levels[0] < 0:
            raise ValueError(f"sigma {levels[0]} is negative")
        kept = tuple(v for v in levels if v > 0)
        return cls((1.0,) * len(kept), kept)

    def index_of(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Return the float index into the list at t, clamped to [0, T - 1]: the time that a diffusers network takes."""
        offset = len(self._angle) - len(self.a)
        return (t * (len(self._angle) - 1) - offset).clamp(0, len(self.a) - 1)

    def time_of_index(self, index: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Return the time of a float index; inverse of `index_of`."""
        offset = len(self._angle) - len(self.a)
        return ((index + offset) / (len(self._angle) - 1)).clamp(0.0, 1.0)

    def _values(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        last = len(self._angle) - 1
        left = (t * last).floor().clamp(0, last - 1).long()
        part = t * last - left
        angle, d_angle = self._segment(self._angle.to(t), left, part)
        log_scale, d_log_scale = self._segment(self._log_scale.to(t), left, part)
        scale = torch.exp(log_scale)
        a, s = scale * torch.cos(angle), scale * torch.sin(angle)
        a = torch.where(a.abs() < 1e-12 * scale, torch.zeros_like(a), a)  # cos(π/2) is 6e-17, not 0
        return a, s, a * d_log_scale - s * d_angle, s * d_log_scale + a * d_angle

    @staticmethod
    def _segment(nodes: Tensor, left: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope in t of the piecewise linear function through the nodes."""
        low, high = nodes[left], nodes[left + 1]
        return low + part * (high - low), (high - low) * (len(nodes) - 1)

    def _inverse(self, logsnr: Tensor) -> Tensor:
        nodes = self._angle.to(logsnr)
        angle = torch.atan(torch.exp(-logsnr / 2))
        left = (torch.searchsorted(nodes, angle.contiguous()) - 1).clamp(0, len(nodes) - 2)
        return (left + (angle - nodes[left]) / (nodes[left + 1] - nodes[left])) / (len(nodes) - 1)
