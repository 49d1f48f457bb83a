"""Which environments run on this machine: `gencontrol doctor` makes one of each family and takes a step.

Each is tried in a process of its own, all at once, so that one that crashes or hangs is a line of the diagnosis.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gencontrol.errors import GencontrolError
from gencontrol.robotics.envs.make import FAMILIES
from gencontrol.robotics.envs.rows import ProcessRow
from gencontrol.robotics.envs.types import Timeouts

_TIMEOUTS = Timeouts(make_s=90.0, reset_s=30.0, step_s=30.0)
_RENDERED = "FetchReach-v4"


class Finding(NamedTuple):
    """One line: whether it runs, and the version or what to do."""

    name: str
    works: bool
    detail: str


def probe() -> Iterator[Finding]:
    """Yield one finding per family of environments, and one about rendering without a screen."""
    rows: dict[str, ProcessRow] = {}
    try:
        for family in FAMILIES:
            if importlib.util.find_spec(family.module) is not None:
                rows[family.name] = _row(family.probe, render=False)
        if "Fetch" in rows:
            rows["rendering"] = _row(_RENDERED, render=True)
        for family in FAMILIES:
            if family.name not in rows:
                yield Finding(family.name, False, f"missing; {family.install}")
            else:
                fault = _try(rows[family.name])
                detail = f"{family.probe} runs" if fault is None else f"{fault}; {family.install}"
                yield Finding(family.name, fault is None, detail)
        if "rendering" not in rows:
            yield Finding("rendering", False, "not tried without Fetch; evaluation works, videos need it")
            return
        fault = _try(rows["rendering"])
        if fault is None:
            rows["rendering"].send_render()
            frame = rows["rendering"].receive_frame()
            if not isinstance(frame, str):
                detail = f"{_RENDERED} draws {frame.shape[1]} × {frame.shape[0]} pixels"
                yield Finding("rendering", True, detail)
                return
            fault = frame
        detail = f"no videos, evaluation works without: {fault[:160]}; apt-get install libegl1"
        yield Finding("rendering", False, detail)
    finally:
        for row in rows.values():
            row.close()


def _row(env_id: str, *, render: bool) -> ProcessRow:
    request: dict[str, Any] = {"env": env_id, "kwargs": {}, "time_limit": None, "success": "auto", "render": render}
    return ProcessRow(request, _TIMEOUTS)


def _try(row: ProcessRow) -> str | None:
    """Make it, reset it, take a step; return what went wrong."""
    try:
        spec = row.start()
    except GencontrolError as error:
        return str(error).rstrip(".")
    row.send_reset(0)
    if isinstance(answer := row.receive(), str):
        return answer
    row.send_step(np.zeros(spec.action_dim, np.float32))
    return answer if isinstance(answer := row.receive(), str) else None
