"""DiffusionNFT and AWM: the contract, their formulas, gradients beside CRD's at the snapshot, NFT's law, the anchor."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from test_crd_losses import fit, grid
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.forward.awm import Awm, AwmConfig
from gencontrol.algorithms.forward.base import Micro
from gencontrol.algorithms.forward.crd import Crd
from gencontrol.algorithms.forward.nft import Nft, NftConfig
from gencontrol.algorithms.matching.rwr import RewardWeightedRegression
from gencontrol.algorithms.online.base import reference_prediction
from gencontrol.models.roles import LoraConfig
from gencontrol.rewards.compose import weighted
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.forward_worlds import SMALL, Shifted, gaussian_task, make, mean_shift, move

CTX = StepContext(seed=0, step=0, micro_batch=1000)


class TestNft(AlgorithmContract):
    """With a lagging snapshot and the guided anchor."""

    # 1e-4: samples differ by float32 rounding between batch sizes
    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Nft:
        nft = make(Nft, decay="0-0.3-0.1-0.9", kl_coef=0.1)
        move(nft.roles, 0.05, "policy", "old")
        return nft


class TestAwm(TestNft):
    """Two updates per round (snapshot at the start), lagging snapshot, LoRA."""

    def make(self) -> Awm:
        awm = make(Awm, lora=LoraConfig(rank=2, targets=("body.0", "body.2", "body.4", "body.6")))
        move(awm.roles, 0.05, "policy", "old", "start")
        return awm


def one_group(kind: Any, **options: Any) -> tuple[Any, Micro]:
    """A method with one group of samples in one micro-batch, at θ = old."""
    shared = {"prompts_per_round": 1, "generations": 8, "updates_per_round": 1, "train_times": 1, "kl_coef": 0.0}
    algorithm = make(kind, **(shared | options))
    (micro,) = algorithm.minibatches(algorithm.collect(CTX).data, 0, CTX)
    return algorithm, micro


def gradient(algorithm: Any, micro: Micro) -> Tensor:
    out = algorithm.loss(micro, CTX)
    out.total.backward()
    return torch.cat([p.grad.flatten() for p in algorithm.roles.trainable()]) / out.count


def test_all_three_point_the_same_way_at_the_snapshot() -> None:
    """docs/methods/crd.md#gradients-at-the-snapshot: with w = 1 the gradients at θ = old are, on the same rows, all the
    advantage-weighted denoising error's.

    CRD: (A_max/β)·2β/K·ΣR_c∇ℓ with R_c = A/(2·A_max): (1/K)ΣA∇ℓ.  NFT: (A_max/β)·(β/A_max)·(1/K)ΣA∇ℓ, in x0 space: t²·ℓ
    for a rectified flow, and the one time of the group makes that a factor.
    """
    plain = {"adv_clip": 5.0, "demo_steps": 3}
    crd, rows = one_group(Crd, weighting="none", **plain)
    nft, nft_rows = one_group(Nft, adaptive=False, time_sampling="stratified", **plain)
    awm, awm_rows = one_group(Awm, weighting="uniform", advantage_max=5.0, snapshot_coef=0.0, **plain)

    expected = gradient(awm, rows)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(crd, rows), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradient(nft, rows), rows.t[0] ** 2 * expected, rtol=1e-3, atol=1e-6)
    assert len(nft_rows.t) == len(awm_rows.t) == 8


def test_nft_shifts_a_gaussian_by_one_over_a_max_beta() -> None:
    """docs/methods/crd.md#what-beta-means: base N(0, 1), A = x without clipping, w = 1: the exact shape of a shifted
    Gaussian, by 1/(A_max·β).
    """
    task, a_max, beta = gaussian_task(8), 5.0, 2.0
    nft = make(Nft, task=task, adaptive=False, beta=beta, adv_clip=a_max, kl_coef=0.0, kl_guidance=1.0)
    network = task.denoiser.network
    assert isinstance(network, Shifted)
    x0, eps, t = grid(1 << 15)
    empty = torch.zeros(len(t), dtype=torch.float64)
    goal = x0 / (2 * a_max) + 0.5
    micro = Micro(x0[:, None], eps[:, None], t, None, empty.long(), x0, goal, x0, empty, {})
    fit(lambda: nft.loss(micro, CTX).total / len(t), network)
    assert mean_shift(network) == pytest.approx(1 / (a_max * beta), rel=0.02)
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    exact = -at / (at.square() + (1 - at).square()) / (a_max * beta)
    # 8 powers of t and 32768 points: within 5 % of the largest value
    torch.testing.assert_close(network.shift(at).detach(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_awm_weighs_errors_by_the_generalised_huber_gradient() -> None:
    """d/dℓ of t·((ℓ + s)^p − s^p)/p is t·(ℓ + s)^(p − 1): at θ = old each row pulls with A·t·ℓ^(p − 1)·∇ℓ."""
    awm = make(Awm, robust=0.25, snapshot_coef=0.0, kl_coef=0.0, updates_per_round=1)
    (micro,) = awm.minibatches(awm.collect(CTX).data, 0, CTX)
    awm.loss(micro, CTX).total.backward()
    got = [p.grad.clone() for p in awm.roles.trainable()]
    t = micro.t[:, None]
    xt, v = (1 - t) * micro.latents + t * micro.noise, micro.noise - micro.latents
    error = (awm.task.denoiser(xt, micro.t, micro.cond).velocity - v).square().mean(1)
    pull = (micro.advantage / 5.0 * micro.t * error.detach() ** -0.75 * error).sum()
    expected = torch.autograd.grad(pull, list(awm.roles.trainable()))
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [Nft, Awm, Crd])
def test_every_method_takes_the_same_anchor(kind: Any) -> None:
    """The anchored loss is the plain one plus κ times the distance to the guided base."""
    options = {"kl_adapt": "off", "kl_guidance": 3.0, "updates_per_round": 1}
    totals = []
    for coef in (0.0, 0.7):
        algorithm = make(kind, kl_coef=coef, **options)
        move(algorithm.roles, 0.1, "policy", "old")
        micro = next(iter(algorithm.minibatches(algorithm.collect(CTX).data, 0, CTX)))
        totals.append(algorithm.loss(micro, CTX).total.detach())
    t = micro.t[:, None]
    xt, task = (1 - t) * micro.latents + t * micro.noise, algorithm.task
    reference = reference_prediction(task, algorithm.roles, xt, micro.t, micro.cond, 3.0).velocity
    distance = (task.denoiser(xt, micro.t, micro.cond).velocity - reference).square().mean(1).sum().detach()
    torch.testing.assert_close(totals[1] - totals[0], 0.7 * distance, rtol=1e-3, atol=1e-4)


def test_reward_weighted_regression_takes_it_too() -> None:
    small = {"prompts_per_round": 4, "updates_per_round": 1, "demo_steps": 3, "eval_steps": 3}
    from gencontrol.models.roles import Roles
    from tests.helpers.dragon_worlds import FirstAxis
    from tests.helpers.forward_worlds import guided_task

    totals = []
    for coef in (0.0, 0.7):
        task = guided_task()
        config = RewardWeightedRegression.Config(**small, kl_coef=coef, kl_guidance=3.0)
        rwr = RewardWeightedRegression(task, FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)
        (micro,) = rwr.minibatches(rwr.collect(CTX).data, 0, CTX)
        totals.append(rwr.loss(micro, CTX).total.detach())
    t = micro.t[:, None]
    xt = (1 - t) * micro.latents + t * micro.noise
    reference = reference_prediction(task, rwr.roles, xt, micro.t, micro.cond, 3.0).velocity
    distance = (task.denoiser(xt, micro.t, micro.cond).velocity - reference).square().mean(1).sum().detach()
    torch.testing.assert_close(totals[1] - totals[0], 0.7 * distance, rtol=1e-3, atol=1e-4)


class Axis:
    """Item reward: one coordinate times a unit."""

    kind, differentiable = "item", False

    def __init__(self, axis: int, unit: float) -> None:
        self.name, self.axis, self.unit = f"axis{axis}", axis, unit

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        return RewardOut(self.unit * samples[:, self.axis], torch.ones(len(samples), dtype=torch.bool))


def test_several_rewards_are_normalised_each_for_itself_or_summed() -> None:
    """A reward in a unit 1000 times larger rules the plain sum, and counts alike under "gdpo"."""

    def advantages(combine: str, unit: float) -> Tensor:
        nft = make(Nft, weighted([(Axis(0, 1.0), 1.0), (Axis(1, unit), 1.0)]), combine=combine)
        return nft.collect(CTX).data.advantage

    torch.testing.assert_close(advantages("gdpo", 1.0), advantages("gdpo", 1000.0), rtol=2e-3, atol=2e-3)
    alone = make(Nft, Axis(1, 1.0)).collect(CTX).data.advantage
    torch.testing.assert_close(advantages("sum", 1000.0), alone, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(advantages("sum", 1.0), alone, atol=0.1)
    metrics = make(Nft, weighted([(Axis(0, 1.0), 1.0), (Axis(1, 2.0), 0.5)])).collect(CTX).metrics
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/axis0"] + 0.5 * metrics["reward/axis1"], abs=1e-5)


@pytest.mark.parametrize(
    ("config", "options"), [(NftConfig, {"beta": 0.0}), (AwmConfig, {"robust": -1.0}), (NftConfig, {"spread": "all"})]
)
def test_options_out_of_range_are_named(config: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        config(**(SMALL | options))
