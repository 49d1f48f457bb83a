"""The one thread of a reward server that scores (a device does one thing at a time), and the bounded queue before it.

Requests that wait together may be merged into one call of the reward.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.base import Reward, checked
from gencontrol.types import RewardContext, RewardOut


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Args:
        max_bytes: of one request's body.
        connections: at once; more are refused with 503.
        waiting: requests in the queue; more are refused with 503.
        read_s: seconds in which a request must have arrived whole.
        score_s: seconds after which a request that was not scored is given up with 503.
        merge: samples up to which waiting requests are scored in one call; 0 never merges.  Only for rewards whose
            value of a sample does not depend on the others in the batch.
    """

    max_bytes: int = 64 * 2**20
    connections: int = 32
    waiting: int = 64
    read_s: float = 60.0
    score_s: float = 600.0
    merge: int = 0

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.connections, self.waiting) < 1 or self.merge < 0:
            raise UsageError("max_bytes, connections and waiting are at least 1, merge is not negative.")
        if min(self.read_s, self.score_s) <= 0:
            raise UsageError("read_s and score_s are positive numbers of seconds.")


@dataclass
class _Job:
    """Samples that wait for their scores."""

    samples: Tensor
    context: RewardContext
    answer: Future[RewardOut] = field(default_factory=Future)

    def fits(self, other: _Job) -> bool:
        """Whether both can be scored in one call."""
        mine, its = self.context, other.context
        return (
            self.samples.shape[1:] == other.samples.shape[1:]
            and (mine.prompts is None) == (its.prompts is None)
            and mine.sampling_rate == its.sampling_rate
            and mine.metadata.keys() == its.metadata.keys()
        )


def _merged(jobs: list[_Job]) -> _Job:
    """One job of several that fit."""
    first = jobs[0].context
    prompts = None if first.prompts is None else [p for job in jobs for p in job.context.prompts or ()]
    metadata = {key: [v for job in jobs for v in job.context.metadata[key]] for key in first.metadata}
    return _Job(torch.cat([job.samples for job in jobs]), RewardContext(prompts, first.sampling_rate, metadata))


class ScoreQueue:
    """The one thread that calls the reward, and the queue before it."""

    def __init__(self, reward: Reward, limits: Limits) -> None:
        """Start the thread; it ends with the process."""
        self._reward, self._limits = reward, limits
        self._jobs: queue.Queue[_Job] = queue.Queue(limits.waiting)
        self._kept: _Job | None = None  # taken from the queue, did not fit the last call
        threading.Thread(target=self._loop, daemon=True).start()

    def score(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """Scores of samples; waits for the thread.

        Raises:
            queue.Full: too many requests wait.
            TimeoutError: not scored within `score_s`.
            Exception: what the reward raised.
        """
        job = _Job(samples, context)
        self._jobs.put_nowait(job)
        try:
            return job.answer.result(self._limits.score_s)
        except WaitedTooLong:
            job.answer.cancel()
            raise

    def _loop(self) -> None:
        while True:
            jobs = [job for job in self._take() if job.answer.set_running_or_notify_cancel()]
            if len(jobs) > 1 and self._try(jobs):
                continue
            for job in jobs:  # alone, so that one bad request does not fail its neighbours
                self._single(job)

    def _take(self) -> list[_Job]:
        """The next job, and those behind it that fit into one call."""
        jobs = [self._kept or self._jobs.get()]
        self._kept = None
        count = len(jobs[0].samples)
        while count < self._limits.merge:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if not jobs[0].fits(job) or count + len(job.samples) > self._limits.merge:
                self._kept = job
                break
            jobs.append(job)
            count += len(job.samples)
        return jobs

    def _call(self, job: _Job) -> RewardOut:
        with torch.no_grad():
            return checked(self._reward.name, self._reward(job.samples, job.context), len(job.samples))

    def _try(self, jobs: list[_Job]) -> bool:
        """Score jobs in one call; False where that raised."""
        try:
            out = self._call(_merged(jobs))
        except Exception:
            return False
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job.samples))
            job.answer.set_result(RewardOut(out.values[rows], out.valid[rows]))
            start = rows.stop
        return True

    def _single(self, job: _Job) -> None:
        try:
            job.answer.set_result(self._call(job))
        except Exception as error:  # belongs to the request that asked
            job.answer.set_exception(error)
