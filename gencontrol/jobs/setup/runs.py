"""The run folder: whether it may be used, what is recorded in it, and the training itself."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol._version import __version__
from gencontrol.errors import CheckpointError, DiskError, Preempted, UsageError
from gencontrol.files import FileLayer
from gencontrol.jobs.setup.settings import check_output
from gencontrol.weights import BUNDLED

if TYPE_CHECKING:
    from gencontrol.train.config import TrainConfig
    from gencontrol.train.trainer import Trainer

CONFIG, RECORD = "config.toml", "run.json"

#: options of [run] that may change between two commands on one folder: they cannot alter what is learned
HARMLESS = ("run.output", "run.online", "run.cache")


@dataclass(frozen=True)
class RunFolder:
    """A checked run folder.

    Args:
        path: the folder.
        table: the merged configuration, as nested plain values.
        allow: dotted keys that may differ from what the folder recorded.
        notes: differences to what the folder recorded before that are allowed, for people.
    """

    path: Path
    table: Mapping[str, Mapping[str, Any]]
    allow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_run(
    output: str,
    table: Mapping[str, Mapping[str, Any]],
    *,
    mode: str = "auto",
    allow: Sequence[str] = (),
) -> RunFolder:
    """Check a run folder against the configuration; writes nothing.

    Args:
        output: the folder, which may not exist yet.
        table: merged configuration.
        mode: "auto" resumes where there is something to resume, "fresh" refuses a used folder, "resume" an unused one.
        allow: dotted keys that may differ from what the folder recorded.

    Raises:
        UsageError: the folder is used with another configuration, or against the mode.
        CheckpointError: mode "resume" without a checkpoint.
    """
    path = check_output(output)
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    used = any(name in entries for name in (CONFIG, RECORD, "metrics.jsonl", "checkpoints"))
    if mode == "fresh" and entries:
        raise UsageError(f"--fresh: {path} is not empty; name another --output, or leave --fresh out to go on there.")
    if mode == "resume" and not any(path.glob("checkpoints/step_*")):
        raise CheckpointError(f"--resume: {path} holds no checkpoint; check --output, or leave --resume out to start.")
    if entries and not used:
        raise UsageError(f"{path} holds other files ({', '.join(sorted(entries)[:3])}); name a new or a run folder.")
    _check_writable(path)
    allowed = (*HARMLESS, *(key.replace("-", "_") for key in allow))
    from gencontrol.train.run_folder import changed_settings

    return RunFolder(path, table, allowed, tuple(changed_settings(path, table, allowed)))


def _check_writable(path: Path) -> None:
    """Raise DiskError where the folder, or the nearest one above it that exists, cannot be written."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DiskError(f"{existing} cannot be written; choose another --output or mend the permission.")


def record(run: RunFolder, extra: Mapping[str, Any]) -> None:
    """Write run.json (`extra`, and per start the step, command line, versions, commit, device) into the folder."""
    from gencontrol.train.checkpoint import Checkpoints

    run.path.mkdir(parents=True, exist_ok=True)
    file = run.path / RECORD
    start = {"step": max(Checkpoints(run.path / "checkpoints", keep=1).steps(), default=0), **environment()}
    text = json.dumps({**extra, "starts": [*_read_starts(file), start]}, indent=1, ensure_ascii=False) + "\n"
    FileLayer().replace_file(file, text.encode())


def _read_starts(file: Path) -> list[Any]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # absent or damaged: the record starts anew; nothing depends on it


def environment() -> dict[str, Any]:
    """Return the command line, versions, git commit and devices of this process."""
    versions = {"gencontrol": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "diffusers", "transformers", "peft", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "command": shlex.join(["gencontrol", *sys.argv[1:]]),
        "versions": versions,
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device_name(),
    }


def _device_name() -> str:
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Commit of the source checkout that runs, or None for an installed package."""
    root = BUNDLED.parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@contextmanager
def running(run: RunFolder, train: TrainConfig, facts: Mapping[str, Any]) -> Iterator[Trainer]:
    """Record the start and hand out the Trainer; after the block write the card and report.html.

    A context and not a call, so that one frame less lies between the job and the loss.
    """
    from gencontrol.reports.card import write_card
    from gencontrol.reports.data import about
    from gencontrol.reports.run import write_report
    from gencontrol.train.trainer import Trainer

    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        settings = run.table.get("run", {})
        name = str(settings.get("algorithm") or settings.get("stage", ""))
        record(run, {"about": about(name, settings.get("reward", ())), **facts})
    others = {section: values for section, values in run.table.items() if section != "train"}
    try:
        yield Trainer(train, run.path, settings=others, allow=run.allow)
    except Preempted:
        if first:
            write_report(run.path)
        raise
    if first:
        write_card(run.path)
        print(f"model:  {run.path / 'final'}\nreport: {write_report(run.path)}")
