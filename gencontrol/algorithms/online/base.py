"""What methods on prompts share: options, rollouts, noise, the pull to the base, evaluation, saving.

A method is a subclass of `Tuning` with its own `Config`, data rule (`collect`, `minibatches`) and `loss`.

The pull to the pre-trained model is the mean squared distance to the base's prediction, by choice under guidance.
Adding λ·mean ‖v_θ − v_ref‖² to a loss is a KL penalty on the path law (up to the weight of each t).  With a guidance
scale s ≠ 1 the base is u + s(c − u): the model learns to imitate guidance without paying for it (CRD, arXiv
2603.14128).  The scale is then part of the objective: evaluate at guidance 1 (docs/methods/crd.md#p8-guidance).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.algorithms.online.compare import Comparison
from gencontrol.algorithms.online.rollout import (
    Pool,
    Sampling,
    chunks,
    device_of,
    draw_times,
    gathered,
    generate,
    guided,
    joined,
    prompts_of_step,
    score,
)
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import BelowOne, Count, NonNegative, Share, options
from gencontrol.errors import RewardError, UsageError
from gencontrol.models.denoiser import Pred, TakesGroups
from gencontrol.models.roles import Roles, ema_decay
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rng import item_generators, item_noise
from gencontrol.sampling import Path
from gencontrol.types import Cond, cond_to, grouped

#: number of samples of a group in which something is compared
Several = Annotated[int, Ge(2)]


@options
class TuningConfig:
    """Options that every method on a prompt-conditioned model has.

    Args:
        guidance_scale: of all samples that are drawn, in training and evaluation alike; 1 = no guidance.
        ema_decay: of the averaged weights that evaluation and the final model use, in [0, 1); 0 = use the policy.
        eval_samples: samples per evaluation prompt.
    """

    guidance_scale: NonNegative = 1.0
    ema_decay: BelowOne = 0.99
    eval_samples: Count = 1


@options
class OnPolicyConfig(TuningConfig):
    """Options that every method has which trains on its own samples.

    Args:
        prompts_per_round: prompts drawn per round, over all processes.
        generations: samples per prompt.
        updates_per_round: optimizer steps on one round's samples.
        demo_steps: sampler steps of the samples that are trained on; fewer than at evaluation is fine.
        eval_steps: sampler steps at evaluation.
        sampler: name of the sampler step, or package.module:Class of one.
        kl_coef: weight of the pull to the base, mean ‖v_θ − v_base‖² per data axis; 0 = none.
        kl_guidance: guidance scale of that base; 1 = its plain conditional prediction.
        min_valid: least share of prompts with valid rewards; below it the round is drawn once more.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "prompts_per_round"}

    prompts_per_round: Count = 256
    generations: Count = 2
    updates_per_round: Count = 8
    demo_steps: Count = 20
    eval_steps: Count = 40
    sampler: str = "euler"
    kl_coef: NonNegative = 0.0
    kl_guidance: NonNegative = 1.0
    min_valid: Share = 0.8


@torch.no_grad()
def reference_prediction(
    task: PromptTask, roles: Roles, xt: Float[Tensor, "b *d"], t: Float[Tensor, " b"], cond: Cond, scale: float
) -> Pred:
    """Return the base model's prediction at (x_t, t), guided by `scale` (1: one conditional pass), without gradient.

    Call it before the policy's own pass, and under the run's autocast.

    Raises:
        UsageError: scale ≠ 1 and the model has no unconditional condition.
    """
    with roles.use("ref"):
        pred = guided(task, scale)(xt, t, cond)
    assert isinstance(pred, Pred)
    return pred


