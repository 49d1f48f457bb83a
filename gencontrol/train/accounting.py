"""Sums over optimizer batches, means over the steps of a line, and the fence around the global random generators."""

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


def numbers(values: Sequence[float | Tensor]) -> list[float]:
    """Return scalars as floats; those on a CUDA device come in one transfer, so that the host waits for it once."""
    remote = [value.double() for value in values if isinstance(value, Tensor) and value.is_cuda]
    if len(remote) < 2:
        return [float(value) for value in values]
    fetched = iter(torch.stack([value.reshape(()) for value in remote]).tolist())
    return [next(fetched) if isinstance(value, Tensor) and value.is_cuda else float(value) for value in values]


@dataclasses.dataclass
class Sums:
    """Sums of losses and metrics over items; divided once, by the count of all items."""

    count: int = 0
    total: float | Tensor = 0.0
    metrics: dict[str, float | Tensor] = dataclasses.field(default_factory=dict)

    def add(self, other: LossOut | Sums | Mapping[str, Any]) -> None:
        """Add a micro-batch without its graph and without waiting for the device, another sum, or its `note()`."""
        if isinstance(other, Mapping):
            other = Sums(**other)
        self.count += other.count
        self.total = self.total + (other.total.detach() if isinstance(other.total, Tensor) else other.total)
        for key, value in other.metrics.items():
            held = value.detach() if isinstance(value, Tensor) else float(value)
            self.metrics[key] = self.metrics.get(key, 0.0) + held

    def note(self) -> dict[str, Any]:
        """Return plain numbers, for the exchange between ranks and for checkpoints."""
        total, *rest = numbers([self.total, *self.metrics.values()])
        return {"count": self.count, "total": total, "metrics": dict(zip(self.metrics, rest, strict=True))}


class Window:
    """What the steps since the last line of metrics.jsonl amount to; a checkpoint holds it.

    Losses and their metrics are means over all items of these steps, gradient norms over the updates that were taken,
    metrics of `collect` over the steps that gave them, times over the steps.
    """

    def __init__(self) -> None:
        self.steps, self.items, self.collect_s, self.update_s = 0, 0, 0.0, 0.0
        self.collected: dict[str, list[float]] = {}
        self.sums: dict[str, dict[str, Any]] = {}
        self.norms: dict[str, list[float]] = {}

    def add_update(self, group: str, sums: Sums, norm: float) -> None:
        """Add a step of a parameter group that was taken; the numbers of `sums` are floats."""
        whole = Sums()
        whole.add(self.sums.get(group, {}))
        whole.add(sums)
        self.sums[group] = vars(whole)
        _add(self.norms, group, norm)

    def add_step(self, rows: Sequence[Mapping[str, float]], items: int, collect_s: float, update_s: float) -> None:
        """Add a training step: metrics of `collect` on each rank, items of its updates, seconds."""
        for name in sorted({name for row in rows for name in row}):
            values = [row[name] for row in rows if name in row]
            _add(self.collected, name, sum(values) / len(values))
        self.steps, self.items = self.steps + 1, self.items + items
        self.collect_s, self.update_s = self.collect_s + collect_s, self.update_s + update_s

    def metrics(self) -> dict[str, float]:
        """Return the means, in the order of their names."""
        found = {name: total / count for name, (total, count) in self.collected.items()}
        for name, sums in self.sums.items():
            found |= {key: value / sums["count"] for key, value in sums["metrics"].items()}
            end = f"/{name}" if name else ""
            found[f"loss{end or '/total'}"] = sums["total"] / sums["count"]
            found[f"grad_norm{end}"] = self.norms[name][0] / self.norms[name][1]
        if self.sums and "" not in self.sums:
            found["loss/total"] = sum(sums["total"] / sums["count"] for sums in self.sums.values())
        return {key: found[key] for key in sorted(found)}

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values; later steps do not alter them."""
        return {key: dict(value) if isinstance(value, dict) else value for key, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`."""
        vars(self).update(state)

    def times(self) -> dict[str, float]:
        """Return seconds per step and items per second."""
        seconds = self.collect_s + self.update_s
        return {
            "time/collect": self.collect_s / self.steps,
            "time/update": self.update_s / self.steps,
            "samples/s": self.items / max(seconds, 1e-9),
        }


def _add(table: dict[str, list[float]], name: str, value: float) -> None:
    total, count = table.get(name, (0.0, 0))
    table[name] = [total + value, count + 1]


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
