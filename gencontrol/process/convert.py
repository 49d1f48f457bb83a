"""Prediction types as rows: one 2x2 solve serves every schedule and type.

A type is a row r with target = r·(x0, eps).  With x_t = (a, s)·(x0, eps) two rows determine (x0, eps), so any type is
p·x_t + q·output of any other.  Rows: X0 (1, 0), EPS (0, 1), V (-s, a) (Salimans & Ho 2022), VELOCITY (da, ds)
(Lipman et al. 2023), EDM the raw network F of D = c_skip·x + c_out·F (Karras et al. 2022 eq. 7, table 1), written with
sigma = s/a as (s/d, -a·d)/sqrt(s² + a²·d²), which stays finite at a = 0.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.process.schedule import Coeffs, Scalar
from gencontrol.types import Prediction

Row = tuple[Scalar, Scalar]


def rows(prediction: Prediction, coeffs: Coeffs, sigma_data: float = 0.5) -> Row:
    """Return the row (on x0, on eps) of a prediction type at these coefficients.

    Args:
        sigma_data: standard deviation of the data; used by EDM alone.
    """
    match prediction:
        case Prediction.X0:
            return 1.0, 0.0
        case Prediction.EPS:
            return 0.0, 1.0
        case Prediction.V:
            return -coeffs.s, coeffs.a
        case Prediction.VELOCITY:
            return coeffs.da, coeffs.ds
        case Prediction.EDM:
            norm = (coeffs.s * coeffs.s + coeffs.a * coeffs.a * sigma_data**2) ** 0.5
            return coeffs.s / (sigma_data * norm), -coeffs.a * sigma_data / norm
    raise ValueError(f"unknown prediction type {prediction!r}; expected one of {', '.join(Prediction)}")


def determinant(prediction: Prediction, coeffs: Coeffs, sigma_data: float = 0.5) -> Scalar:
    """Return a·r1 - s·r0, the determinant of (x_t, target) on (x0, eps); 0 or infinite where the type says nothing."""
    row = rows(prediction, coeffs, sigma_data)
    return coeffs.a * row[1] - coeffs.s * row[0]


def solve(given: Row, wanted: Row, coeffs: Coeffs) -> tuple[Scalar, Scalar]:
    """Return (p, q) with wanted·(x0, eps) = p·x_t + q·(given·(x0, eps)).

    Raises:
        ValueError: `given` is singular here (X0 at s = 0, EPS at a = 0) or a row is infinite (VELOCITY of VP at t = 0);
            t and schedule are named.  Coefficients on an accelerator are not looked at (it would stall it): the result
            is then NaN or infinite.
    """
    det = coeffs.a * given[1] - coeffs.s * given[0]
    _refuse_singular(given, wanted, coeffs, det)
    return (wanted[0] * given[1] - wanted[1] * given[0]) / det, (coeffs.a * wanted[1] - coeffs.s * wanted[0]) / det


def convert_weights(
    source: Prediction, target: Prediction, coeffs: Coeffs, sigma_data: float = 0.5
) -> tuple[Scalar, Scalar]:
    """Return (p, q) with target = p·x_t + q·output for an output of type `source`; (0, 1) for the same type.

    Raises:
        ValueError: singular here; the message names the types, t and the schedule.
    """
    if source == target:
        return 0.0, 1.0
    try:
        return solve(rows(source, coeffs, sigma_data), rows(target, coeffs, sigma_data), coeffs)
    except ValueError as error:
        raise ValueError(f"prediction type {source.upper()} gives no {target.upper()}: {error}") from None


def convert(
    output: Float[Tensor, "b *d"],
    xt: Float[Tensor, "b *d"],
    coeffs: Coeffs,
    source: Prediction,
    target: Prediction,
    sigma_data: float = 0.5,
) -> Float[Tensor, "b *d"]:
    """Return a network output of type `source` in the coordinates of `target`; `coeffs` must broadcast against x."""
    p, q = convert_weights(source, target, coeffs, sigma_data)
    return combine(p, xt, q, output)


def combine(p: Scalar, x: Float[Tensor, "*d"], q: Scalar, y: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Return p·x + q·y with as few operations as the coefficients allow."""
    if isinstance(p, Tensor) or isinstance(q, Tensor):
        return p * x + q * y
    if p == 0.0:
        return y if q == 1.0 else q * y
    if q == 0.0:
        return x if p == 1.0 else p * x
    return torch.add(p * x if p != 1.0 else x, y, alpha=q)


def to_x0_eps(
    output: Float[Tensor, "b *d"],
    xt: Float[Tensor, "b *d"],
    coeffs: Coeffs,
    prediction: Prediction,
    sigma_data: float = 0.5,
) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
    """Return the clean sample and the noise that a network output stands for; `coeffs` must broadcast against x."""
    x0 = convert(output, xt, coeffs, prediction, Prediction.X0, sigma_data)
    return x0, convert(output, xt, coeffs, prediction, Prediction.EPS, sigma_data)


def from_x0_eps(
    x0: Float[Tensor, "b *d"],
    eps: Float[Tensor, "b *d"],
    coeffs: Coeffs,
    prediction: Prediction,
    sigma_data: float = 0.5,
) -> Float[Tensor, "b *d"]:
    """Return the regression target of a prediction type; `coeffs` must broadcast against x."""
    row = rows(prediction, coeffs, sigma_data)
    return combine(row[0], x0, row[1], eps)


def weight_ratio(source: Prediction, target: Prediction, coeffs: Coeffs, sigma_data: float = 0.5) -> Scalar:
    """Return w with |error in target|² = w·|error in source|² at the same x_t: the squared ratio of determinants."""
    _, q = convert_weights(source, target, coeffs, sigma_data)
    return q * q


def _refuse_singular(given: Row, wanted: Row, coeffs: Coeffs, det: Scalar) -> None:
    """Raise where the system has no finite solution."""
    bad = _unusable(det, zero_is_bad=True)
    for value in (*given, *wanted):
        bad = bad or _unusable(value, zero_is_bad=False)
    if not bad:
        return
    times = torch.as_tensor(coeffs.t, dtype=torch.float64).reshape(-1)
    flags = torch.zeros(1, dtype=torch.bool)
    for value in (det, *given, *wanted):
        wide = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
        flags = (
            flags | ~torch.isfinite(wide) | ((wide == 0) if value is det else torch.zeros_like(wide, dtype=torch.bool))
        )
    index = int(flags.nonzero()[0, 0])
    where = float(times[index]) if len(times) == len(flags) else float(times[0])
    raise ValueError(
        f"singular at t = {where:g} of the {coeffs.schedule} schedule; use another prediction type or stay away from "
        "that end"
    )


def _unusable(value: Scalar, *, zero_is_bad: bool) -> bool:
    """Whether a coefficient is infinite, NaN or (optionally) zero anywhere; False for values on an accelerator."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return False
        return bool((~torch.isfinite(value)).any()) or (zero_is_bad and bool((value == 0).any()))
    return not math.isfinite(value) or (zero_is_bad and value == 0.0)
