"""Advantages of samples inside their prompt groups, shared by all group-relative methods.

A = (r − mean of its prompt group)/std, clipped; the mean removes what all samples of a prompt share, the spread makes
the learning rate independent of the reward's unit.  Rule and floor are those of Flow-GRPO's and DiffusionNFT's code
(PORT; methods/crd.md §3): the spread is that of the whole batch's raw rewards ("global") or of each group ("group").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Spread = Literal["global", "group"]

#: Added to a standard deviation (PORT): groups of nearly equal rewards must not become advantages of size 1.
FLOOR = 1e-4


def group_advantages(
    values: Float[Tensor, " n"],
    valid: Bool[Tensor, " n"],
    generations: int,
    *,
    spread: Spread = "global",
    clip: float = 5.0,
) -> Float[Tensor, " n"]:
    """Return the clipped advantage of each sample in its group of `generations` neighbours; 0 where invalid.

    Args:
        values: rewards in any unit; invalid items may hold anything.
        valid: which items count; an invalid one enters neither mean nor spread.
        generations: samples per prompt, adjacent; divides n.
        spread: "global" divides by the standard deviation of all valid rewards, "group" by that of the own group.
        clip: largest size of an advantage, > 0 (5, PORT).

    Raises:
        ValueError: n is not a multiple of `generations`, or `spread` is unknown.
    """
    if generations < 1 or len(values) % generations:
        raise ValueError(f"{len(values)} rewards do not divide into groups of {generations}; give whole groups")
    if spread not in ("global", "group"):
        raise ValueError(f"spread = {spread!r}; expected 'global' or 'group'")
    grid = torch.where(valid, values, torch.zeros_like(values)).double().view(-1, generations)
    mask = valid.view(-1, generations).double()
    count = mask.sum(1, keepdim=True).clamp_min(1.0)
    centred = (grid - grid.sum(1, keepdim=True) / count) * mask
    if spread == "group":
        scale = (centred.square().sum(1, keepdim=True) / count).sqrt()
    else:
        kept = values[valid].double()
        scale = kept.std(unbiased=False) if len(kept) else torch.zeros((), dtype=torch.float64, device=values.device)
    return (centred / (scale + FLOOR)).clamp(-clip, clip).flatten().to(values.dtype)


def combined_advantages(
    parts: Sequence[tuple[Float[Tensor, " n"], float]],
    valid: Bool[Tensor, " n"],
    generations: int,
    *,
    spread: Spread = "global",
    clip: float = 5.0,
) -> Float[Tensor, " n"]:
    """Normalise each reward for itself, add with its weight, normalise the sum: "gdpo" (PORT, crd.md §3.4).

    So no reward dominates by its unit or spread.  `parts` are (values, weight); a single part of weight 1 is
    `group_advantages` of it (up to the floor).
    """
    total = torch.zeros(len(valid), dtype=torch.float64, device=valid.device)
    for values, weight in parts:
        total += weight * group_advantages(values.double(), valid, generations, spread=spread, clip=clip)
    if len(parts) == 1:
        return total.clamp(-clip, clip).to(parts[0][0].dtype)
    return group_advantages(total, valid, generations, spread=spread, clip=clip).to(parts[0][0].dtype)


def zero_spread_share(values: Float[Tensor, " n"], valid: Bool[Tensor, " n"], generations: int) -> float:
    """Return the share of groups whose valid rewards are all equal: they carry no preference."""
    grid, mask = values.view(-1, generations).double(), valid.view(-1, generations)
    high = torch.where(mask, grid, -torch.inf).amax(1)
    low = torch.where(mask, grid, torch.inf).amin(1)
    return float((high <= low).double().mean())
