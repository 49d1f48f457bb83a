"""AND and OR, and what the diagnostics say, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import config

from gencontrol.bench.gpc.exact import level_times
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred
from gencontrol.process import GaussianProcess
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.composition.diagnostics import parent_errors, trace
from gencontrol.robotics.composition.mixing import ByLogSnr
from gencontrol.robotics.composition.operators import AND_RANGE, And, Or
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.robotics.policies.diffusion import squaredcos
from gencontrol.sampling import compose, own_conditions
from gencontrol.types import Prediction
from tests.helpers.composition_parents import ACTIONS, FLOW, HORIZON, chunk, gaussian, history, noise, parent

SHAPE = (4, HORIZON, ACTIONS)


def drawn(operator, models, weights, steps: int = 40):
    sampler = ChunkSampler(steps, clip=None)
    model = compose(models, weights, own_conditions=True)
    return operator.draw(model, sampler, SHAPE, noise(4), own_conditions([None] * len(models)))


@pytest.mark.parametrize("operator", [Or(), And()])
@pytest.mark.parametrize("count", [2, 3])
def test_identical_parents_keep_their_weights(operator, count: int) -> None:
    weights = [0.3, 0.7] if count == 2 else [0.2, 0.5, 0.3]
    found = drawn(operator, [gaussian(0.5, 0.3)] * count, weights)
    expected = torch.tensor(weights).expand_as(found.weights)
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-5)
    assert bool(torch.isfinite(found.x).all()) and found.clipped == 0.0


class Plain:
    """N(mean, sd²) in every number, with little arithmetic."""

    def __init__(self, mean: float, sd: float, process: GaussianProcess) -> None:
        self.mean, self.sd, self.process = mean, sd, process

    def __call__(self, x, t, cond=None) -> Pred:
        c = self.process.schedule.at(t)
        eps = (x - c.a * self.mean) * (c.s / (c.a**2 * self.sd**2 + c.s**2))
        return Pred(eps, x, c, Prediction.EPS)


def test_itos_log_density_is_the_analytic_one() -> None:
    """Along the reverse SDE of N(m, sd²), 2000 levels from σ = 10 on: the change of the log-density within 2 %.

    In y = x/a the marginal is N(m, sd² + σ²).  2 % holds for the mean over 64 paths; a path alone has the noise of a
    first-order scheme (5 %).
    """
    mean, sd, process = -0.2, 0.8, GaussianProcess(squaredcos(2000))
    model, times = Plain(mean, sd, process), level_times(2000)
    start = next(i for i, t in enumerate(times) if process.schedule.at(t).s / process.schedule.at(t).a < 10)
    here = process.schedule.at(times[start])
    generator, shape = torch.Generator().manual_seed(0), (64, HORIZON, ACTIONS)
    clean, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x_init = here.a * (mean + sd * clean) + here.s * eps
    sampler = ChunkSampler(1, times=tuple(times[start:]), clip=None)
    both = compose([model, model], [0.5, 0.5], own_conditions=True)
    config.update("jaxtyping_disable", True)  # checked elsewhere; here they would take ten seconds
    try:
        found = Or().draw(both, sampler, shape, noise(64), own_conditions([None, None]), x_init)
    finally:
        config.update("jaxtyping_disable", False)

    def log_density(y: torch.Tensor, sigma: float) -> torch.Tensor:
        variance = sd**2 + sigma**2
        return (-0.5 * (y.flatten(1) - mean).square() / variance - 0.5 * math.log(variance)).sum(1)

    change = log_density(found.x, 0.0) - log_density(x_init / here.a, here.s / here.a)
    measured = found.log_densities[-1, :, 0]
    assert float(change.abs().min()) > 10  # a change worth the name
    assert float(measured.mean()) == pytest.approx(float(change.mean()), rel=0.02)
    torch.testing.assert_close(measured, change, rtol=0.05, atol=0.0)


def test_and_makes_the_increments_equal() -> None:
    found = drawn(And(), [gaussian(0.5, 0.3), gaussian(-0.3, 0.5)], [0.5, 0.5], 100)
    inside = ((found.weights > AND_RANGE[0] + 1e-4) & (found.weights < AND_RANGE[1] - 1e-4)).all(-1)
    steps = found.log_densities.diff(dim=0)
    gap = (steps[..., 0] - steps[..., 1]).abs()
    # relative to the size of an increment; the last step lands on x0 and has no noise
    assert float((gap / (steps.abs().amax(-1) + 1))[inside].max()) < 1e-3
    assert 0.2 < float(inside.float().mean())


def test_and_of_three_parents_makes_all_increments_equal() -> None:
    models = [gaussian(0.5, 0.4), gaussian(-0.3, 0.5), gaussian(0.1, 0.6)]
    models[2].means[:, ::2] += 0.4  # not on the line between the others
    found = drawn(And(), models, [0.4, 0.3, 0.3], 100)
    inside = ((found.weights > AND_RANGE[0] + 1e-4) & (found.weights < AND_RANGE[1] - 1e-4)).all(-1)
    steps = found.log_densities.diff(dim=0)
    gap = steps.amax(-1) - steps.amin(-1)
    assert bool(inside.any()) and float((gap / (steps.abs().amax(-1) + 1))[inside].max()) < 1e-2


def test_or_follows_the_likelier_parent() -> None:
    """Two narrow laws far apart: every row ends with one of them, the shares are the weights'."""
    parents = [parent(0.9, 0.05), parent(-0.9, 0.05)]
    composed = ComposedPolicy(parents, [0.5, 0.5], operator="or", sampler=ChunkSampler(100, clip=None))
    found = composed.sample_chunk(history(200), noise(200))
    side = (found[:, -1, -1] > 0).float()
    assert float((found[:, -1, -1].abs() - 0.9).abs().max()) < 0.3
    assert float(side.mean()) == pytest.approx(0.5, abs=0.15)
    watched = trace(composed, history(8), noise(8))
    final = watched.superposed.weights[-1]
    assert bool((final.max(-1).values > 0.99).all())
    hard = drawn(Or(temperature=0.0), [gaussian(0.5, 0.3), gaussian(-0.5, 0.3)], [0.3, 0.7]).weights
    torch.testing.assert_close(hard, torch.tensor([0.3, 0.7]).expand_as(hard))
    with pytest.raises(UsageError, match="biases"):
        drawn(Or(bias=(1.0,)), [gaussian(0.5, 0.3)] * 2, [0.5, 0.5])


