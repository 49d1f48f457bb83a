"""The thread pool: order, bounds, exceptions, hanging calls; and rewards that score one sample a call."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from gencontrol.errors import Preempted, UsageError
from gencontrol.rewards import Reward
from gencontrol.rewards.pool import bounded_map, counted, pooled
from gencontrol.types import RewardContext


def test_order_bounds_and_exceptions() -> None:
    """Later items finish first; at most three calls run at a time; exceptions stay with their items."""
    lock, running, most = threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02 * (12 - item) / 12)
        with lock:
            running -= 1
        if item % 5 == 4:
            raise ValueError(f"no {item}\nmore")
        return item * item

    outcomes = bounded_map(work, range(12), workers=3, timeout_s=5)
    assert [o.result for o in outcomes] == [None if i % 5 == 4 else i * i for i in range(12)]
    assert counted(outcomes) == {"ValueError: no 4": 1, "ValueError: no 9": 1} and most == 3
    assert bounded_map(work, [], workers=3, timeout_s=5) == []


def test_hanging_calls_are_given_up() -> None:
    """Two of six hang: the others are scored; when all hang, the end comes after two rounds at most."""
    free = threading.Event()

    def work(item: int) -> int:
        if item in hanging:
            free.wait(20)
        return item

    hanging = {0, 3}
    began = time.monotonic()
    outcomes = bounded_map(work, range(6), workers=3, timeout_s=0.3)
    assert [o.result for o in outcomes] == [None, 1, 2, None, 4, 5]
    assert outcomes[3].error == "no answer within 0.3 s" and time.monotonic() - began < 2
    hanging = set(range(100))
    began = time.monotonic()
    outcomes = bounded_map(work, range(100), workers=2, timeout_s=0.2)
    assert time.monotonic() - began < 2
    assert counted(outcomes) == {"no answer within 0.2 s": 2, "not tried: too many calls hang": 98} or (
        counted(outcomes)["no answer within 0.2 s"] == 3
    )
    free.set()


def test_poll_ends_the_wait() -> None:
    def stop() -> None:
        raise Preempted("stop")

    began = time.monotonic()
    with pytest.raises(Preempted):
        bounded_map(lambda _: time.sleep(5), range(3), workers=1, timeout_s=10, poll=stop)
    assert time.monotonic() - began < 2


def test_pooled_reward() -> None:
    """Sample, prompt and metadata belong together; None, exceptions and NaN are invalid, with reasons."""

    def judge(sample: torch.Tensor, context: RewardContext) -> float | None:
        assert context.prompts is not None and len(context.prompts) == 1
        label = context.metadata["label"][0]
        if label == 2:
            raise TimeoutError("judge is asleep")
        if label == 3:
            return None
        return float("nan") if label == 4 else float(sample.sum()) + len(context.prompts[0])

    reward = pooled(judge, workers=4)
    assert isinstance(reward, Reward) and reward.kind == "item" and reward.name == "judge"
    context = RewardContext(["p" * i for i in range(6)], metadata={"label": list(range(6))})
    x = torch.arange(12.0).view(6, 2)
    out = reward(x, context)
    assert out.valid.tolist() == [True, True, False, False, False, True]
    assert out.values[[0, 1, 5]].tolist() == [1.0, 6.0, 26.0]
    assert out.extras["reasons"] == {"TimeoutError: judge is asleep": 1}
    for options in ({"workers": 0}, {"timeout_s": 0}):
        with pytest.raises(UsageError):
            pooled(judge, **options)
