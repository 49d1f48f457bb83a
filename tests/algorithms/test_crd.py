"""CRD under the Trainer: contract, gradients in any micro-batch, roles, schedules, anchor, warnings."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.crd import centered_reward_loss, implicit_reward
from gencontrol.algorithms.forward.base import LinearDecay, RewardRange
from gencontrol.algorithms.forward.crd import Crd, CrdConfig
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.errors import UsageError
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.dragon_worlds import FirstAxis
from tests.helpers.forward_worlds import SMALL, guided_task, make, move

CTX = StepContext(seed=0, step=0, micro_batch=1000)


class TestContract(AlgorithmContract):
    """The whole method: snapshots that lag, guided anchor, averaged weights."""

    # 1e-4: samples differ by float32 rounding between batch sizes
    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Crd:
        crd = make(Crd, old_decay="0-0.25-0.05-0.9", sampling_decay="2-0.0-0.3-0.9")
        move(crd.roles, 0.05, "policy", "old", "sampling")
        return crd


class TestContractExact(TestContract):
    """Exact mode: bound's weight, raw reward, two independent halves of four draws."""

    def make(self) -> Crd:
        exact = {"weighting": "elbo", "target": "reward", "draws_per_sample": 4, "unbiased": True}
        crd = make(Crd, **exact, train_times=1)
        move(crd.roles, 0.05, "policy", "old", "sampling")
        return crd


class TestContractParity(TestContract):
    """Means over the whole batch, weighted by two softmaxes; advantage-driven anchor; LoRA."""

    def make(self) -> Crd:
        options = {"center": "batch", "weight_temp": 0.2, "kl_adapt": "advantage", "loss": "bce"}
        lora = LoraConfig(rank=2, targets=("body.0", "body.2", "body.4", "body.6"))
        crd = make(Crd, lora=lora, **options)
        move(crd.roles, 0.05, "policy", "old", "sampling")
        return crd


def gradient(crd: Crd, micro_batch: int, update: int = 0) -> torch.Tensor:
    ctx = StepContext(seed=0, step=0, micro_batch=1000)
    data = crd.collect(ctx).data
    count = 0
    for micro in crd.minibatches(data, update, StepContext(seed=0, step=0, micro_batch=micro_batch)):
        out = crd.loss(micro, ctx)
        out.total.backward()
        count += out.count
    return torch.cat([p.grad.flatten() for p in crd.roles.trainable()]) / count


def moved(**options: Any) -> Crd:
    crd = make(Crd, **options)
    move(crd.roles, 0.1, "policy", "old", "sampling")
    return crd


@pytest.mark.parametrize("options", [{}, {"weight_temp": 0.1}, {"draws_per_sample": 2}, {"loss": "bce"}])
def test_splitting_a_group_does_not_change_the_gradient(options: dict[str, Any]) -> None:
    """A micro-batch of one row (first pass, slopes) against whole groups (autograd through the loss): same gradient."""
    whole, split = gradient(moved(**options), 1000), gradient(moved(**options), 1)
    assert whole.abs().max() > 1e-4
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_an_update_uses_its_own_groups_and_one_time_per_group() -> None:
    crd = make(Crd)
    data = crd.collect(CTX).data
    seen = []
    for update in range(2):
        rows = crd.rows(data, update, CTX)
        groups = data.group[rows.item]
        seen += groups.unique().tolist()
        for unit in rows.unit.unique():
            inside = rows.unit == unit
            assert len(rows.t[inside].unique()) == 1 and len(groups[inside].unique()) == 1
            assert int(inside.sum()) == SMALL["generations"]
    assert sorted(seen) == [0, 1, 2, 3]


