"""Denoiser and Pred: coordinates, precision, EDM preconditioning, the floor of EPS networks, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gencontrol.models.denoiser import Denoiser, Pred, TokenPred
from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear, MaskedProcess
from gencontrol.types import Prediction


class Oracle(nn.Module):
    """Returns the exact target of a known (x0, eps), whatever it is asked."""

    def __init__(self, process: GaussianProcess, prediction: Prediction, x0: Tensor, eps: Tensor) -> None:
        super().__init__()
        self.args = process, prediction, x0, eps
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, xt: Tensor, t: Tensor, cond: object) -> Tensor:
        process, prediction, x0, eps = self.args
        self.seen.append((xt, t))
        from gencontrol.process.convert import from_x0_eps

        return from_x0_eps(x0, eps, process.at(t.to(x0.dtype), x0), prediction)


def _pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x0, eps


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), Edm()])
@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("t", [0.4, torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)])
def test_all_coordinates_of_all_types(schedule, prediction: Prediction, t) -> None:
    process, (x0, eps) = GaussianProcess(schedule), _pair()
    denoiser = Denoiser(Oracle(process, prediction, x0, eps), process, prediction)
    pred = denoiser(process.corrupt(x0, t, eps), t)
    c = process.at(t, x0)
    for found, expected in (
        (pred.x0, x0),
        (pred.eps, eps),
        (pred.v, c.a * eps - c.s * x0),
        (pred.velocity, c.da * x0 + c.ds * eps),
        (pred.score, -eps / c.s),
        (pred.mix(0.3, -2.0), 0.3 * x0 - 2 * eps),
        (denoiser.target(x0, eps, t), pred.raw),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert pred.x0 is pred.x0


def test_the_network_runs_in_its_own_dtype_and_the_algebra_in_float32() -> None:
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, xt: Tensor, t: Tensor, cond: object) -> Tensor:
            assert xt.dtype == torch.bfloat16 and t.dtype == torch.float32 and t.shape == (2,)
            return xt * self.weight

    denoiser = Denoiser(Low(), GaussianProcess(Linear()), "velocity")
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        pred = denoiser(torch.ones(2, 3, dtype=dtype), 0.5)
        assert pred.raw.dtype == pred.x0.dtype == expected


def test_edm_network_input_has_unit_variance() -> None:
    process, (x0, eps) = GaussianProcess(Edm()), _pair()
    network = Oracle(process, Prediction.EDM, x0, eps)
    xt = process.corrupt(x0, 0.7, eps)
    Denoiser(network, process, "edm", sigma_data=0.9)(xt, 0.7)
    sigma = process.schedule.at(0.7).s
    torch.testing.assert_close(network.seen[0][0], xt / (sigma**2 + 0.81) ** 0.5)  # Karras et al. 2022 table 1, c_in


def test_eps_network_is_finite_at_pure_noise() -> None:
    class Exact(nn.Module):
        """Posterior mean of eps for x0 ~ N(0, 1): s·x/(a² + s²)."""

        def forward(self, xt: Tensor, t: Tensor, cond: object) -> Tensor:
            values = Linear().coeffs(t)
            return (values.s / values.scale2)[:, None] * xt

    denoiser = Denoiser(Exact(), GaussianProcess(Linear()), "eps")
    for t in (1.0, torch.ones(2)):
        pred = denoiser(torch.ones(2, 3), t)
        # E[x0 | pure noise] = 0 up to a/s = exp(-7) and float32 rounding over it
        torch.testing.assert_close(pred.x0, torch.zeros(2, 3), rtol=0, atol=3e-3)
        assert bool(torch.isfinite(pred.velocity).all())


def test_vp_eps_network_is_asked_at_t_one() -> None:
    process, (x0, eps) = GaussianProcess(VP()), _pair()
    network = Oracle(process, Prediction.EPS, x0, eps)
    Denoiser(network, process, "eps")(eps, 1.0)
    assert network.seen[0][1].tolist() == [1.0] * 3


def test_score_and_x0_networks_name_their_singular_end() -> None:
    process, (x0, eps) = GaussianProcess(Linear()), _pair()
    pred = Denoiser(Oracle(process, Prediction.X0, x0, eps), process, "x0")(x0, 0.0)
    assert torch.equal(pred.x0, x0)
    for ask in (lambda: pred.eps, lambda: pred.score):
        with pytest.raises(ValueError, match=r"t = 0 of"):
            ask()


def test_gradients_reach_the_network_through_every_coordinate() -> None:
    layer = nn.Linear(3, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, xt: Tensor, t: Tensor, cond: object) -> Tensor:
            return self.layer(xt)

    pred = Denoiser(Net(), GaussianProcess(VP()), "v")(torch.ones(2, 3), torch.tensor([0.3, 0.8]))
    for value in (pred.x0, pred.eps, pred.velocity):
        (gradient,) = torch.autograd.grad(value.sum(), layer.weight, retain_graph=True)
        assert float(gradient.abs().min()) > 0


def test_token_denoiser_returns_logits() -> None:
    class Tokens(nn.Module):
        def forward(self, xt: Tensor, t: Tensor, cond: object) -> Tensor:
            assert t.shape == (2,)
            return torch.nn.functional.one_hot(xt % 4, 4).float()

    pred = Denoiser(Tokens(), MaskedProcess(4, 4))(torch.zeros(2, 5, dtype=torch.int64), 0.5)
    assert isinstance(pred, TokenPred) and pred.logits.shape == (2, 5, 4)
    torch.testing.assert_close(pred.log_probs.exp().sum(-1), torch.ones(2, 5))


def test_prediction_and_process_must_fit() -> None:
    with pytest.raises(ValueError, match="prediction"):
        Denoiser(nn.Identity(), GaussianProcess(Linear()))
    with pytest.raises(ValueError, match="prediction"):
        Denoiser(nn.Identity(), MaskedProcess(4, 4), "eps")
    with pytest.raises(ValueError, match="noise"):
        Denoiser(nn.Identity(), GaussianProcess(Linear()), "noise")
    with pytest.raises(ValueError, match="target"):
        Denoiser(nn.Identity(), MaskedProcess(4, 4)).target(torch.ones(1, 2), torch.ones(1, 2), 0.5)


def test_pred_replace_keeps_the_place() -> None:
    coeffs = Linear().at(0.25)
    pred = Pred(torch.ones(1, 2), torch.ones(1, 2), coeffs, Prediction.X0)
    other = pred.replace(torch.zeros(1, 2))
    torch.testing.assert_close(other.eps, torch.full((1, 2), 4.0))
    assert other.xt is pred.xt and pred.raw.sum() == 2
