"""CTRL against what is known: closed forms, identities of the path KL, the bound, and the Trainer's contract."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.ctrl.bound import Ledger, log_mean_exp
from gencontrol.algorithms.ctrl.ceiling import check_classifiers
from gencontrol.algorithms.ctrl.ctrl import Ctrl, CtrlConfig
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.bench.ctrl.exact import Later
from gencontrol.bench.ctrl.worlds import (
    MEANS,
    STD,
    WEIGHTS,
    ExactNetwork,
    Linears,
    Slope,
    make_ctrl,
    mixture,
    two_classes,
)
from gencontrol.errors import UsageError
from gencontrol.models.conditions.base import conditioned
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.readers.image_classifier import ImageClassifierConfig, build_image_classifier
from gencontrol.process import GaussianProcess, Linear, Table
from gencontrol.rewards.image.classifier import ClassifierReward
from gencontrol.rng import row_keys, stream
from gencontrol.sampling.control.controlled import memory, sample_controlled
from gencontrol.sampling.control.files import load_control
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.types import Prediction

CTX = StepContext(seed=0, step=0, micro_batch=10_000)


def small(reward: Any = None, *, seed: int = 0, **options: Any) -> Ctrl:
    """CTRL on the mixture with few steps."""
    network = ExactNetwork(MEANS, WEIGHTS, STD)
    defaults = {"prompts_per_round": 8, "steps": 6, "bound_samples": 64, "backprop": "full", "probe": 0}
    return make_ctrl(reward or two_classes(), network, 2, seed=seed, **(defaults | options))


def stirred(ctrl: Ctrl, size: float = 0.3) -> Ctrl:
    """Give the control arbitrary weights."""
    generator = stream(1, "test/stir")
    with torch.no_grad():
        for parameter in ctrl.roles.trainable():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return ctrl


def gradient(ctrl: Ctrl) -> Tensor:
    """Gradient of the loss of step 0 over the number of items."""
    data = ctrl.collect(CTX).data
    (micro,) = ctrl.minibatches(data, 0, CTX)
    out = ctrl.loss(micro, CTX)
    out.total.backward()
    return torch.cat([p.grad.flatten() for p in ctrl.roles.trainable() if p.grad is not None]) / out.count


def test_exact_network_is_the_mixture() -> None:
    x, t = torch.randn(50, 2, generator=stream(0, "x")), torch.rand(50, generator=stream(0, "t"))
    expected = mixture()(x, t).raw
    torch.testing.assert_close(ExactNetwork(MEANS, WEIGHTS, STD)(x, t), expected, rtol=1e-4, atol=1e-5)


class TestContract(AlgorithmContract):
    """Full backpropagation, averaged weights."""

    # 1e-4: paths are float32 matrix products of other batch sizes
    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Ctrl:
        return stirred(small(ema_decay=0.9, checkpointing=True))


class TestPoolContract(AlgorithmContract):
    """Regression on the pool, which every process and every resumed run draws again."""

    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Ctrl:
        own = {"pool": 64, "pool_batch": 8, "pool_updates": 2, "base_updates": 3}
        return stirred(small(ema_decay=0.9, backprop="pool", probe=2, **own))


def test_zero_init_is_the_base_for_every_label() -> None:
    ctrl = small()
    keys = row_keys(0, "a", torch.arange(16))
    start = ctrl.chain().start((2,), keys, torch.device("cpu"))
    with torch.no_grad():
        base = ctrl.chain().run(start, keys, None)
        for row in range(2):
            found = ctrl.chain().run(start, keys, ctrl.condition(["toy"] * 16, torch.full((16,), row)))
            assert torch.equal(found.x, base.x) and not found.kl.any() and not found.log_ratio.any()
    stirred(ctrl)
    with torch.no_grad():
        assert torch.equal(ctrl.chain().run(start, keys, None).x, base.x)
        assert ctrl.chain().run(start, keys, ctrl.condition(["toy"] * 16, torch.zeros(16).long())).kl.min() > 0
        with ctrl.roles.use("ref"):
            found = ctrl.chain().run(start, keys, ctrl.condition(["toy"] * 16, torch.zeros(16).long()))
            assert torch.equal(found.x, base.x)


@pytest.mark.parametrize("backprop", ["full", "adjoint"])
def test_without_gamma_or_signal_nothing_moves(backprop: str) -> None:
    flat = Linears(torch.zeros(2, 2), torch.tensor([0.3, -0.3]))
    for ctrl in (small(gamma=0.0, backprop=backprop), small(flat, backprop=backprop)):
        assert gradient(ctrl).abs().max() == 0
    assert gradient(small(backprop=backprop)).abs().max() > 0


def test_kl_identity_and_reweighting_hold_for_any_control() -> None:
    """Weights of tuned paths have mean Z(y) for an arbitrary control; the mean log-ratio is the mean KL."""
    ctrl = stirred(small(bound_samples=20_000), 0.15)
    ctrl.collect(replace(CTX, micro_batch=20_000))
    for row in range(2):
        found = ctrl.correct("toy", row, 20_000, seed=3)
        ratio = ctrl.config.gamma * found.rewards - found.log_weights
        error = float((ratio - found.kl).std() / math.sqrt(len(ratio)))
        assert float(found.kl.mean()) > 0.01
        assert abs(float((ratio - found.kl).mean())) < 4 * error
        log_z, z_error = log_mean_exp(found.log_weights[:, None])
        spread = math.hypot(float(z_error), float(ctrl.ledger.error[row]))
        assert abs(float(log_z) - float(ctrl.ledger.log_z[row])) < 4 * spread
        assert float((found.rewards - found.kl).mean()) <= float(ctrl.ledger.log_z[row]) + 3 * spread
        assert 0 < found.ess < 1


def test_normalisers_of_all_labels_sum_to_one() -> None:
    ctrl = small(bound_samples=5000)
    ctrl.collect(replace(CTX, micro_batch=5000))
    assert float(ctrl.ledger.log_z.exp().sum()) == pytest.approx(1.0, abs=1e-5)  # float32 log-probabilities


def test_checkpointed_gradient_is_plain_and_finite_differences_agree() -> None:
    plain, checked = gradient(stirred(small())), gradient(stirred(small(checkpointing=True)))
    torch.testing.assert_close(checked, plain, rtol=1e-6, atol=1e-8)
    direction = torch.randn(len(plain), generator=stream(2, "d"))
    direction /= direction.norm()

    def objective(step: float) -> float:
        ctrl = stirred(small())
        place = 0
        with torch.no_grad():
            for p in ctrl.roles.trainable():
                p.add_(step * direction[place : place + p.numel()].view_as(p))
                place += p.numel()
            (micro,) = ctrl.minibatches(ctrl.collect(CTX).data, 0, CTX)
            out = ctrl.loss(micro, CTX)
        return float(out.total) / out.count

    slope = (objective(1e-2) - objective(-1e-2)) / 2e-2
    # float32 values of order 1 over 2e-2: about 1e-4 of rounding, and h² of curvature
    assert slope == pytest.approx(float(plain @ direction), rel=2e-2, abs=2e-3)


def test_truncation_keeps_the_kl_of_all_steps() -> None:
    """P4: with a flat reward, the steps before the cut still feel their KL."""
    flat = Linears(torch.zeros(2, 2), torch.zeros(2))
    cut = stirred(small(flat, backprop="truncated", backprop_steps=2))
    data = cut.collect(CTX).data
    (micro,) = cut.minibatches(data, 0, CTX)
    out = cut.loss(micro, CTX)
    whole = stirred(small(flat))
    whole.collect(CTX)
    assert float(out.total.detach()) == pytest.approx(float(whole.loss(micro, CTX).total.detach()), rel=1e-5)
    all_steps = gradient(stirred(small(flat, backprop="truncated", backprop_steps=6)))
    torch.testing.assert_close(all_steps, gradient(stirred(small(flat))))


def test_truncation_takes_the_reward_of_early_steps_away_and_no_kl() -> None:
    """The gradient is that of a run whose states are detached before the cut: each early push pays its own KL alone."""
    cut = gradient(stirred(small(backprop="truncated", backprop_steps=2)))
    assert (cut - gradient(stirred(small()))).norm() > 0.05 * cut.norm()
    ctrl = stirred(small())
    (micro,) = ctrl.minibatches(ctrl.collect(CTX).data, 0, CTX)
    keys = row_keys(ctrl.seed, f"ctrl/path/{CTX.step}", micro.items)
    chain, cond = ctrl.chain(), ctrl.condition(micro.prompts, micro.rows)
    x, total = chain.start((2,), keys, torch.device("cpu")), torch.zeros(len(keys))
    for index in range(chain.steps):  # written out: steps 0 to 3 see detached states, and price their own push alone
        new, old = chain.means(x.detach() if index < 4 else x, index, cond)
        std = chain.weights(index, x)[2]
        if std:
            total = total + (new - old).square().sum(1) / (2 * std * std)
            x = new + std * chain.noise(x, keys, index)
        else:
            x = new
    (total - ctrl.reward_of(x, micro.prompts, micro.rows)[0]).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in ctrl.roles.trainable() if p.grad is not None]) / len(keys)
    torch.testing.assert_close(cut, expected, rtol=1e-4, atol=1e-6)


def test_pool_reaches_its_closed_form_on_a_linear_chain() -> None:
    """Reward a·x on N(0, 1): E[x0|x_k] moves by a·Var(x0|x_k) of the chain, so u_k is that over unit_k.

    The path's end then moves by the sum of these pushes; the shares of 4096 base paths have an error of 1/sqrt(ESS).
    """
    slope = 0.8
    options: dict[str, Any] = {"pool": 4096, "pool_batch": 256, "base_updates": 60, "pool_updates": 60, "probe": 1}
    options["backprop"] = "pool"
    ctrl = make_ctrl(
        Slope(slope),
        ExactNetwork([[0.0]], [1.0], 1.0),
        1,
        seed=0,
        steps=5,
        prompts_per_round=8,
        **options,
    )
    records = run_in_memory(Later(ctrl, 0), 3, Loop(1e-2, max_grad_norm=50.0), seed=0)
    records += run_in_memory(Later(ctrl, 3), 3, Loop(2e-3, max_grad_norm=50.0), seed=0)
    schedule, like, grid = Linear(), torch.zeros(1), ctrl.plan.grid
    rates, stds = [], []
    for t, t_next in zip(grid, grid[1:]):
        here = schedule.at(t)
        w0, w1, std = GaussianProcess(schedule).step_weights(t, t_next, 1.0, like) if t_next else (1.0, 0.0, 0.0)
        rates.append(float((w0 * here.a + w1 * here.s) / here.scale2))
        stds.append(float(std))
    shift = 0.0
    for k in range(len(rates) - 1):
        variance, reach = 0.0, 1.0  # of x0 given x_k, backwards over the steps that follow
        for later in reversed(range(k, len(rates))):
            variance += (reach * stds[later]) ** 2
            reach *= rates[later]
        push = slope * variance / float(ctrl.network.unit(torch.tensor([grid[k]])))
        shift = rates[k] * shift + stds[k] ** 2 * push
    shift *= rates[-1]
    found = ctrl.correct("toy", 0, 20_000, seed=5)
    assert float(found.rewards.mean()) / slope == pytest.approx(shift, abs=0.06)
    assert records[0]["ctrl/cosine"] > 0.5
    assert ctrl.ceiling is not None and float(ctrl.ceiling.ess.min()) > 1000


def test_pool_tilts_the_mixture_and_lowers_gamma_where_few_paths_count() -> None:
    options = {"pool": 4096, "pool_batch": 256, "base_updates": 100, "pool_updates": 100, "steps": 8, "probe": 0}
    ctrl = small(backprop="pool", **options)
    for start, lr in ((0, 5e-3), (1, 1e-3)):
        run_in_memory(Later(ctrl, start), 1, Loop(lr, max_grad_norm=50.0), seed=0)
    for row in range(2):
        found = ctrl.correct("toy", row, 4000, seed=1)
        gap = float(ctrl.ledger.log_z[row] - (found.rewards - found.kl).mean())
        # without any control .4 and 3.5; full backpropagation has .1 and .3 after 40 updates of 64
        assert gap < 0.35 and found.ess > 0.5
    steep = small(backprop="pool", gamma=40.0, **(options | {"base_updates": 0, "pool": 64, "min_ess": 20.0}))
    metrics = steep.collect(CTX).metrics
    assert 0 < metrics["ctrl/pool/gamma_min"] < 40 and metrics["ctrl/pool/lowered"] > 0


def test_classifiers_that_know_nothing_are_refused() -> None:
    model = build_image_classifier(0, ("a", "b"))
    for known, reason in (({"temperature": 49.9}, "an end of its search"), ({"held_out": 0.5}, "chance is 50%")):
        model.config = replace(ImageClassifierConfig(("a", "b")), **known)
        with pytest.raises(UsageError, match=reason):
            check_classifiers(ClassifierReward(reward_model=model, device="cpu"))
    model.config = replace(ImageClassifierConfig(("a", "b")), held_out=0.9)
    check_classifiers(ClassifierReward(reward_model=model, device="cpu"))


def chain_variance(grid: Any) -> float:
    """Var(x0) of the posterior chain over N(0, 1) data: below 1, since each step uses the mean of x0."""
    schedule, process = Linear(), GaussianProcess(Linear())
    variance = schedule.at(grid[0]).s ** 2
    for t, t_next in zip(grid, grid[1:]):
        here = schedule.at(t)
        w0, w1, std = process.step_weights(t, t_next, 1.0, torch.zeros(1)) if t_next else (1.0, 0.0, 0.0)
        variance = ((w0 * here.a + w1 * here.s) / here.scale2) ** 2 * variance + std**2
    return float(variance)


@pytest.mark.parametrize("backprop", ["full", "adjoint"])
def test_linear_gaussian_closed_form(backprop: str) -> None:
    """docs/methods/ctrl.md#e-ctrl-3: reward a·x: shift a·Var(x0)(1 − rho²), J = a²·Var(x0)(1 − rho²)/2; the flow has
    rho² = 0.
    """
    slope, network = 1.3, ExactNetwork([[0.0]], [1.0], 1.0)
    ctrl = make_ctrl(
        Slope(slope),
        network,
        1,
        seed=0,
        steps=5,
        prompts_per_round=64,
        backprop=backprop,
        bound_samples=16,
        oversample=0.0,
        probe=0,
    )
    assert ctrl.rho2 == 0.0
    run_in_memory(ctrl, 60, Loop(1e-2), seed=0)
    found = ctrl.correct("toy", 0, 20_000, seed=5)
    variance = chain_variance(ctrl.plan.grid)
    # J is flat at its optimum: the control's own errors enter squared
    assert float((found.rewards - found.kl).mean()) == pytest.approx(slope**2 * variance / 2, abs=0.02)
    assert float(found.rewards.mean()) / slope == pytest.approx(slope * variance, abs=0.08)
    assert found.log_z == pytest.approx(slope**2 * variance / 2, abs=0.02) and found.ess > 0.9


def test_adjoint_and_backprop_agree_on_the_linear_optimum() -> None:
    """DERIVED: u_i = a·∂E[x0|x_{i+1}]/∂x_{i+1} is exact for a linear chain; the adjoints are those numbers."""
    ctrl = make_ctrl(
        Slope(1.3), ExactNetwork([[0.0]], [1.0], 1.0), 1, seed=0, steps=5, prompts_per_round=4, bound_samples=4
    )
    chain, keys = ctrl.chain(), row_keys(0, "b", torch.arange(4))
    with torch.no_grad():
        path = chain.run(chain.start((1,), keys, torch.device("cpu")), keys, None, keep=True)
    adjoints = chain.adjoints(path.states, None, torch.full((4, 1), 1.3))
    schedule = Linear()
    for index, value in enumerate(adjoints):
        there = schedule.at(chain.grid[index + 1])
        expected = 1.3 * (there.a / there.scale2)
        # the chain's own conditional mean equals the law's for Gaussian data and posterior steps
        torch.testing.assert_close(value, torch.full((4, 1), expected), rtol=1e-4, atol=1e-5)


def test_training_closes_the_gap_below_the_bound() -> None:
    ctrl = small(prompts_per_round=64, steps=8, bound_samples=4000)
    records = run_in_memory(ctrl, 40, Loop(1e-2), seed=0)
    assert records[-1]["ctrl/gap"] < 0.5 * float(ctrl.ledger.log_z.mean() - records[0]["ctrl/j"])
    for row in range(2):
        found = ctrl.correct("toy", row, 4000, seed=1)
        j = found.rewards - found.kl
        error = math.hypot(float(j.std()) / len(j) ** 0.5, float(ctrl.ledger.error[row]))
        assert float(j.mean()) <= float(ctrl.ledger.log_z[row]) + 3 * error


def test_memory_of_the_first_noise_and_its_refusal() -> None:
    """P2: rho² of 50 DDIM steps on the linear DDPM schedule; 3 digits of docs/methods/ctrl.md."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = Table.from_alphas_cumprod((1 - betas).cumprod(0).tolist())
    times = [float(table.time_of_index(torch.tensor(float(i), dtype=torch.float64))) for i in range(981, 0, -20)]
    for eta, expected in ((0.3, 0.47), (0.5, 0.115), (0.7, 0.013)):
        assert memory(table, [*times, 0.0], eta) == pytest.approx(expected, abs=0.02)
    assert memory(table, [*times, 0.0], 1.0) < 1e-3
    assert memory(Linear(), [1 - i / 20 for i in range(20)] + [0.0], 1.0) == 0.0
    with pytest.raises(UsageError, match=r"eta = 0.5.*rho² = 0\.\d+"):
        small(eta=0.5)
    assert small(eta=0.5, exact=False).rho2 > 0
    with pytest.raises(ValueError, match="eta = 0.0"):
        CtrlConfig(eta=0.0)