@pytest.mark.parametrize("operator", ["or", "and"])
def test_operators_mix_diffusion_and_flow(operator: str) -> None:
    composed = ComposedPolicy([parent(0.5, 0.3), parent(0.5, 0.3, FLOW)], [0.5, 0.5], operator=operator)
    alone = ComposedPolicy([parent(0.5, 0.3), parent(0.5, 0.3)], [0.5, 0.5], operator=operator)
    torch.testing.assert_close(chunk(composed), chunk(alone), rtol=0, atol=2e-3)


# ---- diagnostics ------------------------------------------------------------------------------------------------


def test_a_trace_counts_calls_and_measures_the_disagreement() -> None:
    composed = ComposedPolicy({"a": parent(0.5, 0.3, FLOW), "b": parent(), "c": parent(-0.4, 0.3)}, [0.4, 0.0, 0.6])
    watched = trace(composed, history(3), noise(3))
    assert watched.calls == 2 * 10 and len(watched.logsnr) == 10 and watched.seconds > 0
    assert watched.weights[0].tolist() == pytest.approx([0.4, 0.0, 0.6])
    # eps of N(m, s²) is σ(z − a·m)/(a²s² + σ²): the means' distance times a·σ/(a²s² + σ²)
    ramp = torch.linspace(0.5, 1.0, HORIZON * ACTIONS).square().mean().sqrt()
    for logsnr, gap in zip(watched.logsnr, watched.disagreement):
        a2 = 1 / (1 + math.exp(-logsnr))
        a, s = math.sqrt(a2), math.sqrt(1 - a2)
        assert float(gap[0, 2]) == pytest.approx(float(0.9 * ramp) * a * s / (a2 * 0.09 + s * s), rel=1e-3)
        assert float(gap[0, 2]) == float(gap[2, 0]) and math.isnan(float(gap[0, 1]))


def test_a_trace_samples_the_same_chunk_and_follows_a_schedule() -> None:
    parents = [parent(0.5, 0.3), parent(-0.4, 0.2)]
    schedule = ByLogSnr((-4.0, 4.0), ((1.0, 0.0), (0.2, 0.8)))
    watched = trace(ComposedPolicy(parents, schedule=schedule), history(2), noise(2))
    for logsnr, row in zip(watched.logsnr, watched.weights):
        assert row.tolist() == pytest.approx(schedule(logsnr), abs=1e-6)
    with pytest.raises(UsageError, match="all the weight"):
        trace(ComposedPolicy(parents, [1.0, 0.0]), history(2), noise(2))


def test_errors_of_the_parents_predict_the_gain() -> None:
    """Experts N(0, 0.3²); parents biased to opposite sides: the mix has less error than either, half and half."""
    composed = ComposedPolicy([parent(0.3, 0.3), parent(-0.3, 0.3)], [0.5, 0.5])
    rows = 400
    experts = 0.3 * torch.randn(rows, HORIZON, ACTIONS, generator=torch.Generator().manual_seed(0))
    found = parent_errors(composed, history(rows), experts, noise=noise(rows))
    assert bool((found.correlation() < 1).all()) and bool((found.gain()[1:5] > 0.01).all())
    torch.testing.assert_close(found.weights()[1:5, 0], torch.full((4,), 0.5).double(), rtol=0, atol=0.05)
    assert found.table().count("\n") == 8
    # the same bias twice, once doubled: the second parent adds nothing
    worse = ComposedPolicy([parent(0.3, 0.3), parent(0.6, 0.3)], [0.5, 0.5])
    found = parent_errors(worse, history(rows), experts, noise=noise(rows))
    torch.testing.assert_close(found.weights(), torch.tensor([1.0, 0.0]).double().expand(6, 2))
    assert bool((found.correlation() >= 1).all()) and float(found.gain().abs().max()) < 1e-9
    residual = ComposedPolicy([parent(0.3, 0.3), parent(0.6, 0.3)], schedule=found.schedule())
    torch.testing.assert_close(chunk(residual), chunk(parent(0.3, 0.3)), rtol=0, atol=1e-5)


def test_errors_need_chunks_of_the_policys_shape() -> None:
    composed = ComposedPolicy([parent(0.3, 0.3), parent(-0.3, 0.3)], [0.5, 0.5])
    with pytest.raises(UsageError, match="chunks have shape"):
        parent_errors(composed, history(3), torch.zeros(3, 2, ACTIONS), noise=noise(3))
    assert np.isfinite(parent_errors(composed, history(3), torch.zeros(3, HORIZON, ACTIONS), noise=noise(3)).gram).all()