def anchor_penalty(velocity: Float[Tensor, "b *d"], reference: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return ‖velocity − reference‖² averaged over the data axes, per item, in float32 or wider."""
    wide = torch.promote_types(velocity.dtype, torch.float32)
    return (velocity.to(wide) - reference.to(wide)).square().flatten(1).mean(1)


class Tuning(ABC):
    """Base of all methods on prompts: everything of the Trainer's contract in which they do not differ.

    A subclass gives the class attributes, `collect`, `minibatches` and `loss`; `name` prefixes its random streams.
    """

    Config: ClassVar[type]
    #: what cards, plans and reports say of the method; `paper` is "arXiv:…" or "", `medium` what it works on
    name: ClassVar[str]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    medium: ClassVar[str] = "any"
    summary: ClassVar[str] = ""

    def __init__(
        self,
        task: PromptTask,
        reward: Reward | SetReward,
        config: Any,
        *,
        roles: Roles,
        seed: int,
        evaluate_by: Sampling | None = None,
    ) -> None:
        """Set up; `roles.module` is the task's network, with the roles that `role_names(config)` gives.

        `evaluate_by` replaces eval_steps, sampler and guidance_scale for a method whose samples are drawn otherwise.

        Raises:
            UsageError: a role is missing, there are no evaluation prompts, or guidance (of the samples or of the pull
                to the base) is asked of a model without an unconditional condition.
        """
        needed = self.role_names(config)
        if not set(needed) <= set(roles.names()):
            raise UsageError(f"{self.name} needs the roles {sorted(needed)}, not {list(roles.names())}.")
        how = evaluate_by or Sampling(config.eval_steps, config.sampler, config.guidance_scale)
        scales = {"guidance_scale": how.guidance_scale}
        if isinstance(config, OnPolicyConfig) and config.kl_coef > 0:
            scales["kl_guidance"] = config.kl_guidance
        for option, scale in scales.items():
            if scale != 1.0 and task.uncond is None:
                raise UsageError(f"{option} {scale}: this model has no unconditional branch; use {option} = 1.")
        self.task, self.reward, self.config, self.roles, self.seed = task, reward, config, roles, seed
        #: the weights that are evaluated and saved
        self.role = "ema" if config.ema_decay > 0 else "policy"
        self.updates = 0
        self.comparison = Comparison(
            task, reward, roles, how, seed=seed, name=self.name, samples_per_prompt=config.eval_samples
        )

    @staticmethod
    def role_names(config: Any) -> tuple[str, ...]:
        """Return the roles that a run with this configuration needs; a method with more of them overrides it."""
        return ("policy", "ref", "ema") if config.ema_decay > 0 else ("policy", "ref")

    @staticmethod
    def prepare(task: PromptTask, reward: Reward | SetReward, config: Any) -> PromptTask:
        """Return the task that the method works on, before the roles are made; a method that adds to it overrides."""
        return task

    @staticmethod
    def whole_parameters(config: Any) -> tuple[str, ...]:
        """Return beginnings of the names of parameters that are trained whole beside LoRA (see `Roles`)."""
        return ()

    # ---------------------------------------------------------------- what a method gives

    @abstractmethod
    def collect(self, ctx: StepContext) -> Collected:
        """Run the data rule of this step."""

    @abstractmethod
    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[Any]:
        """Return the micro-batches of optimizer update number `update` of this step."""

    @abstractmethod
    def loss(self, micro: Any, ctx: StepContext) -> LossOut:
        """Return the loss of one micro-batch under the policy role."""

    # ---------------------------------------------------------------- what it may use

    def draw(
        self, ctx: StepContext, *, role: str = "policy", path_of: Sampling | None = None
    ) -> tuple[Pool, dict[str, float]]:
        """Sample and score this step's groups with the weights of `role`; returns the pool and metrics.

        `path_of` replaces the configured sampler and keeps the whole path (methods that train on sampler steps).
        Below `min_valid` valid groups the pool is drawn once more with other noise.

        Raises:
            RewardError: too few groups are valid twice in a row.
            UsageError: the groups do not divide over the ranks.
        """
        cfg = self.config
        how = path_of or Sampling(cfg.demo_steps, cfg.sampler, cfg.guidance_scale)
        prompts = self.prompts(ctx)
        for attempt in range(2):
            noise = f"{self.name}/{'noise' if attempt == 0 else 'redraw'}/{ctx.step}"
            with self.roles.use(role):
                pool, seconds = self._share(prompts, how, noise, ctx, keep_path=path_of is not None)
            valid = float(pool.scores.valid.view(-1, cfg.generations).all(1).double().mean())
            if valid >= cfg.min_valid:
                metrics = {"reward/valid_fraction": float(pool.scores.valid.double().mean())}
                return pool, metrics | {"rollout/valid_groups": valid, "rollout/redrawn": float(attempt)} | seconds
        why = "; ".join(f"{reason} ({count})" for reason, count in pool.scores.reasons.items())
        raise RewardError(
            f"reward '{self.reward.name}' was valid for {valid:.0%} of the groups, twice; at least {cfg.min_valid:.0%} "
            f"are needed: {why or 'look at the samples'}; mend the reward or its inputs, or lower min_valid."
        )

    def prompts(self, ctx: StepContext) -> list[str]:
        """Return the prompts of this step, those of all ranks.

        Raises:
            UsageError: they do not divide over the ranks.
        """
        count = self.config.prompts_per_round
        if count % ctx.world_size:
            raise UsageError(
                f"prompts_per_round = {count} does not divide over {ctx.world_size} processes; use a multiple."
            )
        return prompts_of_step(self.task.prompts, count, self.seed, f"{self.name}/prompts", ctx.step)

    def _share(
        self, prompts: list[str], how: Sampling, noise: str, ctx: StepContext, *, keep_path: bool
    ) -> tuple[Pool, dict[str, float]]:
        """Sample and score this rank's share of the groups with the active weights; also the seconds of both."""
        task, generations = self.task, self.config.generations
        count = len(prompts) // ctx.world_size
        mine = prompts[ctx.rank * count : (ctx.rank + 1) * count]
        first = ctx.rank * count * generations
        record: list[Path] | None = [] if keep_path else None
        began = time.perf_counter()
        with ctx.group.all_or_none(ctx.poll):
            cond = cond_to(task.encode(mine), device_of(task))
            rows = torch.arange(count).repeat_interleave(generations)
            generators = item_generators(self.seed, noise, range(first, first + len(rows)))
            latents = generate(task, grouped(cond, rows), generators, how, ctx, record=record)
            drawn = time.perf_counter()
            scores = score(task, self.reward, latents, [mine[i] for i in rows.tolist()], ctx)
        seconds = {"time/rollout": drawn - began, "time/reward": time.perf_counter() - drawn}
        path, shared = joined(record) if record else None, isinstance(task.denoiser.network, TakesGroups)
        return Pool(latents, cond, generations, first, gathered(scores, ctx.group), path, shared), seconds

    def noised(
        self,
        items: Int64[Tensor, " q"],
        total: int,
        latents: Float[Tensor, "q *d"],
        size: int,
        ctx: StepContext,
        update: int,
    ) -> Iterator[tuple[slice, Float[Tensor, " p"], Float[Tensor, "p *d"]]]:
        """Cut an update's items into parts of `size`; yield each with times and noise, which depend on the item alone.

        Args:
            items: global numbers of this rank's items, below `total`.
            total: number of items on all ranks.
            latents: give the noise its shape and both their device.
        """
        t = draw_times(total, self.seed, f"{self.name}/time", ctx.step, update)[items].to(latents.device)
        for part in chunks(len(items), size):
            name = f"{self.name}/eps/{ctx.step}/{update}"
            noise = item_noise(latents.shape[1:], self.seed, name, items[part].tolist())
            yield part, t[part], noise.to(latents.device)

    def base_at(self, xt: Float[Tensor, "b *d"], t: Float[Tensor, " b"], cond: Cond, ctx: StepContext) -> Pred | None:
        """Return the base's prediction that the policy is pulled to, or None where kl_coef is 0.

        Call it before the policy's own pass: switching roles under a graph would change the weights it holds.
        """
        if not self.config.kl_coef:
            return None
        with ctx.autocast():
            return reference_prediction(self.task, self.roles, xt, t, cond, self.config.kl_guidance)

    # ---------------------------------------------------------------- the rest of the Trainer's contract

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the averaged weights."""
        if self.config.ema_decay > 0:
            self.roles.lerp("ema", ema_decay(self.config.ema_decay, self.updates))
        self.updates += 1

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Compare the averaged weights (or the policy) with the base on fixed held-out prompts and noise."""
        return self.comparison.run(self.role, ctx)

    def state_dict(self) -> dict[str, Any]:
        """Number of updates taken (for the warm-up of the average)."""
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.updates = int(state["updates"])

    def save_final(self, folder: FilePath) -> None:
        """Write the tuned model (averaged weights where there are any), loadable by `from_pretrained`."""
        with self.roles.use(self.role):
            self.task.save_final(folder)