def test_labels_with_a_larger_gap_are_drawn_more() -> None:
    ledger = Ledger(2)
    assert ledger.shares(0.5).tolist() == [0.5, 0.5]
    ledger.log_z = torch.tensor([-0.5, -1.0], dtype=torch.float64)
    ledger.add(torch.tensor([0, 1]), torch.tensor([-1.5, -4.0]), torch.zeros(2), torch.zeros(2))
    ledger.close(CTX.group)
    assert ledger.shares(0.5).tolist() == pytest.approx([0.25 + 0.125, 0.25 + 0.375])


def test_stops_when_the_gap_is_closed() -> None:
    ctrl = small(stop_gap=0.1)
    assert ctrl.collect(CTX).updates == 1
    ctrl.ledger.j = ctrl.ledger.log_z - 0.05
    found = ctrl.collect(CTX)
    assert found.updates == 0 and found.metrics["ctrl/stopped"] == 1.0


def test_mean_kl_is_the_sum_over_values() -> None:
    """P1: "mean" divides the KL in the loss by the 2 values of a sample; metrics stay in summed units."""
    totals, kls = [], []
    for kl in ("sum", "mean"):
        ctrl = stirred(small(gamma=0.0, kl_reduction=kl))
        (micro,) = ctrl.minibatches(ctrl.collect(CTX).data, 0, CTX)
        out = ctrl.loss(micro, CTX)
        totals.append(float(out.total.detach()))
        kls.append(float(out.metrics["policy/kl"]))
    assert totals[0] == pytest.approx(2 * totals[1]) and kls[0] == kls[1] == pytest.approx(totals[0])


