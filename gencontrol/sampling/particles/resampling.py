"""Weights of particles: normalisation, effective sample size, and unbiased ways to turn weights into equal ones.

Everything is float64 on the CPU and in logarithms, so that r/temperature may be in the thousands.  Resampling is
unbiased: particle i gets n·w_i copies on average.  Systematic resampling (Kitagawa 1996) gives it the integer below or
above n·w_i and so adds the least noise; multinomial is what FK steering's public code does.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def normalised(log_weights: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], float]:
    """Return log-weights that sum to 1 after exp, and the logarithm of the sum they had (-inf: no weight at all).

    NaN counts as weight 0.
    """
    known = torch.nan_to_num(log_weights.double(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    total = float(torch.logsumexp(known, 0))
    return (known - total if math.isfinite(total) else known), total


def effective_size(log_weights: Float[Tensor, " n"]) -> float:
    """Return (Σw)²/Σw² in [1, n] of log-weights of any scale; 0 if all weights are 0."""
    log, total = normalised(log_weights)
    return math.exp(-float(torch.logsumexp(2 * log, 0))) if math.isfinite(total) else 0.0


def systematic(log_weights: Float[Tensor, " n"], draw: float) -> Int64[Tensor, " n"]:
    """Return n ancestors in ascending order: the places of (draw + i)/n, i < n, in the distribution function.

    Args:
        log_weights: of any scale, not all -inf.
        draw: one uniform number in [0, 1).
    """
    size = len(log_weights)
    points = (torch.arange(size, dtype=torch.float64) + draw) / size
    return _places(log_weights, points)


def multinomial(log_weights: Float[Tensor, " n"], draws: Float[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Return m independent ancestors, one per uniform number in [0, 1)."""
    return _places(log_weights, draws)


def _places(log_weights: Float[Tensor, " n"], points: Float[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Where uniform numbers fall in the distribution function; never on a weight of 0."""
    cumulative = torch.exp(normalised(log_weights)[0]).cumsum(0)
    places = torch.searchsorted(cumulative, points * cumulative[-1], right=True)
    last = int(torch.isfinite(log_weights).nonzero()[-1])  # rounding must not reach past the last weight
    return places.clamp(max=last)
