"""A twin-delayed actor-critic on made-up transitions, as an algorithm and as a hand-written loop of plain torch.

Critic in turn 0 against a Polyak target, actor in turn 1 at every second update through the new critic (the order of
TD3, Fujimoto et al. 2018), each with its own learning rate, schedule and clipping.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, ParameterGroup, StepContext
from gencontrol.models.roles import Roles
from gencontrol.rng import item_noise, stream
from gencontrol.train.trainer import TrainConfig

BATCH, GAMMA, DECAY = 8, 0.9, 0.95
ACTOR_LR, CRITIC_LR = 3e-3, 1e-2
CONFIG = TrainConfig(
    steps=6, lr=CRITIC_LR, lr_schedule="linear", micro_batch=4, max_grad_norm=0.5, weight_decay=0.1, save_every=2
)


def networks() -> dict[str, nn.Module]:
    """An actor 2 → 1 and a critic 3 → 1, equal at each call."""
    found: dict[str, nn.Module] = {}
    for name, width in (("actor", 2), ("critic", 3)):
        found[name] = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))
        with torch.no_grad():
            for index, parameter in enumerate(found[name].parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=stream(0, f"ac/{name}", index)) * 0.5)
    return found


def transitions(seed: int, step: int, update: int) -> Tensor:
    """State, action, reward, next state of an update's batch [b 6]."""
    first = (2 * step + update) * BATCH
    return item_noise((6,), seed, "ac/transitions", range(first, first + BATCH))


def critic_errors(critic: nn.Module, target: Tensor, rows: Tensor) -> Tensor:
    return (critic(rows[:, :3])[:, 0] - target).square()


class ActorCritic:
    """Two groups, two updates a step.

    Args:
        joint: both losses are taken at the same weights, in turn 0, as FQL does.
        spoil: factor on the loss of a group by (name, number of the update).
    """

    def __init__(self, joint: bool = False, spoil: Callable[[str, int], float] = lambda name, update: 1.0) -> None:
        self.roles = Roles(networks(), ("policy", "target"), only={"target": ["critic"]})
        self.joint, self.spoil = joint, spoil
        self.stepped: list[tuple[int, tuple[str, ...]]] = []

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """The actor is named first, but its turn is the second."""
        actor = ParameterGroup(
            self.roles.trainable("actor"), lr=ACTOR_LR, lr_schedule="constant", every=2, turn=0 if self.joint else 1,
            weight_decay=0.0, max_grad_norm=0.05, betas=(0.8, 0.99),
        )  # fmt: skip
        return {"actor": actor, "critic": ParameterGroup(self.roles.trainable("critic"))}

    def collect(self, ctx: StepContext) -> Collected:
        """Batches of both updates."""
        return Collected([transitions(ctx.seed, ctx.step, update) for update in range(2)], 2, {"reward/mean": ctx.step})

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[Tensor]:
        """Split a batch; a rank takes every world_size-th row."""
        return data[update][ctx.rank :: ctx.world_size].split(ctx.micro_batch)

    def loss(self, micro: Tensor, ctx: StepContext) -> dict[str, LossOut]:
        """Losses of the groups that are due."""
        module: Any = self.roles.module
        found = {}
        if "critic" in ctx.due:
            with torch.no_grad(), self.roles.use("target") as held:
                target = bellman(held["actor"], held["critic"], micro)
            errors = critic_errors(module["critic"], target, micro)
            total = errors.sum() * self.spoil("critic", ctx.updates)
            found["critic"] = LossOut(total, len(micro), {"critic/target": target.sum()})
        if "actor" in ctx.due:
            total = -value(module["actor"], module["critic"], micro).sum() * self.spoil("actor", ctx.updates)
            found["actor"] = LossOut(total, len(micro), {"actor/value": -total.detach()})
        return found

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Targets follow at the actor's steps alone."""
        self.stepped.append((ctx.updates, ctx.due))
        if "actor" in ctx.due:
            self.roles.lerp("target", DECAY)

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Value of the actor on fixed states."""
        rows, module = item_noise((6,), ctx.seed, "ac/eval", range(4)), self.roles.module
        with torch.no_grad():
            return Evaluation({"eval/value": float(value(module["actor"], module["critic"], rows).mean())})  # type: ignore[index]

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the roles."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing beside the roles."""

    def save_final(self, folder: Path) -> None:
        """Write something to look for."""
        (folder / "networks.json").write_text("{}")


def bellman(actor: nn.Module, critic: nn.Module, rows: Tensor) -> Tensor:
    """r + γ·Q'(s', π(s')) [b]."""
    return rows[:, 3] + GAMMA * value(actor, critic, rows[:, 4:])


def value(actor: nn.Module, critic: nn.Module, rows: Tensor) -> Tensor:
    """Q(s, π(s)) [b]."""
    states = rows[:, :2]
    out: Tensor = critic(torch.cat([states, actor(states)], 1))[:, 0]
    return out


def bare_loop(steps: int, joint: bool = False) -> dict[str, Tensor]:
    """The same training by hand; returns all weights, those of the target as target.…"""
    nets = networks()
    actor, critic = nets["actor"], nets["critic"]
    target = copy.deepcopy(critic)
    wide = [[p for p in critic.parameters() if p.ndim == 2], [p for p in critic.parameters() if p.ndim == 1]]
    critic_adam = torch.optim.AdamW(
        [{"params": wide[0], "weight_decay": 0.1}, {"params": wide[1], "weight_decay": 0.0}], fused=True
    )
    actor_adam = torch.optim.AdamW(actor.parameters(), weight_decay=0.0, betas=(0.8, 0.99), lr=ACTOR_LR, fused=True)
    for number in range(2 * steps):
        rows = transitions(0, number // 2, number % 2)
        for group in critic_adam.param_groups:
            group["lr"] = CRITIC_LR * (1 - number / 2 / CONFIG.steps)
        with torch.no_grad():
            goal = bellman(actor, target, rows)
        gradient = torch.autograd.grad(critic_errors(critic, goal, rows).mean(), list(critic.parameters()))
        if joint:  # before either step
            pull = torch.autograd.grad(-value(actor, critic, rows).mean(), list(actor.parameters()))
        apply(critic_adam, list(critic.parameters()), gradient, 0.5)
        if number % 2 == 1:
            if not joint:
                pull = torch.autograd.grad(-value(actor, critic, rows).mean(), list(actor.parameters()))
            apply(actor_adam, list(actor.parameters()), pull, 0.05)
            with torch.no_grad():
                for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                    old.copy_(DECAY * old + (1 - DECAY) * new)
    named = {f"actor.{n}": p for n, p in actor.named_parameters()}
    named |= {f"critic.{n}": p for n, p in critic.named_parameters()}
    named |= {f"target.critic.{n}": p for n, p in target.named_parameters()}
    return {name: p.detach().clone() for name, p in named.items()}


def apply(adam: torch.optim.AdamW, parameters: list[nn.Parameter], gradient: tuple[Tensor, ...], limit: float) -> None:
    """Clip to a norm, then step."""
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    for parameter, part in zip(parameters, gradient, strict=True):
        parameter.grad = part * min(1.0, limit / (norm + 1e-6))
    adam.step()


def weights(algorithm: ActorCritic) -> dict[str, Tensor]:
    """All weights under the names of `bare_loop`."""
    state = algorithm.roles.state_dict()
    found = dict(state["policy"]) | {f"target.{name}": tensor for name, tensor in state["target"].items()}
    return {name: tensor.clone() for name, tensor in found.items()}
