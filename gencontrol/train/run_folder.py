"""The run folder: lock, settings, metrics.jsonl, samples and final/; every replacement is atomic."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from gencontrol.config import RENAMED, dump_toml, load_toml
from gencontrol.errors import UsageError
from gencontrol.files import FileLayer, digest, disk_errors
from gencontrol.train.config import differences, flatten, is_harmless

#: A lock of another machine counts as dead when it was not touched for this long.
FOREIGN_LOCK_S = 600.0


def is_wall_clock(key: str) -> bool:
    """Whether a metric depends on the clock or machine, so that it may differ after a resume."""
    return key.startswith(("time/", "memory/")) or key == "samples/s"


class Lock:
    """One run per folder: a lock of the system on `.lock`, which ends with its process however that dies.

    Inside stand pid and host of the holder.  They name it in messages, and they count where a network file system keeps
    locks of the system to one machine: a file of another host that was touched lately is respected.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self._lock = FileLock(self.path)
        self._touched = 0.0

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            UsageError: another process holds it.
            DiskError: the folder is not writable.
        """
        with disk_errors("the lock file", self.path.parent):
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise self._taken() from None
            holder = self._holder()
            if len(holder) == 3 and holder[2] != socket.gethostname():
                if time.time() - self.path.stat().st_mtime < FOREIGN_LOCK_S:
                    self._lock.release()
                    raise self._taken()
            self.path.write_text(f"{os.getpid()} - {socket.gethostname()}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.path.exists():
            self.path.write_text("")
        self._lock.release()

    def _holder(self) -> list[str]:
        """Pid, "-" (older versions wrote a start time) and host; empty where nobody stands in the file."""
        try:
            return self.path.read_text(errors="replace").split()
        except OSError:  # Windows shows nobody a locked file
            return []

    def _taken(self) -> UsageError:
        pid, _, host = (self._holder() + ["?", "?", "?"])[:3]
        return UsageError(
            f"'{self.path.parent}' is in use by process {pid} on {host}; wait for it, stop it, or choose "
            "another --output folder."
        )

    def touch(self) -> None:
        """Show other machines that this run lives; at most every 20 s."""
        now = time.monotonic()
        if now - self._touched > 20 and self.path.exists():
            os.utime(self.path)
            self._touched = now


_LISTED = 6  # differences named in a refusal


def changed_settings(run_dir: Path, settings: Mapping[str, Any], allow: Sequence[str]) -> list[str]:
    """Compare with the run's config.toml, where there is one; returns lines about the differences that are allowed.

    A file of an earlier version is read with the names that its options have today.

    Raises:
        UsageError: a setting that alters the result differs (each with old and new value) and is not in `allow`.
    """
    path = run_dir / "config.toml"
    if not path.exists():
        return []
    found = differences(_named_as_today(load_toml(path)), json.loads(json.dumps(_without_none(settings))))
    serious = {key: pair for key, pair in found.items() if key not in allow and not is_harmless(key, settings)}
    if "run.algorithm" in serious:  # all options of the algorithm differ then, which helps nobody
        before, after = serious["run.algorithm"]
        raise UsageError(f"{run_dir} holds a run of {before}, this one is {after}; name another --output.")
    if serious:
        pairs = [f"{key} was {before!r}, now {after!r}" for key, (before, after) in serious.items()]
        rest = len(pairs) - _LISTED
        listed = "; ".join(pairs[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
        raise UsageError(
            f"{run_dir} was begun with other settings: {listed}. Name another --output, repeat the old options, or "
            f"give --allow-change {next(iter(serious))} for each."
        )
    return [f"{key} was {before!r}, now {after!r}" for key, (before, after) in found.items()]


def _named_as_today(table: Mapping[str, Any]) -> dict[str, Any]:
    """Options of [algorithm] under their present names; a name that is new and old at once keeps what it says."""
    section = table.get("algorithm", {})
    renamed = {RENAMED[key]: value for key, value in section.items() if key in RENAMED and RENAMED[key] not in section}
    kept = {key: value for key, value in section.items() if RENAMED.get(key) not in renamed}
    return {**table, "algorithm": kept | renamed} if renamed else dict(table)


def check_settings(run_dir: Path, settings: Mapping[str, Any], allow: Sequence[str], files: FileLayer) -> list[str]:
    """Compare as `changed_settings`, write config.toml, and return the lines.

    Raises:
        UsageError: as `changed_settings`.
    """
    notes = changed_settings(run_dir, settings, allow)
    files.replace_file(run_dir / "config.toml", dump_toml(_without_none(settings)).encode())
    return notes


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Return a hex digest of all settings, independent of their order."""
    return digest(flatten(settings), 16)


def finite_json(record: Mapping[str, Any]) -> str:
    """Return one line of strict JSON; non-finite numbers become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, allow_nan=False)


class MetricsFile:
    """metrics.jsonl: one object per step, appended a whole line at a time."""

    def __init__(self, path: Path, files: FileLayer) -> None:
        self.path, self.files = path, files

    def read(self) -> list[dict[str, Any]]:
        """Return the complete lines; a torn last line is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> bool:
        """Drop lines after `step` (and torn ones); returns whether the line of `step` is there."""
        rows = self.read()
        kept = [row for row in rows if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if self.path.exists() and text.encode() != self.path.read_bytes():
            self.files.replace_file(self.path, text.encode())
        return bool(kept) and kept[-1]["step"] == step

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line in a single write."""
        self.files.hook("append", self.path)
        with open(self.path, "ab", buffering=0) as file:
            file.write((finite_json(record) + "\n").encode())

    def sync(self) -> None:
        """Make the lines durable."""
        if self.path.exists():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())


def write_samples(run_dir: Path, step: int, metrics: Mapping[str, float], artefacts: Mapping[str, bytes]) -> Path:
    """Write samples/step_XXXXXXXX/ with metrics.json and the artefacts; returns the folder.

    Raises:
        ValueError: a name is a path, hidden, or metrics.json.
    """
    for name in artefacts:
        if not name or name != Path(name).name or "\\" in name or name.startswith(".") or name == "metrics.json":
            raise ValueError(f"evaluation artefact '{name}' is not a plain file name (metrics.json is taken)")
    files = FileLayer()
    target = run_dir / "samples" / f"step_{step:08d}"
    staged = target.with_name(f".tmp_{target.name}_{os.getpid()}")
    with disk_errors(f"samples of step {step}", target.parent):
        files.make_folder(staged)
        for name, data in artefacts.items():
            files.write(staged / name, data)
        files.write(staged / "metrics.json", (finite_json({"step": step, **metrics}) + "\n").encode())
        files.replace_folder(staged, target)
    return target


_LEFTOVER = re.compile(r"\.tmp_final|\.del_final_\d+|\.(tmp|del)_step_\d{8}_\d+")


def clean_leftovers(run_dir: Path, files: FileLayer) -> None:
    """Delete staging folders of final/ and samples/ that an interrupted process left; no other name is touched."""
    for folder in (run_dir, run_dir / "samples"):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                files.remove_tree(path)
    for path in run_dir.glob(".tmp_*"):
        if re.fullmatch(r"\.tmp_(metrics\.jsonl|config\.toml)_\d+", path.name) and not path.is_symlink():
            path.unlink()
