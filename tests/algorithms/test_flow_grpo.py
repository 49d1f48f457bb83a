"""Flow-GRPO and DDPO: exact recomputation, REINFORCE and KL in closed form, the Trainer's contract, records."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.path.base import PathGradient, PathMicro, clipped_surrogate
from gencontrol.algorithms.path.flow_grpo import Ddpo, DdpoConfig, FlowGrpo, FlowGrpoConfig, PromptRecord
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.process import VP, GaussianProcess, MaskedProcess
from gencontrol.process.gaussian import GridProcess
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.types import Prediction
from tests.helpers.dragon_worlds import PROMPTS, SIZE, FirstAxis, Share, encode, make_task
from tests.helpers.gaussian_world import Parabola, gaussian_task

CTX = StepContext(seed=0, step=0, micro_batch=1000)
SMALL = {"prompts_per_round": 6, "generations": 4, "demo_steps": 4, "eval_steps": 4, "ema_decay": 0.9}


def guided_task(prediction: str = "velocity", schedule: Any = None) -> Any:
    """`make_task` with an empty condition, so that guidance has something to guide by."""
    task = make_task()
    old = task.denoiser
    denoiser = Denoiser(old.network, GaussianProcess(schedule) if schedule else old.process, Prediction(prediction))
    return dataclasses.replace(task, denoiser=denoiser, uncond=torch.zeros(1, len(PROMPTS)))


def make_grpo(task: Any = None, reward: Any = None, **options: Any) -> FlowGrpo:
    task = task or guided_task()
    config = FlowGrpoConfig(**(SMALL | options))
    return FlowGrpo(task, reward or FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)


def make_ddpo(task: Any = None, reward: Any = None, **options: Any) -> Ddpo:
    task = task or guided_task("eps", VP())
    config = DdpoConfig(**(SMALL | {"history": 4, "min_history": 2} | options))
    return Ddpo(task, reward or FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)


def totals(algorithm: PathGradient, data: Any, update: int, ctx: StepContext) -> dict[str, float]:
    """Sums of the metrics and of the counts over an update's micro-batches."""
    sums: dict[str, float] = {"count": 0.0}
    for micro in algorithm.minibatches(data, update, ctx):
        out = algorithm.loss(micro, ctx)
        sums["count"] += out.count
        for key, value in out.metrics.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return sums


class TestGrpoContract(AlgorithmContract):
    """Guidance, KL, anchor, half of the steps, averaged weights."""

    # 2e-3: stored and recomputed paths differ by float32 rounding between batch sizes, which KL divides by std²
    accumulation_tolerance: ClassVar[float] = 2e-3

    def make(self) -> FlowGrpo:
        return make_grpo(guidance_scale=2.0, kl_coef=0.1, kl_guidance=3.0, train_steps=2)


class TestDdpoContract(AlgorithmContract):
    """Records of rewards in the state."""

    accumulation_tolerance: ClassVar[float] = 2e-3

    def make(self) -> Ddpo:
        return make_ddpo(generations=2)


@pytest.mark.parametrize("make", [make_grpo, make_ddpo])
@pytest.mark.parametrize("micro_batch", [1000, 5])
def test_log_probs_are_recomputed_exactly(make: Any, micro_batch: int) -> None:
    """θ = θ_old: every ratio is 1 to the bit, also under guidance and in parts, for flow and VP."""
    algorithm = make(updates_per_round=1, guidance_scale=2.0)
    ctx = dataclasses.replace(CTX, micro_batch=micro_batch)
    sums = totals(algorithm, algorithm.collect(ctx).data, 0, ctx)
    assert sums["count"] == 24 * 3  # 24 samples, 3 of 4 steps are stochastic
    assert sums["policy/ratio"] == sums["count"] and sums["policy/approx_kl"] == 0.0
    assert sums["policy/clip_fraction"] == 0.0
    assert sums.get("policy/kl", 0.0) == 0.0  # the base is the policy


