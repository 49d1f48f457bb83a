"""Incremental set rewards: the Fréchet distance and the Vendi score of a set whose members are exchanged.

With per-set sums S = Σ f and Q = Σ f fᵀ an exchange costs O(f·d²) for the sums and one symmetric eigenvalue problem for
the value (docs/methods/dragon.md#sets, derived).  The Fréchet state stores frames already multiplied by the root R of
the reference covariance, so the matrix whose eigenvalues are needed, R C R, is the covariance of the stored frames and
no matrix product is left in the loop.  The reference mean is subtracted first, which keeps the sums free of
cancellation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gencontrol.errors import RewardError
from gencontrol.rewards.base import check_chosen
from gencontrol.rewards.sets.gaussian import Gaussian, root_sum

_CHUNK = 64
#: Exchanges after which the sums are taken anew, so that rounding stays bounded.
_FRESH = 1000

Sums = TypeVar("Sums")


class _RunningState(ABC, Generic[Sums]):
    """A set whose reward is a function of sums over its members; an exchange updates the sums.

    A subclass fills what `_total` reads and calls `_resum` at the end of its `__init__`.
    """

    def __init__(self, valid: Bool[Tensor, " pool"], chosen: Int64[Tensor, " n"]) -> None:
        """Start with the items `chosen`.

        Raises:
            RewardError: an invalid or missing row.
        """
        check_chosen(valid, chosen)
        self._valid: list[bool] = valid.cpu().tolist()
        self._slots = [int(row) for row in chosen]

    @abstractmethod
    def _total(self) -> Sums:
        """The sums over the members."""

    @abstractmethod
    def _exchanged(self, slot: int, candidate: int) -> Sums:
        """The sums after an exchange."""

    @abstractmethod
    def _reward(self, sums: Sums) -> Tensor:
        """Reward of a set of the present size with these sums."""

    def _resum(self) -> None:
        self._sums, self._swaps = self._total(), 0
        self._value: float | None = None

    def value(self) -> float:
        """Reward of the set; kept until the next swap."""
        if self._value is None:
            self._value = float(self._reward(self._sums))
        return self._value

    def propose(self, slot: int, candidate: int) -> float:
        """Value after the exchange; −inf for an invalid candidate."""
        if not self._valid[candidate]:
            return float("-inf")
        return float(self._reward(self._exchanged(slot, candidate)))

    def swap(self, slot: int, candidate: int) -> None:
        """Exchange; the sums are taken anew every 1000 swaps so that rounding stays bounded.

        Raises:
            RewardError: the candidate is invalid.
        """
        if not self._valid[candidate]:
            raise RewardError(f"pool item {candidate} is invalid and cannot enter the set.")
        self._sums, self._value = self._exchanged(slot, candidate), None
        self._slots[slot] = candidate
        self._swaps += 1
        if self._swaps >= _FRESH:
            self._resum()


#: Σ f, Σ f R, Σ ‖f‖² and Σ (f R)(f R)ᵀ.
_FrechetSums = tuple[Tensor, Tensor, Tensor, Tensor]


class FrechetState(_RunningState[_FrechetSums]):
    """−(Fréchet distance) of the pooled frames of a set of clips against a reference Gaussian."""

    def __init__(
        self,
        frames: Float[Tensor, "pool f d"],
        valid: Bool[Tensor, " pool"],
        chosen: Int64[Tensor, " n"],
        reference: Gaussian,
    ) -> None:
        """Start with the clips `chosen`; needs at least two frames in all (three for `influence`).

        Raises:
            RewardError: an invalid or missing row, or fewer than two frames.
        """
        super().__init__(valid, chosen)
        offsets = frames.detach().cpu().double() - reference.mean
        self._y = offsets @ reference.root
        self._s = offsets.sum(1)
        self._sy = self._y.sum(1)
        self._q = offsets.square().sum((1, 2))
        self._frames = frames.shape[1]
        self._reference_trace = float(reference.cov.trace())
        if self._frames * len(self._slots) < 2:
            raise RewardError("a Fréchet distance needs at least two frames in the set.")
        self._resum()

    def _total(self) -> _FrechetSums:
        rows = torch.tensor(self._slots)
        flat = self._y[rows].flatten(0, 1)
        return self._s[rows].sum(0), self._sy[rows].sum(0), self._q[rows].sum(), flat.T @ flat

    def _rewards(self, s: Tensor, sy: Tensor, q: Tensor, outer: Tensor, clips: int) -> Tensor:
        """−FD from sums with any leading batch axes; `clips` members each."""
        n = clips * self._frames
        mean, mean_y = s / n, sy / n
        squared = mean.square().sum(-1)
        trace = (q - n * squared) / (n - 1)
        shaped = (outer - n * mean_y[..., :, None] * mean_y[..., None, :]) / (n - 1)
        return -(squared + trace + self._reference_trace - 2 * root_sum(shaped)).clamp_min(0)

    def _reward(self, sums: _FrechetSums) -> Tensor:
        return self._rewards(*sums, len(self._slots))

    def _exchanged(self, slot: int, candidate: int) -> _FrechetSums:
        old, (s, sy, q, outer) = self._slots[slot], self._sums
        moved = outer + self._y[candidate].T @ self._y[candidate] - self._y[old].T @ self._y[old]
        return (
            s + self._s[candidate] - self._s[old],
            sy + self._sy[candidate] - self._sy[old],
            q + self._q[candidate] - self._q[old],
            moved,
        )

    def influence(self) -> Float[Tensor, " n"]:
        """R(S) − R(S∖i) of each slot, by batched eigenvalues.

        Raises:
            RewardError: fewer than two frames would be left.
        """
        if self._frames * (len(self._slots) - 1) < 2:
            raise RewardError("leave-one-out influence needs at least two frames beside each clip.")
        s, sy, q, outer = self._sums
        parts = []
        for start in range(0, len(self._slots), _CHUNK):
            rows = torch.tensor(self._slots[start : start + _CHUNK])
            y = self._y[rows]
            left = (s - self._s[rows], sy - self._sy[rows], q - self._q[rows], outer - y.mT @ y)
            parts.append(self.value() - self._rewards(*left, len(self._slots) - 1))
        return torch.cat(parts)


def entropy_score(eigenvalues: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """exp(−Σ λ log λ) of a PSD spectrum scaled to sum 1; rounding below 0 counts as 0."""
    weights = eigenvalues.clamp_min(0)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.exp(-torch.special.xlogy(weights, weights).sum(-1))


def unit_rows(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Scale rows to length 1.

    Raises:
        RewardError: a row of zeros or with NaN has no direction.
    """
    norms = embeddings.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise RewardError("an embedding is zero or NaN; cosine similarity is not defined for it.")
    return embeddings / norms


