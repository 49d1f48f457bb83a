"""CRD's mathematics (docs/methods/crd.md#idea and docs/methods/crd.md#laws): invariances, identities, the exact tilt,
gradients beside its peers'.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gencontrol.algorithms.crd import (
    centered_losses,
    centered_reward_loss,
    centring_weights,
    elbo_weight,
    implicit_reward,
)
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import VP, GaussianProcess, Linear
from gencontrol.rng import stream
from tests.helpers.forward_worlds import Shifted, gaussian_task, mean_shift

GROUPS = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3, 3, -1])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed, "test/crd"), dtype=torch.float64)


def value_and_gradient(
    ratio: Tensor, reward: Tensor, groups: Tensor = GROUPS, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = ratio.clone().requires_grad_()
    loss = centered_reward_loss(leaf, reward, groups, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"kind": "bce"}, {"beta": 3.0, "detach": False}])
def test_a_constant_per_prompt_changes_nothing(options: dict[str, object]) -> None:
    ratio, reward = draw(10), draw(10, seed=1)
    shift = torch.tensor([5.0, -3.0, 11.0], dtype=torch.float64)[torch.unique(GROUPS, return_inverse=True)[1]]
    for one, other in zip(
        value_and_gradient(ratio, reward, **options), value_and_gradient(ratio, reward + shift, **options), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_order_inside_a_group_is_immaterial_and_groups_do_not_meet() -> None:
    ratio, reward, order = draw(10), draw(10, seed=1), torch.tensor([3, 0, 9, 2, 1, 8, 4, 6, 5, 7])
    loss, gradient = value_and_gradient(ratio, reward)
    shuffled, moved = value_and_gradient(ratio[order], reward[order], GROUPS[order])
    torch.testing.assert_close(shuffled, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved, gradient[order], rtol=1e-12, atol=1e-15)
    other = reward.clone()
    other[GROUPS == 3] += draw(5, seed=2)
    untouched = GROUPS != 3
    assert torch.equal(value_and_gradient(ratio, other)[1][untouched], gradient[untouched])
    together = torch.zeros(10, dtype=torch.long)  # one group of all: the groups do meet
    assert not torch.allclose(
        value_and_gradient(ratio, other, together)[1][untouched],
        value_and_gradient(ratio, reward, together)[1][untouched],
    )


def test_it_is_all_pairs_regression() -> None:
    ratio, reward, beta = draw(6), draw(6, seed=1), 1.7
    error = beta * ratio - reward
    pairs = (error[:, None] - error[None]).square().sum() / (2 * 36)
    loss = centered_reward_loss(ratio, reward, torch.zeros(6, dtype=torch.long), beta=beta)
    torch.testing.assert_close(loss, pairs, rtol=1e-12, atol=0)


def test_a_lone_sample_has_no_loss() -> None:
    loss, gradient = value_and_gradient(draw(1), draw(1, seed=1), torch.tensor([4]))
    assert loss == 0 and gradient == 0


def test_at_the_snapshot_the_loss_is_the_variance_of_the_reward() -> None:
    reward = draw(8)
    one = torch.zeros(8, dtype=torch.long)
    loss, gradient = value_and_gradient(torch.zeros(8, dtype=torch.float64), reward, one, beta=2.0)
    torch.testing.assert_close(loss, reward.var(unbiased=False), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, -2 * 2.0 / 8 * (reward - reward.mean()), rtol=1e-12, atol=1e-15)
    flat = torch.ones(8, dtype=torch.float64)
    assert torch.equal(value_and_gradient(torch.zeros(8, dtype=torch.float64), flat, one)[1], torch.zeros_like(flat))
    assert value_and_gradient(draw(8, seed=2), flat, one)[1].abs().max() > 0.1  # ratios are pulled together


def test_detached_means_matter_only_with_unequal_weights() -> None:
    ratio, reward = draw(10), draw(10, seed=1)
    for tau, same in ((math.inf, True), (-1.0, True), (0.3, False)):
        kept = value_and_gradient(ratio, reward, tau=tau, detach=False)[1]
        cut = value_and_gradient(ratio, reward, tau=tau, detach=True)[1]
        assert torch.allclose(kept, cut, rtol=0, atol=1e-16) == same


def test_centring_weights() -> None:
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    one = torch.zeros(4, dtype=torch.long)
    plus, minus = centring_weights(reward, one, 0.7)
    torch.testing.assert_close(plus, torch.softmax(reward / 0.7, 0))
    torch.testing.assert_close(minus, torch.softmax(-reward / 0.7, 0))
    hard_plus, hard_minus = centring_weights(reward, one, 0.0)
    torch.testing.assert_close(hard_plus[[0, 2, 3]], torch.softmax(reward[[0, 2, 3]], 0))
    assert hard_plus[1] == 0 and hard_minus.tolist() == [0, 1, 0, 0]
    empty = centring_weights(reward.abs(), one, 0.0)[1]  # no negative entry: uniform
    torch.testing.assert_close(empty, torch.full_like(empty, 0.25))
    assert len(centring_weights(reward, one)) == 1


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_minimiser_is_the_exact_tilt(scale: float) -> None:
    """ρ = log π_θ − log π_ref over six atoms: full-batch L-BFGS finds π_ref·exp(r/β)/Z to 1e-8, also for λr and λβ."""
    prior, reward, beta = torch.log_softmax(draw(6), 0), draw(6, seed=1), 0.8
    logits = prior.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratio = torch.log_softmax(logits, 0) - prior
        loss = centered_reward_loss(ratio, scale * reward, torch.zeros(6, dtype=torch.long), beta=scale * beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = torch.softmax(prior + reward / beta, 0)
    assert (torch.softmax(logits.detach(), 0) - exact).abs().max() <= 1e-8


def test_implicit_reward_is_the_formula_and_zero_at_the_snapshot() -> None:
    theta, old, target = draw(5, 2, 3), draw(5, 2, 3, seed=1), draw(5, 2, 3, seed=2)
    plain = (old - target).square().mean((1, 2)) - (theta - target).square().mean((1, 2))
    torch.testing.assert_close(implicit_reward(theta, old, target, adaptive=False), plain, rtol=1e-12, atol=1e-12)
    w_theta, w_old = (theta - target).abs().mean((1, 2)), (old - target).abs().mean((1, 2))
    weighted = (old - target).square().mean((1, 2)) / w_old - (theta - target).square().mean((1, 2)) / w_theta
    torch.testing.assert_close(implicit_reward(theta, old, target), weighted, rtol=1e-12, atol=1e-12)
    assert torch.equal(implicit_reward(theta, theta, target), torch.zeros(5, dtype=torch.float64))
    leaf = theta.clone().requires_grad_()
    implicit_reward(leaf, old, target).sum().backward()
    expected = -2 * (theta - target) / 6 / w_theta[:, None, None]  # the weight is a constant
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-15)
    half = implicit_reward(theta.half(), old.half(), target.half())
    assert half.dtype == torch.float32


def test_two_independent_estimates_remove_the_noise_of_the_square() -> None:
    """E(βρ̂ − R)² is (βρ − R)² + β²Var ρ̂; the product of two halves has the mean (βρ − R)² of the centred values."""
    truth, goal, beta = draw(4), draw(4, seed=1), 1.3
    one = torch.zeros(4, dtype=torch.long)
    noise = 0.5 * draw(4000, 4, 2, seed=2)
    exact = centered_losses(truth[:, None], goal, one, beta=beta).mean()
    product = torch.stack(
        [centered_losses(truth[:, None] + n, goal, one, beta=beta).mean() for n in noise[:4000]]
    ).mean()
    square = torch.stack(
        [centered_losses((truth + n[:, 0])[:, None], goal, one, beta=beta).mean() for n in noise[:4000]]
    )
    # 4000 draws: standard errors about 0.008; the bias of the square is β²·0.25·(1 − 1/4) = 0.317
    assert abs(float(product - exact)) < 0.04
    assert float(square.mean() - exact) == pytest.approx(0.317, abs=0.04)


def test_bound_weight_of_a_rectified_flow_and_of_other_coordinates() -> None:
    t, like = torch.tensor([0.1, 0.5, 0.9]), torch.zeros(3, 2, 2)
    flow = Denoiser(Shifted(1), GaussianProcess(Linear()), "velocity")
    torch.testing.assert_close(elbo_weight(flow, t, like), 4 * (1 - t.double()) / t.double())
    eps = Denoiser(Shifted(1), GaussianProcess(Linear()), "eps")  # error in v is that of eps divided by (1 − t)
    torch.testing.assert_close(elbo_weight(eps, t, like), 4 / (t.double() * (1 - t.double())))
    vp = Denoiser(Shifted(1), GaussianProcess(VP()), "eps")  # −½ dlogSNR/dt = β(t)/(2 s²)
    coeffs = VP().coeffs(t.double())
    rate = (0.1 + t.double() * 19.9) / 2
    torch.testing.assert_close(elbo_weight(vp, t, like), 4 * rate / coeffs.s**2, rtol=1e-6, atol=0)


def grid(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sobol points of (x0, ε, t): normal, normal, uniform on [1e-4, 1 − 1e-4]."""
    points = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(count).double().clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(points[:, 0]), torch.special.ndtri(points[:, 1]), points[:, 2].clamp(1e-4, 1 - 1e-4)


def fit(loss_of: object, network: Shifted) -> None:
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()  # type: ignore[operator]
        loss.backward()
        return loss

    optimizer.step(closure)


def test_shift_of_a_gaussian_under_the_default_weighting() -> None:
    """Base N(0, 1), reward a·x, uniform t, w = 1: the samples' mean moves by 0.3116 a/β, not by a/β (±2 %)."""
    a, beta = 0.05, 1.0  # small: the closed form is first order in Δ
    network = gaussian_task(1).denoiser.network
    x0, eps, t = grid(1 << 15)
    xt, v = ((1 - t) * x0 + t * eps)[:, None], (eps - x0)[:, None]
    old = network(xt, t).detach()

    def loss() -> Tensor:
        ratio = implicit_reward(network(xt, t), old, v, adaptive=False)
        # a group per time would do the same: Δ(t) = −a·t/(2β) is in the family and optimal at each t
        bins = (t * 64).long()
        return centered_reward_loss(ratio, a * x0, bins, beta=beta)

    fit(loss, network)
    assert network.c[0].item() == pytest.approx(-a / (2 * beta), rel=0.02)
    assert mean_shift(network) == pytest.approx(0.3116 * a / beta, rel=0.02)
