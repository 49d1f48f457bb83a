"""DPO, KTO and positive-only: values and gradients at θ = ref, roles of the sets, Q over the whole optimizer batch."""

from __future__ import annotations

import math

import pytest
import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.matching.dragon import Dragon
from gencontrol.algorithms.matching.preference import Errors, dpo, kto, positive_only
from gencontrol.algorithms.online.rollout import draw_times
from gencontrol.rng import stream
from tests.helpers.dragon_worlds import Share, make_dragon

CTX = StepContext(seed=0, step=0, micro_batch=1000)


def errors(shift: float = 0.0) -> Errors:
    """Errors of five pairs, at distance `shift` from the reference."""
    rows = torch.rand(4, 5, generator=stream(0, "test/errors"))
    return Errors(rows[0] + shift * rows[2], rows[1] - shift * rows[3], rows[0], rows[1])


def flat_gradient(dragon: Dragon, value: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(value, dragon.roles.trainable(), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def update_gradient(dragon: Dragon, data, update: int, ctx: StepContext) -> tuple[torch.Tensor, list]:
    """Gradient of one update as the Trainer accumulates it, and the micro-batches."""
    micros = list(dragon.minibatches(data, update, ctx))
    total, count = 0.0, 0
    for micro in micros:
        out = dragon.loss(micro, ctx)
        total, count = total + flat_gradient(dragon, out.total), count + out.count
    return total / count, micros


def mean_errors(dragon: Dragon, micros: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ℓ(D+) and mean ℓ(D−) with gradient, straight from the network, without the algorithm's code."""
    network, plus, minus = dragon.task.denoiser.network, [], []
    for micro in micros:
        t = micro.t[:, None]
        for x0, into in ((micro.positive, plus), (micro.negative, minus)):
            velocity = network((1 - t) * x0 + t * micro.noise, micro.t, micro.cond)
            into.append((velocity - (micro.noise - x0)).square().mean(1))
    return torch.cat(plus).mean(), torch.cat(minus).mean()


def test_losses_at_the_reference() -> None:
    """θ = ref: DPO log 2, KTO 0.5 for both classes; a member that equals its partner has zero DPO gradient."""
    torch.testing.assert_close(dpo(errors(), 7.0, 0.0), torch.full((5,), math.log(2)))
    torch.testing.assert_close(kto(errors(), 7.0, 0.0), torch.full((10,), 0.5))
    torch.testing.assert_close(positive_only(errors(), 1.0, 0.0), errors().positive)
    same = torch.rand(5, generator=stream(1, "test/errors")).requires_grad_()
    ref = torch.rand(5, generator=stream(2, "test/errors"))
    loss = dpo(Errors(same, same, ref, ref), 7.0, 0.0)
    torch.testing.assert_close(loss, torch.full((5,), math.log(2)))
    (gradient,) = torch.autograd.grad(loss.sum(), same)
    assert torch.equal(gradient, torch.zeros(5))


def test_identical_pairs_train_nothing_under_dpo() -> None:
    """Every pair twice the same sample: DPO loss log 2, KTO 0.5, and exactly no DPO gradient through the network."""
    for name, value in (("dpo", math.log(2)), ("kto", 0.5)):
        dragon = make_dragon(loss=name, beta=50.0)
        data = dragon.collect(CTX).data
        (micro,) = dragon.minibatches(data, 0, CTX)
        twin = type(micro)(**{**vars(micro), "negative": micro.positive, "reference": micro.reference[[0, 0]]})
        out = dragon.loss(twin, CTX)
        assert out.total.item() / out.count == pytest.approx(value, abs=1e-6)
        if name == "dpo":  # the two halves cancel term by term; 1e-7 is float32 rounding of the batch sums
            assert flat_gradient(dragon, out.total).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "factor"), [("kto", 1 / 8), ("dpo", 1 / 4)])
def test_gradient_formula_at_the_reference(name: str, factor: float) -> None:
    """KTO: (β/4)·½·∇(mean ℓ+ − mean ℓ−); DPO: (β/4)·∇(mean ℓ+ − mean ℓ−), with ℓ computed without our code."""
    dragon = make_dragon(loss=name, beta=2.0)
    gradient, micros = update_gradient(dragon, dragon.collect(CTX).data, 0, CTX)
    plus, minus = mean_errors(dragon, micros)
    expected = 2.0 * factor * flat_gradient(dragon, plus - minus)
    assert expected.norm() > 1e-3
    # 2e-5: float32 sums of 36 terms in another order, relative to the gradient's size
    assert (gradient - expected).norm() < 2e-5 * expected.norm()


def test_positive_only_is_plain_regression_on_the_winners() -> None:
    dragon = make_dragon(loss="positive")
    gradient, micros = update_gradient(dragon, dragon.collect(CTX).data, 0, CTX)
    expected = flat_gradient(dragon, mean_errors(dragon, micros)[0])
    assert (gradient - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("name", ["kto", "dpo"])
def test_swapping_the_sets_flips_the_gradient(name: str) -> None:
    dragon = make_dragon(loss=name, beta=3.0)
    data = dragon.collect(CTX).data
    (micro,) = dragon.minibatches(data, 0, CTX)
    swapped = type(micro)(
        **{**vars(micro), "positive": micro.negative, "negative": micro.positive, "reference": micro.reference.flip(0)}
    )
    one, two = (flat_gradient(dragon, dragon.loss(m, CTX).total) for m in (micro, swapped))
    assert one.norm() > 1e-3
    torch.testing.assert_close(one, -two, rtol=1e-4, atol=1e-5 * float(one.norm()))


def test_both_members_of_a_pair_share_time_and_noise() -> None:
    """Equal members in D+ and D− get equal errors, hence the same t and ε; other pairs and updates get others."""
    dragon = make_dragon()
    data = dragon.collect(CTX).data
    (first,), (second,) = (list(dragon._cut(data, update, CTX)) for update in (0, 1))
    twin = type(first)(**{**vars(first), "negative": first.positive})
    x0, t, noise, cond = dragon._stacked(twin)
    half = len(first.t)
    for tensor in (x0, t, noise, cond):
        assert torch.equal(tensor[:half], tensor[half:])
    assert len(first.t.unique()) == half and not torch.equal(first.t, second.t)
    assert not torch.equal(first.noise, second.noise) and not torch.equal(first.noise[0], first.noise[1])


@pytest.mark.parametrize("reference", ["per_round", "frozen", "ema"])
def test_baseline_and_gradient_do_not_depend_on_micro_batches(reference: str) -> None:
    """After θ has moved (Q > 0), micro-batches of 2, 5 and all samples give one Q and one gradient."""
    results = []
    for micro_batch in (1000, 5, 2):
        ctx = StepContext(seed=0, step=0, micro_batch=micro_batch)
        dragon = make_dragon(loss="kto", beta=20.0, reference=reference)
        data = dragon.collect(CTX).data
        optimizer = torch.optim.SGD(dragon.roles.trainable(), lr=0.05)
        for _ in range(3):  # lower both errors, so that the mean of g is positive and the clamp is not what is tested
            optimizer.zero_grad()
            plus, minus = mean_errors(dragon, list(dragon._cut(data, 1, CTX)))
            (plus + minus).backward()
            optimizer.step()
        dragon.roles.trainable()[0].grad = None
        gradient, micros = update_gradient(dragon, data, 1, ctx)
        out = dragon.loss(micros[0], ctx)
        results.append((float(out.metrics["policy/baseline"]) / out.count, gradient))
    assert results[0][0] > 0.01, "Q must be positive, or the test says nothing"
    for q, gradient in results[1:]:
        assert q == pytest.approx(results[0][0], rel=1e-4)
        assert (gradient - results[0][1]).norm() < 1e-4 * results[0][1].norm()


def test_baseline_is_a_constant_of_the_graph() -> None:
    """A Q with gradient would change the KTO gradient; compare with the formula that holds Q fixed."""
    dragon = make_dragon(loss="kto", beta=5.0, kl_coef=0.0)
    data = dragon.collect(CTX).data
    with torch.no_grad():
        for parameter in dragon.roles.trainable():
            parameter *= 0.9
    (micro,) = dragon.minibatches(data, 1, CTX)
    out = dragon.loss(micro, CTX)
    baseline = float(out.metrics["policy/baseline"]) / out.count
    t = micro.t[:, None]
    network, parts = dragon.task.denoiser.network, []
    for x0 in (micro.positive, micro.negative):
        velocity = network((1 - t) * x0 + t * micro.noise, micro.t, micro.cond)
        parts.append((velocity - (micro.noise - x0)).square().mean(1))
    by_hand = kto(Errors(*parts, *micro.reference), 5.0, baseline).sum()
    torch.testing.assert_close(flat_gradient(dragon, out.total), flat_gradient(dragon, by_hand), rtol=1e-4, atol=1e-5)


def test_kl_term_pulls_to_the_base() -> None:
    """kl_coef adds kl_coef·β·mean ‖v_θ − v_base‖² per item, nothing at θ = base."""
    plain, tied = (make_dragon(loss="dpo", beta=3.0, kl_coef=k) for k in (0.0, 2.0))
    for dragon in (plain, tied):
        dragon.data = dragon.collect(CTX).data
    at_base = [d.loss(next(iter(d.minibatches(d.data, 0, CTX))), CTX) for d in (plain, tied)]
    assert at_base[0].total.item() == pytest.approx(at_base[1].total.item(), rel=1e-6)
    for dragon in (plain, tied):
        with torch.no_grad():
            dragon.task.denoiser.network.body[-1].bias += 0.5
    moved = [d.loss(next(iter(d.minibatches(d.data, 1, CTX))), CTX) for d in (plain, tied)]
    # the output bias moved by 0.5: ‖v_θ − v_base‖² = 0.25 on every axis, at every t
    assert (moved[1].total - moved[0].total).item() / moved[0].count == pytest.approx(2.0 * 3.0 * 0.25, rel=1e-4)
    assert float(moved[1].metrics["loss/kl"]) / moved[1].count == pytest.approx(0.25, rel=1e-4)


def test_times_are_uniform_and_stratified() -> None:
    """Each of n strata of (0, 1) holds exactly one time, in random order."""
    t = draw_times(64, 0, "test/times", 3)
    assert torch.equal((t * 64).long().sort().values, torch.arange(64)) and not torch.equal(t, t.sort().values)
    assert not torch.equal(t, draw_times(64, 0, "test/times", 4))


def test_set_rewards_reach_the_loss() -> None:
    """A set reward gives pairs as well, and the same prompts on both sides."""
    collected = make_dragon(Share(), split="gap").collect(CTX)
    assert collected.updates == 2 and collected.metrics["reward/mean"] <= 0
    assert collected.data.positive.shape == collected.data.negative.shape
