"""Losses of DiffusionNFT, AWM, CRD, Diffusion-DPO and Diffusion-KTO against their official code, values and gradients.

The network's one weight is its prediction, a row per sample, so that each role's weights are that role's stored
prediction and the weight's gradient is the stored gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.crd import implicit_reward
from gencontrol.algorithms.forward.awm import Awm
from gencontrol.algorithms.forward.base import Micro
from gencontrol.algorithms.forward.crd import Crd
from gencontrol.algorithms.forward.nft import Nft
from gencontrol.algorithms.matching.preference import Errors, dpo, kto, kto_baseline
from gencontrol.algorithms.online.rollout import squared_error
from gencontrol.bench.toys import toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.types import Prediction
from tests.helpers.dragon_worlds import FirstAxis
from tests.helpers.golden import cases, relative, tensors

SHAPE = (3, 4, 4)


class Stored(nn.Module):
    """Returns its weight; on rows whose condition is 0 the unconditional prediction."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.prediction = nn.Parameter(torch.zeros(rows, *SHAPE, dtype=torch.float64))
        self.empty = torch.zeros(rows, *SHAPE, dtype=torch.float64)

    def forward(self, xt: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        # a copy, because roles take turns in one parameter
        parts = [(self.prediction if bool(part.any()) else self.empty) for part in cond.split(len(self.prediction))]
        return torch.cat(parts).clone()


def method(kind: Any, rows: int, predictions: dict[str, Tensor], empty: Tensor | None = None, **options: Any) -> Any:
    """The method with these predictions in its roles."""
    network = Stored(rows)
    network.prediction.data.copy_(predictions["ref"])  # the base is what the roles begin with
    task = toy_task(Denoiser(network, GaussianProcess(Linear()), Prediction.VELOCITY), 1)
    task = replace(task, latent_shape=SHAPE, uncond=torch.zeros(1, 1))
    config = kind.Config(ema_decay=0.0, **options)
    roles = Roles(network, kind.role_names(config))
    if empty is not None:
        network.empty = empty
    made = kind(task, FirstAxis(), config, roles=roles, seed=0)
    for role, value in predictions.items():
        if role != "ref" and role in made.roles.state_dict():
            made.roles.state_dict()[role]["prediction"].data.copy_(value)
    return made


def batch(data: dict[str, Tensor], goal: Tensor, advantage: Tensor, strength: Tensor, unit: Tensor) -> Micro:
    rows = len(data["x0"])
    return Micro(data["x0"], data["noise"], data["t"], torch.ones(rows, 1), unit, advantage, goal, goal, strength, {})


def outcome(algorithm: Any, micro: Micro) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Loss, its gradient to the policy's prediction, and metrics, averaged over rows."""
    out = algorithm.loss(micro, StepContext(seed=0, step=0, micro_batch=1000))
    (weight,) = algorithm.roles.trainable()
    loss = out.total / out.count
    (slope,) = torch.autograd.grad(loss, weight)
    return loss.detach(), slope, {key: value / out.count for key, value in out.metrics.items()}


@pytest.mark.parametrize("case", cases("nft_loss"))
def test_nft(case: str) -> None:
    config, data = cases("nft_loss")[case], tensors("nft_loss", case)
    if config["dtype"] == "float32":
        data |= {key: data[key].float().double() for key in ("x0", "noise", "t", "v_theta", "v_old", "v_ref")}
    rows, clip = len(data["x0"]), config["adv_clip"]
    roles = {"policy": data["v_theta"], "old": data["v_old"], "ref": data["v_ref"]}
    options = {"beta": config["beta"], "kl_coef": config["kl"], "adv_clip": clip, "adaptive": config["adaptive"]}
    advantage = data["advantages"].clamp(-clip, clip)
    goal, strength = (advantage / (2 * clip) + 0.5).clamp(0, 1), torch.full((rows,), config["kl"]).double()
    micro = batch(data, goal, advantage, strength, torch.zeros(rows).long())
    loss, slope, _ = outcome(method(Nft, rows, roles, **options), micro)
    assert relative(loss, data["loss"]) < (1e-7 if config["dtype"] == "float64" else 1e-6)
    assert relative(slope, data["grad"]) < (1e-7 if config["dtype"] == "float64" else 1e-6)


@pytest.mark.parametrize("case", cases("awm_loss"))
def test_awm(case: str) -> None:
    config, data = cases("awm_loss")[case], tensors("awm_loss", case)
    rows = len(data["x0"])
    roles = {"policy": data["v_theta"], "start": data["v_start"], "old": data["v_ema"], "ref": data["v_ref"]}
    options = {
        "weighting": {"ghuber": "robust", "t": "time", "uniform": "uniform"}[config["weighting"]],
        "clip_range": config["clip_range"],
        "snapshot_coef": config["ema"],
        "kl_coef": config["kl"],
        "updates_per_round": 2 if config["off_policy"] else 1,
    }
    advantage = data["advantages"].clamp(-5, 5).repeat(rows // len(data["advantages"]))
    strength = torch.full((rows,), config["kl"]).double()
    micro = batch(data, advantage, advantage, strength, torch.zeros(rows).long())
    loss, slope, _ = outcome(method(Awm, rows, roles, **options), micro)
    assert relative(loss, data["loss"]) < 1e-6
    assert relative(slope, data["grad"]) < 1e-6


@pytest.mark.parametrize("case", cases("crd_loss"))
def test_crd(case: str) -> None:
    """β off 1 among them: the loss's scale A_max/β."""
    config, data = cases("crd_loss")[case], tensors("crd_loss", case)
    rows = len(data["x0"])
    roles = {"policy": data["v_theta"], "old": data["v_old"], "ref": data["v_ref_cond"]}
    options = {
        "loss": config["loss"],
        "beta": config["beta"],
        "weight_temp": config["tau"],
        "weighting": "adaptive" if config["adaptive"] else "none",
        "kl_coef": config["kl"],
        "kl_guidance": 4.5,
        "kl_adapt": "advantage" if config["kl_adaptive"] else "off",
    }
    advantage = data["advantages"].clamp(-5, 5)
    goal = (advantage / 10 + 0.5).clamp(0, 1)
    strength = 1e-4 + goal * (config["kl"] - 1e-4) if config["kl_adaptive"] else torch.full_like(goal, config["kl"])
    unit = data["group_index"] if config["center"] == "group" else torch.zeros(rows).long()
    algorithm = method(Crd, rows, roles, data["v_ref_uncond"], **options)
    loss, slope, _ = outcome(algorithm, batch(data, goal, advantage, strength, unit))
    assert relative(loss, data["loss"]) < 1e-7
    assert relative(slope, data["grad"]) < 1e-6
    target = data["noise"] - data["x0"]
    ratio = implicit_reward(data["v_theta"], data["v_old"], target, adaptive=config["adaptive"])
    assert relative(ratio, data["implicit_reward"]) < 1e-7


@pytest.mark.parametrize("case", [name for name in cases("preference_losses") if name.startswith("dpo")])
def test_diffusion_dpo(case: str) -> None:
    beta, data = cases("preference_losses")[case]["beta"], tensors("preference_losses", case)
    prediction = data["pred"].clone().requires_grad_()
    errors, base = squared_error(prediction, data["target"]), squared_error(data["pred_ref"], data["target"])
    loss = dpo(Errors(errors[:6], errors[6:], base[:6], base[6:]), beta, 0.0).mean()
    (slope,) = torch.autograd.grad(loss, prediction)
    assert relative(loss, data["loss"]) < 1e-9
    assert relative(slope, data["grad"]) < 1e-9


@pytest.mark.parametrize("case", [name for name in cases("preference_losses") if name.startswith("kto")])
def test_diffusion_kto(case: str) -> None:
    beta, data = cases("preference_losses")[case]["beta"], tensors("preference_losses", case)
    error, wanted = data["error"].clone().requires_grad_(), data["label"] > 0.5
    parts = Errors(error[wanted], error[~wanted], data["error_ref"][wanted], data["error_ref"][~wanted])
    baseline = kto_baseline(float(parts.gains().detach().mean()))
    loss = kto(parts, beta, baseline).mean()
    (slope,) = torch.autograd.grad(loss, error)
    assert baseline == pytest.approx(float(data["Q"]), rel=1e-12)
    assert relative(loss, data["loss"]) < 1e-12
    assert relative(slope, data["grad"]) < 1e-12
