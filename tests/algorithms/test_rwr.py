"""Reward-weighted regression: weights, the loss, the Trainer's contract, set rewards by influence."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.matching.rwr import RewardWeightedRegression, RwrConfig, softmax_weights
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.models.roles import Roles
from gencontrol.rewards.base import InfluenceAsItem
from gencontrol.rng import stream
from gencontrol.testing.algorithm import AlgorithmContract
from tests.helpers.dragon_worlds import FirstAxis, Share, make_task

CTX = StepContext(seed=0, step=0, micro_batch=1000)


def make_rwr(reward: Any = None, **options: Any) -> RewardWeightedRegression:
    small = {"prompts_per_round": 6, "updates_per_round": 2, "demo_steps": 4, "eval_steps": 4}
    task, config = make_task(), RwrConfig(**(small | options))
    return RewardWeightedRegression(task, reward or FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)


class TestContract(AlgorithmContract):
    """Item reward, averaged weights."""

    # 1e-4: the weights come from samples that differ by float32 rounding between batch sizes
    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> RewardWeightedRegression:
        return make_rwr(ema_decay=0.9)


def test_weights_are_a_softmax_of_mean_one() -> None:
    values = torch.randn(8, generator=stream(0, "test/values"))
    valid = torch.ones(8, dtype=torch.bool)
    valid[2] = False
    weights, effective = softmax_weights(values, valid, 0.5)
    kept = values[valid].double()
    expected = torch.softmax((kept - kept.mean()) / (0.5 * kept.std(unbiased=False)), 0) * 7
    torch.testing.assert_close(weights[valid], expected.float())
    assert weights[2] == 0 and weights.sum() == pytest.approx(7, rel=1e-6)
    assert effective == pytest.approx(float(7 / expected.square().sum()))
    flat, share = softmax_weights(torch.ones(8), valid, 0.5)
    assert torch.equal(flat, valid.float()) and share == pytest.approx(1.0)


def test_loss_is_the_weighted_denoising_error() -> None:
    rwr = make_rwr()
    data = rwr.collect(CTX).data
    (micro,) = rwr.minibatches(data, 0, CTX)
    out = rwr.loss(micro, CTX)
    t, network = micro.t[:, None], rwr.task.denoiser.network
    velocity = network((1 - t) * micro.latents + t * micro.noise, micro.t, micro.cond)
    errors = (velocity - (micro.noise - micro.latents)).square().mean(1)
    torch.testing.assert_close(out.total, (micro.weights * errors).sum(), rtol=1e-5, atol=1e-6)
    assert out.count == 12


def test_set_reward_enters_as_influence() -> None:
    """The weights are those of `InfluenceAsItem` on the whole round."""
    rwr = make_rwr(Share())
    collected = rwr.collect(CTX)
    values = InfluenceAsItem(Share())(collected.data.latents, None)
    expected, _ = softmax_weights(values.values, values.valid, 1.0)
    torch.testing.assert_close(collected.data.weights, expected, rtol=1e-4, atol=1e-5)
    assert collected.metrics["reward/mean"] == pytest.approx(values.extras["set_value"])


def test_training_raises_an_item_reward() -> None:
    """Twelve rounds move the first coordinate up by more than the spread of the evaluation's interval."""
    rwr = make_rwr(FirstAxis(), prompts_per_round=64, eval_samples=32)
    run_in_memory(rwr, 12, Loop(1e-2), seed=0)
    metrics = rwr.evaluate(CTX).metrics
    assert metrics["eval/reward/gain_low"] > 0.1


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"prompts_per_round": 0}, {"eval_steps": 0}])
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RwrConfig(**options)
