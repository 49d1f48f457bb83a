"""Kill -9 at every call of the file layer and at random moments; failing saves (K1, K2, K4, K5)."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from gencontrol.errors import DiskError
from gencontrol.testing.algorithm import assert_same_run
from tests.helpers.shim import CONFIG, Forked, Shim, fit, hidden, in_child, kill_self, newest
from tests.helpers.training_toy import Toy

SHORT = dataclasses.replace(CONFIG, steps=2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    fit(folder)
    return folder


def kill_points(folder: Path) -> list[int]:
    """All calls of a run of two steps: start, two saves, the pruning of the first, metrics, final/."""
    shim = Shim()
    fit(folder, SHORT, shim=shim)
    return list(range(len(shim.calls)))


def test_k1_kill_at_every_file_call_then_resume_is_bit_equal(tmp_path: Path) -> None:
    reference = tmp_path / "count"
    points = kill_points(reference)
    assert len(points) > 60
    saved_before = 0
    for point in points:
        folder = tmp_path / f"kill{point}"
        assert in_child(lambda f=folder, p=point: fit(f, SHORT, shim=Shim(p, kill_self))) == 137, point
        state = newest(folder)  # raises when a checkpoint was damaged
        step = 0 if state is None else state.step
        assert step >= saved_before, "an older checkpoint than at an earlier kill point: pruned too soon"
        saved_before = step
        fit(folder, SHORT)
        assert hidden(folder) == [], point
        assert_same_run(reference, folder, SHORT.steps)
    assert saved_before == SHORT.steps


def test_k2_kills_at_random_moments(reference: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    for attempt in range(3):
        folder = tmp_path / f"run{attempt}"
        child = Forked(lambda f=folder: fit(f, toy=Toy(delay_s=0.02)) and 0)
        time.sleep(rng.uniform(0.02, 0.2))
        child.send_signal(signal.SIGKILL)
        assert child.wait() in (0, -signal.SIGKILL)
        fit(folder)
        assert_same_run(reference, folder, CONFIG.steps)


def test_order_of_calls_is_safe_against_power_loss(tmp_path: Path) -> None:
    """kill -9 keeps the page cache, so the order of fsync and rename is asserted itself."""
    shim = Shim()
    fit(tmp_path / "run", SHORT, shim=shim)
    place = {(op, path.name): number for number, (op, path) in enumerate(shim.calls)}
    renamed = place["rename", "step_00000002"]
    staged = [(number, op, path) for number, (op, path) in enumerate(shim.calls) if ".tmp_step_00000002" in str(path)]
    written = [path.name for _, op, path in staged if op == "write"]
    synced = [path.name for _, op, path in staged if op == "fsync"]
    assert written == synced and len(written) == 7 and written[-1] == "manifest.json"
    assert [op for _, op, _ in staged][-1] == "fsync-folder" and staged[-1][0] < renamed
    assert shim.calls[renamed + 1][0] == "fsync-folder" and shim.calls[renamed + 1][1].name == "checkpoints"
    assert place["rename", ".del_step_00000001_" + str(os.getpid())] > renamed + 1
    final = [op for op, path in shim.calls if "final" in str(path)]
    assert final[-3:] == ["fsync-folder", "fsync-folder", "rename"] and "fsync" in final


def test_k4_leftovers_are_cleaned_and_foreign_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(folder)
    for name in (".tmp_step_00000009_123", ".del_step_00000001_9", ".tmp_mine", "notes"):
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "file").write_text("x")
    fit(folder)
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert left == [".tmp_mine", "notes", "step_00000004"]


@pytest.mark.parametrize("operation", ["write", "fsync", "rename", "mkdir", "fsync-folder"])
def test_k5_s1_failing_save_keeps_the_old_checkpoint(tmp_path: Path, operation: str) -> None:
    """With keep = 1 and a disk that fills up in the second save, the first one stays and no staging is left."""
    counted = Shim()
    fit(tmp_path / "count", shim=counted)
    at = next(i for i, (op, path) in enumerate(counted.calls) if op == operation and "step_00000002" in str(path))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "run"
    with pytest.raises(DiskError, match="disk is full") as caught:
        fit(folder, shim=Shim(at, full))
    assert caught.value.exit_code == 7 and "\n" not in str(caught.value)
    state = newest(folder)
    assert state is not None and state.step >= 1
    assert [p for p in hidden(folder) if p.startswith(".tmp")] == []
    fit(folder)
    assert_same_run(tmp_path / "count", folder, CONFIG.steps)