def chain(algorithm: PathGradient, schedule: str) -> tuple[list[tuple[float, float, float]], float]:
    """Return (A, B, std) of each stochastic step, mean = A·x + B·m, and dx0/dx of the last one."""
    task = gaussian_task(schedule, 0.0, torch.float64)
    times = [1 - k / algorithm.config.demo_steps for k in range(algorithm.config.demo_steps + 1)]

    def mean(m: float, x: float, t: float, t_next: float) -> tuple[float, float]:
        task.denoiser.network.mean.data.fill_(m)
        value, std = algorithm.step.moments(task.denoiser, torch.tensor([[x]], dtype=torch.float64), t, t_next)
        return float(value.detach()), float(std)

    rows = []
    for t, t_next in zip(times[:-2], times[1:-1]):
        zero = mean(0, 0, t, t_next)[0]
        rows.append((mean(0, 1, t, t_next)[0] - zero, mean(1, 0, t, t_next)[0] - zero, mean(0, 0, t, t_next)[1]))
    return rows, mean(0, 1, times[-2], 0.0)[0] - mean(0, 0, times[-2], 0.0)[0]


@pytest.mark.parametrize(("kind", "schedule"), [("grpo", "flow"), ("grpo", "vp"), ("ddpo", "flow"), ("ddpo", "vp")])
def test_gradient_is_reinforce_and_its_mean_the_derivative_of_the_reward(kind: str, schedule: str) -> None:
    """Exact per sample: Σ_k A·∂log p_k/∂m; and over samples d E[x0]/dm through the stochastic steps (4 s.e.)."""
    n, m = 6000, 0.3
    options = {"prompts_per_round": n, "generations": 2, "updates_per_round": 1, "reduce": "sum", "path_kl_coef": 0.0}
    make = make_grpo if kind == "grpo" else make_ddpo
    algorithm = make(gaussian_task(schedule, m), FirstAxis(), **options)
    ctx = dataclasses.replace(CTX, micro_batch=10**6)
    data = algorithm.collect(ctx).data
    x0 = algorithm.task.denoiser(data.states[-2], data.times[-2]).x0.flatten().detach()
    data = dataclasses.replace(data, advantages=x0 - x0.mean())
    for micro in algorithm.minibatches(data, 0, ctx):
        algorithm.loss(micro, ctx).total.backward()
    measured = -float(algorithm.roles.trainable()[0].grad) / (2 * n)

    rows, last = chain(algorithm, schedule)
    states = data.states[..., 0].double()
    each = torch.zeros(2 * n, dtype=torch.float64)
    slope = 0.0
    for k, (a, b, std) in enumerate(rows):
        each += b * (states[k + 1] - a * states[k] - b * m) / std**2
        slope = a * slope + b
    each = each * data.advantages.double()
    assert measured == pytest.approx(float(each.mean()), rel=2e-4)
    error = float(each.std()) / (2 * n) ** 0.5
    assert abs(measured - last * slope) < 4 * error
    assert last * slope > 10 * error  # the check can see the derivative


