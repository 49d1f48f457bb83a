"""The best control that a chain of K steps can have, for two-dimensional worlds, by dynamic programming on a grid.

A control moves the mean of a Gaussian step and not its shape, while the exact tilt of a step is no Gaussian: with few
steps even the best control keeps a gap to log Z (DERIVED).  With W = V∗N(0, std²), the value before a step is
max_p W(p) − |p − m|²/(2·std²), m the base mean; its optimum solves p = m + std²·∇W(p).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.ctrl.chain import ControlChain

#: half-width and points of the grid, and iterations of the fixed point
_REACH, _POINTS, _ITERATIONS = 5.5, 221, 12


@dataclass(frozen=True)
class Optimum:
    """Value of the best control over the first noise, and samples under it."""

    j: float
    x: Float[Tensor, "n 2"]


@dataclass(frozen=True)
class _Surface:
    """A function on the grid, its gradient and their interpolation."""

    value: np.ndarray
    slope: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, value: np.ndarray) -> _Surface:
        space = 2 * _REACH / (_POINTS - 1)
        return cls(value, (np.gradient(value, space, axis=0), np.gradient(value, space, axis=1)))

    def at(self, x: np.ndarray) -> np.ndarray:
        """Values at points [n 2]."""
        return _lookup(self.value, x, 3)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """Gradients at points [n 2]."""
        return np.stack([_lookup(part, x, 1) for part in self.slope], 1)


def _lookup(table: np.ndarray, x: np.ndarray, order: int) -> np.ndarray:
    from scipy.ndimage import map_coordinates

    place = (x.T + _REACH) * ((_POINTS - 1) / (2 * _REACH))
    found: np.ndarray = map_coordinates(table, place, order=order, mode="nearest")
    return found


def _best(surface: _Surface, mean: np.ndarray, std: float) -> tuple[np.ndarray, np.ndarray]:
    """The best landing point and its value for every mean [n 2]."""
    p = mean
    for _ in range(_ITERATIONS):
        p = 0.5 * p + 0.5 * (mean + std * std * surface.gradient(p))
    return p, surface.at(p) - ((p - mean) ** 2).sum(1) / (2 * std * std)


@torch.no_grad()
def best_control(chain: ControlChain, log_prob: Callable[[Tensor], Tensor], *, samples: int, seed: int) -> Optimum:
    """Return the optimum of E[log_prob(x0)] − Σ KL over all controls of a chain on [2] vectors.

    Args:
        chain: its model's base is used alone.
        log_prob: scaled reward γ·log p(y given x) of points [n 2].
    """
    from scipy.ndimage import gaussian_filter

    axis = np.linspace(-_REACH, _REACH, _POINTS)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    space = axis[1] - axis[0]

    def means(x: np.ndarray, index: int) -> np.ndarray:
        return chain.base_mean(torch.from_numpy(x).float(), index, None).double().numpy()

    last = chain.steps - 1
    value = log_prob(torch.from_numpy(means(points, last)).float()).double().numpy()
    surfaces: list[_Surface] = []
    stds = [chain.weights(index, torch.zeros(1, 2))[2] for index in range(last)]
    for index in reversed(range(last)):
        smooth = gaussian_filter(value.reshape(_POINTS, _POINTS), stds[index] / space, mode="nearest", truncate=5.0)
        surfaces.append(_Surface.of(smooth))
        value = _best(surfaces[-1], means(points, index), stds[index])[1]
    rng = np.random.default_rng(seed)
    x = chain.process.schedule.at(chain.grid[0]).s * rng.standard_normal((samples, 2))
    j = float(_lookup(value.reshape(_POINTS, _POINTS), x, 3).mean())
    for index, surface in enumerate(reversed(surfaces)):
        x = _best(surface, means(x, index), stds[index])[0] + stds[index] * rng.standard_normal(x.shape)
    return Optimum(j, torch.from_numpy(means(x, last)))
