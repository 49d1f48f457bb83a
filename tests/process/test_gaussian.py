"""The Gaussian process: corruption, steps that keep the marginals, path KL, matching of signal-to-noise ratios."""

from __future__ import annotations

import math

import pytest
import torch
from test_schedule import SCHEDULES

from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_corrupt_takes_a_time_per_item() -> None:
    process, x0, noise = GaussianProcess(Cosine()), _randn(3, 2, 4), _randn(3, 2, 4, seed=1)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    xt = process.corrupt(x0, t, noise)
    torch.testing.assert_close(xt[0], x0[0])
    torch.testing.assert_close(xt[2], noise[2])
    torch.testing.assert_close(xt[1], math.cos(0.2 * math.pi) * x0[1] + math.sin(0.2 * math.pi) * noise[1])
    torch.testing.assert_close(xt[1:2], process.corrupt(x0[1:2], 0.4, noise[1:2]))


def test_corrupt_keeps_float32_with_float64_times() -> None:
    xt = GaussianProcess(VP()).corrupt(
        torch.ones(2, 3), torch.tensor([0.1, 0.5], dtype=torch.float64), torch.ones(2, 3)
    )
    assert xt.dtype == torch.float32


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_transition_keeps_the_marginal(name: str, eta: float) -> None:
    process, x0 = GaussianProcess(SCHEDULES[name]), _randn(1, 3)
    mean0, std = process.transition(x0, torch.zeros_like(x0), 0.7, 0.45, eta)
    mean1, _ = process.transition(x0, torch.ones_like(x0), 0.7, 0.45, eta)
    there = process.schedule.at(0.45)
    # given x0, eps ~ N(0, 1): x' must be N(a'·x0, s'²)
    torch.testing.assert_close(mean0, there.a * x0)
    torch.testing.assert_close((mean1 - mean0) ** 2 + std**2, torch.full_like(x0, there.s**2))


@pytest.mark.parametrize("name", ["linear", "vp", "edm"])
def test_transition_with_eta_one_is_the_bayes_posterior(name: str) -> None:
    process = GaussianProcess(SCHEDULES[name])
    here, there = process.schedule.at(0.7), process.schedule.at(0.45)
    x0, xt = _randn(1, 4), _randn(1, 4, seed=3)
    eps = (xt - here.a * x0) / here.s
    mean, std = process.transition(x0, eps, 0.7, 0.45, 1.0)
    # q(x' | x_t, x0) from q(x_t | x') = N(α·x', β²), q(x' | x0) = N(a'·x0, s'²)
    alpha = here.a / there.a
    beta2 = here.s**2 - alpha**2 * there.s**2
    precision = 1 / there.s**2 + alpha**2 / beta2
    torch.testing.assert_close(mean, (there.a * x0 / there.s**2 + alpha * xt / beta2) / precision)
    assert std == pytest.approx(precision**-0.5)


@pytest.mark.parametrize("schedule", [Linear(), VP(), Edm()])
def test_transition_to_zero_is_the_clean_sample(schedule) -> None:
    x0 = _randn(2, 3)
    for t, zero in ((0.2, 0.0), (torch.tensor([0.2, 0.9]), torch.zeros(2))):
        mean, std = GaussianProcess(schedule).transition(x0, _randn(2, 3, seed=1), t, zero, 1.0)
        torch.testing.assert_close(mean, x0, rtol=1e-6, atol=1e-6)
        assert float(torch.as_tensor(std).abs().max()) == 0.0


def test_transition_from_pure_noise_is_finite() -> None:
    mean, std = GaussianProcess(Linear()).transition(torch.ones(1, 2), torch.ones(1, 2), 1.0, 0.5, 1.0)
    torch.testing.assert_close(mean, torch.full((1, 2), 0.5))
    assert std == pytest.approx(0.5)


def test_transition_refuses_eta_outside_range() -> None:
    with pytest.raises(ValueError, match="eta"):
        GaussianProcess(Linear()).transition(torch.ones(1, 2), torch.ones(1, 2), 0.5, 0.4, 1.5)


def test_path_kl_matches_torch_distributions() -> None:
    p, q = _randn(3, 2, 5), _randn(3, 2, 5, seed=1)
    std = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(p, std), normal(q, std)).sum((1, 2))
    torch.testing.assert_close(GaussianProcess.path_kl(p, q, std), expected)
    torch.testing.assert_close(GaussianProcess.path_kl(p[:1], q[:1], 0.3), expected[:1])
    with pytest.raises(ValueError, match="deviation"):
        GaussianProcess.path_kl(p, q, 0.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_matched_times_have_equal_ratio_and_scale(name: str) -> None:
    process, other = GaussianProcess(VP()), SCHEDULES[name]
    for t in (0.35, torch.tensor([0.35, 0.6], dtype=torch.float64)):
        time, scale = process.matched(t, other)
        here = process.schedule.coeffs(torch.as_tensor(t, dtype=torch.float64))
        there = other.coeffs(torch.as_tensor(time, dtype=torch.float64))
        scale = torch.as_tensor(scale, dtype=torch.float64)
        # equal ratio: (a, s) of one is a multiple of the other's, the multiple being the scale
        torch.testing.assert_close(there.a, scale * here.a, rtol=1e-8, atol=0)
        torch.testing.assert_close(there.s, scale * here.s, rtol=1e-8, atol=0)


def test_prior_has_the_deviation_of_the_end(fenced_rng: None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = GaussianProcess(Edm()).prior((4000, 2), generator)
    assert float(x.std()) == pytest.approx(80.0, rel=0.03)  # 8000 numbers: standard error 0.8 %


def test_prior_of_a_list_does_not_depend_on_the_batch() -> None:
    process = GaussianProcess(Linear())
    three = process.prior((3, 5), [torch.Generator().manual_seed(i) for i in range(3)])
    one = process.prior((1, 5), [torch.Generator().manual_seed(2)])
    assert torch.equal(three[2:], one)
    with pytest.raises(ValueError, match="generators"):
        process.prior((3, 5), [torch.Generator()])
