"""Particle samplers against closed forms: a linear-Gaussian chain whose law is known, a mixture, a table of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gencontrol.errors import RewardError, UsageError
from gencontrol.models import EnumerableTokens, GaussianMixture
from gencontrol.process import GaussianProcess, Linear, MaskedProcess
from gencontrol.sampling import confidence, ddim, sde
from gencontrol.sampling.chain import Chain, Twist, make_chain
from gencontrol.sampling.particles import Particles, Target, options_of, particles_for_budget, run, spend
from gencontrol.sampling.particles.resampling import effective_size, multinomial, systematic
from gencontrol.sampling.particles.steering import POTENTIALS, das_tempering
from gencontrol.sampling.samplers import PARTICLES
from gencontrol.sampling.scoring import Scorer
from gencontrol.types import RewardContext, RewardOut

STEPS = 8
GENTLE = 1.0  # slope of the reward over the temperature


def one_gaussian() -> GaussianMixture:
    """N(0.5, 0.8) in one dimension: every transition of its chain is linear-Gaussian."""
    return GaussianMixture(torch.tensor([[0.5]]), torch.tensor([[[0.8]]]), torch.ones(1), GaussianProcess(Linear()))


def two_modes() -> GaussianMixture:
    means = torch.tensor([[-1.5, 0.5], [1.5, -0.5]])
    covariances = torch.tensor([[[0.2, 0.05], [0.05, 0.1]], [[0.1, 0.0], [0.0, 0.3]]])
    return GaussianMixture(means, covariances, torch.tensor([0.8, 0.2]), GaussianProcess(Linear()))


def table() -> EnumerableTokens:
    weights = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 2
    return EnumerableTokens(weights, MaskedProcess(3, 3))


def chain_law(chain: Chain) -> tuple[float, float]:
    """Exact mean and variance of x0 under the discretised chain of `one_gaussian`."""
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, t_next in zip(chain.grid, chain.grid[1:]):
        found, std = chain.step.moments(chain.model, probe, t, t_next)  # type: ignore[attr-defined]
        shift, slope = float(found[0]), float(found[1] - found[0])
        mean, variance = slope * mean + shift, slope**2 * variance + (0.0 if t_next == 0 else float(std) ** 2)
    return mean, variance


def first(x: Tensor) -> Tensor:
    return x[:, 0].float()


def linear(slope: float) -> Callable[[Tensor], Tensor]:
    return lambda x: slope * first(x)


def weighted_mean(particles: Particles) -> float:
    return float(particles.weights @ particles.samples[:, 0].double())


#: samplers whose weights are right, with their options
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "snis": ("snis", {}),
    "smc": ("smc", {}),
    "smc-max": ("smc", {"potential": "max", "ess_threshold": 1.0}),
    "smc-add": ("smc", {"potential": "add", "ess_threshold": 1.0, "resample_at": 3}),
    "smc-always": ("smc", {"ess_threshold": 1.0}),
    "tds": ("tds", {}),
    "tds-all": ("tds", {"resample_at": "all", "ess_threshold": 1.0}),
    "das": ("das", {}),
    "dps-weighted": ("dps", {"importance": True, "scale": 0.7}),
    "tds-clipped": ("tds", {"max_norm": 0.3}),
}
ALL = {"best-of-n": ("best-of-n", {}), "beam": ("beam", {"children": 3}), "dps": ("dps", {}), **EXACT}


@pytest.mark.parametrize("name", EXACT)
def test_law_and_evidence_of_a_gaussian_chain(name: str, fenced_rng: None) -> None:
    """p·exp(a·x) of N(m, v) is N(m + a·v, v) with log Z = a·m + a²·v/2 (docs/methods/dts.md#law-gaussian-chain, for the
    discretised chain).
    """
    sampler, options = EXACT[name]
    model, temperature = one_gaussian(), 0.5
    mean, variance = chain_law(make_chain(model, (1,), steps=STEPS))
    found = run(
        sampler,
        model,
        linear(GENTLE * temperature),
        (4000, 1),
        steps=STEPS,
        temperature=temperature,
        generator=1,
        **options,
    )
    # relative variance of one weight is at most exp(a²·v)·few; the standard error of log Z is 1/sqrt(ess) at most
    tolerance = 4 / math.sqrt(found.ess)
    assert found.ess > 300
    assert bool(found.extras.get("resampled")) == (options.get("ess_threshold") == 1.0)
    assert abs(found.log_z - (GENTLE * mean + GENTLE**2 * variance / 2)) < tolerance
    assert abs(weighted_mean(found) - (mean + GENTLE * variance)) < tolerance
    spread = found.samples[:, 0].double() - weighted_mean(found)
    assert abs(float(found.weights @ spread.square()) - variance) < 1.5 * tolerance
    assert abs(mean - (mean + GENTLE * variance)) > 2 * tolerance  # the base law would be seen


@pytest.mark.parametrize("name", ["smc", "tds"])
def test_evidence_is_unbiased(name: str) -> None:
    """The mean of exp(log_z) over small runs is Z within 3 standard errors, with resampling in each run."""
    model, steps = one_gaussian(), 5
    mean, variance = chain_law(make_chain(model, (1,), steps=steps))
    exact = GENTLE * mean + GENTLE**2 * variance / 2
    runs = [run(name, model, linear(GENTLE), (16, 1), steps=steps, generator=s, ess_threshold=1.0) for s in range(50)]
    assert all(run.extras["resampled"][-2:] == [2, 3] for run in runs)
    ratios = torch.tensor([math.exp(run.log_z - exact) for run in runs], dtype=torch.float64)
    error = float(ratios.std()) / math.sqrt(len(ratios))
    assert error < 0.06
    assert abs(float(ratios.mean()) - 1) < 3 * error


def test_tds_with_the_exact_twist_has_equal_weights() -> None:
    """At constant variance the linear tilt's optimal transition is the shifted mean; TDS finds most of it."""
    plain = run("snis", one_gaussian(), linear(2.0), (1000, 1), steps=STEPS, generator=0)
    climbed = run("tds", one_gaussian(), linear(2.0), (1000, 1), steps=STEPS, generator=0, ess_threshold=0.0)
    assert climbed.extras["resampled"] == []
    assert climbed.ess > 2 * plain.ess


