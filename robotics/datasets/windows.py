"""Training windows of chunked policies, cut from episodes by index arithmetic alone.

A window belongs to a step t of an episode of length T: observations t − n_obs + 1 … t and actions t − n_obs + 1 …
t − n_obs + horizon.  Rows outside the episode repeat its first or last row and are marked in the pad mask.  Windows
never cross episodes.  With `n_action`, the steps are those of Diffusion Policy (pad_before = n_obs − 1, pad_after =
n_action − 1) and of LeRobot's `drop_n_last_frames` (docs/robot-interfaces.md#diffusion-policy, FOUND); without, every
step has a window, as in robomimic's SequenceDataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets.episodes import Episodes


@dataclass(frozen=True)
class WindowBatch:
    """Some windows.

    Args:
        observations: key → [b n_obs *d], in the type of the data set (images uint8 [h w 3]).
        actions: in the environment's units.
        pad: true where the action repeats an end of the episode.
        obs_pad: the same of the observations.
    """

    observations: dict[str, Tensor]
    actions: Float[Tensor, "b horizon action"]
    pad: Bool[Tensor, "b horizon"]
    obs_pad: Bool[Tensor, "b n_obs"]


@dataclass(frozen=True)
class Windows:
    """All windows of a data set; rows of all episodes lie one after another.

    Args:
        observations: key → [rows *d].
        actions: [rows A].
        first, last: rows where the episode of each window begins and ends (inclusive).
        start: row of each window's oldest observation; before `first` where history is missing.
        n_obs, horizon: sizes of a window.
    """

    observations: dict[str, Shaped[Tensor, "rows *d"]]
    actions: Float[Tensor, "rows action"]
    first: Int64[Tensor, " windows"]
    last: Int64[Tensor, " windows"]
    start: Int64[Tensor, " windows"]
    n_obs: int
    horizon: int

    @classmethod
    def of(
        cls,
        episodes: Episodes,
        *,
        n_obs: int,
        horizon: int,
        n_action: int | None = None,
        keys: Sequence[str] | None = None,
    ) -> Windows:
        """Cut windows; the final observation (row T) is never used, since no action follows it.

        Args:
            n_obs: observations in the history.
            horizon: actions, counted from the oldest observation.
            n_action: leave out steps whose window has more than n_action − 1 rows past the end, but keep one window
                of every episode (ours); None keeps all steps.
            keys: observations to hold; None holds all.

        Raises:
            UsageError: a size or key does not fit.
        """
        if min(n_obs, horizon) < 1 or not (n_action is None or 1 <= n_action <= horizon - n_obs + 1):
            raise UsageError(
                f"windows with n_obs {n_obs}, horizon {horizon}, n_action {n_action}: each must be at least 1 and "
                "n_action at most horizon − n_obs + 1."
            )
        have = episodes[0].observations
        chosen = list(have) if keys is None else list(keys)
        if missing := [key for key in chosen if key not in have]:
            raise UsageError(f"the data set has no observation '{missing[0]}'; it has {', '.join(have)}.")
        lengths = torch.tensor([len(episode) for episode in episodes])
        ends = lengths.cumsum(0)
        counts = lengths if n_action is None else (lengths - horizon + n_action + n_obs - 1).clamp(min=1)
        counts = torch.minimum(counts, lengths)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        before = counts.cumsum(0) - counts
        step = torch.arange(len(owner)) - before[owner]
        first = (ends - lengths)[owner]
        return cls(
            {key: _rows([episode.observations[key][: len(episode)] for episode in episodes]) for key in chosen},
            _rows([episode.actions for episode in episodes]),
            first,
            ends[owner] - 1,
            first + step - (n_obs - 1),
            n_obs,
            horizon,
        )

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.start)

    def to(self, device: torch.device | str) -> Windows:
        """Move everything, so that batches are gathered there."""
        observations = {key: value.to(device) for key, value in self.observations.items()}
        return replace(
            self,
            observations=observations,
            actions=self.actions.to(device),
            first=self.first.to(device),
            last=self.last.to(device),
            start=self.start.to(device),
        )

    def batch(self, index: Int64[Tensor, " b"]) -> WindowBatch:
        """Gather windows by number."""
        index = index.to(self.start.device)
        history, obs_pad = self._table(index, self.n_obs)
        future, pad = self._table(index, self.horizon)
        found = {key: value[history] for key, value in self.observations.items()}
        return WindowBatch(found, self.actions[future], pad, obs_pad)

    def _table(self, index: Tensor, count: int) -> tuple[Int64[Tensor, "b count"], Bool[Tensor, "b count"]]:
        """Rows `start … start + count − 1` of each window kept inside its episode, and which had to be moved."""
        rows = self.start[index][:, None] + torch.arange(count, device=self.start.device)
        inside = torch.minimum(torch.maximum(rows, self.first[index][:, None]), self.last[index][:, None])
        return inside, inside != rows


def _rows(parts: Sequence[np.ndarray]) -> Tensor:
    """Join episodes into one tensor of rows."""
    return torch.from_numpy(np.concatenate(parts))
