"""TensorBoard's content, and that no failure of a tracker or of the screen reaches the run (L1)."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import wave
import zlib
from pathlib import Path
from typing import Any

import pytest

from gencontrol.algorithms.base import Evaluation, StepContext
from gencontrol.train import tracking
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.training_toy import Toy

CONFIG = TrainConfig(steps=3, eval_every=3, track="tensorboard")


def a_wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(32))
    return buffer.getvalue()


def a_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


class Shown(Toy):
    def evaluate(self, ctx: StepContext) -> Evaluation:
        return Evaluation({"eval/square": 1.5}, {"a.wav": a_wav(), "b.png": a_png(), "c.json": b"{}"})


def test_tensorboard_gets_scalars_sound_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(CONFIG, tmp_path).fit(Shown())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e.step for e in events.Scalars("loss/total")] == [1, 2, 3]
    assert events.Scalars("loss/total")[2].value == pytest.approx(rows[3]["loss/total"], rel=1e-6)
    assert events.Audio("samples/a")[0].encoded_audio_string == a_wav()
    assert events.Images("samples/b")[-1].encoded_image_string == a_png()
    assert "samples/c" not in events.Tags()["images"]


def run_and_read(tmp_path: Path) -> list[dict[str, Any]]:
    Trainer(CONFIG, tmp_path).fit(Toy())
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_l1_failing_tracker_is_counted_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path, resume_step: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tracking, "_open_events", broken)
    assert len(run_and_read(tmp_path)) == 4
    said = capsys.readouterr().err
    assert said.count("warning: TensorBoard: No space left") == 1 and "dropped 4 records" in said


def test_l1_blocked_tracker_drops_and_does_not_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(tracking, "_open_events", lambda folder, step: gate.wait(30))
    tracker = tracking.TensorBoardTracker(tmp_path, 0, capacity=2)
    begin = time.monotonic()
    for step in range(50):
        tracker.log(step, {"x": 1.0}, {})
    assert time.monotonic() - begin < 1 and tracker.dropped >= 47
    gate.set()


def test_missing_tensorboard_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(tracking.open_tracker("tensorboard", tmp_path, 0), tracking.NoTracker)
    assert "pip install tensorboard" in capsys.readouterr().err


def test_lines_on_stderr_hold_the_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_and_read(tmp_path)
    said = capsys.readouterr()
    assert said.out == "" and "step 3/3 reward " in said.err and "\x1b" not in said.err


def test_bar_on_a_terminal_holds_the_reward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = tracking.Progress(10, visible=True)
    progress.start(0)
    progress.show(4, {"reward/mean": 0.25, "loss/total": 2.0})
    progress.close()
    said = capsys.readouterr().err
    assert "4/10" in said and "reward 0.25 loss 2" in said