class VendiState(_RunningState[Tensor]):
    """Vendi score (Friedman & Dieng 2023, arXiv 2210.02410, cosine kernel) of a set of embeddings.

    The spectrum of K/n (n×n) and that of Σ e eᵀ/n (d×d) agree up to zeros; the smaller of the two is the running sum.
    """

    def __init__(
        self, embeddings: Float[Tensor, "pool d"], valid: Bool[Tensor, " pool"], chosen: Int64[Tensor, " n"]
    ) -> None:
        """Start with the items `chosen`; embeddings are scaled to length 1 here.

        Raises:
            RewardError: an invalid or missing row, or a zero embedding among the valid ones.
        """
        super().__init__(valid, chosen)
        keep = valid.cpu()
        rows = embeddings.detach().cpu().double()
        self._e = torch.zeros_like(rows)
        self._e[keep] = unit_rows(rows[keep])
        self._primal = len(self._slots) <= rows.shape[1]
        self._resum()

    def _total(self) -> Tensor:
        members = self._e[self._slots]
        return members @ members.T if self._primal else members.T @ members

    def _reward(self, sums: Tensor) -> Tensor:
        return entropy_score(torch.linalg.eigvalsh(sums))

    def _exchanged(self, slot: int, candidate: int) -> Tensor:
        new = self._e[candidate]
        if not self._primal:
            old = self._e[self._slots[slot]]
            return self._sums + torch.outer(new, new) - torch.outer(old, old)
        row = self._e[self._slots] @ new
        row[slot] = 1.0
        matrix = self._sums.clone()
        matrix[slot, :] = row
        matrix[:, slot] = row
        return matrix

    def influence(self) -> Float[Tensor, " n"]:
        """R(S) − R(S∖i) of each slot.

        Raises:
            RewardError: the set has one member.
        """
        count = len(self._slots)
        if count < 2:
            raise RewardError("leave-one-out influence needs a set of at least two items.")
        here, parts = self.value(), []
        for slot in range(count):
            if self._primal:
                rest = [i for i in range(count) if i != slot]
                left = self._sums[rest][:, rest]
            else:
                member = self._e[self._slots[slot]]
                left = self._sums - torch.outer(member, member)
            parts.append(here - entropy_score(torch.linalg.eigvalsh(left)))
        return torch.stack(parts)
