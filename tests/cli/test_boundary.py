"""Every kind of exception becomes one line and the exit code of docs/guarantees.md#exit-codes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gencontrol import errors
from gencontrol.cli import app, main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.UsageError("bad; do x."), 2, "do x"),
        (errors.CheckpointError("none"), 3, "none"),
        (errors.NumericsError("nan"), 4, "nan"),
        (errors.RewardError("reward"), 5, "reward"),
        (errors.EnvironmentMissing("pip install x"), 6, "pip install x"),
        (errors.DiskError("full"), 7, "full"),
        (errors.Preempted("saved"), 143, "saved"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 7, "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 7, "permission"),
        (KeyboardInterrupt(), 130, "same command"),
        (MemoryError(), 6, "--micro-batch"),
        (RuntimeError("CUDA out of memory. Tried"), 6, "--micro-batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 6, "--micro-batch"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 6, "gencontrol doctor"),
        (ValueError("oops\nmore"), 1, "GENCONTROL_DEBUG=1"),
    ],
)
def test_exceptions(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(_run_dir: str) -> Path:
        raise error

    monkeypatch.setattr("gencontrol.reports.run.write_report", fail)
    assert main(["report", str(tmp_path)]) == code
    line = capsys.readouterr().err
    assert line.startswith("gencontrol: error: ")
    assert line.count("\n") == 1
    assert text in line


def test_exit_codes_of_all_error_classes_are_distinct() -> None:
    codes = [
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.GencontrolError)
    ]
    assert sorted(codes) == [1, 2, 3, 4, 5, 6, 7, 8, 143]


def test_system_exit_passes() -> None:
    assert app.explain(SystemExit(5)) == 5
