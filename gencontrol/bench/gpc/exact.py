"""Part A of `bench gpc`: composition where the law is known (docs/methods/gpc.md#exact-laws and
docs/methods/gpc.md#part-a), in seconds, without a robot.

The composed score of Gaussian parents is linear, so mean and deviation of what a sampler draws are propagated exactly,
step by step, and compared with the limits of docs/methods/gpc.md#exact-laws (the DDPM column is derived here the same
way: with Φ(q) = Π(sᵢ² + q)^(wᵢ/2), mean Φ(0)²∫Σ wᵢmᵢ/(sᵢ² + q)/Φ², variance Φ(0)⁴∫Φ⁻⁴ over q = (s/a)² from 0).  The
bimodal rows are samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencontrol.bench.base import Check, table
from gencontrol.models.exact import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rng import Keyed, row_keys
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.robotics.policies.diffusion import squaredcos
from gencontrol.robotics.policies.foreign import ForeignPolicy
from gencontrol.sampling import compose, ddim, score_shift
from gencontrol.stats import Estimate

Law = tuple[float, float]
Row = list[Estimate | float | str]


def mixture(
    means: Sequence[float], sds: Sequence[float], weights: Sequence[float], process: GaussianProcess
) -> GaussianMixture:
    """Return a mixture of one-dimensional Gaussians."""
    covariances = torch.tensor(sds, dtype=torch.float64).square()[:, None, None]
    return GaussianMixture(torch.tensor(means)[:, None].double(), covariances, torch.tensor(weights), process)


def diffusion(levels: int) -> GaussianProcess:
    """Return the cosine schedule of diffusion policies with that many levels."""
    return GaussianProcess(squaredcos(levels))


def level_times(levels: int) -> list[float]:
    """Return the times of all levels, from noise to data."""
    return [(levels - k) / levels for k in range(levels)] + [0.0]


def sampled_law(model: Any, times: Sequence[float], eta: float) -> Law:
    """Return mean and deviation of the samples of a model whose prediction is affine in x_t: no random number is drawn.

    Args:
        eta: 0 DDIM, 1 DDPM.
    """
    grid = torch.tensor(times, dtype=torch.float64)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat_interleave(len(grid) - 1, 0)
    means, std = ddim(eta).moments(model, ends, grid[:-1].repeat(2), grid[1:].repeat(2))  # all steps at once
    at_zero, at_one = means.view(2, -1)
    noise = torch.as_tensor(std).flatten().expand(2 * len(at_zero))[: len(at_zero)].square()
    mean, variance = 0.0, model.process.schedule.at(times[0]).s ** 2
    for constant, slope, added in zip(at_zero.tolist(), (at_one - at_zero).tolist(), noise.tolist()):
        mean, variance = constant + slope * mean, slope**2 * variance + added
    return mean, math.sqrt(variance)


def limit_law(means: Sequence[float], sds: Sequence[float], weights: Sequence[float], eta: float) -> Law:
    """Return mean and deviation of the limit of many steps (docs/methods/gpc.md#exact-laws; weights need not sum to 1).

    The integrals are trapezoids over log(q + least variance) with 200 000 nodes.
    """
    least = min(sds) ** 2
    q = torch.expm1(torch.linspace(0.0, 36.0, 200_001, dtype=torch.float64)) * least
    variances = [s * s + q for s in sds]
    log_phi = sum(0.5 * w * v.log() for w, v in zip(weights, variances, strict=True))
    assert isinstance(log_phi, Tensor)
    pull = sum(w * m / v for w, m, v in zip(weights, means, variances, strict=True))
    power = 1.0 if eta == 0.0 else 2.0
    mean = float(torch.trapezoid(pull * torch.exp(power * (log_phi[0] - log_phi)), q)) * power / 2
    if eta == 0.0:
        total = sum(weights)
        return mean, math.prod(s**w for s, w in zip(sds, weights, strict=True)) if abs(total - 1) < 1e-9 else 0.0
    return mean, math.sqrt(float(torch.trapezoid(torch.exp(4 * (log_phi[0] - log_phi)), q)))


def exact_policy(
    means: Sequence[float], sds: Sequence[float], weights: Sequence[float], levels: int = 100
) -> ForeignPolicy:
    """Return a policy of one action per chunk whose law is known."""
    sampler = ChunkSampler(levels, "ddim", tuple(level_times(levels)), clip=None)
    spec = PolicySpec({"state": (1,)}, 1, horizon=1, n_obs=1, n_action=1)
    return ForeignPolicy(spec, mixture(means, sds, weights, diffusion(levels)), sampler=sampler)


def draw(policy: Any, count: int, name: str, seed: int) -> Tensor:
    """Return `count` actions."""
    noise = Keyed(row_keys(seed, name, torch.arange(count)))
    with torch.inference_mode():
        actions: Tensor = policy.sample_chunk({"state": torch.zeros(count, 1, 1).numpy()}, noise)
    return actions.flatten()


def gaussian_rows(levels: int) -> tuple[list[Row], list[Check]]:
    """The table of docs/methods/gpc.md#exact-laws and a diffusion parent mixed with a flow parent."""
    cases = [
        ("equal sd", (-1.0, 1.0), (0.5, 0.5), (0.3, 0.7), diffusion(levels)),
        ("unequal sd", (-1.0, 1.0), (0.5, 1.0), (0.5, 0.5), diffusion(levels)),
        ("diffusion + flow", (-1.0, 1.0), (0.5, 1.0), (0.5, 0.5), GaussianProcess(Linear())),
    ]
    rows: list[Row] = []
    checks, times = [], level_times(levels)
    sds_summed = []
    for name, means, sds, weights, second in cases:
        parents = [mixture([m], [s], [1.0], p) for m, s, p in zip(means, sds, (diffusion(levels), second), strict=True)]
        model = compose(parents, weights)
        for eta, sampler in ((0.0, "DDIM"), (1.0, "DDPM")):
            found, limit = sampled_law(model, times, eta), limit_law(means, sds, weights, eta)
            rows.append([name, sampler, *found, *limit])
            gap = max(abs(found[0] - limit[0]), abs(found[1] - limit[1]))
            claim = f"{name}, {sampler}, {levels} levels: law within 0.003 of the closed form"
            checks.append(Check(claim, f"{gap:.4f}", gap <= 3e-3))
    parents = [mixture([m], [0.5], [1.0], diffusion(levels)) for m in (-1.0, 1.0)]
    summed = score_shift(parents[0], lambda pred, t, cond: parents[1](pred.xt, t).score)
    for eta, sampler in ((0.0, "DDIM"), (1.0, "DDPM")):
        found, limit = sampled_law(summed, times, eta), limit_law((-1.0, 1.0), (0.5, 0.5), (1.0, 1.0), eta)
        rows.append(["scores summed", sampler, *found, *limit])
        sds_summed.append(found[1])
    collapsed, sharpened = sds_summed
    checks.append(
        Check(
            "scores summed without a baseline collapse under DDIM and sharpen under DDPM (product: sd 0.354)",
            f"sd {collapsed:.4f} and {sharpened:.4f}",
            collapsed < 0.02 and abs(sharpened - 0.2887) < 3e-3,
        )
    )
    return rows, checks


def bimodal_rows(count: int, seed: int) -> tuple[list[Row], list[Check]]:
    """Two-mode parents: composition keeps the gap empty, averaging of actions with independent noise fills it."""
    rows: list[Row] = []
    checks = []
    cases = {
        "modes ±1 shifted by ±0.1": ((0.5, 0.5), (0.5, 0.5), 0.1),
        "mode weights .9/.1 and .3/.7": ((0.9, 0.1), (0.3, 0.7), 0.0),
    }
    for name, (first, second, shift) in cases.items():
        parents = [exact_policy([-1 + d, 1 + d], [0.15, 0.15], w) for d, w in ((shift, first), (-shift, second))]
        arms = {
            "first parent": draw(parents[0], count, "one", seed),
            "second parent": draw(parents[1], count, "one", seed),
            "convex": draw(ComposedPolicy(parents, [0.5, 0.5]), count, "one", seed),
            "OR": draw(ComposedPolicy(parents, [0.5, 0.5], operator="or"), count, "one", seed),
        }
        arms["average, shared noise"] = (arms["first parent"] + arms["second parent"]) / 2
        arms["average, independent noise"] = (arms["first parent"] + draw(parents[1], count, "two", seed)) / 2
        gap = {arm: float((x.abs() < 0.5).double().mean()) for arm, x in arms.items()}
        right = {arm: float((x > 0).double().mean()) for arm, x in arms.items()}
        rows += [[name, arm, gap[arm], right[arm]] for arm in arms]
        measured = f"{gap['convex']:.4f} and {gap['average, independent noise']:.3f}"
        holds = gap["convex"] <= 0.01 and gap["average, independent noise"] >= 0.4
        checks.append(Check(f"{name}: gap mass of the mix ≤ 0.01, of averaged actions ≥ 0.4", measured, holds))
    convex, either = right["convex"], right["OR"]
    checks.append(
        Check(
            "right mode: convex between geometric mean .337 and mixture .40, OR at the mixture's .40 ± .02",
            f"{convex:.3f} and {either:.3f}",
            0.337 - 0.01 <= convex <= 0.40 and abs(either - 0.40) <= 0.02,
        )
    )
    return rows, checks


def part_a(*, levels: int = 1000, count: int = 20_000, seed: int = 0) -> dict[str, Any]:
    """Run Part A; returns "table", "checks" and the rows.

    Args:
        levels: noise levels of the Gaussian rows.
        count: samples of every bimodal row.
    """
    laws, checks = gaussian_rows(levels)
    finite: list[Row] = []
    parents = [mixture([m], [0.5], [1.0], diffusion(1000)) for m in (-1.0, 1.0)]
    for steps in (10, 20, 50, 100, 1000):
        times = [(k * (1000 // steps) + 1) / 1000 for k in reversed(range(steps))] + [0.0]
        finite.append([str(steps), sampled_law(compose(parents, (0.3, 0.7)), times, 0.0)[1]])
    modes, more = bimodal_rows(count, seed)
    text = table(
        "What law a composition samples (found, closed form)",
        ["parents", "sampler", "mean", "sd", "limit mean", "limit sd"],
        laws,
    )
    text += table("Deviation after few DDIM steps (limit 0.5)", ["steps", "sd"], finite)
    text += table(f"Two modes, {count} samples", ["parents", "arm", "mass in |x| < .5", "mass in x > 0"], modes)
    return {"table": text, "checks": [*checks, *more], "laws": laws, "finite": finite, "modes": modes}