@pytest.mark.parametrize("name", ["snis", "smc", "tds"])
def test_mixture_tilted_by_linear_and_quadratic_rewards(name: str) -> None:
    """Weights of the modes, means and log Z of the tilted mixture; 40 steps, whose own error is about 0.03."""
    sampler, options = EXACT[name]
    model = two_modes()
    slope, curve = torch.tensor([0.8, -0.3], dtype=torch.float64), torch.diag(torch.tensor([0.4, 0.2])).double()
    reward = lambda x: (x.double() @ slope - 0.5 * ((x.double() @ curve) * x).sum(1)).float()  # noqa: E731
    exact = model.tilt(slope, curve)
    found = run(sampler, model, reward, (3000, 2), steps=40, generator=2, **options)
    tolerance = 4 / math.sqrt(found.ess) + 0.03
    assert abs(found.log_z - model.log_normaliser(slope, curve)) < tolerance
    right = (found.samples[:, 0] > 0).double()
    assert abs(float(found.weights @ right) - float(exact.weights[1])) < tolerance
    assert abs(float(exact.weights[1]) - 0.2) > 1.5 * tolerance
    target = exact.weights @ exact.means
    assert float((found.weights @ found.samples.double() - target).abs().max()) < 1.6 * tolerance


@pytest.mark.parametrize("name", ["snis", "smc"])
def test_tokens_tilted_by_a_table(name: str) -> None:
    """One token per step samples the table exactly, so the weighted law is the tilted table: total variation.

    Mean over 20 runs of 2000: 0.037 (snis), 0.049 (smc; its estimates are single draws, which is noise in the weights).
    """
    model = table()
    values = 0.8 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    reward = lambda x: values[tuple(x.unbind(1))].float()  # noqa: E731
    options = {"resample_at": "all", "ess_threshold": 1.0} if name == "smc" else {}
    step = confidence(temperature=1.0)
    found = run(name, model, reward, (3000, 3), steps=3, step=step, generator=1, **options)
    place = (found.samples * torch.tensor([9, 3, 1])).sum(1)
    law = torch.zeros(27, dtype=torch.float64).index_add(0, place, found.weights)
    exact = model.tilt(values).table.reshape(-1)
    assert 0.5 * float((law - exact).abs().sum()) < 0.07
    assert 0.5 * float((model.table.reshape(-1) - exact).abs().sum()) > 0.2
    log_z = float((model.table * values.exp()).sum().log())
    assert abs(found.log_z - log_z) < 4 / math.sqrt(found.ess)
    assert found.nfe == 9000


