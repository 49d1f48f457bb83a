"""Times at which the forward-process methods train: strata of (0, 1), or the sampler's own grid.

On a grid, index i is the time at which the sampler's step i starts.  The published trainers draw from these times and
no others; on a shifted grid (SD3, FLUX) they crowd at high noise.  The rules and their roundings are held to the
official code's numbers by tests/golden/test_golden_times.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

#: What `strata` does with the first time of a grid: it is one of them, left out, or always taken.
Start = Literal["drawn", "out", "always"]


def spread(offsets: Float[Tensor, "g k m"], count: int) -> Float[Tensor, "g k m"]:
    """Place uniform offsets in strata of [0, 1): one for each index k where m = 1, else `count` over the draws m."""
    return (_numbers(offsets, count) + offsets) / count


def strata(offsets: Float[Tensor, "g k m"], kept: int, *, count: int, start: Start = "drawn") -> Int64[Tensor, "g k m"]:
    """Return one grid index for each offset, from equal stretches of the first `kept` indices.

    Args:
        offsets: uniform in [0, 1).
        kept: how many of the grid's times are used, ≥ 1.
        count: number of stretches, as in `spread`.
        start: "drawn" spreads over 0, …, kept − 1; "out" over 1, …, kept − 1; "always" takes index 0 first and spreads
            the others over the rest (one draw per index only).
    """
    if kept < 2 or start == "drawn":
        return _stretches(offsets, 0, kept, count)
    if start == "out":
        return _stretches(offsets, 1, kept, count)
    first = torch.zeros(offsets[:, :1].shape, dtype=torch.int64)
    return torch.cat([first, _stretches(offsets[:, 1:], 1, kept, max(1, count - 1))], 1)


def permutation(offsets: Float[Tensor, "g k m"], keys: Float[Tensor, "g n"]) -> Int64[Tensor, "g k m"]:
    """Return the first k indices of a random order of a grid's n times, the order of `keys`; an own one per group g."""
    order = keys.argsort(1)[:, : offsets.shape[1], None]
    return order.expand(-1, -1, offsets.shape[2])


def kept_by_level(grid: Sequence[float], share: float) -> int:
    """How many of the grid's times, from noise on, are at least 1 − share, but for the last such one (CRD's, PORT)."""
    return max(1, sum(t >= 1.0 - share - 1e-9 for t in grid) - 1)


def kept_by_count(grid: Sequence[float], share: float) -> int:
    """The first floor(share·n) of the grid's n times (AWM's and DiffusionNFT's rule, CODE)."""
    return max(1, int(share * len(grid) + 1e-9))


def _numbers(offsets: Float[Tensor, "g k m"], count: int) -> Int64[Tensor, "1 k m"]:
    """The stretch that each offset belongs to."""
    _, k, m = offsets.shape
    return torch.arange(k).view(1, k, 1) if m == 1 else (torch.arange(m) * count // m).view(1, 1, m)


def _stretches(offsets: Float[Tensor, "g k m"], first: int, last: int, count: int) -> Int64[Tensor, "g k m"]:
    """An index of [first, last) from each of `count` stretches whose ends are rounded down (PORT)."""
    ends = torch.linspace(first, last, count + 1).long()
    number = _numbers(offsets, count)
    low, high = ends[number], ends[number + 1]
    return low + (offsets * (high - low)).long()
