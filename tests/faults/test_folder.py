"""The run folder: lock, other settings, fresh, finished, full or read-only disk, torn metrics (R6, S1–S3)."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from gencontrol.errors import DiskError, UsageError
from gencontrol.files import FileLayer
from gencontrol.testing.algorithm import assert_same_run, metric_lines
from gencontrol.train.run_folder import Lock, MetricsFile, write_samples
from gencontrol.train.trainer import Trainer
from tests.helpers.shim import CONFIG, Shim, fit, in_child
from tests.helpers.training_toy import Toy


def test_s3_second_run_is_refused_with_pid_and_host(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with Lock(run):

        def other() -> None:
            try:
                fit(run)
            except UsageError as error:
                (tmp_path / "said").write_text(str(error))
                raise

        assert in_child(other) == 1
    said = (tmp_path / "said").read_text()
    assert f"process {os.getpid()} on {os.uname().nodename}" in said
    fit(run)  # released


@pytest.mark.parametrize("holder", ["999999999 1 HOST", "PID 0 HOST", "garbage", "\x00\xff"])
def test_s3_stale_locks_are_taken_over(tmp_path: Path, holder: str) -> None:
    """A dead pid, a pid that now belongs to a younger process, and rubbish."""
    run = tmp_path / "run"
    run.mkdir()
    text = holder.replace("HOST", os.uname().nodename).replace("PID", str(os.getppid()))
    (run / ".lock").write_text(text)
    fit(run)
    assert (run / ".lock").read_text() == ""


def test_s3_lock_of_another_machine_counts_until_it_is_old(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text("1 1 another-machine")
    with pytest.raises(UsageError, match="in use by process 1 on another-machine"):
        fit(run)
    os.utime(run / ".lock", (0, 0))
    fit(run)


def test_r6_other_settings_are_listed_old_and_new(tmp_path: Path) -> None:
    fit(tmp_path, dataclasses.replace(CONFIG, steps=2))
    with pytest.raises(UsageError, match=r"train.lr was 0.001, now 0.002; train.seed was 0, now 1\.") as caught:
        fit(tmp_path, dataclasses.replace(CONFIG, steps=2, lr=2e-3, seed=1))
    assert caught.value.exit_code == 2
    changed = dataclasses.replace(CONFIG, steps=3, lr=2e-3, keep=7)
    done = Trainer(changed, tmp_path, allow=("train.lr",)).fit(Toy())
    assert done["step"] == 3 and done["metrics"]["lr"] == 2e-3


def test_r6_sections_of_the_command_line_are_compared(tmp_path: Path) -> None:
    settings = {"algorithm": {"name": "toy", "beta": 1.0, "layers": (1, 2), "unset": None}}
    Trainer(CONFIG, tmp_path, settings=settings).fit(Toy(), stop_at=1)
    Trainer(CONFIG, tmp_path, settings=settings).fit(Toy(), stop_at=2)
    settings["algorithm"]["beta"] = 2.0
    with pytest.raises(UsageError, match=r"algorithm.beta was 1.0, now 2.0"):
        Trainer(CONFIG, tmp_path, settings=settings).fit(Toy())


def test_steps_may_grow_only_where_the_learning_rate_does_not_use_them(tmp_path: Path) -> None:
    cosine = dataclasses.replace(CONFIG, lr_schedule="cosine", steps=2)
    fit(tmp_path, cosine)
    with pytest.raises(UsageError, match="train.steps was 2, now 4"):
        fit(tmp_path, dataclasses.replace(cosine, steps=4))


def test_longer_run_equals_one_run(tmp_path: Path) -> None:
    base = dataclasses.replace(CONFIG, eval_every=2)
    fit(tmp_path / "a", base)
    fit(tmp_path / "b", dataclasses.replace(base, steps=2))
    fit(tmp_path / "b", base)
    assert_same_run(tmp_path / "a", tmp_path / "b", CONFIG.steps)


def test_fresh_refuses_a_used_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        Trainer(CONFIG, tmp_path, fresh=True).fit(Toy())
    assert Trainer(CONFIG, tmp_path / "new", fresh=True).fit(Toy(), stop_at=1)["status"] == "stopped"


def test_finished_run_says_so_and_trains_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Trainer(CONFIG, tmp_path).fit(Toy())
    toy = Toy()
    again = Trainer(CONFIG, tmp_path).fit(toy)
    assert "finished: 4 of 4 steps" in capsys.readouterr().err
    assert again == first and toy.calls == 0 and again["metrics"]["eval/square"] > 0
    assert (tmp_path / "final/toy.json").is_file()


def test_lost_final_folder_is_written_again(tmp_path: Path) -> None:
    fit(tmp_path)
    (tmp_path / "final/toy.json").unlink()
    (tmp_path / "final").rmdir()
    fit(tmp_path)
    assert (tmp_path / "final/toy.json").is_file()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENAMETOOLONG])
def test_s2_unwritable_folder_fails_before_step_0(tmp_path: Path, code: int) -> None:
    def refuse(operation: str, path: Path) -> None:
        raise OSError(code, os.strerror(code))

    toy = Toy()
    with pytest.raises(DiskError) as caught:
        Trainer(CONFIG, tmp_path / "run", files=FileLayer(refuse)).fit(toy)
    assert toy.calls == 0 and caught.value.exit_code == 7 and "\n" not in str(caught.value)


def test_s1_small_disk_fails_before_step_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileLayer, "free_bytes", lambda self, path: 100)
    toy = Toy()
    with pytest.raises(DiskError, match="0 MB free; free some space first"):
        fit(tmp_path / "run", toy=toy)
    assert toy.calls == 0


def test_s1_free_space_is_checked_before_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileLayer, "free_bytes", lambda self, path: 500_000)  # more than the weights, less than 1 MB
    shim = Shim()
    with pytest.raises(DiskError, match="older checkpoints are intact"):
        fit(tmp_path / "run", shim=shim)
    assert not any(".tmp_step" in str(path) for _, path in shim.calls)


def test_metrics_file_rewinds_and_drops_torn_lines(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", FileLayer())
    for step in range(4):
        metrics.append({"step": step, "x": float("nan") if step == 2 else step / 3})
    with open(metrics.path, "a") as file:
        file.write('{"step": 4, "x"')
    assert not metrics.rewind(5)
    assert [row["step"] for row in metrics.read()] == [0, 1, 2, 3]
    assert metrics.rewind(2) and metrics.read()[-1] == {"step": 2, "x": None}
    assert all(json.loads(line) for line in metrics.path.read_text().splitlines())
    metrics.append({"step": 3, "x": 1})
    assert [row["step"] for row in metrics.read()] == [0, 1, 2, 3]


def test_one_line_per_step_with_the_agreed_names(tmp_path: Path) -> None:
    fit(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    wanted = {"loss/total", "loss/square", "reward/mean", "grad_norm", "lr", "time/wall", "time/collect", "time/update"}
    assert all(wanted | {"samples/s", "memory/peak_mb"} <= row.keys() for row in rows[1:])
    assert [row["step"] for row in metric_lines(tmp_path) if "eval/square" in row] == [0, 2, 4]
    assert [row["items"] for row in rows[1:]] == [8, 16, 24, 32]


def test_samples_are_written_and_names_checked(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    folder = tmp_path / "run/samples/step_00000002"
    assert json.loads((folder / "metrics.json").read_text())["step"] == 2
    assert (folder / "points.json").read_bytes() == b"[]"
    for name in ("../x", "a/b", ".x", "metrics.json", "", "a\\b"):
        with pytest.raises(ValueError, match="not a plain file name"):
            write_samples(tmp_path, 1, {}, {name: b""})
    write_samples(tmp_path, 1, {"a": 1.0}, {"x.wav": b"1"})
    write_samples(tmp_path, 1, {"a": 2.0}, {})
    assert sorted(p.name for p in (tmp_path / "samples/step_00000001").iterdir()) == ["metrics.json"]
