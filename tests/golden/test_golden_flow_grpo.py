"""Flow-GRPO and DDPO against their official code: steps, log-probabilities, clipped loss, KL in both units."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gencontrol.algorithms.path.base import PathMicro
from gencontrol.algorithms.path.flow_grpo import Ddpo, DdpoConfig, FlowGrpo, FlowGrpoConfig
from gencontrol.process import GaussianProcess, Linear
from gencontrol.process.schedule import Coeffs
from gencontrol.sampling.state import gaussian_log_prob
from gencontrol.sampling.steps import Ddim
from tests.helpers.golden import cases, relative, tensors


@pytest.mark.parametrize("case", cases("flow_grpo_step"))
def test_rollout_step(case: str) -> None:
    """Mean, std and log-prob of each step but the last, to clean data, where ours is the clean prediction itself."""
    level, data = cases("flow_grpo_step")[case]["noise_level"], tensors("flow_grpo_step", case)
    step = FlowGrpo.rollout_step(FlowGrpoConfig(noise=level))
    process, x, v = GaussianProcess(Linear()), data["x"].double(), data["v"].double()
    sigmas, kept = data["sigmas"].double().tolist(), data["mean_steps"].tolist()
    for k, (s, s_next) in enumerate(zip(sigmas[:-2], sigmas[1:-1])):
        w0, w1, std = step.weights(process, s, s_next, x)
        mean = w0 * (x - s * v) + w1 * (x + (1 - s) * v)
        assert relative(std, data["sigma_t"][k].double() * math.sqrt(s - s_next)) < 1e-6
        if k in kept:
            assert relative(mean, data["mean"][kept.index(k)]) < 1e-6
        log_prob = gaussian_log_prob(x + data["delta"].double(), mean, std) / x[0].numel()
        assert relative(log_prob, data["log_prob"][k]) < 1e-5


class _TwoPoints(GaussianProcess):
    """A process of which two moments are asked, t = 1 and t = 0.5."""

    def __init__(self, here: Coeffs, there: Coeffs) -> None:
        object.__setattr__(self, "points", {1.0: here, 0.5: there})

    def at(self, t: Any, like: Any) -> Coeffs:
        return self.points[t]

    landing = at


def test_ddpo_step() -> None:
    """DDIM with eta = 1 on all 50 steps of Stable Diffusion's table, the last one, which has a deviation, included."""
    data = tensors("ddpo_logprob")
    x, eps, axes = data["x"], data["eps"], data["x"][0].numel()
    step = Ddpo.rollout_step(DdpoConfig())
    assert isinstance(step, Ddim)
    for k, (now, after) in enumerate(zip(data["alphas_cumprod_at"].tolist(), data["alphas_cumprod_next"].tolist())):
        here, there = (Coeffs(a**0.5, (1 - a) ** 0.5, 0.0, 0.0) for a in (now, after))
        w0, w1, std = step.weights(_TwoPoints(here, there), 1.0, 0.5, x)
        mean = w0 * (x - here.s * eps) / here.a + w1 * eps
        assert relative(std, data["std"][k]) < 1e-6
        for x_next, name in ((mean + std * data["z"], "log_prob"), (x, "log_prob_of_x")):
            assert relative(gaussian_log_prob(x_next, mean, std) / axes, data[name][k]) < 1e-6


class _Role:
    """Says which role's prediction is asked for."""

    active = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _Role.active = self.name

    def __exit__(self, *error: object) -> None:
        _Role.active = ""


@pytest.mark.parametrize("case", cases("flow_grpo_loss"))
def test_loss(case: str) -> None:
    """Clipped surrogate and KL through `PathGradient.loss`, value and gradient; log-probabilities are sums in ours."""
    config, data = cases("flow_grpo_loss")[case], tensors("flow_grpo_loss", case)
    axes, rows = data["x_next"][0].numel(), len(data["x_next"])
    unit = config["unit"] if config["unit"] in ("code", "paper") else "code"
    options: Any = {"clip_range": config["clip"], "path_kl_coef": config["kl_coef"], "path_kl_unit": unit}
    mean = data["mean_policy"].clone().requires_grad_()
    means, std = {"policy": mean, "ref": data["mean_ref"]}, float(data["std"])
    algorithm: Any = SimpleNamespace(
        config=FlowGrpoConfig(**options),
        roles=SimpleNamespace(use=_Role),
        process=GaussianProcess(Linear()),
        base_at=lambda *arguments: None,
        _moments=lambda micro, ctx: (means[_Role.active], std, None),
    )
    algorithm._length = partial(FlowGrpo._length, algorithm)
    advantages = data["advantages"].clamp(-5, 5)
    micro = PathMicro(data["x_next"], data["x_next"], data["log_prob_old"] * axes, advantages, None, 0.6, 0.5)
    ctx: Any = SimpleNamespace(poll=lambda: None)
    out = FlowGrpo.loss(algorithm, micro, ctx)
    loss = out.total / out.count
    (slope,) = torch.autograd.grad(loss, mean)
    assert out.count == rows
    assert relative(loss, data["loss"]) < 1e-7
    assert relative(slope, data["grad"]) < 1e-7
    if "kl" in data:
        assert relative(out.metrics["policy/kl"] / rows, data["kl"]) < 1e-7


@pytest.mark.parametrize(("unit", "weight"), [("code", 0.04), ("paper", 0.004)])
def test_each_unit_has_its_own_weight(unit: Any, weight: float) -> None:
    assert FlowGrpoConfig(path_kl_unit=unit).kl_weight() == weight
    assert FlowGrpoConfig(path_kl_unit=unit, path_kl_coef=0.5).kl_weight() == 0.5
    assert DdpoConfig().kl_weight() == 0
