"""Signals in real processes and in every phase of a step; resume in a fresh process (R1, R2, G1, G3, G4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gencontrol.errors import Preempted
from gencontrol.testing.algorithm import assert_same_run
from gencontrol.train.signals import Interrupted, SignalGuard
from gencontrol.train.trainer import TrainConfig
from tests.helpers.shim import CONFIG, Forked, Shim, fit, in_child, limit_s, newest, wait_for_line
from tests.helpers.training_toy import Toy, main

ROOT = Path(__file__).parents[2]
SPARSE = TrainConfig(steps=4, save_every=100, keep=1, eval_every=2, micro_batch=4, lr=1e-3)


def test_g1_r1_sigterm_saves_exits_143_and_a_fresh_process_goes_on(tmp_path: Path) -> None:
    arguments = ["steps=30", "save_every=100", "delay_s=0.02", "micro_batch=4", "updates=2", "lr=0.001"]
    run = tmp_path / "run"
    child = Forked(lambda: main([str(run), *arguments]), log=tmp_path / "log")
    wait_for_line(run, 3)
    begin = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 143 and time.monotonic() - begin < limit_s()
    said = (tmp_path / "log").read_text()
    assert "run the same command to go on" in said and "Traceback" not in said
    state = newest(run)
    assert state is not None and 3 <= state.step < 30
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/helpers/training_toy.py"), str(run), *arguments]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=280, check=False)
    assert done.returncode == 0 and f"resumed from step {state.step} of 30" in done.stderr
    config = TrainConfig(steps=30, save_every=100, micro_batch=4, lr=1e-3)
    fit(tmp_path / "reference", config, toy=Toy(updates=2))
    assert_same_run(tmp_path / "reference", run, 30)


class Phase(Toy):
    """Sends SIGTERM to itself in one phase of the second step."""

    def __init__(self, phase: str, number: int = signal.SIGTERM, updates: int = 2) -> None:
        super().__init__(updates=updates)
        self.phase, self.number = phase, number

    def hit(self, phase: str, *, now: bool) -> None:
        if phase == self.phase and now:
            self.phase = ""
            os.kill(os.getpid(), self.number)

    def collect(self, ctx):  # type: ignore[no-untyped-def]
        self.hit("collect", now=ctx.step == 1)
        return super().collect(ctx)

    def minibatches(self, data, update, ctx):  # type: ignore[no-untyped-def]
        self.hit(f"update {update}", now=ctx.step == 1)
        return super().minibatches(data, update, ctx)

    def after_update(self, ctx, update):  # type: ignore[no-untyped-def]
        self.hit(f"after {update}", now=ctx.step == 1)
        super().after_update(ctx, update)

    def evaluate(self, ctx):  # type: ignore[no-untyped-def]
        self.hit("evaluate", now=ctx.step == 2)
        return super().evaluate(ctx)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    fit(folder, toy=Toy(updates=2))
    return folder


@pytest.mark.parametrize(
    ("phase", "saved"),
    [("collect", 1), ("update 0", 1), ("after 0", 1), ("update 1", 1), ("after 1", 2), ("evaluate", 2)],
)
def test_g1_signal_in_each_phase_saves_the_last_whole_step(
    reference: Path, tmp_path: Path, phase: str, saved: int
) -> None:
    with pytest.raises(Preempted) as caught:
        fit(tmp_path / "run", SPARSE, toy=Phase(phase))
    assert caught.value.exit_code == 143
    state = newest(tmp_path / "run")
    assert state is not None and state.step == saved
    fit(tmp_path / "run", SPARSE, toy=Toy(updates=2))
    assert_same_run(reference, tmp_path / "run", 4)


def test_g1_signal_after_the_only_update_finishes_the_step(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path / "run", SPARSE, toy=Phase("after 0", updates=1))
    state = newest(tmp_path / "run")
    assert state is not None and state.step == 2
    fit(tmp_path / "run", SPARSE)
    fit(tmp_path / "reference", SPARSE)
    assert_same_run(tmp_path / "reference", tmp_path / "run", 4)


def test_g1_signal_in_a_save_finishes_it(tmp_path: Path) -> None:
    counted = Shim()
    fit(tmp_path / "count", shim=counted)
    at = next(i for i, (op, p) in enumerate(counted.calls) if op == "rename" and p.name == "step_00000002")
    with pytest.raises(Preempted):
        fit(tmp_path / "run", shim=Shim(at, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    state = newest(tmp_path / "run")
    assert state is not None and state.step == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_g3_ctrl_c_and_usr1_save_too(tmp_path: Path, number: int, code: int) -> None:
    with pytest.raises(Preempted) as caught:
        fit(tmp_path / "run", toy=Phase("collect", number))
    assert caught.value.exit_code == code and isinstance(caught.value, Interrupted) == (code == 130)
    state = newest(tmp_path / "run")
    assert state is not None and state.step == 1


def test_g3_second_signal_exits_at_once_and_handlers_are_put_back(tmp_path: Path) -> None:
    def twice() -> None:
        with SignalGuard():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    assert in_child(twice) == 143
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path / "run", CONFIG)
    assert signal.getsignal(signal.SIGTERM) is before


def test_g4_forked_workers_have_the_default_behaviour() -> None:
    with SignalGuard() as guard:
        assert in_child(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5))) == 128 + signal.SIGTERM
        assert guard.pending is None
