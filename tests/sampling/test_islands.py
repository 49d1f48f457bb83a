"""Calibrated islands: the fit against its closed form, the evidence, the pooled law, and going on to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gencontrol.models import EnumerableTokens, GaussianMixture
from gencontrol.process import GaussianProcess, Linear, MaskedProcess
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.particles import Particles, Target, run
from gencontrol.sampling.particles.islands import Island, calibrate, grouped_size, grow, matched, next_size, pool, ramp
from gencontrol.sampling.scoring import Scorer


def one_gaussian() -> GaussianMixture:
    return GaussianMixture(torch.tensor([[0.5]]), torch.tensor([[[0.8]]]), torch.ones(1), GaussianProcess(Linear()))


def linear(slope: float) -> Callable[[Tensor], Tensor]:
    return lambda x: slope * x[:, 0].float()


def target_of(model: object, reward: Callable[[Tensor], Tensor], shape: tuple[int, ...], steps: int) -> Target:
    return Target(make_chain(model, shape, steps=steps), Scorer(reward, batch=10_000), seed=3)


def test_the_fit_is_the_closed_form() -> None:
    """v ~ N(0, 1) and target ∝ exp(a·v): moment matching gives β = a.  With 20,000 points the mean of v has a standard
    error of 0.007, and dE/dβ = 1.
    """
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros_like(values)
    for slope in (0.3, 1.0):
        fit = matched(values, zero, slope * values)
        assert fit is not None and abs(fit - slope) < 1e-6  # the same points on both sides: no noise at all
    assert matched(values, zero, -values) == pytest.approx(0.0, abs=1e-6)
    assert matched(torch.ones(5), torch.zeros(5), torch.zeros(5)) is None


def test_a_linear_reward_on_one_gaussian_is_trusted_wholly() -> None:
    """x̂0 is linear in x there, so the true value is λ·r(x̂0) plus a constant: β = 1 at every level.

    The standard error of β is 1/(sd(v)·sqrt(n)); of 8000 particles about 5000 are effective.  sd(v) is 0.29 at first,
    above 0.7 later.
    """
    target = target_of(one_gaussian(), linear(1.5), (1,), 40)
    done = list(grow(target, [], 8000))
    assert ramp(4) == pytest.approx((0.2, 0.4, 0.6, 0.8)) and done[0].betas == (0.0,) * 4  # the scouts
    seen = torch.cat([each.seen for each in done], 1)
    for level, beta in enumerate(calibrate(done, 4)):
        assert abs(beta - 1) < 4 / (float(seen[level].std()) * math.sqrt(5000)), (level, beta)


def test_the_floor_keeps_a_part_of_the_base_law() -> None:
    """ψ = α + (1 - α)·exp(β·v)/E_p[exp(β·v)]: never below α, and its mean over the base law is 1."""
    from gencontrol.sampling.particles.islands import FLOOR, _potential

    target = target_of(one_gaussian(), linear(3.0), (1,), 10)
    done = list(grow(target, [], 3000))
    base = done[0]  # plain paths
    shape = _potential(done, {0: 0.7}, target)
    psi = shape(0, base.seen[0]).exp()
    assert float(psi.min()) >= FLOOR and float(shape(0, torch.tensor([-1e6])).exp()) == pytest.approx(FLOOR)
    assert float(psi.mean()) == pytest.approx(1.0, abs=4 * float(psi.std()) / math.sqrt(len(psi)))
    assert torch.equal(_potential([], {0: 0.7}, target)(0, base.seen[0]), 0.7 * base.seen[0])


@pytest.mark.slow
def test_a_lookahead_that_misleads_hides_no_mode() -> None:
    """The narrow band of `bench dts`: SMC misses a part that its lookahead speaks against, and its mean Ẑ/Z is
    below 0.7; islands of as many calls are within 0.15 of 1 (ten runs, standard error 0.04).
    """
    from gencontrol.bench.dts.battery import gaussians
    from gencontrol.sampling.particles import spend

    problem = next(each for each in gaussians() if each.name.startswith("band"))

    def mean(name: str) -> float:
        found = []
        for seed in range(10):
            target = Target(problem.chain, Scorer(problem.reward, batch=4096), 1.0, seed)
            log_z = spend(name, target, 40_000 // problem.price, resample_at=problem.branch).log_z
            found.append(math.exp(log_z - problem.log_z))
        return sum(found) / 10

    assert mean("smc") < 0.7
    assert abs(mean("islands") - 1) < 0.15


def test_a_constant_reward_leaves_nothing_to_learn() -> None:
    found = run("islands", one_gaussian(), lambda x: 3.0 + 0 * x[:, 0].float(), (500, 1), steps=10, generator=0)
    assert found.log_z == pytest.approx(3.0, abs=1e-9)
    assert float(found.log_weights.max() - found.log_weights.min()) < 1e-6
    assert found.extras["betas"][1] == pytest.approx(ramp(4))  # nothing speaks against the ramp
    assert found.ess == pytest.approx(500)


@pytest.mark.slow
def test_the_evidence_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean of exp(log_z) over runs of 2 scouts and islands of 8 and 10 particles, β learned from those before, within 3
    standard errors; the Gaussian chain has log Z = a·m + a²·v/2.
    """
    from gencontrol.sampling.particles import islands
    from tests.sampling.test_particles import chain_law

    monkeypatch.setattr(islands, "ALONE", 10)
    model, slope, steps, runs = one_gaussian(), 1.0, 3, 120
    mean, variance = chain_law(make_chain(model, (1,), steps=steps))
    target = target_of(model, linear(slope), (1,), steps)
    found = torch.empty(runs, dtype=torch.float64)
    for seed in range(runs):
        both = list(grow(replace(target, seed=seed), [], 20, resample_at=[2 / 3]))
        assert seed or [len(each) for each in both] == [2, 8, 10]
        found[seed] = pool(target, both).log_z
    ratio = (found - slope * mean - slope**2 * variance / 2).exp()
    error = float(ratio.std()) / math.sqrt(runs)
    assert error < 0.04
    assert abs(float(ratio.mean()) - 1) < 3 * error


