"""Time grids: decreasing times from 1 (noise) to 0 (data), one more than there are steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.process.schedule import Schedule

#: Beyond these log-SNRs a grid spends no steps (s/a from 0.0015 to 148; ours, Edm's default range lies inside).
LOGSNR_RANGE = (-10.0, 13.0)
GRIDS = ("uniform", "logsnr", "karras")


def uniform_grid(steps: int) -> list[float]:
    """Return steps + 1 times at equal distance (for Edm this is Karras' rho-ramp)."""
    return [1.0 - i / steps for i in range(steps)] + [0.0]


def logsnr_grid(schedule: Schedule, steps: int) -> list[float]:
    """Return times at equal distance in log-SNR, from t = 1; the last step ends in clean data."""
    low, high = _range(schedule)
    return _closed(schedule, torch.linspace(low, high, _points(schedule, steps), dtype=torch.float64))


def karras_grid(schedule: Schedule, steps: int, rho: float = 7.0) -> list[float]:
    """Return times at equal distance in (s/a)^(1/rho) (Karras et al. 2022 eq. 5); the last step ends in clean data."""
    low, high = _range(schedule)
    ends = math.exp(-low / (2 * rho)), math.exp(-high / (2 * rho))
    ramp = torch.linspace(*ends, _points(schedule, steps), dtype=torch.float64)
    return _closed(schedule, -2 * rho * torch.log(ramp))


def model_grid(process: Any, steps: int) -> list[float]:
    """Return the times that `sample` takes for so many steps: the model's own grid, or equal distances."""
    own = process.times(steps) if hasattr(process, "times") else None
    return uniform_grid(steps) if own is None else list(own)


def make_grid(
    schedule: Schedule | None, steps: int | None, times: str | Sequence[float] | Tensor | None
) -> list[float]:
    """Return decreasing times as Python floats.

    Args:
        schedule: of the Gaussian process, None for tokens (only "uniform" then).
        steps: number of steps; may be None when `times` holds values.
        times: "uniform" (also None), "logsnr", "karras", or the values themselves, decreasing, in [0, 1]; they need
            not start at 1 or end at 0.

    Raises:
        UsageError: unknown name, values not strictly decreasing in [0, 1], or a count that contradicts `steps`.
    """
    if times is None or isinstance(times, str):
        name = times or "uniform"
        if name not in GRIDS or (schedule is None and name != "uniform"):
            known = ", ".join(GRIDS if schedule is not None else GRIDS[:1])
            raise UsageError(
                f"unknown time grid '{name}'.{nearest(name, GRIDS)} Known here: {known}, or the times themselves."
            )
        if steps is None or steps < 1:
            raise UsageError(f"steps is {steps}; a time grid needs at least one step")
        if schedule is None or name == "uniform":
            return uniform_grid(steps)
        return (logsnr_grid if name == "logsnr" else karras_grid)(schedule, steps)
    values = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    if len(values) < 2 or any(b >= a for a, b in zip(values, values[1:])) or values[0] > 1 or values[-1] < 0:
        raise UsageError("times must be at least two strictly decreasing numbers in [0, 1] (1 is noise, 0 is data)")
    if steps is not None and steps != len(values) - 1:
        raise UsageError(f"steps is {steps} but {len(values)} times make {len(values) - 1} steps; leave steps out")
    return values


def _range(schedule: Schedule) -> tuple[float, float]:
    """The log-SNR range of the schedule, cut to LOGSNR_RANGE."""
    first, last = 2 * schedule.at(1.0).half_logsnr, 2 * schedule.at(0.0).half_logsnr
    return max(first, LOGSNR_RANGE[0]), min(last, LOGSNR_RANGE[1])


def _points(schedule: Schedule, steps: int) -> int:
    """How many log-SNRs a grid needs: a schedule that ends at sigma_min has its t = 0 among them."""
    return steps if schedule.at(0.0).s == 0.0 else steps + 1


def _closed(schedule: Schedule, logsnr: Tensor) -> list[float]:
    """Times of increasing log-SNRs, the first exactly 1 and the last exactly 0."""
    times = [1.0, *schedule.time_of(logsnr).tolist()[1:]]
    return [*times, 0.0] if schedule.at(0.0).s == 0.0 else [*times[:-1], 0.0]