def test_forgotten_weights_are_measurably_wrong() -> None:
    """P14: with small potentials at every step the published rule never resamples, and so never tilts."""
    model = one_gaussian()
    mean, variance = chain_law(make_chain(model, (1,), steps=16))
    runs = {
        potential: run(
            "smc", model, linear(1.0), (2000, 1), steps=16, generator=0, resample_at="all", potential=potential
        )
        for potential in ("diff", "fk-published")
    }
    ours, theirs = (weighted_mean(run) - (mean + variance) for run in runs.values())
    assert abs(ours) < 0.1
    assert theirs < -0.3
    assert math.isnan(runs["fk-published"].log_z)
    assert torch.allclose(runs["fk-published"].weights, torch.full((2000,), 1 / 2000).double())


@pytest.mark.parametrize("name", ["smc", "tds"])
def test_values_move_with_their_particles(name: str) -> None:
    """DAS issue 1: the law survives values that stay behind in resampling, but the weights collapse to 1-3 of 200."""
    found = run(
        name, one_gaussian(), linear(2.0), (200, 1), steps=12, resample_at="all", ess_threshold=1.0, generator=0
    )
    assert found.ess > (100 if name == "smc" else 190)


def test_copies_diverge_and_origins_are_counted() -> None:
    found = run(
        "smc", one_gaussian(), linear(2.0), (200, 1), steps=6, resample_at="all", ess_threshold=1.0, generator=0
    )
    assert len(found.samples.unique()) == 200
    assert 1 <= found.extras["origins"] < 150
    assert found.extras["resampled"] == [1, 2, 3, 4]


def test_systematic_resampling_is_unbiased_and_even() -> None:
    log = torch.tensor([0.05, 0.3, 0.0, 0.4, 0.25], dtype=torch.float64).log() + 700.0
    expected = 5 * torch.softmax(log, 0)
    counts = torch.stack([torch.bincount(systematic(log, (i + 0.5) / 400), minlength=5) for i in range(400)]).double()
    assert bool(((counts - expected).abs() < 1).all())
    assert torch.allclose(counts.mean(0), expected, atol=0.01)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.bincount(multinomial(log, draws), minlength=5).double() / 4000
    assert float((shares - expected / 5).abs().max()) < 0.03
    assert shares[2] == 0
    assert effective_size(log) == pytest.approx(1 / float((expected / 5).square().sum()))


@pytest.mark.parametrize("kind", ["gaussian", "tokens"])
def test_beam_of_one_child_is_the_base_sampler(kind: str) -> None:
    model, shape, steps = (two_modes(), (6, 2), 5) if kind == "gaussian" else (table(), (6, 3), 3)
    plain = run("best-of-n", model, first, shape, steps=steps, generator=4)
    assert torch.equal(run("beam", model, first, shape, steps=steps, generator=4, children=1).samples, plain.samples)
    wide = run("beam", model, first, shape, steps=steps, generator=4, children=6)
    assert float(wide.rewards.mean()) > float(plain.rewards.mean())


def test_gradient_without_scale_is_the_base_sampler() -> None:
    model = two_modes()
    plain = run("best-of-n", model, first, (8, 2), steps=5, generator=4)
    still = run("dps", model, first, (8, 2), steps=5, generator=4, scale=0.0)
    assert torch.equal(still.samples, plain.samples)
    assert torch.equal(still.extras["log_ratio"], torch.zeros(8, dtype=torch.float64))
    moved = run("dps", model, first, (8, 2), steps=5, generator=4)
    assert float(moved.rewards.mean()) > float(plain.rewards.mean())


