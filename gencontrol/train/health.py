"""Health of a run: counts non-finite updates and stops past a budget, leaving a dump that reproduces the case."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from gencontrol.files import FileLayer

#: At most this share of the last `WINDOW` updates may be non-finite.
WINDOW, SHARE = 1000, 0.01


@dataclass
class Health:
    """Counter of skipped updates; `recent` holds the indices of bad updates among the last 1000."""

    max_in_row: int
    updates: int = 0
    in_row: int = 0
    skipped: int = 0
    recent: list[int] = field(default_factory=list)

    def note(self, *, bad: bool) -> str | None:
        """Count one update; returns why the run must stop, or None."""
        self.updates += 1
        self.recent = [index for index in self.recent if index > self.updates - WINDOW]
        if not bad:
            self.in_row = 0
            return None
        self.in_row += 1
        self.skipped += 1
        self.recent.append(self.updates)
        if self.in_row > self.max_in_row:
            return f"{self.in_row} updates in a row were non-finite (max_bad_steps = {self.max_in_row})"
        if len(self.recent) > SHARE * WINDOW:
            return f"{len(self.recent)} of the last {WINDOW} updates were non-finite (at most {SHARE:.0%} may be)"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"updates": self.updates, "in_row": self.in_row, "skipped": self.skipped, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.updates, self.in_row = int(state["updates"]), int(state["in_row"])
        self.skipped, self.recent = int(state["skipped"]), [int(index) for index in state["recent"]]


def find_tensors(value: Any, name: str = "batch") -> dict[str, Tensor]:
    """Return every tensor inside mappings, sequences and dataclasses under a dotted name."""
    if isinstance(value, Tensor):
        return {name: value}
    found: dict[str, Tensor] = {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            found.update(find_tensors(item, f"{name}.{key}"))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, item in enumerate(value):
            found.update(find_tensors(item, f"{name}.{index}"))
    return found


def write_dump(folder: Path, facts: Mapping[str, Any], batch: Any, weights: Mapping[str, Tensor]) -> None:
    """Write dump.json (seed, step, update, losses), batch.safetensors and weights.safetensors into `folder`."""
    files = FileLayer()
    files.make_folder(folder)
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in find_tensors(batch).items()}
    files.write(folder / "batch.safetensors", safetensors.torch.save(tensors))
    held = {name: t.detach().cpu().clone().contiguous() for name, t in weights.items()}
    files.write(folder / "weights.safetensors", safetensors.torch.save(held))
    files.write(folder / "dump.json", json.dumps(dict(facts), indent=1).encode())
