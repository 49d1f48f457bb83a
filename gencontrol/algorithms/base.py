"""What the one Trainer needs of an algorithm, and nothing of diffusion.

A step of training is: `collect` (the data rule) → `updates` times [`minibatches` → `loss` of each micro-batch →
optimizer step → `after_update`].  All randomness is a pure function of (seed, step, update, item) through
`gencontrol.rng`, so a step that was interrupted is repeated identically after a resume.

An algorithm with one loss trains `roles.trainable()`.  One with several (actor, critic, value) also has a method
`parameter_groups`, and `loss` returns a LossOut per group:

    class TwinDelayed:
        def parameter_groups(self):
            critic, actor = self.roles.trainable("critic"), self.roles.trainable("actor")
            return {"critic": ParameterGroup(critic, lr=1e-3), "actor": ParameterGroup(actor, every=2, turn=1)}

        def loss(self, micro, ctx):               # ctx.due: whose losses are asked for
            if "actor" in ctx.due:                # turn 1: the critic has taken its step of this update already
                return {"actor": self.actor_loss(micro)}
            return {"critic": self.critic_loss(micro)}

        def after_update(self, ctx, update):      # ctx.due: who took a step
            if "actor" in ctx.due:
                self.roles.lerp("target", 0.995)

Each loss reaches the parameters of its own group only, whatever else lies in its graph; each group has its own clipping
and finite check, so one that is not finite leaves the others' steps alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Shaped
from torch import Tensor, nn


def _nothing() -> None:
    """The default poll: no signal is awaited."""


class Collectives:
    """What the processes of a run tell one another; this class is a run of one process, where each is the identity.

    `gencontrol.train.distributed.dist.Group` is the run of several.  Every process must make the same calls in the same
    order between two calls of the Trainer into the algorithm.
    """

    rank = 0
    world_size = 1

    def gather_rows(self, rows: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "w *d"]:
        """Concatenate the rows of all ranks in rank order; every rank must hold the same shape."""
        return rows

    def sum_numbers(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all ranks in float64."""
        return [float(value) for value in values]

    @contextmanager
    def all_or_none(self, poll: Callable[[], None]) -> Iterator[None]:
        """Run a block of rank-local work before a collective; when it fails on one rank, no rank enters the collective.

        The others call `poll` until it tells them why (the Trainer's poll raises), at most a minute.

        Raises:
            GencontrolError: another rank failed and no reason arrived.
        """
        yield


@dataclass(frozen=True)
class StepContext:
    """Where the loop stands.

    Args:
        seed: the run's seed.
        step: index of the training step (a round of collect and updates), from 0.
        micro_batch: the largest number of items in one forward/backward pass.
        rank, world_size: this process's share of the work.
        group: exchanges between the processes of the run.
        updates: optimizer updates of the run that were begun before this one, taken or not.
        due: names of the parameter groups whose losses are asked for; in `after_update`, of those that took a step.
            Empty in `collect` and `evaluate`, and for an algorithm that has no `parameter_groups`.
        poll: call it between units of work (a rollout chunk, a sampler step); raises `Preempted` on a signal.
        autocast: returns the context manager of the chosen precision; networks run inside it.
    """

    seed: int
    step: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    group: Collectives = field(default_factory=Collectives)
    updates: int = 0
    due: tuple[str, ...] = ()
    poll: Callable[[], None] = _nothing
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one loss trains; settings left at None are the run's (section [train]).

    Args:
        parameters: trainable, float32, in no other group.  Values that no role holds (a temperature, say) belong into
            the algorithm's `state_dict`.
        lr: peak learning rate, > 0.
        lr_schedule: "constant", "cosine" or "linear", after the run's warmup.
        every: the group is due at the updates every, 2·every, … of the run, counted from 1.
        turn: groups of one turn step together, from losses at the same weights; those of a higher turn are asked for
            their losses after that, at the new weights.
        max_grad_norm: of this group's gradient alone; 0 does not clip.
        weight_decay, betas, eps: of AdamW.
    """

    parameters: Sequence[nn.Parameter]
    lr: float | None = None
    lr_schedule: Literal["constant", "cosine", "linear"] | None = None
    every: int = 1
    turn: int = 0
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.every < 1 or self.turn < 0 or (self.lr is not None and not 0 < self.lr < math.inf):
            raise ValueError(
                f"every = {self.every}, turn = {self.turn}, lr = {self.lr}; expected every ≥ 1, turn ≥ 0, lr > 0"
            )
        if self.lr_schedule not in (None, "constant", "cosine", "linear"):
            raise ValueError(f"lr_schedule = {self.lr_schedule!r}; expected constant, cosine, linear or None")


@dataclass(frozen=True)
class LossOut:
    """Loss of one micro-batch as a sum and a count, so that accumulation cannot change it; metrics are sums too.

    Args:
        total: scalar tensor with gradient, the sum of per-item losses (plus regularisers times `count`).
        count: number of items in the sum; the Trainer divides by the count of the whole optimizer batch.
        metrics: name → (sum of values over the items); the Trainer divides by the global count.
    """

    total: Tensor
    count: int
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """Result of `collect`: what the losses need, the number of updates it feeds, and metrics to log.

    `updates` may be 0 (all groups were dropped): the step is counted and logged, nothing is trained.
    """

    data: Any
    updates: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`: scalars to log and artefacts for people, written by the Trainer under samples/step_N/.

    Args:
        metrics: name → number, e.g. `eval/reward/mean`.
        artefacts: file name → bytes (wav, png, json); names may not contain a path separator.
    """

    metrics: Mapping[str, float]
    artefacts: Mapping[str, bytes] = field(default_factory=dict)


class RolesProtocol(Protocol):
    """Named parameter sets of one network, or of several in a ModuleDict; see `gencontrol.models.roles`."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def active(self) -> str: ...
    def names(self) -> Sequence[str]: ...
    def use(self, role: str) -> AbstractContextManager[nn.Module]: ...
    def trainable(self) -> list[nn.Parameter]: ...
    def state_dict(self) -> dict[str, dict[str, Tensor]]: ...
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None: ...
    def convert(
        self,
        change: Callable[[Tensor], Tensor],
        swap: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None] | None,
    ) -> None: ...


class Algorithm(Protocol):
    """The contract that `gencontrol.testing.AlgorithmContract` checks on every algorithm."""

    @property
    def roles(self) -> RolesProtocol: ...

    def collect(self, ctx: StepContext) -> Collected:
        """Run the data rule of this step (rollouts, rewards, sets, or a batch of data)."""
        ...

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[Any]:
        """Return the micro-batches of optimizer update number `update` of this step."""
        ...

    def loss(self, micro: Any, ctx: StepContext) -> LossOut | Mapping[str, LossOut]:
        """Loss of one micro-batch under the policy role; with `parameter_groups`, a LossOut for each name in `ctx.due`.

        A due group that is left out is not stepped in this update (a warm-up); losses of groups that are not due are
        ignored.  Metrics of different groups need different names.
        """
        ...

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the other roles (EMA, old policies, targets) after an update in which a step was taken."""
        ...

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Measure on streams of its own; must change no state at all."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All further state: JSON values and tensors, nested in dictionaries."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...

    def save_final(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads."""
        ...


@runtime_checkable
class HasParameterGroups(Protocol):
    """An algorithm with several losses; see the module."""

    def parameter_groups(self) -> Mapping[str, ParameterGroup]:
        """Return the groups by name, in the order in which those of one turn are treated; equal at every call."""
        ...
