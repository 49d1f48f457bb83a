"""Helpers of the fault tests: a file layer that kills or fails at its n-th call, and children made by fork."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch._dynamo  # noqa: F401  # the first optimizer imports it; once here, not in every child

from gencontrol.files import FileLayer
from gencontrol.train.checkpoint import Checkpoints, TrainState
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.training_toy import Toy

CONFIG = TrainConfig(steps=4, save_every=1, keep=1, eval_every=2, micro_batch=4, lr=1e-3)


class Shim:
    """A hook for `FileLayer`: remembers all calls; at number `at` it leaves half a file behind and calls `act`."""

    def __init__(self, at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.at, self.act = at, act
        self.calls: list[tuple[str, Path]] = []

    def __call__(self, operation: str, path: Path) -> None:
        self.calls.append((operation, path))
        if len(self.calls) - 1 == self.at:
            if operation == "write":
                path.write_bytes(b"half a fi")
            elif operation == "append":
                with open(path, "ab") as file:
                    file.write(b'{"step": 1, "loss/to')
            self.act()


def kill_self() -> None:
    """What a power cut or the kernel's memory killer does to a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: Path, config: TrainConfig = CONFIG, shim: Shim | None = None, toy: Toy | None = None) -> Toy:
    """Train the toy in a folder, quietly; returns it."""
    toy = toy or Toy()
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        Trainer(config, folder, files=FileLayer(shim or Shim())).fit(toy)
    return toy


class Forked:
    """As much of Popen as the tests need, by fork: it saves an import of torch per start.

    Args:
        work: runs in the child, whose exit code is what it returns (None = 0), or 1 after an exception.
        environment: added in the child.
        log: file that gets the child's stderr.
    """

    def __init__(
        self, work: Callable[[], object], environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.environ.update(environment or {})
                if log is not None:
                    sys.stderr = open(log, "w", buffering=1)  # lives as long as the child
                code = int(work() or 0)  # type: ignore[call-overload]
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """Exit code, negative for a signal as in Popen; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 200.0) -> int:
        """Wait for the exit code."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("child", timeout)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the child."""
        os.kill(self.pid, number)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child and return its exit status as a shell would (137 = killed)."""
    code = Forked(lambda: (work(), 0)[1]).wait()
    return code if code >= 0 else 128 - code


def limit_s() -> float:
    """The promised 10 s, longer where other programs hold the processors."""
    return 10 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def wait_for_line(run_dir: Path, number: int) -> None:
    """Wait until metrics.jsonl has so many lines."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= number:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


def newest(folder: Path) -> TrainState | None:
    """Load the newest intact checkpoint of a run folder."""
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        return Checkpoints(folder / "checkpoints", 1).load_newest()


def hidden(folder: Path) -> list[str]:
    """Names of staging and doomed folders or files anywhere in a run folder."""
    return sorted(p.name for p in folder.rglob(".*") if p.name != ".lock")
