"""Schedules: values against their derivatives, the log-SNR inverse, ends and errors."""

from __future__ import annotations

import math

import pytest
import torch

from gencontrol.process import VP, Cosine, Edm, Linear, Table

ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULES = {
    "linear": Linear(),
    "shifted": Linear(shift=3.0),
    "cosine": Cosine(),
    "vp": VP(),
    "edm": Edm(),
    "ddpm-table": Table.from_alphas_cumprod(ALPHAS),
    "sigma-table": Table.from_sigmas([14.6, 5.0, 2.0, 0.7, 0.1, 0.03, 0.0]),
}
SMOOTH = [name for name in SCHEDULES if "table" not in name]
TIMES = torch.linspace(0.0131717, 0.9871313, 41, dtype=torch.float64)  # no node of a table among them


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives_match_finite_differences(name: str) -> None:
    schedule, step = SCHEDULES[name], 1e-6
    here = schedule.coeffs(TIMES)
    up, down = schedule.coeffs(TIMES + step), schedule.coeffs(TIMES - step)
    for value, low, high in ((here.da, down.a, up.a), (here.ds, down.s, up.s)):
        # central differences: error O(step²)·f''' + 1e-16/step
        torch.testing.assert_close(value, (high - low) / (2 * step), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_match_autograd(name: str) -> None:
    t = TIMES.clone().requires_grad_()
    values = SCHEDULES[name].coeffs(t)
    for value, derivative in ((values.a, values.da), (values.s, values.ds)):
        if not value.requires_grad:  # Edm's a = 1
            assert torch.equal(derivative, torch.zeros_like(derivative))
            continue
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True, allow_unused=True)
        expected = torch.zeros_like(t) if expected is None else expected
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_inverts_logsnr(name: str) -> None:
    schedule = SCHEDULES[name]
    logsnr = schedule.logsnr(TIMES)
    assert bool((logsnr.diff() < 0).all())
    torch.testing.assert_close(schedule.time_of(logsnr), TIMES, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_logsnr_is_the_log_of_the_ratio(name: str) -> None:
    values = SCHEDULES[name].coeffs(TIMES)
    torch.testing.assert_close(SCHEDULES[name].logsnr(TIMES), torch.log(values.a**2 / values.s**2))
    torch.testing.assert_close(2 * values.half_logsnr, torch.log(values.a**2 / values.s**2))


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_is_clamped_and_finite_at_infinite_logsnr(name: str) -> None:
    ends = SCHEDULES[name].time_of(torch.tensor([math.inf, -math.inf], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "shifted", "cosine"])
def test_ends_are_exact(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        values = SCHEDULES[name].coeffs(torch.tensor([0.0, 1.0], dtype=dtype))
        assert values.a.tolist() == [1.0, 0.0]
        assert values.s.tolist() == [0.0, 1.0]
        assert values.a.dtype == dtype


@pytest.mark.parametrize("name", SCHEDULES)
def test_scalar_values_equal_tensor_values(name: str) -> None:
    schedule = SCHEDULES[name]
    values = schedule.coeffs(TIMES)
    for index in (0, 17, 40):
        t = float(TIMES[index])
        found = schedule.at(t)
        for key in ("a", "s", "da", "ds"):
            assert math.isclose(getattr(found, key), float(getattr(values, key)[index]), rel_tol=1e-12, abs_tol=1e-15)
        assert found.t == t and found is schedule.at(t)


def test_variance_preserving_schedules() -> None:
    for name in ("cosine", "vp", "ddpm-table"):
        torch.testing.assert_close(SCHEDULES[name].coeffs(TIMES).scale2, torch.ones_like(TIMES))


def test_edm_is_karras_ramp() -> None:
    # Karras et al. 2022 eq. 5 with i/(N-1) = 1 - t
    ramp = (80 ** (1 / 7) + (1 - TIMES) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(Edm().coeffs(TIMES).s, ramp)
    assert math.isclose(Edm().at(0.0).s, 0.002) and math.isclose(Edm().at(1.0).s, 80.0)


def test_linear_shift_is_esser_equation_23() -> None:
    torch.testing.assert_close(Linear(3.0).coeffs(TIMES).s, 3 * TIMES / (1 + 2 * TIMES))


def test_table_is_exact_at_its_entries() -> None:
    table = SCHEDULES["ddpm-table"]
    index = torch.tensor([0, 1, 500, 999])
    times = table.time_of_index(index.double())
    torch.testing.assert_close(table.coeffs(times).a, ALPHAS[index].sqrt())
    torch.testing.assert_close(table.index_of(times), index.double())
    assert table.at(0.0).a == 1.0 and table.at(0.0).s == 0.0
    sigmas = SCHEDULES["sigma-table"]
    torch.testing.assert_close(
        sigmas.coeffs(sigmas.time_of_index(torch.arange(6).double())).s,
        torch.tensor([0.03, 0.1, 0.7, 2.0, 5.0, 14.6], dtype=torch.float64),
    )


def test_table_with_clean_first_and_pure_noise_last_entry() -> None:
    table = Table(a=(1.0, 0.6, 0.0), s=(0.0, 0.8, 1.0))
    values = table.coeffs(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(values.a, torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64))
    assert float(values.a[2]) == 0.0
    assert float(table.index_of(torch.tensor(0.5))) == 1.0


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Linear(shift=0.0), "shift"),
        (lambda: VP(beta_min=0.0), "beta_min"),
        (lambda: Edm(sigma_min=2.0, sigma_max=1.0), "sigma_min"),
        (lambda: Edm(rho=0.0), "rho"),
        (lambda: Table(a=(1.0,), s=(0.1,)), "length"),
        (lambda: Table(a=(0.5, 0.9), s=(0.5, 0.1)), "increasing"),
        (lambda: Table.from_alphas_cumprod([1.2, 0.3]), "alphas_cumprod"),
        (lambda: Table.from_sigmas([-1.0, 2.0]), "negative"),
        (lambda: Linear().at(1.5), "outside"),
    ],
)
def test_wrong_arguments_are_refused(make, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()
