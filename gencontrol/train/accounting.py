"""Sums over optimizer batches, averages over ranks, and the fence around the global random generators."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import resource
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencontrol.algorithms.base import LossOut


@dataclasses.dataclass
class Sums:
    """Sums of losses and metrics over items; divided once, by the count of the whole optimizer batch."""

    count: int = 0
    total: float | Tensor = 0.0
    metrics: dict[str, float | Tensor] = dataclasses.field(default_factory=dict)

    def add_loss(self, out: LossOut) -> None:
        """Add a micro-batch without its graph and without waiting for the device."""
        held = {key: v.detach() if isinstance(v, Tensor) else float(v) for key, v in out.metrics.items()}
        self.add({"count": out.count, "total": out.total.detach(), "metrics": held})

    def add(self, note: Mapping[str, Any]) -> None:
        """Add another sum, given as `note()` gives it."""
        self.count += note["count"]
        self.total = self.total + note["total"]
        for key, value in note["metrics"].items():
            self.metrics[key] = self.metrics.get(key, 0.0) + value

    def note(self) -> dict[str, Any]:
        """Return plain numbers, for the exchange between ranks."""
        metrics = {key: float(value) for key, value in self.metrics.items()}
        return {"count": self.count, "total": float(self.total), "metrics": metrics}

    def means(self) -> dict[str, float]:
        """Metrics per item."""
        return {key: float(value) / self.count for key, value in self.metrics.items()}

    def mean_loss(self) -> float:
        """Loss per item."""
        return float(self.total) / self.count


def average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the ranks that have it."""
    names = sorted({name for row in rows for name in row})
    return {name: sum(v := [row[name] for row in rows if name in row]) / len(v) for name in names}


def peak_mb(device: torch.device) -> float:
    """Largest memory in use so far, in MB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@contextlib.contextmanager
def global_rng_untouched(device: torch.device) -> Iterator[None]:
    """Put the global generators (CPU and `device`) back at the end, so that an evaluation cannot alter training."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
