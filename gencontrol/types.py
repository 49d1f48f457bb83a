"""Shared vocabulary: prediction types, conditions, rewards' output, model output protocol.

Conventions (docs/concepts.md#conventions): t in [0, 1], t = 0 is data; x_t = a(t)·x0 + s(t)·eps; batch axis first
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

#: A condition: None, a tensor with the batch axis first, a (nested) mapping of such tensors, or `Grouped` rows of one.
Cond = Any


@dataclass(frozen=True)
class Grouped:
    """A condition that batch rows share, so that what depends on it alone is computed once per distinct row.

    Batch row i has row rows[i] of `unique`.  A `Denoiser` expands it for networks that are not `TakesGroups`.

    Args:
        unique: a condition of the other forms, not None.
        rows: on the CPU.
    """

    unique: Cond
    rows: Int64[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.rows)

    def expand(self) -> Cond:
        """Return the plain condition with one row per batch row."""
        return index_cond(self.unique, self.rows)

    def pick(self, index: Any) -> Grouped:
        """Return some batch rows, holding only the unique rows that they need."""
        used, rows = torch.unique(self.rows[index.cpu() if isinstance(index, Tensor) else index], return_inverse=True)
        return Grouped(self.unique if len(used) == cond_rows(self.unique) else index_cond(self.unique, used), rows)

    def repeats(self) -> int | None:
        """Return g if each unique row serves g adjacent batch rows, all in order, else None."""
        count = cond_rows(self.unique)
        g = len(self.rows) // max(count, 1)
        return g if torch.equal(self.rows, torch.arange(count).repeat_interleave(g)) else None


def cond_rows(cond: Cond) -> int:
    """Return the batch size of a condition that is not None (of its first tensor)."""
    if isinstance(cond, (Tensor, Grouped)):
        return len(cond)
    return cond_rows(next(iter(cond.values())))


def grouped(cond: Cond, rows: Int64[Tensor, " b"]) -> Cond:
    """Return batch rows `rows` of a condition without repeating it; None stays None."""
    return None if cond is None else Grouped(cond, rows.cpu())


class Prediction(StrEnum):
    """What a Gaussian network outputs, as a row on (x0, eps); see `gencontrol.process.convert`."""

    X0 = "x0"
    EPS = "eps"
    V = "v"
    VELOCITY = "velocity"
    EDM = "edm"


def map_cond(fn: Callable[[Tensor], Tensor], cond: Cond) -> Cond:
    """Apply `fn` to every tensor of a condition; None stays None."""
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return fn(cond)
    if isinstance(cond, Mapping):
        return {key: map_cond(fn, value) for key, value in cond.items()}
    if isinstance(cond, Grouped):
        return Grouped(map_cond(fn, cond.unique), cond.rows)
    raise TypeError(f"a condition is None, a tensor or a mapping of tensors, not {type(cond).__name__}")


def index_cond(cond: Cond, index: Any) -> Cond:
    """Select rows of the batch axis of every tensor in a condition."""
    if isinstance(cond, Grouped):
        return cond.pick(index)
    return map_cond(lambda leaf: leaf[index], cond)


def cat_cond(conds: Sequence[Cond]) -> Cond:
    """Concatenate conditions of the same structure along the batch axis."""
    first = conds[0]
    if first is None:
        return None
    if any(isinstance(cond, Grouped) for cond in conds):
        return _cat_grouped(conds)
    if isinstance(first, Tensor):
        return torch.cat(list(conds))
    return {key: cat_cond([cond[key] for cond in conds]) for key in first}


def _cat_grouped(conds: Sequence[Cond]) -> Grouped:
    parts = [c if isinstance(c, Grouped) else Grouped(c, torch.arange(cond_rows(c))) for c in conds]
    if all(part.unique is parts[0].unique for part in parts):
        return Grouped(parts[0].unique, torch.cat([part.rows for part in parts]))
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + cond_rows(part.unique))
    rows = torch.cat([part.rows + start for part, start in zip(parts, starts)])
    return Grouped(cat_cond([part.unique for part in parts]), rows)


def cond_to(cond: Cond, device: torch.device | str) -> Cond:
    """Move every tensor of a condition to a device."""
    return map_cond(lambda leaf: leaf.to(device), cond)


@dataclass(frozen=True)
class RewardContext:
    """What a reward may know beside the samples.

    Args:
        prompts: one text per sample, or None.
        sampling_rate: Hz, for audio samples.
        metadata: any per-sample lists (labels, ids), keyed by name.
        poll: called now and then by a reward that waits; raises when the run has to stop.
    """

    prompts: Sequence[str] | None = None
    sampling_rate: int | None = None
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    poll: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def rows(self, rows: Sequence[int]) -> RewardContext:
        """The context of the samples with these indices."""
        prompts = self.prompts
        return replace(
            self,
            prompts=None if prompts is None else [prompts[i] for i in rows],
            metadata={key: [value[i] for i in rows] for key, value in self.metadata.items()},
        )


@dataclass(frozen=True)
class RewardOut:
    """Values of a reward: `values` [b] float32 (higher is better), `valid` [b] bool; an invalid item is never a 0."""

    values: Float[Tensor, " b"]
    valid: Bool[Tensor, " b"]
    extras: Mapping[str, Any] = field(default_factory=dict)

    def mean(self) -> float:
        """Mean over the valid items; NaN when none is valid."""
        return float(self.values[self.valid].mean()) if bool(self.valid.any()) else float("nan")

    def valid_fraction(self) -> float:
        """Share of valid items in [0, 1]."""
        return float(self.valid.float().mean())
