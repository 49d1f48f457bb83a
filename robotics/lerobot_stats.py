"""Statistics of LeRobotDataset v3.0: exact ones, of numbers over their rows, of pictures per channel by histograms.

lerobot itself samples some frames and interpolates quantiles in bins (FOUND, compute_stats.py); shapes and keys agree.
"""

from __future__ import annotations

import numpy as np

from gencontrol.data.normalize import QUANTILES, statistics
from gencontrol.robotics.storage import Array


class Values:
    """Rows of numbers."""

    def __init__(self) -> None:
        self.parts: list[Array] = []

    def add(self, rows: Array) -> None:
        """Add [T *d]; scalars become [T 1]."""
        self.parts.append(rows.reshape(len(rows), *(rows.shape[1:] or (1,))))

    def statistics(self) -> dict[str, Array]:
        """Return statistic → [*d]."""
        return statistics(np.concatenate(self.parts))


class Pictures:
    """Histograms of the three channels."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), dtype=np.int64)
        self.frames = 0

    def add(self, images: Array) -> None:
        """Add uint8 [T h w 3]."""
        self.frames += len(images)
        for channel in range(3):
            self.counts[channel] += np.bincount(images[..., channel].reshape(-1), minlength=256)

    def statistics(self) -> dict[str, Array]:
        """Return statistic → [3 1 1] of values in [0, 1]."""
        share = self.counts / self.counts.sum(axis=1, keepdims=True)
        values = np.arange(256) / 255
        mean = share @ values
        below = np.cumsum(share, axis=1)
        found = {
            "min": values[np.argmax(self.counts > 0, axis=1)],
            "max": values[255 - np.argmax(self.counts[:, ::-1] > 0, axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(share @ values**2 - mean**2, 0)),
            # the least value that at least this share of the pixels does not exceed
            **{name: values[np.argmax(below >= level - 1e-12, axis=1)] for name, level in QUANTILES.items()},
        }
        shaped = {name: value.reshape(3, 1, 1) for name, value in found.items()}
        return {**shaped, "count": np.array([self.frames])}
