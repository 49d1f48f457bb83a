"""The file layer: every durable change on disk passes here, so that tests can fail or kill at each call; and digests.

Write protocol (docs/guarantees.md#write-protocol): files are written into a `.tmp_…` folder and synced, the folder is
synced and renamed, its parent is synced; deletion renames to `.del_…` first.  A crash anywhere leaves the old or new
state.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gencontrol.errors import DiskError, UsageError, nearest

#: Called with (operation, path) before each operation; tests raise or kill in it.
Hook = Callable[[str, Path], None]


def _nothing(operation: str, path: Path) -> None:
    """The default hook."""


class FileLayer:
    """Durable file operations; `hook(operation, path)` runs before each of them."""

    def __init__(self, hook: Hook = _nothing) -> None:
        self.hook = hook

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the file system of `path`."""
        self.hook("free", path)
        return shutil.disk_usage(path).free

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents; an existing one is kept."""
        self.hook("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> str:
        """Write and fsync a file; returns the sha256 of `data`."""
        self.hook("write", path)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            self.hook("fsync", path)
            os.fsync(file.fileno())
        return hashlib.sha256(data).hexdigest()

    def sync_folder(self, path: Path) -> None:
        """Make names in a folder durable."""
        self.hook("fsync-folder", path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_tree(self, path: Path) -> None:
        """Make all files below a folder durable (files that other libraries wrote)."""
        for folder, _, names in os.walk(path):
            for name in names:
                self.hook("fsync", Path(folder, name))
                with open(Path(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            self.sync_folder(Path(folder))

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically; a file replaces a file, a folder must be new."""
        self.hook("rename", target)
        os.replace(source, target)

    def remove_tree(self, path: Path) -> None:
        """Delete a folder file by file."""
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink():
                self.remove_tree(child)
            else:
                self.hook("unlink", child)
                child.unlink()
        self.hook("rmdir", path)
        path.rmdir()

    def replace_file(self, path: Path, data: bytes) -> None:
        """Replace one file atomically."""
        staged = path.with_name(f".tmp_{path.name}_{os.getpid()}")
        self.write(staged, data)
        self.rename(staged, path)
        self.sync_folder(path.parent)

    def replace_folder(self, staged: Path, target: Path) -> None:
        """Move a finished folder to `target`; what lay there is moved to `.del_…` first and then deleted."""
        self.sync_folder(staged)
        if target.exists():
            self.discard(target, staged)
        else:
            self.rename(staged, target)
            self.sync_folder(target.parent)

    def discard(self, path: Path, successor: Path | None = None) -> None:
        """Delete a folder by renaming it first; `successor` takes its name in between."""
        doomed = path.with_name(f".del_{path.name}_{os.getpid()}")
        if doomed.exists():
            self.remove_tree(doomed)
        self.rename(path, doomed)
        if successor is not None:
            self.rename(successor, path)
        self.sync_folder(path.parent)
        self.remove_tree(doomed)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new sibling to write a file or folder to; it takes the name `path` when the block ends well, else it goes.

    The sibling keeps the suffix of `path`, by which some libraries choose what they write.  Text and bytes that are in
    memory are written by `FileLayer().replace_file`.
    """
    files = FileLayer()
    staged = path.with_name(f".tmp_{path.stem}_{os.getpid()}{path.suffix}")
    files.make_folder(path.parent)
    try:
        yield staged
        if staged.is_dir():
            files.sync_tree(staged)
            if path.is_file():
                path.unlink()
            files.replace_folder(staged, path)
        else:
            with open(staged, "rb") as file:
                os.fsync(file.fileno())
            if path.is_dir():
                files.discard(path)
            files.rename(staged, path)
            files.sync_folder(path.parent)
    finally:
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink(missing_ok=True)


def existing(path: str | Path) -> Path:
    """Return a folder's path, `~` resolved.

    Raises:
        UsageError: there is none; the message names the nearest name beside it.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        names = [child.name for child in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UsageError(f"there is no folder '{place}'.{nearest(place.name, names)}")
    return place


def digest(value: Any, digits: int = 64) -> str:
    """Hexadecimal digits that change with a JSON value (of anything else its `str` counts), not with the order of keys.

    Run folders, caches and checkpoints store such digests: what this returns for a value must never change.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def feed(state: Any, arrays: Mapping[str, Any]) -> Any:
    """Update a hash of `hashlib` with the names and bytes of tensors or arrays, sorted by name; returns the hash."""
    import numpy as np
    import torch

    for name, value in sorted(arrays.items()):
        state.update(name.encode())
        if isinstance(value, torch.Tensor):  # bytes by a view: numpy does not know bfloat16
            value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        state.update(np.ascontiguousarray(value).tobytes())
    return state


def disk_error(error: OSError, what: str, where: Path) -> DiskError:
    """Return the one-line DiskError for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"the disk is full: {what} in '{where}' was not written; earlier files are intact. Free some space and run "
            "the same command to resume."
        )
    return DiskError(f"{what} in '{where}' could not be written: {error.strerror or error}; make the folder writable.")


@contextmanager
def disk_errors(what: str, where: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a DiskError about `what` in `where`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, what, where) from error