@pytest.mark.parametrize("name", ALL)
def test_constant_reward_gives_equal_weights(name: str) -> None:
    sampler, options = ALL[name]
    if options.get("importance"):
        options = {**options, "scale": 1.0}
    reward = lambda x: 0.0 * first(x) + 3.0  # noqa: E731
    found = run(sampler, two_modes(), reward, (16, 2), steps=5, temperature=0.5, generator=0, **options)
    assert torch.allclose(found.weights, torch.full((16,), 1 / 16, dtype=torch.float64), atol=1e-6)
    assert found.ess == pytest.approx(16, rel=1e-6)
    if not math.isnan(found.log_z):
        assert found.log_z == pytest.approx(6.0, abs=1e-5)


@pytest.mark.parametrize("name", ["best-of-n", "snis", "smc", "tds", "das", "dps", "beam", "smc-max"])
def test_samples_without_a_score_have_no_weight(name: str) -> None:
    """NaN where x > 0.5: the law is the tilt of what remains."""
    sampler, options = ALL[name]
    reward = lambda x: torch.where(x[:, 0] > 0.5, float("nan"), first(x))  # noqa: E731
    found = run(sampler, one_gaussian(), reward, (40, 1), steps=5, generator=0, **options)
    assert torch.equal(found.valid, ~(found.samples[:, 0] > 0.5))
    assert 0 < int(found.valid.sum())
    assert torch.equal(found.weights > 0, found.valid) or name == "best-of-n"
    assert float(found.weights[~found.valid].sum()) == 0
    assert float(found.weights.sum()) == pytest.approx(1)
    assert bool((found.best(50)[:, 0] <= 0.5).all())


def test_nothing_scored_is_an_error() -> None:
    with pytest.raises(RewardError, match="finite weight.*NaN"):
        run("smc", one_gaussian(), lambda x: first(x) * float("nan"), (4, 1), steps=4, generator=0)


@dataclass
class Counting:
    """A model that counts its rows."""

    inner: Any
    rows: int = 0

    @property
    def process(self) -> Any:
        return self.inner.process

    def __call__(self, xt: Tensor, t: Any, cond: Any = None) -> Any:
        self.rows += len(xt)
        return self.inner(xt, t, cond)


@pytest.mark.parametrize("name", PARTICLES)
def test_budget_is_kept_and_counted(name: str) -> None:
    model, steps = Counting(two_modes()), 6
    calls: list[int] = []
    scorer = Scorer(lambda x: calls.append(len(x)) or first(x))
    chain = make_chain(model, (2,), steps=steps)
    each = 1 + 10 * (steps - 1) if name == "beam" else steps
    budget = 3 * each + each - 1
    found = spend(name, Target(chain, scorer), budget)
    assert found.nfe == model.rows == 3 * each <= budget
    assert found.reward_calls == sum(calls)
    assert len(found) == particles_for_budget(name, budget, steps)
    with pytest.raises(UsageError, match="costs"):
        spend(name, Target(chain, Scorer(first)), each - 1)


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_change_nothing(name: str) -> None:
    sampler, options = ALL[name]
    whole, parts = (
        run(sampler, two_modes(), first, (12, 2), steps=5, generator=7, batch=batch, **options) for batch in (None, 5)
    )
    assert torch.allclose(whole.samples, parts.samples, atol=1e-6)
    assert torch.allclose(whole.weights, parts.weights, atol=1e-6)
    assert (whole.nfe, whole.reward_calls) == (parts.nfe, parts.reward_calls)
    other = run(sampler, two_modes(), first, (12, 2), steps=5, generator=8, **options)
    assert not torch.allclose(whole.samples, other.samples, atol=1e-3)