def test_changing_another_group_leaves_a_groups_loss_alone() -> None:
    """Independence of groups at the level of the method; centring over the batch breaks it, by design."""

    def losses(center: str, boost: float) -> torch.Tensor:
        crd = make(Crd, center=center, updates_per_round=1, kl_coef=0.0)
        move(crd.roles, 0.1, "policy", "old")
        data = crd.collect(CTX).data
        data.goal[data.group == 3] += torch.tensor([0.0, boost, 2 * boost])
        micros = list(crd.minibatches(data, 0, CTX))
        found = torch.cat([crd.objective(m, crd.views(m, CTX, anchored=False))[0].detach() for m in micros])
        return found[data.group[crd.rows(data, 0, CTX).item] != 3]

    assert torch.equal(losses("group", 0.0), losses("group", 0.3))
    assert not torch.allclose(losses("batch", 0.0), losses("batch", 0.3))


def test_the_loss_is_that_of_the_public_functions() -> None:
    crd = moved(updates_per_round=1, train_times=1)
    (micro,) = crd.minibatches(crd.collect(CTX).data, 0, CTX)
    out = crd.loss(micro, CTX)
    task, t = crd.task, micro.t[:, None]
    xt, v = (1 - t) * micro.latents + t * micro.noise, micro.noise - micro.latents

    def velocity(role: str, cond: torch.Tensor) -> torch.Tensor:
        with crd.roles.use(role):
            return task.denoiser(xt, micro.t, cond).velocity

    theta, old = velocity("policy", micro.cond), velocity("old", micro.cond)
    given, free = velocity("ref", micro.cond), velocity("ref", torch.zeros_like(micro.cond))
    ratio = implicit_reward(theta, old, v)
    match = 5.0 * centered_reward_loss(ratio, micro.goal, micro.unit)
    kappa = 1e-4 + micro.value.clamp(0, 1) * (0.1 - 1e-4)
    anchor = (theta - (free + 2.0 * (given - free))).square().mean(1)
    if crd.range.unbounded:
        kappa = 1e-4 + crd.range.place(micro.value).float() * (0.1 - 1e-4)
    expected = match * len(micro.t) + (kappa * anchor).sum()
    torch.testing.assert_close(out.total, expected, rtol=1e-5, atol=1e-6)
    assert out.count == 12


def test_snapshots_follow_their_schedules_and_get_no_gradient() -> None:
    crd = make(Crd, old_decay="0-0.25-0.1-0.9", sampling_decay="1-0-0.5-1")
    before = {name: w.clone() for name, w in crd.roles.state_dict()["old"].items()}
    run_in_memory(crd, 1, Loop(1e-2), seed=0)
    state = crd.roles.state_dict()
    for name, policy in state["policy"].items():
        torch.testing.assert_close(state["old"][name], before[name] * 0.45 + 0.55 * policy)  # d(2) = 0.25 + 0.1·2
        torch.testing.assert_close(state["sampling"][name], before[name] * 0.5 + 0.5 * policy)  # d(2) = 0.5·(2 − 1)
        assert torch.equal(state["ref"][name], before[name])
    identities = {id(p) for p in crd.roles.trainable()}
    for role in ("old", "sampling", "ref", "ema"):
        assert all(w.grad is None and id(w) not in identities for w in state[role].values())


def test_schedule_values_and_the_two_ends_of_a_blend() -> None:
    decay = LinearDecay.parse("75-0.0-0.0075-0.999")
    assert decay.at(74) == 0.0 and decay.at(100) == pytest.approx(0.1875)
    assert decay.at(208) < 0.999 and decay.at(209) == 0.999 and decay.at(5000) == 0.999
    assert LinearDecay.parse("medium") == LinearDecay.parse("75-0-0.0075-0.999")
    for wrong in ("1-2-3", "0-1.5-0-1", "0-0--1-1", "quick"):
        with pytest.raises(ValueError, match="decay"):
            LinearDecay.parse(wrong)
    task = guided_task()
    roles = Roles(task.denoiser.network, ("policy", "ref", "old"))
    move(roles, 0.1, "policy")
    before = {name: w.clone() for name, w in roles.state_dict()["old"].items()}
    roles.lerp("old", 1.0)
    assert all(torch.equal(before[name], w) for name, w in roles.state_dict()["old"].items())
    roles.lerp("old", 0.0)
    state = roles.state_dict()
    assert all(torch.equal(state["policy"][name], w) for name, w in state["old"].items())


