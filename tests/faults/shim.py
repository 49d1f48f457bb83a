"""Helpers of the fault tests: a file layer that kills or fails at its n-th call, and children made by fork."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401  # the first optimizer imports it; once here, not in every child

from gencontrol.train.checkpoint import Checkpoints, TrainState
from gencontrol.train.files import FileLayer
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.training_toy import Toy

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


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child and return its exit status as a shell would (137 = killed)."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) % 256 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def newest(folder: Path) -> TrainState | None:
    """Load the newest intact checkpoint of a run folder."""
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        return Checkpoints(folder / "checkpoints", 1).load_newest()


def hidden(folder: Path) -> list[str]:
    """Names of staging and doomed folders or files anywhere in a run folder."""
    return sorted(p.name for p in folder.rglob(".*") if p.name != ".lock")
