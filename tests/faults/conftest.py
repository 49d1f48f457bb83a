"""Fault tests write hundreds of small synced files; a folder in memory makes that quick where there is one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A new folder, in /dev/shm where that exists."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="gencontrol-test-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
