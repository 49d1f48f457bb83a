"""DRaFT: gradients against finite differences, ascent to the maximum, the Trainer's contract, a real VAE."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.path.draft import Draft, DraftConfig, DraftMicro
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.bench.toys import toy_task
from gencontrol.errors import RewardError, UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rng import item_generators, item_noise, randn
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.dragon_worlds import PROMPTS, FirstAxis, make_task
from tests.helpers.gaussian_world import Parabola, gaussian_task

CTX = StepContext(seed=0, step=0, micro_batch=1000)
SMALL = {"prompts_per_round": 6, "generations": 2, "updates_per_round": 2, "demo_steps": 4, "eval_steps": 4}


def make_draft(task: Any = None, reward: Any = None, **options: Any) -> Draft:
    task = task or dataclasses.replace(make_task(), uncond=torch.zeros(1, len(PROMPTS)))
    config = DraftConfig(**(SMALL | {"ema_decay": 0.9} | options))
    return Draft(task, reward or Parabola(0.5), config, roles=Roles(task.denoiser.network), seed=0)


class TestContract(AlgorithmContract):
    """Random truncation, guidance, anchor, averaged weights."""

    # 1e-4: samples differ by float32 rounding between batch sizes
    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Draft:
        return make_draft(
            grad_steps=3, truncation="random", guidance_scale=2.0, kl_coef=0.2, kl_guidance=3.0, sampler="sde"
        )


class TestLowVarianceContract(AlgorithmContract):
    """DRaFT-LV."""

    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Draft:
        return make_draft(low_variance=2)


class LinearFlow(nn.Module):
    """Velocity shift·t, whatever x is: samples are affine in `shift`, so a quadratic reward is a parabola of it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.shift * t[:, None] + 0.1 * xt


def linear_task() -> Any:
    return toy_task(Denoiser(LinearFlow(), GaussianProcess(Linear()), "velocity"), 2)


def first_micro(draft: Draft) -> DraftMicro:
    return next(iter(draft.minibatches(draft.collect(CTX).data, 0, CTX)))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gradient_equals_finite_differences_of_the_last_steps(depth: int) -> None:
    """Earlier steps keep the old weights; central differences of a parabola are exact, so only rounding is left."""
    draft = make_draft(linear_task(), grad_steps=depth)
    micro = first_micro(draft)
    network = draft.task.denoiser.network
    old = network.shift.detach().clone()

    def value(shift: Tensor) -> float:
        x = randn((len(micro.items), 2), item_generators(0, "draft/noise/0/0", micro.items.tolist())).double()
        for k in range(4):
            t, own = 1 - k / 4, (shift if k >= 4 - depth else old).double()
            velocity = own * t + 0.1 * x
            x = x - t * velocity if k == 3 else x - 0.25 * velocity  # the last step returns x0 = x − t·v, t = 1/4
        return float((x - 0.5).square().sum())

    out = draft.loss(micro, CTX)
    assert float(out.total.detach()) == pytest.approx(value(old), rel=1e-4)
    out.total.backward()
    for axis in range(2):
        h = torch.zeros(2)
        h[axis] = 0.5
        assert float(network.shift.grad[axis]) == pytest.approx(value(old + h) - value(old - h), rel=1e-4)


def test_low_variance_averages_fresh_noise_at_the_last_time() -> None:
    draft = make_draft(linear_task(), low_variance=2)
    micro = first_micro(draft)
    draft.loss(micro, CTX).total.backward()
    shift = draft.task.denoiser.network.shift
    measured = shift.grad.clone()
    x0 = draft._sample(micro, CTX).detach()
    total = 0.0
    for copy in (None, 0, 1):
        again = x0
        if copy is not None:
            noise = item_noise((2,), 0, f"draft/copy/0/0/{copy}", micro.items.tolist())
            xt = 0.75 * x0 + 0.25 * noise
            again = xt - 0.25 * (shift.detach() * 0.25 + 0.1 * xt)
        total = total + (2 * (again - 0.5) * (-0.25 * 0.25)).sum(0) / 3
    torch.testing.assert_close(measured, total, rtol=1e-4, atol=1e-6)


