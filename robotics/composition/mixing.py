"""Weights of a composition that change with the noise level, the action dimension or the place in the chunk.

All are functions of the log-SNR that return one weight per parent, which is what `gencontrol.sampling.compose` takes.
Names: docs/methods/gpc.md#operators (ours); the paper's own list of weighting strategies is not known.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.process.schedule import Scalar


def _check_rows(weights: Float[Tensor, "rows m"], what: str) -> None:
    """Refuse rows that are not convex."""
    if not bool(torch.isfinite(weights).all() & (weights >= 0).all()):
        raise UsageError(f"{what} has a weight below 0 or not finite; give convex weights.")
    sums = weights.sum(1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
        raise UsageError(f"{what} has weights that sum to {sums.tolist()}; every sum must be 1.")


@dataclass(frozen=True)
class ByLogSnr:
    """Weights that are linear in the log-SNR between given levels and constant beyond them.

    Args:
        levels: strictly increasing log-SNRs, log(a²/s²); −10 is almost noise, +8 almost clean.
        weights: one row of convex weights per level.

    Raises:
        UsageError: levels do not increase, or a row is not convex.
    """

    levels: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        object.__setattr__(self, "weights", tuple(tuple(float(w) for w in row) for row in self.weights))
        rising = all(low < high for low, high in itertools.pairwise(self.levels))
        if not self.levels or not rising or len(self.levels) != len(self.weights):
            raise UsageError(f"levels {self.levels} must increase, with one row of weights each ({len(self.weights)}).")
        if len({len(row) for row in self.weights}) != 1:
            raise UsageError("the levels have different numbers of weights; give one weight per parent at each.")
        _check_rows(torch.tensor(self.weights, dtype=torch.float64), "the schedule")

    def __call__(self, logsnr: Scalar) -> list[Scalar]:
        """Return one weight per parent, floats for a float."""
        levels = torch.tensor(self.levels, dtype=torch.float64)
        rows = torch.tensor(self.weights, dtype=torch.float64)
        value = torch.as_tensor(logsnr, dtype=torch.float64).cpu().clamp(self.levels[0], self.levels[-1])
        right = torch.searchsorted(levels, value.contiguous()).clamp(1, max(len(levels) - 1, 1))
        if len(levels) == 1:
            found = rows[0].expand(*value.shape, -1)
        else:
            low, high = levels[right - 1], levels[right]
            part = ((value - low) / (high - low))[..., None]
            found = torch.lerp(rows[right - 1], rows[right], part)
        if not isinstance(logsnr, Tensor):
            return [float(w) for w in found]
        return list(found.to(logsnr).unbind(-1))


@dataclass(frozen=True)
class PerDim:
    """A weight per parent and action dimension, the same at every noise level.

    Args:
        weights: one row per parent, one number per action dimension; every column sums to 1.

    Raises:
        UsageError: a column is not convex.
    """

    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rows = tuple(tuple(float(w) for w in row) for row in self.weights)
        if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise UsageError(f"{type(self).__name__} needs one row of equal length per parent.")
        _check_rows(torch.tensor(rows, dtype=torch.float64).T, type(self).__name__)
        object.__setattr__(self, "weights", rows)

    def __call__(self, logsnr: Scalar) -> list[Scalar]:
        """Return one [A] tensor per parent."""
        return [torch.tensor(row) for row in self.weights]


class PerChunkIndex(PerDim):
    """The same per parent and action of the chunk: one number per action, from the oldest observation on."""

    def __call__(self, logsnr: Scalar) -> list[Scalar]:
        """Return one [H 1] tensor per parent."""
        return [torch.tensor(row)[:, None] for row in self.weights]


def best_weights(gram: Float[Tensor, "m m"]) -> Float[Tensor, " m"]:
    """Return the convex weights that minimise wᵀ·gram·w: Prop. 4.1 of GPC for any number of parents.

    Args:
        gram: E⟨err_i, err_j⟩, symmetric and positive semi-definite.  For two parents the minimum is
            w1 = (B − C)/(A + B − 2C) where that lies in [0, 1], else the better parent alone (derived,
            docs/methods/gpc.md#single-step).

    The optimum of a subset of parents without the sign constraint is G⁻¹1/(1ᵀG⁻¹1); the best subset whose weights are
    not negative holds the optimum.  2^m − 1 subsets: at most 12 parents.

    Raises:
        UsageError: more than 12 parents.
    """
    count, gram = len(gram), gram.double()
    if count > 12:
        raise UsageError(f"{count} parents; the weights of at most 12 can be computed.")
    best, lowest = torch.zeros(count, dtype=torch.float64), float("inf")
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            index = torch.tensor(subset)
            part = gram[index][:, index]
            ones = torch.ones(size, dtype=torch.float64)
            solved = torch.linalg.pinv(part, hermitian=True) @ ones
            if size == 1:
                solved = ones
            if float(solved.sum().abs()) < 1e-300:
                continue
            weights = solved / solved.sum()
            value = float(weights @ part @ weights)
            # a larger set has to be better beyond rounding
            if bool((weights >= 0).all()) and value < lowest - 1e-12 * abs(lowest if lowest < float("inf") else 1.0):
                best, lowest = torch.zeros(count, dtype=torch.float64).index_copy_(0, index, weights), value
    return best
