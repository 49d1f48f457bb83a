"""What CTRL needs around its loss: the condition of a task and labelled prompts for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import options
from gencontrol.errors import UsageError
from gencontrol.files import digest
from gencontrol.models.conditions.base import Conditioned, add_condition, with_labels
from gencontrol.models.conditions.labels import Labels, join_prompt, split_prompt
from gencontrol.models.roles import Roles
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rewards.image.classifier import attributes_of, fingerprint
from gencontrol.types import Cond

#: evaluation prompts at most, when each label needs one
_EVAL_PROMPTS = 64


def prepare(task: PromptTask, reward: Reward | SetReward, config: Any) -> PromptTask:
    """Return the task with a condition made of the reward's classifiers; one that has a condition is returned as it is.

    Raises:
        UsageError: the reward has no classifier whose classes could be the labels.
    """
    if isinstance(task.denoiser.network, Conditioned):
        return task
    attributes = attributes_of(reward)
    if not attributes:
        raise UsageError(f"reward '{reward.name}' has no classifier; ctrl needs reward 'classifier' for its labels.")
    single = len(attributes) == 1
    name = next(iter(attributes)) if single else "y"
    denoiser = add_condition(
        task.denoiser,
        shape=task.latent_shape,
        name=name,
        kind="categorical" if single else "multi",
        cardinality=attributes[name] if single else attributes,
        inject=config.inject,
    )
    return replace(task, denoiser=denoiser)


def whole_parameters(config: Any) -> tuple[str, ...]:
    """What is trained whole beside LoRA: all of the condition."""
    return ("embed", "control") if config.inject == "residual" else ("embed",)


def check_reward(reward: Reward | SetReward) -> None:
    """Check that the reward has a gradient per sample.

    Raises:
        UsageError: it has none.
    """
    if reward.kind != "item" or not reward.differentiable:
        raise UsageError(
            f"reward '{reward.name}' has no gradient per sample; ctrl needs log p(y|x) of a classifier. For other "
            "rewards use a method that needs none (crd, rwr)."
        )


def check_backbone(network: Conditioned, roles: Roles) -> None:
    """Check that without labels the model stays the base.

    Raises:
        UsageError: the roles hold another network, or backbone weights are trained themselves.
    """
    if roles.module is not network:
        raise UsageError("ctrl: the roles must hold the task's conditioned network (task.denoiser.network).")
    own = {id(p) for p in network.own_parameters().values()}
    if roles.lora is None and any(id(p) not in own for p in roles.trainable()):
        raise UsageError("ctrl: backbone weights are trained, so the base would be lost; freeze them, or use LoRA.")
    if roles.lora is not None and not own & {id(p) for p in roles.trainable()}:
        raise UsageError("ctrl: LoRA alone cannot see the labels; make the roles with whole=whole_parameters(config).")


@options
class ShellConfig:
    """What `Tuning` asks of a configuration; guidance is inside the labelled task's model."""

    demo_steps: int
    eval_steps: int
    ema_decay: float
    eval_samples: int
    sampler: Any
    generations: int = 1
    guidance_scale: float = 1.0
    min_valid: float = 0.0


def shell_config(config: Any) -> ShellConfig:
    """Return the shell's part of a configuration."""
    from gencontrol.sampling.steps import Ddim

    return ShellConfig(config.steps, config.steps, config.ema_decay, config.eval_samples, Ddim(eta=config.eta))


def join(cond: Cond, labels: Tensor, name: str) -> Cond:
    """Return the condition with labels."""
    return with_labels(cond, labels, name=name)


def labelled(task: PromptTask, labels: Labels, texts: Sequence[str]) -> PromptTask:
    """Return a task whose prompts carry labels ("a cube | size=3"); evaluation prompts without any get them in turn."""
    prompts = list(task.eval_prompts)
    if prompts and not any(split_prompt(prompt)[1] for prompt in prompts):
        count = min(max(len(prompts), len(texts)), max(_EVAL_PROMPTS, len(prompts)))
        prompts = [join_prompt(prompts[i % len(prompts)], texts[i % len(texts)]) for i in range(count)]
    name = labels.config.name

    def encode(given: Sequence[str]) -> Cond:
        parts = [split_prompt(text) for text in given]
        cond = task.encode([prompt for prompt, _ in parts])
        device = next(task.denoiser.parameters()).device
        return join(cond, labels.encode([found or None for _, found in parts]).to(device), name)

    return replace(task, encode=encode, eval_prompts=prompts)


def reward_hash(reward: Reward | SetReward) -> str:
    """Return a digest of the weights of the reward's classifiers, "" where it has none."""
    marks = fingerprint(reward)
    return digest(marks, 16) if marks else ""
