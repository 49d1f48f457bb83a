"""Prediction rows: every pair of types round-trips on every schedule; weights; singular ends raise."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_schedule import SCHEDULES

from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear
from gencontrol.process.convert import convert, from_x0_eps, rows, to_x0_eps, weight_ratio
from gencontrol.types import Prediction

TIMES = torch.tensor([0.05, 0.3, 0.5, 0.77, 0.95], dtype=torch.float64)


def _case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]:
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(len(TIMES), 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    process = GaussianProcess(SCHEDULES[name])
    return x0, eps, process.corrupt(x0, TIMES, eps), process.at(TIMES, x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_type_gives_back_x0_and_eps(name: str) -> None:
    x0, eps, xt, coeffs = _case(name)
    for prediction in Prediction:
        output = from_x0_eps(x0, eps, coeffs, prediction)
        back_x0, back_eps = to_x0_eps(output, xt, coeffs, prediction)
        # relative to the conditioning of the 2x2 system: at most 1e3 in these times
        torch.testing.assert_close(back_x0, x0, rtol=0, atol=1e-10)
        torch.testing.assert_close(back_eps, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_pair_of_types_round_trips(name: str) -> None:
    x0, eps, xt, coeffs = _case(name)
    for source, target in itertools.permutations(Prediction, 2):
        output = from_x0_eps(x0, eps, coeffs, source)
        there = convert(output, xt, coeffs, source, target)
        torch.testing.assert_close(there, from_x0_eps(x0, eps, coeffs, target), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(convert(there, xt, coeffs, target, source), output, rtol=1e-10, atol=1e-10)


def test_scalar_coefficients_equal_tensor_coefficients() -> None:
    x0, eps, xt, _ = _case("vp")
    process = GaussianProcess(VP())
    for source, target in itertools.permutations(Prediction, 2):
        output = from_x0_eps(x0[1:2], eps[1:2], process.at(float(TIMES[1]), x0), source)
        found = convert(output, xt[1:2], process.at(float(TIMES[1]), x0), source, target)
        expected = convert(output, xt[1:2], process.at(TIMES[1:2], x0), source, target)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_v_and_velocity_are_the_definitions() -> None:
    x0, eps, _, coeffs = _case("vp")
    torch.testing.assert_close(from_x0_eps(x0, eps, coeffs, Prediction.V), coeffs.a * eps - coeffs.s * x0)
    torch.testing.assert_close(from_x0_eps(x0, eps, coeffs, Prediction.VELOCITY), coeffs.da * x0 + coeffs.ds * eps)


@pytest.mark.parametrize("name", ["edm", "vp", "linear"])
def test_edm_row_is_karras_network(name: str) -> None:
    x0, eps, xt, coeffs = _case(name)
    sigma_data, sigma = 0.7, coeffs.s / coeffs.a
    noisy = xt / coeffs.a
    total = sigma**2 + sigma_data**2
    # Karras et al. 2022 table 1: D = c_skip·x + c_out·F solved for F with D = x0
    expected = (x0 - sigma_data**2 / total * noisy) / (sigma * sigma_data / total**0.5)
    torch.testing.assert_close(from_x0_eps(x0, eps, coeffs, Prediction.EDM, sigma_data), expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_weight_ratio_scales_squared_errors(name: str) -> None:
    x0, eps, xt, coeffs = _case(name)
    for source, target in itertools.permutations(Prediction, 2):
        output = from_x0_eps(x0, eps, coeffs, source)
        error = 0.3 * torch.ones_like(output)
        moved = convert(output + error, xt, coeffs, source, target) - convert(output, xt, coeffs, source, target)
        torch.testing.assert_close(moved**2, weight_ratio(source, target, coeffs) * error**2, rtol=1e-6, atol=1e-9)


def test_known_weights() -> None:
    coeffs = Cosine().at(0.3)
    assert weight_ratio(Prediction.EPS, Prediction.X0, coeffs) == pytest.approx((coeffs.s / coeffs.a) ** 2)
    assert weight_ratio(Prediction.V, Prediction.EPS, coeffs) == pytest.approx(coeffs.a**2)
    assert weight_ratio(Prediction.EPS, Prediction.EPS, coeffs) == 1.0


@pytest.mark.parametrize(
    ("schedule", "t", "source", "target", "words"),
    [
        (Linear(), 0.0, Prediction.X0, Prediction.EPS, ("X0", "t = 0", "Linear")),
        (Linear(), 1.0, Prediction.EPS, Prediction.X0, ("EPS", "t = 1", "Linear")),
        (Cosine(), 1.0, Prediction.EPS, Prediction.VELOCITY, ("EPS", "t = 1", "Cosine")),
        (VP(), 0.0, Prediction.V, Prediction.VELOCITY, ("VELOCITY", "t = 0", "VP")),
        (VP(), 0.0, Prediction.VELOCITY, Prediction.X0, ("VELOCITY", "t = 0", "VP")),
    ],
)
def test_singular_ends_raise_and_are_named(schedule, t, source, target, words) -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    for coeffs in (schedule.at(t), GaussianProcess(schedule).at(torch.tensor([0.5, t], dtype=torch.float64), x)):
        with pytest.raises(ValueError) as caught:
            convert(x, x, coeffs, source, target)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Edm()])
def test_regular_ends_are_finite(schedule) -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    for t, source in ((0.0, Prediction.EPS), (1.0, Prediction.X0), (0.0, Prediction.V), (1.0, Prediction.V)):
        for target in (Prediction.X0, Prediction.EPS, Prediction.VELOCITY):
            assert bool(torch.isfinite(convert(x, x, schedule.at(t), source, target)).all())
    for t in (0.0, 1.0):
        assert all(abs(value) < 1e3 for value in rows(Prediction.EDM, schedule.at(t)))
