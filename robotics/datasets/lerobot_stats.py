"""Statistics of LeRobotDataset v3.0: exact ones, of numbers over their rows, of pictures per channel by histograms.

lerobot itself samples some frames and interpolates quantiles in bins (FOUND, compute_stats.py); shapes and keys agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gencontrol.data.normalize import QUANTILES, statistics
from gencontrol.robotics.datasets.storage import Array


class Numbers:
    """Rows of several features, side by side in one table: a single pass serves all of them."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, columns: Mapping[str, Array]) -> None:
        """Add feature → [T *d]; scalars become [T 1]."""
        self.shapes = {name: rows.shape[1:] or (1,) for name, rows in columns.items()}
        flat = [rows.reshape(len(rows), -1).astype(np.float64) for rows in columns.values()]
        self.parts.append(np.concatenate(flat, axis=1))

    def statistics(self) -> dict[str, dict[str, Array]]:
        """Return feature → statistic → [*d]."""
        table = statistics(np.concatenate(self.parts))
        count = table.pop("count")
        found, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + math.prod(shape)
            found[name] = {key: value[start:end].reshape(shape) for key, value in table.items()} | {"count": count}
            start = end
        return found


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