def test_anchor_pulls_to_the_base() -> None:
    """At the base its gradient is 0; after a move of the shift by δ it is 2·δ·mean t² per axis/2 (mean over 2 axes)."""
    plain, anchored = make_draft(linear_task()), make_draft(linear_task(), kl_coef=2.0)
    delta = 0.4
    for draft in (plain, anchored):
        with torch.no_grad():
            draft.roles.trainable()[0].add_(delta)
        draft.loss(first_micro(draft), CTX).total.backward()
    pull = anchored.roles.trainable()[0].grad - plain.roles.trainable()[0].grad
    expected = 2.0 * delta * float(first_micro(plain).t.square().sum())
    torch.testing.assert_close(pull, torch.full((2,), expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_ascent_reaches_the_maximum(schedule: str) -> None:
    """Data N(m, 1) and reward −(x − 1)²: the mean of samples ends at 1, by one step's gradient as by all."""
    for depth in (1, 4):
        draft = make_draft(
            gaussian_task(schedule), Parabola(1.0), prompts_per_round=64, grad_steps=depth, ema_decay=0.0
        )
        run_in_memory(draft, 30, Loop(5e-2), seed=0)
        many = DraftMicro(None, [], torch.arange(4000), torch.zeros(4000), 1, 99)
        assert float(draft._sample(many, CTX).detach().mean()) == pytest.approx(1.0, abs=0.15)


def test_random_truncation_draws_all_depths() -> None:
    draft = make_draft(grad_steps=3, truncation="random")
    assert {draft.depth_of(step, 0) for step in range(20)} == {1, 2, 3}


@pytest.mark.parametrize("lora", [None, LoraConfig(2)])
def test_gradient_reaches_the_network_through_a_diffusers_vae(lora: LoraConfig | None) -> None:
    """Stable Diffusion's layout: two steps of training change the weights; VAE and text encoder stay as they are."""
    from gencontrol.pipelines import TextToImagePipeline
    from tests.helpers.fixtures_images import tiny_sd

    pipe = tiny_sd()
    task = TextToImagePipeline(pipe).task(["a", "b"], ["c"])

    class Bright:
        name, kind, differentiable = "bright", "item", True

        def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
            return RewardOut(samples.flatten(1).mean(1), torch.ones(len(samples), dtype=torch.bool))

    before = [p.detach().clone() for p in pipe.vae.parameters()]
    roles = Roles(task.denoiser.network, ("policy", "ref"), lora)
    start = [p.detach().clone() for p in roles.trainable()]
    config = DraftConfig(
        prompts_per_round=2, updates_per_round=1, demo_steps=2, grad_steps=2, ema_decay=0.0, kl_coef=0.1
    )
    run_in_memory(Draft(task, Bright(), config, roles=roles, seed=0), 2, Loop(1e-3), seed=0)
    assert any(not torch.equal(p, q) for p, q in zip(roles.trainable(), start))
    assert all(torch.equal(p, q) for p, q in zip(pipe.vae.parameters(), before))


def test_rewards_without_gradient_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"'first-axis' is none; such are: .*clap.*digit-class"):
        make_draft(reward=FirstAxis())

    class Lying(FirstAxis):
        differentiable = True

        def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
            return super().__call__(samples.detach(), context)

    draft = make_draft(reward=Lying())
    with pytest.raises(RewardError, match="reward 'first-axis' passes no gradient"):
        draft.loss(first_micro(draft), CTX)
    frozen = make_draft(dataclasses.replace(make_task(), decode=lambda latents: latents.detach()))
    with pytest.raises(RewardError, match="decode passes no gradient"):
        frozen.loss(first_micro(frozen), CTX)


def test_too_few_valid_rewards_stop_the_run() -> None:
    class Broken(Parabola):
        def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
            valid = torch.arange(len(samples)) % 4 == 0
            values = super().__call__(samples, context).values
            return RewardOut(torch.where(valid, values, torch.nan), valid)

    draft = make_draft(reward=Broken())
    out = draft.loss(first_micro(draft), CTX)
    out.total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in draft.roles.trainable() if p.grad is not None)
    with pytest.raises(RewardError, match="2 of 6 samples"):
        draft.after_update(CTX, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"grad_steps": 21},
        {"truncation": "half"},
        {"low_variance": 2, "grad_steps": 3},
        {"kl_coef": -1.0},
        {"demo_steps": 0},
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DraftConfig(**options)
