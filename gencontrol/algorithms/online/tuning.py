"""What prompt-conditioned fine-tuning methods have in common: rollouts, noise, averaged weights, evaluation, saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Evaluation, StepContext
from gencontrol.algorithms.online.compare import Comparison
from gencontrol.algorithms.online.preference import draw_times
from gencontrol.algorithms.online.rollout import Pool, Sampling, chunks, draw_pool
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.errors import UsageError
from gencontrol.models.roles import Roles, ema_decay
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rng import item_noise


class TuningConfig(Protocol):
    """Options that every such method has; see `DragonConfig` for their meaning."""

    @property
    def generations(self) -> int: ...
    @property
    def demo_steps(self) -> int: ...
    @property
    def eval_steps(self) -> int: ...
    @property
    def sampler(self) -> str: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def min_valid(self) -> float: ...
    @property
    def eval_samples(self) -> int: ...


def default_roles(config: TuningConfig) -> tuple[str, ...]:
    """Return policy and ref, and the average where the configuration asks for one."""
    return ("policy", "ref", "ema") if config.ema_decay > 0 else ("policy", "ref")


def check_counts(config: object, *names: str) -> None:
    """Raise ValueError with the option's name unless each of these options is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}; expected a whole number of at least 1")


def check_tuning(config: TuningConfig) -> None:
    """Check the ranges of the common options; raises ValueError with the option's name."""
    check_counts(config, "demo_steps", "eval_steps", "eval_samples", "generations")
    if config.guidance_scale < 0:
        raise ValueError(f"guidance_scale = {config.guidance_scale}; expected at least 0 (1 = no guidance)")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay = {config.ema_decay}; expected [0, 1), 0 = no average")
    if not 0 <= config.min_valid <= 1:
        raise ValueError(f"min_valid = {config.min_valid}; expected a share in [0, 1]")


class Tuning:
    """The shell around a method's data rule and loss; `name` prefixes all its random streams."""

    def __init__(
        self,
        name: str,
        task: PromptTask,
        reward: Reward | SetReward,
        config: TuningConfig,
        roles: Roles,
        seed: int,
        needed: Sequence[str] | None = None,
    ) -> None:
        """Set up; `needed` names the roles that the method uses (None: those of `default_roles`).

        Raises:
            UsageError: a role is missing, there are no evaluation prompts, or guidance is asked of a model without an
                unconditional condition.
        """
        needed = default_roles(config) if needed is None else needed
        if not set(needed) <= set(roles.names()):
            raise UsageError(f"{name} needs the roles {sorted(needed)}, not {list(roles.names())}.")
        if config.guidance_scale != 1.0 and task.uncond is None:
            raise UsageError(
                f"guidance_scale {config.guidance_scale}: this model has no unconditional branch; use 1.0."
            )
        self.name, self.task, self.reward, self.config, self.roles, self.seed = name, task, reward, config, roles, seed
        self.role = "ema" if config.ema_decay > 0 else "policy"
        self.updates = 0
        self._demos = Sampling(config.demo_steps, config.sampler, config.guidance_scale)
        self.comparison = Comparison(
            task,
            reward,
            roles,
            Sampling(config.eval_steps, config.sampler, config.guidance_scale),
            seed=seed,
            name=name,
            samples_per_prompt=config.eval_samples,
        )

    def draw(
        self, groups: int, ctx: StepContext, *, role: str = "policy", path_of: Sampling | None = None
    ) -> tuple[Pool, dict[str, float]]:
        """Sample and score this step's groups with the weights of `role`; see `draw_pool`.

        `path_of` replaces the configured sampler and keeps the whole path (methods that train on sampler steps).
        """
        with self.roles.use(role):
            return draw_pool(
                self.task,
                self.reward,
                path_of or self._demos,
                ctx,
                seed=self.seed,
                name=self.name,
                groups=groups,
                generations=self.config.generations,
                min_valid=self.config.min_valid,
                keep_path=path_of is not None,
            )

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

    def updated(self) -> None:
        """Move the averaged weights after an optimizer step."""
        if self.config.ema_decay > 0:
            self.roles.lerp("ema", ema_decay(self.config.ema_decay, self.updates))
        self.updates += 1

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Compare the averaged weights (or the policy) with the base on fixed held-out prompts and noise."""
        return self.comparison.run(self.role, ctx)

    def save_final(self, folder: Path) -> None:
        """Write the tuned model (averaged weights where there are any), loadable by `from_pretrained`."""
        with self.roles.use(self.role):
            self.task.save_final(folder)


class RewardTuning:
    """Base of the methods around a `Tuning`: the parts of the Trainer's contract in which they do not differ."""

    def __init__(
        self,
        name: str,
        task: PromptTask,
        reward: Reward | SetReward,
        config: TuningConfig,
        roles: Roles,
        seed: int,
    ) -> None:
        """Set up the shell; arguments and errors are those of `Tuning`."""
        self.roles, self.seed = roles, seed
        self.shell = Tuning(name, task, reward, config, roles, seed, self.role_names(config))

    @staticmethod
    def role_names(config: Any) -> tuple[str, ...]:
        """Return the roles that a run with this configuration needs; a method with more of them overrides it."""
        return default_roles(config)

    @staticmethod
    def prepare(task: PromptTask, reward: Reward | SetReward, config: Any) -> PromptTask:
        """Return the task that the method works on, before the roles are made; a method that adds to it overrides."""
        return task

    @staticmethod
    def whole_parameters(config: Any) -> tuple[str, ...]:
        """Return beginnings of the names of parameters that are trained whole beside LoRA (see `Roles`)."""
        return ()

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the averaged weights."""
        self.shell.updated()

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Compare the averaged weights (or the policy) with the base on fixed held-out prompts and noise."""
        return self.shell.evaluate(ctx)

    def save_final(self, folder: Path) -> None:
        """Write the tuned model (averaged weights where there are any), loadable by `from_pretrained`."""
        self.shell.save_final(folder)
