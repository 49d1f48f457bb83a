"""Claim: a training killed at random moments (kill -9) always resumes, and ends bit-equal to one that never stopped.

    gencontrol bench faults --kills 20 --output runs/faults -- \
        python -m gencontrol finetune --output {output} …

The command after `--` is any training command; `{output}` stands for its run folder.  It is run once undisturbed, then
in a second folder, where it is killed with its children at random moments (one in four anywhere, the others after it
has begun to train) and started again by the same command until it ends.  After each kill the newest checkpoint must be
intact; at the end all tensors of the last checkpoint and all lines of metrics.jsonl (but for the clock's fields) must
be equal.  When the run ends before all kills were spent, a further folder is begun.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from gencontrol.config import POSITIONAL, Count, options
from gencontrol.errors import UsageError


@dataclass
class Result:
    """Outcome of the kills."""

    kills: int = 0
    intact: int = 0
    resumed_from: list[int] = field(default_factory=list)
    runs: int = 0
    equal_runs: int = 0
    differences: list[str] = field(default_factory=list)
    undisturbed_s: float = 0.0
    startup_s: float = 0.0

    def passed(self) -> bool:
        """Whether every kill left an intact state and every run ended bit-equal."""
        return self.intact == self.kills and self.equal_runs == self.runs


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, which must be intact; 0 when there is none yet.

    Raises:
        gencontrol.train.checkpoint.Damaged: the newest folder is not what its manifest says.
    """
    from gencontrol.train.checkpoint import Checkpoints, read_verified

    checkpoints = Checkpoints(run_dir / "checkpoints", 1)
    steps = checkpoints.steps()
    if steps:
        read_verified(checkpoints.path(steps[-1]))
    return steps[-1] if steps else 0


def learned(run_dir: Path) -> dict[str, str]:
    """Return {file: sha256} of everything learned in the last checkpoint."""
    from gencontrol.train.checkpoint import Checkpoints, read_verified

    checkpoints = Checkpoints(run_dir / "checkpoints", 1)
    files = read_verified(checkpoints.path(checkpoints.steps()[-1]))
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "state.json"}


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the fields of the clock and of the machine."""
    from gencontrol.train.run_folder import is_wall_clock

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not is_wall_clock(key)} for row in rows]


def compare(first: Path, second: Path) -> list[str]:
    """Return what differs between two finished runs; empty when they are bit-equal."""
    a, b = learned(first), learned(second)
    found = [f"{name} differs" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    one, two = metric_lines(first), metric_lines(second)
    if len(one) != len(two):
        found.append(f"metrics.jsonl has {len(two)} lines instead of {len(one)}")
    found += [f"line of step {x.get('step')} differs" for x, y in zip(one, two, strict=False) if x != y]
    return found


def _start(command: Sequence[str], run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    filled = [part.replace("{output}", str(run_dir)) for part in command]
    with open(log, "ab") as file:
        return subprocess.Popen(filled, stdout=file, stderr=file, start_new_session=True)


def _await_training(process: subprocess.Popen[bytes], run_dir: Path, since: float) -> None:
    """Wait until this start has written a line of metrics (or has ended); `since` in seconds of the epoch."""
    path = run_dir / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_mtime > since):
        time.sleep(0.005)


def _finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait() != 0:
        tail = " ".join(log.read_text(errors="replace").split()[-40:])
        raise UsageError(f"the command ended with code {process.returncode}; its last words in '{log}': {tail}")


def run(command: Sequence[str], output: Path, kills: int, seed: int) -> Result:
    """Run the experiment; folders `undisturbed` and `killed_N` are made in `output`.

    Raises:
        UsageError: the command has no {output}, ends with an error, or `output` is not empty.
    """
    if not any("{output}" in part for part in command):
        raise UsageError("the command after -- must hold {output}, e.g. gencontrol finetune --output {output}.")
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise UsageError(f"'{output}' is not empty; name a new --output.")
    result, rng = Result(), random.Random(seed)
    reference, log = output / "undisturbed", output / "log.txt"
    begin = time.monotonic()
    process = _start(command, reference, log)
    _await_training(process, reference, 0.0)
    result.startup_s = time.monotonic() - begin
    _finish(process, log)
    result.undisturbed_s = time.monotonic() - begin
    while result.kills < kills:
        folder = output / f"killed_{result.runs}"
        _one_run(command, folder, kills, rng, result, log)
        found = compare(reference, folder)
        result.runs += 1
        result.equal_runs += not found
        result.differences += [f"{folder.name}: {text}" for text in found[:3]]
        if not found:
            shutil.rmtree(folder)
    return result


def _one_run(command: Sequence[str], folder: Path, kills: int, rng: random.Random, result: Result, log: Path) -> None:
    """Start, kill and start again until the command ends by itself."""
    while result.kills < kills:
        began = time.time()
        process = _start(command, folder, log)
        if rng.random() < 0.25:
            delay_s = rng.uniform(0.0, result.startup_s)
        else:
            _await_training(process, folder, began)
            delay_s = rng.uniform(0.0, (result.undisturbed_s - result.startup_s) / 3)
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result.kills += 1
            result.resumed_from.append(newest_step(folder))
            result.intact += 1
            print(f"kill {result.kills}: newest checkpoint is step {result.resumed_from[-1]}", file=sys.stderr)
            continue
        _finish(process, log)
        return
    _finish(_start(command, folder, log), log)


@options
class Options:
    """Options of the benchmark; behind them, after "--", the command that is killed, "{output}" for its folder.

    Args:
        command: the command that is killed.
        output: a new folder.
        kills: number of kill -9.
        seed: of the moments.
    """

    command: Annotated[tuple[str, ...], POSITIONAL]
    output: str
    kills: Count = 20
    seed: int = 0


def main(options: Options) -> int:
    """Kill and compare; prints one JSON object and returns 0 when all kills were survived, else 1."""
    output = Path(options.output)
    result = run(options.command, output, options.kills, options.seed)
    table = {**vars(result), "passed": result.passed()}
    (output / "faults.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table))
    return 0 if result.passed() else 1