@pytest.mark.parametrize("schedule", ["flow", "vp"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_kl_in_closed_form(schedule: str, reduce: str) -> None:
    """Moving m by δ moves the step's mean by B·δ: KL of the transition = (B·δ)²/(2·std²) at each step."""
    kl = {"path_kl_coef": 1.0, "path_kl_unit": "paper"}
    algorithm = make_grpo(gaussian_task(schedule), reduce=reduce, updates_per_round=1, ema_decay=0.0, **kl)
    data = algorithm.collect(CTX).data
    delta = 0.25
    with torch.no_grad():
        algorithm.roles.trainable()[0].add_(delta)
    rows, _ = chain(algorithm, schedule)
    for (_, b, std), micro in zip(rows, algorithm.minibatches(data, 0, CTX), strict=True):
        out = algorithm.loss(micro, CTX)
        assert float(out.metrics["policy/kl"]) / out.count == pytest.approx((b * delta) ** 2 / (2 * std**2), rel=2e-4)


def test_mean_and_sum_differ_by_the_number_of_axes() -> None:
    """KL, and the square of the log-ratio, under reduce="sum" are 3 and 9 times those under "mean" on three axes."""
    sums = []
    for reduce in ("mean", "sum"):
        algorithm = make_grpo(reduce=reduce, updates_per_round=1)
        data = algorithm.collect(CTX).data
        with torch.no_grad():
            algorithm.roles.trainable()[-1].add_(0.1)
        sums.append(totals(algorithm, data, 0, CTX))
    assert sums[1]["policy/kl"] == pytest.approx(SIZE * sums[0]["policy/kl"], rel=1e-5)
    assert sums[1]["policy/approx_kl"] == pytest.approx(SIZE**2 * sums[0]["policy/approx_kl"], rel=1e-4)
    assert sums[0]["policy/kl"] > 0


@pytest.mark.parametrize("make", [make_grpo, make_ddpo])
def test_gradient_equals_finite_differences(make: Any) -> None:
    """Away from θ_old and from the base, with KL and anchor, in float64: central differences agree to 1e-6."""
    task = gaussian_task("flow", 0.2, torch.float64)
    algorithm = make(task, path_kl_coef=0.5, kl_coef=0.3, reduce="sum", clip_range=10.0)
    generator = torch.Generator().manual_seed(1)
    x, x_next, advantages = (torch.randn(5, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    micro = PathMicro(x, x_next, torch.full((5,), -1.0, dtype=torch.float64), advantages[:, 0], None, 0.75, 0.5)
    (mean,) = algorithm.roles.trainable()
    with torch.no_grad():
        mean.add_(0.1)

    def value(at: float) -> float:
        with torch.no_grad():
            mean.fill_(at)
            return float(algorithm.loss(micro, CTX).total)

    algorithm.loss(micro, CTX).total.backward()
    here, h = float(mean.detach()), 1e-5
    assert float(mean.grad) == pytest.approx((value(here + h) - value(here - h)) / (2 * h), rel=1e-6)


def test_surrogate_is_ppo() -> None:
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.05])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    losses, bounded = clipped_surrogate(log_ratio, advantages, 0.2)
    ratio = log_ratio.exp()
    expected = torch.stack([torch.tensor(-1.2), -ratio[1], ratio[2], torch.tensor(0.8), -2 * ratio[4]])
    torch.testing.assert_close(losses, expected)
    assert bounded.tolist() == [1, 0, 0, 1, 0]


def test_update_shares_are_disjoint_and_steps_are_a_fresh_subset() -> None:
    algorithm = make_grpo(updates_per_round=5, train_steps=2)
    data = algorithm.collect(CTX).data
    seen = [
        m.x_next[:, 0]
        for u in range(5)
        for m in algorithm.minibatches(data, u, CTX)
        if m.t == data.times[data.steps[0]]
    ]
    assert torch.equal(torch.cat(seen).sort().values, data.states[data.steps[0] + 1][:, 0].sort().values)
    subsets = {algorithm.steps_of(step) for step in range(20)}
    assert subsets == {(0, 1), (0, 2), (1, 2)}
    assert make_grpo(train_steps=0).steps_of(0) == (0, 1, 2)
    with pytest.raises(UsageError, match="train_steps"):
        make_grpo(train_steps=4)


def test_a_last_step_with_a_deviation_is_trained() -> None:
    """On a grid that ends above 0, as Stable Diffusion's does, all steps have a density and are trained (CODE)."""
    task = guided_task("eps", VP())
    grid = GridProcess(VP(), grid=lambda steps: [1.0 - 0.99 * k / steps for k in range(steps + 1)])
    task = dataclasses.replace(task, denoiser=Denoiser(task.denoiser.network, grid, Prediction("eps")))
    algorithm = make_ddpo(task, updates_per_round=1)
    sums = totals(algorithm, algorithm.collect(CTX).data, 0, CTX)
    assert algorithm.steps_of(0) == (0, 1, 2, 3) and sums["count"] == 24 * 4 and sums["policy/ratio"] == sums["count"]


def test_invalid_samples_do_not_train() -> None:
    algorithm = make_grpo(reward=FirstAxis(broken=2), min_valid=0.0, updates_per_round=1)
    collected = algorithm.collect(CTX)
    assert collected.data.states.shape[1] == 6 and collected.metrics["reward/valid_fraction"] == 0.25


def test_set_rewards_enter_as_influence() -> None:
    assert make_grpo(reward=Share()).collect(CTX).data.advantages.abs().max() > 0


@pytest.mark.parametrize("make", [make_grpo, make_ddpo])
def test_training_raises_the_reward(make: Any) -> None:
    """The mean of a Gaussian moves to the top of a parabola at distance 1 (gain 1 − remaining²)."""
    algorithm = make(
        gaussian_task("flow" if make is make_grpo else "vp"),
        Parabola(1.0),
        prompts_per_round=16,
        generations=16,
        path_kl_coef=0.0,
        clip_range=0.2,
        updates_per_round=2,
        ema_decay=0.0,
        demo_steps=5,
    )
    run_in_memory(algorithm, 25, Loop(3e-2), seed=0)
    assert float(algorithm.roles.trainable()[0].detach()) == pytest.approx(1.0, abs=0.25)


def test_records_are_per_prompt() -> None:
    """Fewer than min_history: the round's statistics; then the prompt's own last `history` rewards."""
    record = PromptRecord(history=3, min_history=2)
    values, valid = torch.tensor([1.0, 3.0, 10.0, 5.0]), torch.tensor([True, True, True, False])
    first = record.normalise(["a", "a", "b", "b"], values, valid)
    assert first[:2].tolist() == pytest.approx([-1, 1], abs=1e-3)
    everything = torch.tensor([1.0, 3.0, 10.0])
    assert float(first[2]) == pytest.approx(float((10 - everything.mean()) / everything.std(unbiased=False)), abs=1e-3)
    assert first[3] == 0 and record.rewards == {"a": [1.0, 3.0], "b": [10.0]}
    record.normalise(["a", "a"], torch.tensor([7.0, 8.0]), torch.tensor([True, True]))
    assert record.rewards["a"] == [3.0, 7.0, 8.0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FlowGrpoConfig, {"noise": 0.0}),
        (FlowGrpoConfig, {"generations": 1}),
        (FlowGrpoConfig, {"spread": "none"}),
        (FlowGrpoConfig, {"train_steps": 11}),
        (FlowGrpoConfig, {"demo_steps": 1}),
        (FlowGrpoConfig, {"path_kl_coef": -1.0}),
        (FlowGrpoConfig, {"reduce": "max"}),
        (DdpoConfig, {"clip_range": 0.0}),
        (DdpoConfig, {"min_history": 40}),
        (DdpoConfig, {"prompts_per_round": 0}),
    ],
)
def test_options_out_of_range_are_named(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_token_models_are_refused() -> None:
    task = guided_task()
    tokens = Denoiser(task.denoiser.network, MaskedProcess(4, 3))
    with pytest.raises(UsageError, match="masked-token"):
        make_grpo(dataclasses.replace(task, denoiser=tokens))


def test_encode_is_asked_once_per_prompt() -> None:
    """Text is encoded for each of the round's prompts, not for each of its samples."""
    calls: list[int] = []

    def counting(texts: Any) -> Tensor:
        calls.append(len(texts))
        return encode(texts)

    make_grpo(dataclasses.replace(guided_task(), encode=counting)).collect(CTX)
    assert calls == [6]