def test_conditions_and_contexts_reach_every_row() -> None:
    """The condition switches the mixture to its right mode; the context has one prompt."""
    seen: set[str] = set()

    def reward(x: Tensor, context: RewardContext) -> Tensor:
        seen.update(context.prompts or [])
        assert len(context.prompts or []) == len(x)
        return first(x)

    found = run(
        "smc",
        two_modes(),
        reward,
        (9, 2),
        steps=8,
        generator=torch.Generator().manual_seed(1),
        cond=torch.tensor([[0.0, 1.0]]),
        context=RewardContext(prompts=["right"]),
        step=ddim(eta=1.0),
        batch=4,
    )
    assert seen == {"right"}
    assert bool((found.samples[:, 0] > 0).all())


def test_das_fades_the_reward_in_as_published() -> None:
    assert das_tempering(0, 50) == 0.0
    assert das_tempering(30, 100) == pytest.approx(1.008**30 - 1)
    assert das_tempering(15, 50) == pytest.approx(1.008**30 - 1)
    assert das_tempering(99, 100) == 1.0


def test_readout() -> None:
    found = run("snis", one_gaussian(), linear(1.0), (500, 1), steps=5, generator=0)
    top = found.best(3)[:, 0]
    assert torch.equal(top, found.samples[:, 0].sort(descending=True).values[:3])
    drawn = found.sample(4000, torch.Generator().manual_seed(0))
    assert abs(float(drawn.mean()) - weighted_mean(found)) < 4 / math.sqrt(4000)
    assert len(run("best-of-n", one_gaussian(), first, (5, 1), steps=4, generator=0).sample(7).unique()) == 1


class NoGradient:
    """An item reward that says it has no gradient."""

    name, kind, differentiable = "steps", "item", False

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        return RewardOut(first(samples).round(), torch.ones(len(samples), dtype=torch.bool))


def test_errors_say_what_to_do() -> None:
    model = one_gaussian()
    for name in ("tds", "das", "dps"):
        with pytest.raises(UsageError, match="not differentiable"):
            run(name, model, NoGradient(), (3, 1), steps=3, generator=0)
        with pytest.raises(UsageError, match="no gradient"):
            run(name, model, lambda x: first(x).detach(), (3, 1), steps=3, generator=0)
        with pytest.raises(UsageError, match="tokens"):
            run(name, table(), first, (3, 3), steps=3, generator=0)
    for name in ("best-of-n", "smc", "beam", "tds"):
        with pytest.raises(UsageError, match="deterministic"):
            run(name, model, first, (3, 1), steps=3, step="euler")
        with pytest.raises(UsageError, match="deterministic"):
            run(name, model, first, (3, 1), steps=3, step=sde(level=0.0))
        with pytest.raises(UsageError, match="temperature"):
            run(name, model, first, (3, 1), steps=3, temperature=0.0, generator=0)
        with pytest.raises(UsageError, match="shape"):
            run(name, model, first, (3,), steps=3, generator=0)
        with pytest.raises(UsageError, match="batch 1"):
            run(name, model, first, (3, 1), steps=3, cond=torch.ones(3, 1), generator=0)
    with pytest.raises(UsageError, match="mean 'max'"):
        run("smc", model, first, (3, 1), steps=3, potential="maxx", generator=0)
    with pytest.raises(UsageError, match="not in the time grid"):
        run("smc", model, first, (3, 1), steps=4, resample_at=[0.61], generator=0)
    chain = make_chain(model, (1,), steps=3)
    with pytest.raises(UsageError, match="no option 'childs'"):
        spend("beam", Target(chain, Scorer(first)), 100, childs=3)
    with pytest.raises(UsageError, match="mean 'smc'"):
        spend("smcc", Target(chain, Scorer(first)), 100)
    with pytest.raises(UsageError, match="'dts' is no particle sampler"):
        run("dts", model, first, (3, 1), steps=3, generator=0)
    with pytest.raises(UsageError, match="without a twist"):
        spend(
            "smc",
            Target(make_chain(model, (1,), steps=3, twist=Twist(lambda x, r: x, lambda t: 1.0)), Scorer(first)),
            9,
        )
    published = {f"fk-published{kind}" for kind in ("", "-max", "-add", "-rt")}
    assert set(POTENTIALS) == {"diff", "max", "add", "rt", *published}
    assert options_of("smc") == ["resample_at", "ess_threshold", "potential"]
