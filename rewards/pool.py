"""Slow calls side by side: a bounded pool of threads with a limit per call, and rewards that score one sample a call.

Python cannot stop a thread, so a call that hangs is given up: its item is invalid, its thread is a daemon, and its
place is taken by a fresh one; after as many given-up calls as there are workers, the rest of the batch is given up too.
So a batch of n items takes at most (n / workers + 1) · timeout, whatever the calls do.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from gencontrol.errors import UsageError
from gencontrol.rewards.base import checked
from gencontrol.types import RewardContext, RewardOut

Item = TypeVar("Item")
Result = TypeVar("Result")
_POLL_S = 0.25


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """Result of one call, or the reason why there is none."""

    result: Result | None = None
    error: str = ""


class _Run(Generic[Item, Result]):
    """One batch: what is waiting, running since when, and done; every field is guarded by `changed`."""

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item], timeout_s: float) -> None:
        self._work, self._items, self._timeout_s = work, items, timeout_s
        self._changed = threading.Condition()
        self._done: dict[int, Outcome[Result]] = {}
        self._started: dict[int, float] = {}
        self._next = 0

    def start(self) -> None:
        """Add a worker."""
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        while True:
            with self._changed:
                if self._next >= len(self._items):
                    return
                index, self._next = self._next, self._next + 1
                self._started[index] = time.monotonic()
                self._changed.notify()
            try:
                outcome = Outcome(self._work(self._items[index]))
            except Exception as error:  # the reason goes to the caller; a worker must live on
                outcome = Outcome[Result](error=f"{type(error).__name__}: {error}".splitlines()[0])
            with self._changed:
                if index in self._done:  # given up meanwhile: a fresh worker has this one's place
                    return
                self._done[index] = outcome
                self._changed.notify()

    def wait(self, patience: int, poll: Callable[[], None] | None) -> list[Outcome[Result]]:
        """Wait for all items; `patience` calls may hang before the waiting items are given up."""
        with self._changed:
            try:
                while len(self._done) < len(self._items):
                    running = [at for index, at in self._started.items() if index not in self._done]
                    now = time.monotonic()
                    left = max(0.0, min(running, default=now) + self._timeout_s - now)
                    self._changed.wait(left if poll is None else min(left, _POLL_S))
                    if poll is not None:
                        poll()
                    patience = self._give_up(patience)
            finally:
                self._next = len(self._items)  # after an interrupt nothing further starts
        return [self._done[index] for index in range(len(self._items))]

    def _give_up(self, patience: int) -> int:
        """Mark the calls that are over their time, replace their workers; returns the patience left."""
        now = time.monotonic()
        for index, at in self._started.items():
            if index in self._done or now - at < self._timeout_s:
                continue
            self._done[index] = Outcome(error=f"no answer within {self._timeout_s:g} s")
            patience -= 1
            if patience > 0:
                self.start()
        if patience <= 0:
            for index in range(self._next, len(self._items)):
                self._done[index] = Outcome(error="not tried: too many calls hang")
            self._next = len(self._items)
        return patience


def bounded_map(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    timeout_s: float,
    poll: Callable[[], None] | None = None,
) -> list[Outcome[Result]]:
    """Call `work` on every item in at most `workers` threads; outcomes in the order of the items.

    Args:
        timeout_s: seconds for one call.
        poll: called a few times a second while waiting; what it raises ends the wait.

    Raises:
        UsageError: workers below 1, or a timeout that is not positive.
    """
    if workers < 1 or not timeout_s > 0:
        raise UsageError(f"workers is at least 1 and timeout_s positive, not {workers} and {timeout_s}.")
    run = _Run(work, items, timeout_s)
    for _ in range(min(workers, len(items))):
        run.start()
    return run.wait(workers, poll)


def counted(outcomes: Sequence[Outcome[Any]]) -> dict[str, int]:
    """How often each reason occurs."""
    return dict(Counter(outcome.error for outcome in outcomes if outcome.error))


@dataclass(frozen=True)
class PooledReward:
    """Item reward that scores sample by sample in threads; what raises, hangs or returns None is invalid.

    Args:
        call: (sample, context of that sample) → number, or None where it cannot score.
        name: for messages and metrics.
        workers: threads, that is calls at a time.
        timeout_s: seconds for one call.
    """

    call: Callable[[Any, RewardContext], float | None]
    name: str
    workers: int = 8
    timeout_s: float = 60.0
    kind: ClassVar[Literal["item", "set"]] = "item"
    differentiable = False

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """Score; `extras["reasons"]` counts why samples are invalid."""
        outcomes = bounded_map(
            lambda row: self.call(samples[row], context.rows([row])),
            range(len(samples)),
            workers=self.workers,
            timeout_s=self.timeout_s,
            poll=context.poll,
        )
        out = checked(self.name, [outcome.result for outcome in outcomes], len(outcomes))
        return RewardOut(out.values, out.valid, {"reasons": counted(outcomes)})


def pooled(
    call: Callable[[Any, RewardContext], float | None],
    *,
    name: str | None = None,
    workers: int = 8,
    timeout_s: float = 60.0,
) -> PooledReward:
    """Return a function of one sample and its context as a reward that runs it in threads.

    For rewards that wait (a judge behind an API, a program, a file); pure Python arithmetic gains nothing.
    Example: `reward = pooled(ask_judge, workers=16)` in judge.py, then `--reward judge:reward`.

    Raises:
        UsageError: values out of range.
    """
    if workers < 1 or not timeout_s > 0:
        raise UsageError(f"workers is at least 1 and timeout_s positive, not {workers} and {timeout_s}.")
    return PooledReward(call, name or call.__name__, workers, timeout_s)