class Constant:
    """Item reward with a set value for every sample."""

    name, kind, differentiable = "constant", "item", False

    def __init__(self, values: float) -> None:
        self.values = values

    def __call__(self, samples: torch.Tensor, context: RewardContext) -> RewardOut:
        return RewardOut(torch.full((len(samples),), self.values), torch.ones(len(samples), dtype=torch.bool))


@pytest.mark.parametrize(("value", "kappa"), [(0.0, 1e-4), (1.0, 0.1), (0.5, 0.05005)])
def test_strength_of_the_anchor_follows_the_raw_reward(value: float, kappa: float) -> None:
    data = make(Crd, Constant(value)).collect(CTX).data
    torch.testing.assert_close(data.strength, torch.full_like(data.strength, kappa))
    assert torch.all(make(Crd, Constant(value), kl_adapt="off").collect(CTX).data.strength == 0.1)
    middle = make(Crd, Constant(value), kl_adapt="advantage").collect(CTX).data.strength
    torch.testing.assert_close(middle, torch.full_like(middle, 0.05005))


def test_an_unbounded_reward_is_placed_among_those_seen() -> None:
    history = RewardRange()
    history.add(torch.linspace(0, 1, 5))
    assert torch.equal(history.place(torch.tensor([0.25])), torch.tensor([0.25], dtype=torch.float64))
    history.add(torch.tensor([10.0, 20.0, 30.0]))
    assert history.place(torch.tensor([-5.0, 100.0])).tolist() == [0.0, 1.0]
    assert history.place(torch.tensor([15.0])).item() == pytest.approx(6 / 8)
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    long = RewardRange()
    for part in values.split(500):
        long.add(part)
    assert len(long.seen) <= RewardRange.LIMIT
    # the thinned history is a sample of thousands: its quantiles are within 0.03 of the law's
    torch.testing.assert_close(
        long.place(torch.tensor([-1.0, 0.0, 1.0])),
        torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0])).double(),
        atol=0.03,
        rtol=0,
    )
    again = RewardRange()
    again.load_state_dict(long.state_dict())
    assert torch.equal(again.seen, long.seen) and again.stride == long.stride


def test_equal_groups_are_counted_and_may_be_left_out() -> None:
    collected = make(Crd, Constant(0.5)).collect(CTX)
    assert collected.metrics["reward/equal_groups"] == 1.0 and collected.updates == 2
    assert make(Crd, Constant(0.5), skip_equal=True).collect(CTX).updates == 0


def test_a_ratio_without_signal_is_told() -> None:
    """old = θ at every round and no learning: the gap at first updates is 0."""
    crd = make(Crd, old_decay="none")
    with pytest.warns(RuntimeWarning, match="carries no signal"):
        run_in_memory(crd, 7, Loop(1e-3), seed=0)


def test_counters_count_every_network_evaluation() -> None:
    crd = make(Crd)
    calls = 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += len(inputs[0])

    crd.task.denoiser.network.register_forward_pre_hook(count)
    records = run_in_memory(crd, 2, Loop(1e-3), seed=0)
    assert records[-1]["count/evaluations"] == calls and records[-1]["count/samples"] == 24


def test_guided_anchor_needs_an_unconditional_branch() -> None:
    from tests.helpers.dragon_worlds import make_task

    with pytest.raises(UsageError, match="kl_guidance"):
        make(Crd, task=make_task())
    make(Crd, task=make_task(), kl_guidance=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"generations": 1},
        {"draws_per_sample": 3, "unbiased": True},
        {"old_decay": "1-2"},
        {"kl_adapt": "quantile"},
        {"center": "rank"},
        {"updates_per_round": 9, "prompts_per_round": 8},
        {"time_range": 0.0},
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).removeprefix("old_").split("_")[0]):
        CrdConfig(**options)


def test_training_raises_the_reward() -> None:
    crd = make(Crd, FirstAxis(), prompts_per_round=8, generations=8, kl_coef=0.0, eval_samples=32)
    run_in_memory(crd, 12, Loop(1e-2), seed=0)
    assert crd.evaluate(CTX).metrics["eval/reward/gain_low"] > 0.1