def test_refusals() -> None:
    class NoGradient:
        name, kind, differentiable = "blind", "item", False

    with pytest.raises(UsageError, match="no gradient"):
        small(NoGradient())
    with pytest.raises(UsageError, match="guidance_scale 3"):
        small(guidance_scale=3.0)
    with pytest.raises(UsageError, match="unconditional"):
        small(guidance="separate", guidance_scale=3.0)
    with pytest.raises(UsageError, match="held out"):
        small(held_out=((0,), (1,)))
    ctrl = small()
    assert conditioned(ctrl.base_task.denoiser) is ctrl.network


def test_saved_control_samples_as_it_was_trained(tmp_path: Path) -> None:
    ctrl = stirred(small())
    ctrl.save_final(tmp_path)
    base = Denoiser(ExactNetwork(MEANS, WEIGHTS, STD), GaussianProcess(Linear()), Prediction.V)
    loaded, plan = load_control(base, tmp_path / "control")
    assert plan == ctrl.plan
    labels = torch.ones(4, 1).long()
    found = [
        sample_controlled(model, plan, (4, 2), labels=labels, generator=[stream(0, "s", i) for i in range(4)]).detach()
        for model in (loaded, ctrl.base_task.denoiser)
    ]
    assert torch.equal(*found)
    assert load_control(base, tmp_path)[1] == plan  # the folder above it is understood
    with pytest.raises(UsageError, match="holds no control"):
        load_control(base, tmp_path / "absent")
