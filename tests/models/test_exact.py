"""Exact models against independent computations: autograd scores, numerical integration, brute-force enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gencontrol.models import EnumerableTokens, GaussianMixture
from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear, MaskedProcess, Table

SCHEDULES = [Linear(), Linear(3.0), Cosine(), VP(), Edm(), Table.from_alphas_cumprod([0.9, 0.6, 0.2, 0.02])]


def mixture(schedule=None) -> GaussianMixture:
    """Two full-covariance components in the plane."""
    means = torch.tensor([[1.5, 0.5], [-1.0, -0.5]])
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]])
    return GaussianMixture(means, covariances, torch.tensor([0.3, 0.7]), GaussianProcess(schedule or Linear()))


def _points(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_score_is_the_gradient_of_the_marginal(schedule, t: float) -> None:
    model, x = mixture(schedule), _points().requires_grad_()
    c = schedule.at(t)
    marginal = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(model.weights),
        torch.distributions.MultivariateNormal(
            c.a * model.means, c.a**2 * model.covariances + c.s**2 * torch.eye(2, dtype=torch.float64)
        ),
    )
    log_prob = marginal.log_prob(x)
    (score,) = torch.autograd.grad(log_prob.sum(), x)
    pred = model(x.detach(), t)
    torch.testing.assert_close(pred.score, score, rtol=1e-8, atol=1e-8)
    # Tweedie: E[x0 | x_t] = (x + s²·score)/a
    torch.testing.assert_close(pred.x0, (x.detach() + c.s**2 * score) / c.a, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(model.log_prob(x, t), log_prob, rtol=1e-9, atol=1e-9)


def test_posterior_mean_matches_integration() -> None:
    model, t = mixture(), 0.4
    c = model.process.schedule.at(t)
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for x in _points(3):
        weight = torch.exp(model.log_prob(grid) - ((x - c.a * grid) ** 2).sum(1) / (2 * c.s**2))
        expected = (weight[:, None] * grid).sum(0) / weight.sum()
        torch.testing.assert_close(model(x[None], t).x0[0], expected, rtol=1e-6, atol=1e-6)


def test_ends_times_per_item_shapes_and_dtype() -> None:
    model, x = mixture(), _points(3)
    torch.testing.assert_close(model(x, 1.0).x0, (model.weights @ model.means).expand(3, 2))
    torch.testing.assert_close(model(x, 0.0).x0, x)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    together = model(x, t)
    for row in range(3):
        torch.testing.assert_close(together.x0[row : row + 1], model(x[row : row + 1], float(t[row])).x0)
    assert model(x.float(), 0.5).x0.dtype == torch.float32
    torch.testing.assert_close(model(x.reshape(3, 1, 2), 0.5).x0, model(x, 0.5).x0.reshape(3, 1, 2))


def test_condition_reweights_the_components() -> None:
    model, x = mixture(), _points(2)
    one = GaussianMixture(model.means[:1], model.covariances[:1], torch.ones(1), model.process)
    torch.testing.assert_close(model(x, 0.6, torch.tensor([[1.0, 0.0]] * 2)).x0, one(x, 0.6).x0)
    torch.testing.assert_close(model(x, 0.6, torch.ones(2, 2)).x0, model(x, 0.6).x0)


def test_samples_have_the_moments() -> None:
    model = mixture()
    x = model.sample(20000, torch.Generator().manual_seed(0))
    mean = model.weights @ model.means
    second = torch.einsum(
        "k,kij->ij", model.weights, model.covariances + model.means[:, :, None] * model.means[:, None]
    )
    # standard errors: about 1/sqrt(20000) = 0.007 per unit variance
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.T @ x / len(x), second, rtol=0, atol=0.08)
    fixed = model.sample(2000, torch.Generator().manual_seed(0), torch.ones(2000, dtype=torch.int64))
    torch.testing.assert_close(fixed.mean(0), model.means[1], rtol=0, atol=0.08)


@pytest.mark.parametrize(
    ("linear", "quadratic"),
    [
        (torch.tensor([0.7, -1.2]), None),
        (None, torch.tensor([[1.0, 0.3], [0.3, 0.5]])),
        (torch.tensor([0.7, -1.2]), torch.tensor([[-0.4, 0.1], [0.1, 0.5]])),
    ],
)
def test_tilt_matches_integration(linear, quadratic) -> None:
    model = mixture()
    tilted = model.tilt(linear, quadratic)
    axis = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    reward = torch.zeros(len(grid), dtype=torch.float64)
    if linear is not None:
        reward = reward + grid @ linear.double()
    if quadratic is not None:
        reward = reward - 0.5 * torch.einsum("ni,ij,nj->n", grid, quadratic.double(), grid)
    density = torch.exp(model.log_prob(grid) + reward)
    total = density.sum() * (axis[1] - axis[0]) ** 2
    # trapezoidal sums of smooth decaying functions converge faster than any power: 1e-7 is loose
    assert model.log_normaliser(linear, quadratic) == pytest.approx(math.log(float(total)), abs=1e-7)
    probe = _points(5)
    value = torch.zeros(5, dtype=torch.float64) if linear is None else probe @ linear.double()
    if quadratic is not None:
        value = value - 0.5 * torch.einsum("ni,ij,nj->n", probe, quadratic.double(), probe)
    torch.testing.assert_close(
        tilted.log_prob(probe), model.log_prob(probe) + value - total.log(), rtol=1e-7, atol=1e-7
    )


def test_tilts_compose_and_refuse_divergence() -> None:
    model, linear, quadratic = mixture(), torch.tensor([0.5, 1.0]), 0.4 * torch.eye(2)
    both, chained = model.tilt(linear, quadratic), model.tilt(linear).tilt(None, quadratic)
    torch.testing.assert_close(both.log_prob(_points()), chained.log_prob(_points()))
    with pytest.raises(ValueError, match="positive definite"):
        model.tilt(None, -4.0 * torch.eye(2))
    with pytest.raises(ValueError, match="symmetric"):
        model.tilt(None, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="linear"):
        model.tilt(torch.ones(3))


def test_point_masses_are_allowed_away_from_clean_data() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    model = GaussianMixture(points, torch.zeros(2, 2, 2), torch.ones(2), GaussianProcess(Linear()))
    torch.testing.assert_close(model(torch.tensor([[0.9, 0.9]]), 0.1).x0, torch.ones(1, 2), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="singular"):
        model.log_prob(points)


def test_wrong_mixtures_are_refused() -> None:
    process, eye = GaussianProcess(Linear()), torch.eye(2)[None]
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture(torch.zeros(1, 2), eye, torch.zeros(1), process)
    with pytest.raises(ValueError, match="eigenvalue"):
        GaussianMixture(torch.zeros(1, 2), -eye, torch.ones(1), process)
    with pytest.raises(ValueError, match="symmetric"):
        GaussianMixture(torch.zeros(1, 2), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), torch.ones(1), process)
    with pytest.raises(ValueError, match="numbers per item"):
        mixture()(torch.zeros(1, 3), 0.5)


def tokens(seed: int = 0, size: int = 3, length: int = 4) -> EnumerableTokens:
    """A random law over size^length."""
    table = torch.rand((size,) * length, generator=torch.Generator().manual_seed(seed)) ** 3
    return EnumerableTokens(table, MaskedProcess(size, size))


def test_token_posterior_matches_enumeration() -> None:
    model = tokens()
    x = torch.tensor([[3, 1, 3, 3], [3, 3, 3, 3], [0, 2, 1, 3], [0, 1, 2, 0]])
    found = model(x, 0.5).log_probs.exp()
    for row in range(len(x)):
        expected = torch.zeros(4, 3, dtype=torch.float64)
        for state in itertools.product(range(3), repeat=4):
            if all(int(v) in (3, s) for v, s in zip(x[row], state)):
                for position, token in enumerate(state):
                    expected[position, token] += model.table[state]
        torch.testing.assert_close(found[row].double(), expected / expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_token_samples_log_prob_and_tilt() -> None:
    model = tokens()
    x = model.sample(40000, torch.Generator().manual_seed(0))
    counts = torch.zeros_like(model.table)
    counts.index_put_(tuple(x.T), torch.ones(len(x), dtype=torch.float64), accumulate=True)
    # expected total variation of 40000 draws over 81 states: about 0.4·sqrt(81/40000) = 0.018
    assert float((counts / len(x) - model.table).abs().sum() / 2) < 0.03
    torch.testing.assert_close(model.log_prob(x[:5]), model.table[tuple(x[:5].T)].log())
    values = torch.randn(model.table.shape, generator=torch.Generator().manual_seed(1))
    expected = model.table * values.double().exp()
    torch.testing.assert_close(model.tilt(values).table, expected / expected.sum())
    weighted = model(x[:2] * 0 + 3, 1.0, values.exp().expand(2, 3, 3, 3, 3))
    torch.testing.assert_close(weighted.logits, model.tilt(values)(x[:2] * 0 + 3, 1.0).logits)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="table"):
        EnumerableTokens(torch.ones(3, 2), MaskedProcess(3, 3))
    with pytest.raises(ValueError, match="mask_id"):
        EnumerableTokens(torch.ones(3, 3), MaskedProcess(3, 2))
    with pytest.raises(ValueError, match="positive sum"):
        EnumerableTokens(torch.zeros(3, 3), MaskedProcess(3, 3))
    model = EnumerableTokens(torch.eye(3), MaskedProcess(3, 3))
    with pytest.raises(ValueError, match="probability 0"):
        model(torch.tensor([[0, 1]]), 0.5)
    with pytest.raises(ValueError, match="values"):
        model.tilt(torch.ones(3))
    with pytest.raises(ValueError, match="positions"):
        model(torch.tensor([[3, 3, 3]]), 0.5)


def test_importing_models_is_lazy() -> None:
    import gencontrol.models

    assert set(gencontrol.models.__all__) == {"Denoiser", "GaussianMixture", "EnumerableTokens"}
    with pytest.raises(AttributeError, match="Mixture"):
        gencontrol.models.Mixture  # noqa: B018
