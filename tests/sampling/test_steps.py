"""Gaussian steps: observed orders of convergence, analytic log-probabilities, exact last steps, times per item."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gencontrol.models import GaussianMixture
from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear, Schedule, Table
from gencontrol.sampling import State, ddim, dpmpp2m, euler, heun, make_step, sample, sde
from gencontrol.sampling.steps import EulerMaruyama

SCHEDULES = {"linear": Linear(), "shifted": Linear(3.0), "cosine": Cosine(), "vp": VP(), "edm": Edm()}
TABLE = Table.from_alphas_cumprod(torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50, dtype=torch.float64), 0))


def gaussian(schedule: Schedule) -> GaussianMixture:
    """One correlated Gaussian, whose probability flow is known in closed form."""
    means, covariances = torch.tensor([[0.8, -0.3]]), torch.tensor([[[0.6, 0.2], [0.2, 0.3]]])
    return GaussianMixture(means, covariances, torch.ones(1), GaussianProcess(schedule))


def flow(model: GaussianMixture, x: Tensor, t: float, t_next: float) -> Tensor:
    """Solution of the probability flow: x(t) = a·μ + S(t)^½·S(t0)^-½·(x - a0·μ), in the eigenbasis of Σ."""
    here, there = model.process.schedule.at(t), model.process.schedule.at(t_next)
    spectrum, vectors = torch.linalg.eigh(model.covariances[0])
    ratio = ((there.a**2 * spectrum + there.s**2) / (here.a**2 * spectrum + here.s**2)).sqrt()
    return there.a * model.means[0] + ((x - here.a * model.means[0]) @ vectors * ratio) @ vectors.T


def observed_order(step, schedule: Schedule, counts: tuple[int, int]) -> float:
    """Slope of log error against log step size between t = 0.9 and t = 0.15."""
    model = gaussian(schedule)
    x = schedule.at(0.9).s * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = flow(model, x, 0.9, 0.15)
    errors = []
    for count in counts:
        times = torch.linspace(0.9, 0.15, count + 1, dtype=torch.float64)
        found = sample(model, (8, 2), step=step, x_init=x, times=times)
        errors.append(float((found - expected).abs().max()))
    return math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [euler(), heun(), ddim(), dpmpp2m(), sde(level=0.0)], ids=lambda s: type(s).__name__)
def test_order_of_convergence(name: str, step) -> None:
    # 0.2 covers the next term of the error; the multistep method on the cosine gets there later
    counts = (128, 512) if name == "cosine" and isinstance(step, dpmpp2m) else (32, 128)
    assert observed_order(step, SCHEDULES[name], counts) == pytest.approx(step.order, abs=0.2)


@pytest.mark.parametrize("name", [*SCHEDULES, "table"])
@pytest.mark.parametrize("step", ["euler", "heun", "ddim", "sde", "euler-maruyama", "dpmpp2m"])
def test_last_step_returns_the_clean_prediction(name: str, step: str) -> None:
    schedule = TABLE if name == "table" else SCHEDULES[name]
    model, chosen = gaussian(schedule), make_step(step, GaussianProcess(schedule))
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    history = (x, model.process.schedule.at(0.4).half_logsnr) if step == "dpmpp2m" else ()
    done = chosen(model, State(x, None, history), 0.2, 0.0, None, None)
    assert torch.equal(done.x, model(x, 0.2).x0)
    if chosen.stochastic:
        assert torch.equal(done.log_prob, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", [*SCHEDULES, "table"])
@pytest.mark.parametrize("step", [ddim(eta=0.3), ddim(eta=1.0), sde(level=0.5), sde(), EulerMaruyama(0.5)], ids=str)
def test_log_prob_is_the_analytic_gaussian(name: str, step) -> None:
    model = gaussian(TABLE if name == "table" else SCHEDULES[name])
    x, noise = (torch.randn(4, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    done = step(model, State(x), 0.6, 0.5, None, noise)
    mean, std = step.moments(model, x, 0.6, 0.5)
    expected = torch.distributions.Normal(mean, std).log_prob(done.x).sum(1)
    torch.testing.assert_close(done.log_prob, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(done.x, mean + std * noise)
    torch.testing.assert_close(step.log_prob(model, x, done.x, 0.6, 0.5), done.log_prob)


@pytest.mark.parametrize("name", SCHEDULES)
def test_stochastic_steps_agree_at_their_common_ends(name: str) -> None:
    model = gaussian(SCHEDULES[name])
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level in (0.0, 1.0):
        one, two = ddim(eta=level).moments(model, x, 0.6, 0.5), sde(level=level).moments(model, x, 0.6, 0.5)
        torch.testing.assert_close(one[0], two[0])
        assert one[1] == pytest.approx(two[1])


@pytest.mark.parametrize("kind", [sde, EulerMaruyama])
def test_sde_steps_tend_to_the_stated_diffusion(kind: type[sde] | type[EulerMaruyama]) -> None:
    # dx = (velocity + g²·eps/(2s))·dt + g·dw with g² = level²·2·s/a on the Linear schedule
    model, level, step = gaussian(Linear()), 0.7, 1e-5
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = kind(level).moments(model, x, 0.6, 0.6 - step)
    pred, g2 = model(x, 0.6), level**2 * 2 * 0.6 / 0.4
    torch.testing.assert_close((mean - x) / -step, pred.velocity + g2 * pred.eps / (2 * 0.6), rtol=1e-3, atol=1e-3)
    assert std**2 / step == pytest.approx(g2, rel=1e-3)


@pytest.mark.parametrize("name", [*SCHEDULES, "table"])
@pytest.mark.parametrize(
    "step", [euler(), heun(), ddim(), ddim(eta=0.5), sde(), EulerMaruyama(), dpmpp2m()], ids=lambda s: type(s).__name__
)
def test_a_time_per_item_equals_separate_calls(name: str, step) -> None:
    model = gaussian(TABLE if name == "table" else SCHEDULES[name])
    x, noise, before = (
        torch.randn(3, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )
    t, t_next = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.45, 0.0]).double()
    earlier = model.process.at(torch.tensor([0.95, 0.6, 0.3]).double(), x).half_logsnr
    history = (before, earlier) if isinstance(step, dpmpp2m) else ()
    together = step(model, State(x, None, history), t, t_next, None, noise)
    for row in range(3):
        one = State(x[row : row + 1], None, tuple(item[row : row + 1] for item in history))
        alone = step(model, one, float(t[row]), float(t_next[row]), None, noise[row : row + 1])
        torch.testing.assert_close(together.x[row : row + 1], alone.x, rtol=1e-7, atol=1e-7)
        if alone.log_prob is not None:
            torch.testing.assert_close(together.log_prob[row : row + 1], alone.log_prob, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine", "shifted"])
@pytest.mark.parametrize(
    "step", [euler(), heun(), ddim(), ddim(eta=1.0), sde(), EulerMaruyama(), dpmpp2m()], ids=lambda s: type(s).__name__
)
def test_start_at_pure_noise_is_finite_and_exact_in_one_step(name: str, step) -> None:
    model = gaussian(SCHEDULES[name])
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert bool(torch.isfinite(step(model, State(x), 1.0, 0.9, None, noise).x).all())
    torch.testing.assert_close(step(model, State(x), 1.0, 0.0, None, noise).x, model.means.expand(3, 2))


def test_state_select_branches_everything() -> None:
    state = State(torch.arange(3.0)[:, None], torch.arange(3.0), (torch.arange(3.0)[:, None], 0.5))
    chosen = state.select(torch.tensor([2, 2, 0, 1]))
    assert chosen.x[:, 0].tolist() == chosen.log_prob.tolist() == chosen.history[0][:, 0].tolist() == [2, 2, 0, 1]
    assert chosen.history[1] == 0.5


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="eta"):
        ddim(eta=1.2)
    with pytest.raises(ValueError, match="level"):
        sde(level=-1.0)
    with pytest.raises(ValueError, match="level"):
        EulerMaruyama(level=0.0)
    with pytest.raises(ValueError, match="noise"):
        sde()(gaussian(Linear()), State(torch.zeros(1, 2)), 0.5, 0.4)


def test_steps_say_where_they_are_stochastic() -> None:
    assert [s.stochastic for s in (euler(), heun(), ddim(), ddim(eta=0.1), sde(), sde(level=0.0), dpmpp2m())] == [
        False, False, False, True, True, False, False,
    ]  # fmt: skip
