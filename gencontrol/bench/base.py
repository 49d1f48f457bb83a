"""What benchmarks share: the in-memory training loop, seeds, intervals, tables and result files."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from gencontrol.algorithms.base import Algorithm, LossOut, StepContext
from gencontrol.errors import NumericsError
from gencontrol.files import FileLayer, digest
from gencontrol.stats import Estimate, student_t

T = TypeVar("T")


@dataclass(frozen=True)
class Loop:
    """Settings of `run_in_memory`: AdamW with constant rate, clipped gradients, at most `micro_batch` items at once.

    `autocast` gives the networks' precision, as in `StepContext`.
    """

    lr: float
    micro_batch: int = 4096
    max_grad_norm: float = 1.0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


def run_in_memory(
    algorithm: Algorithm, steps: int, loop: Loop, *, seed: int, on_step: Callable[[int], None] | None = None
) -> list[dict[str, float]]:
    """Train like the Trainer does (collect, updates, clip, AdamW, after_update), without a run folder.

    Returns one record per step.  A benchmark makes dozens of short runs; what it trains is the user's algorithm class.

    Raises:
        NumericsError: a loss or gradient is not finite.
    """
    parameters = algorithm.roles.trainable()
    optimizer = torch.optim.AdamW(parameters, lr=loop.lr, weight_decay=0.0, fused=True)
    records = []
    for step in range(steps):
        ctx = StepContext(seed=seed, step=step, micro_batch=loop.micro_batch, autocast=loop.autocast)
        began = time.perf_counter()
        collected = algorithm.collect(ctx)
        sums: dict[str, float] = {}
        items = 0
        for update in range(collected.updates):
            optimizer.zero_grad(set_to_none=True)
            count = 0
            for micro in algorithm.minibatches(collected.data, update, ctx):
                out = algorithm.loss(micro, ctx)
                assert isinstance(out, LossOut)  # the methods that are compared here have one loss
                out.total.backward()
                count += out.count
                for key, value in out.metrics.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
            if not count:
                continue
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= count
            norm = torch.nn.utils.clip_grad_norm_(parameters, loop.max_grad_norm)
            if not math.isfinite(float(norm)):
                raise NumericsError(f"step {step}: the gradient norm is {float(norm)}; lower the learning rate.")
            optimizer.step()
            algorithm.after_update(ctx, update)
            items += count
        record = {**collected.metrics, **{key: value / max(items, 1) for key, value in sums.items()}}
        records.append(record | {"time/step": time.perf_counter() - began})
        if on_step is not None:
            on_step(step)
    return records


def kept(folder: Path | None, name: str, settings: Mapping[str, Any], make: Callable[[], T]) -> T:
    """Return `make()`, or what an earlier call with this name and these settings wrote into the folder.

    An interrupted benchmark goes on where it was.  The result is a JSON value (NaN may be in it); a change of the code
    is not noticed: empty the folder.

    Args:
        folder: None keeps nothing.
        settings: everything that the result depends on, JSON values.
    """
    if folder is None:
        return make()
    path = folder / f"{name}_{digest(settings, 16)}.json"
    if path.exists():
        found: T = json.loads(path.read_text(encoding="utf-8"))["result"]
        return found
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, "result": made}, indent=1) + "\n"
    FileLayer().replace_file(path, text.encode())
    return made


def over_seeds(rows: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Return mean and Student t interval over seeds of every number that all rows have."""
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: student_t([row[key] for row in rows]) for key in keys}


def show(value: Estimate | float | str) -> str:
    """Format a cell: three significant digits, and "±" half the interval where there is one."""
    if isinstance(value, str):
        return value
    if isinstance(value, Estimate):
        half = (value.high - value.low) / 2
        return show(value.value) if math.isnan(half) else f"{show(value.value)} ±{half:.2g}"
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Estimate | float | str]]) -> str:
    """Return a Markdown table under its title."""
    cells = [list(header)] + [[show(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"\n{title}\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Check:
    """One claim with what was measured and whether it holds."""

    claim: str
    measured: str
    holds: bool


def verdicts(checks: Sequence[Check]) -> str:
    """Return the claims as lines, each marked as confirmed or not."""
    return (
        "\n".join(f"{'confirmed' if c.holds else 'NOT CONFIRMED'}: {c.claim} — measured {c.measured}" for c in checks)
        + "\n"
    )


def write_result(folder: Path, name: str, result: Mapping[str, Any], seconds: float) -> Path:
    """Write a result as JSON beside its environment (versions, threads, wall time); returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "seconds": round(seconds, 1),
    }
    path.write_text(json.dumps({"environment": environment, **_plain(result)}, indent=1) + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    """Turn estimates, checks and nested containers into JSON values; NaN becomes null."""
    if isinstance(value, (Estimate, Check)):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