def made(x: list[float], log_weights: list[float]) -> Island:
    n, zeros = len(x), torch.zeros(len(x), dtype=torch.float64)
    nothing = torch.zeros(0, n)
    log = torch.tensor(log_weights, dtype=torch.float64)
    every = torch.ones(n, dtype=torch.bool)
    states, places, start = torch.tensor(x)[:, None], nothing.long(), torch.arange(n)
    return Island(states, zeros, every, zeros, log, nothing.double(), places, start, (), n, n, {}, [])


def test_an_island_without_a_mode_has_a_small_say() -> None:
    """The mode at 1 has 9/10 of the weight; the second island never met it.  Its law alone says 0, and pooling the
    normalised laws would give half of the share back; unnormalised, the mode keeps 9/(10 + 1) of equal coefficients.
    """
    target = target_of(one_gaussian(), linear(1.0), (1,), 4)
    both = made([1.0] * 10 + [-1.0] * 10, [math.log(9.0)] * 10 + [0.0] * 10)
    missed = made([-1.0] * 20, [0.0] * 20)
    found = pool(target, [both, missed])
    share = float(found.weights[found.samples[:, 0] > 0].sum())
    a = both.ess / (both.ess + missed.ess)
    # mean weights: 5 at both, 1 at the other; the mode's part of the first is 4.5
    assert share == pytest.approx(4.5 * a / (5 * a + (1 - a)))
    assert found.log_z == pytest.approx(math.log(0.5 * 5 + 0.5 * 1))
    assert any("islands disagree" in text for text in found.extras["warnings"])


def test_few_starts_are_told() -> None:
    with pytest.warns(UserWarning, match="few independent starts"):
        found = run("islands", one_gaussian(), linear(12.0), (200, 1), steps=10, generator=0)
    assert found.ess < 30 and found.ess <= 200
    log = torch.zeros(4)
    assert grouped_size(log, torch.tensor([0, 0, 1, 1])) == pytest.approx(2.0)
    assert grouped_size(log, torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)


def test_plans_of_islands() -> None:
    """Every run ends with the particles it was asked for; and going on multiplies them by about three."""

    def plan(total: int, *sizes: int) -> list[int]:
        made = list(sizes)
        while sum(made) < total:
            made.append(next_size(made, total))
            assert made[-1] > 0
        assert sum(made) == total
        return made

    for total in (10, 199, 200, 1000, 3000, 100_000):
        for start in ((), (7,), (150,), (7, 3)):
            if sum(start) < total:
                plan(total, *start)
    assert plan(199) == [199] and plan(400) == [20, 160, 220] and plan(2000) == [100, 800, 1100]
    assert plan(9000, 100, 900) == [100, 900, 2000, 6000]


def tokens() -> tuple[EnumerableTokens, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(3, 3, 3, 3, generator=generator, dtype=torch.float64) ** 2
    rewards = torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64)
    return EnumerableTokens(weights, MaskedProcess(3, 4)), rewards


def test_tokens_follow_the_tilted_table() -> None:
    """4000 paths of about 1500 effective ones over 81 sequences: total variation about sqrt(81/1500)/2.5 = 0.09."""
    model, rewards = tokens()
    found = run("islands", model, lambda x: rewards[tuple(x.unbind(1))], (4000, 4), steps=16, generator=0, batch=512)
    law = model.tilt(rewards).table.flatten()
    place = (found.samples * torch.tensor([27, 9, 3, 1])).sum(1)
    mine = torch.zeros(81, dtype=torch.float64).index_add_(0, place, found.weights)
    assert float((mine - law).abs().sum()) / 2 < 0.12


def equal(a: Particles, b: Particles) -> bool:
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("samples", "rewards", "log_weights"))
    return same and (a.nfe, a.reward_calls, a.log_z, a.ess) == (b.nfe, b.reward_calls, b.log_z, b.ess)


def test_going_on_gives_the_same_bits() -> None:
    target = target_of(one_gaussian(), linear(2.0), (1,), 10)
    whole = list(grow(target, [], 600))
    stopped = [next(grow(target, [], 600))]
    assert equal(pool(target, whole), pool(target, stopped + list(grow(target, stopped, 600))))
    more = whole + list(grow(target, whole, 1200))
    assert [len(each) for each in more] == [30, 240, 330, 600]
    assert pool(target, more).nfe == 12_000
    assert all(value >= 0 for each in more for value in each.betas)
