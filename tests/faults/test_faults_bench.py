"""The benchmark `gencontrol.bench.faults`: passes a sound run, and finds fault with one that forgets its state."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gencontrol.bench import faults
from gencontrol.cli import main
from gencontrol.errors import UsageError
from tests.helpers.shim import CONFIG, Forked, fit
from tests.helpers.training_toy import Toy


class Forgetful(Toy):
    """Does not restore its drift."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]


def use(monkeypatch: pytest.MonkeyPatch, kind: type[Toy]) -> None:
    def start(command: Sequence[str], run_dir: Path, log: Path) -> Forked:
        return Forked(lambda: fit(run_dir, CONFIG, toy=kind(delay_s=0.03)) and 0)

    monkeypatch.setattr(faults, "_start", start)


def test_a_sound_run_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Toy)
    code = main(["bench", "faults", "--kills", "3", "--output", str(tmp_path / "out"), "--", "toy", "{output}"])
    table = json.loads(capsys.readouterr().out)
    assert code == 0 and table["passed"] and table["kills"] == table["intact"] == 3
    assert json.loads((tmp_path / "out/faults.json").read_text()) == table


def test_a_forgetful_run_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Forgetful)
    result = faults.Result(undisturbed_s=0.2)
    fit(tmp_path / "a")
    with_kill = tmp_path / "b"
    process = faults._start([], with_kill, tmp_path / "log")
    while not (with_kill / "checkpoints/step_00000002").exists():
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    fit(with_kill, toy=Forgetful())
    assert "algorithm.safetensors differs" in faults.compare(tmp_path / "a", with_kill)
    assert result.passed() and not faults.Result(kills=1).passed()


def test_usage_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must hold {output}"):
        faults.run(["gencontrol", "finetune"], tmp_path / "new", 1, 0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        faults.run(["x", "{output}"], tmp_path, 1, 0)
