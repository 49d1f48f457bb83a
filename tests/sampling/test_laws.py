"""ODE and SDE samplers reproduce the law of a GaussianMixture: Kolmogorov-Smirnov distance of projections."""

from __future__ import annotations

import math

import pytest
import torch

from gencontrol.models import GaussianMixture
from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear, Schedule, Table
from gencontrol.sampling import ddim, sample, sde

N = 4000
#: 0.1 % quantile of the KS statistic of N draws, 1.95/sqrt(N) = 0.031, plus 0.012 for the discretisation.
TOLERANCE = 1.95 / math.sqrt(N) + 0.012
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VP(),
    "edm": Edm(),
    "table": Table.from_alphas_cumprod(torch.cumprod(1 - BETAS, 0)),
}


def mixture(schedule: Schedule) -> GaussianMixture:
    """Three separated components, two of them correlated."""
    means = torch.tensor([[2.0, 0.0], [-1.5, 1.0], [0.0, -2.0]])
    covariances = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.3]], [[0.2, 0.0], [0.0, 0.05]]])
    return GaussianMixture(means, covariances, torch.tensor([0.5, 0.3, 0.2]), GaussianProcess(schedule))


def ks_distance(model: GaussianMixture, x: torch.Tensor) -> float:
    """Largest KS distance of four projections from the mixture's exact distribution functions."""
    worst = 0.0
    for angle in (0.0, 0.7, 1.4, 2.3):
        direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        values = (x.double() @ direction).sort().values
        spread = torch.einsum("i,kij,j->k", direction, model.covariances, direction).sqrt()
        exact = torch.special.ndtr((values[:, None] - model.means @ direction) / spread) @ model.weights
        steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
        worst = max(worst, float((exact - steps[:-1]).abs().max()), float((steps[1:] - exact).abs().max()))
    return worst


CASES = [
    ("linear", "euler", "uniform", 64),
    ("linear", "heun", "uniform", 32),
    ("linear", sde(level=1.0), "uniform", 128),
    ("linear", sde(level=0.7), "logsnr", 100),
    ("cosine", "heun", "uniform", 32),
    ("cosine", ddim(eta=1.0), "uniform", 128),
    ("vp", "dpmpp2m", "logsnr", 32),
    ("vp", ddim(eta=0.5), "uniform", 128),
    ("edm", "heun", "karras", 32),
    ("edm", "dpmpp2m", "uniform", 32),
    ("edm", sde(level=1.0), "uniform", 128),
    ("table", "ddim", "uniform", 100),
    ("table", "heun", "karras", 48),
]


@pytest.mark.parametrize(("name", "step", "times", "steps"), CASES, ids=str)
def test_samples_follow_the_law(name: str, step, times: str, steps: int, fenced_rng: None) -> None:
    model = mixture(SCHEDULES[name])
    x = sample(model, (N, 2), steps=steps, step=step, times=times, generator=torch.Generator().manual_seed(7))
    assert ks_distance(model, x) < TOLERANCE


def test_the_distance_sees_a_wrong_law() -> None:
    model = mixture(Linear())
    right = model.sample(N, torch.Generator().manual_seed(0))
    assert ks_distance(model, right) < 1.95 / math.sqrt(N)
    assert ks_distance(model, right * 1.1) > TOLERANCE
    assert (
        ks_distance(model, model.tilt(torch.tensor([0.15, 0.0])).sample(N, torch.Generator().manual_seed(0)))
        > TOLERANCE
    )
