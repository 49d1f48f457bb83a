"""What the one Trainer needs of an algorithm, and nothing of diffusion.

A step of training is: `collect` (the data rule) → `updates` times [`minibatches` → `loss` of each micro-batch →
optimizer step → `after_update`].  All randomness is a pure function of (seed, step, update, item) through
`gencontrol.rng`, so a step that was interrupted is repeated identically after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
        poll: call it between units of work (a rollout chunk, a sampler step); raises `Preempted` on a signal.
        autocast: returns the context manager of the chosen precision; networks run inside it.
    """

    seed: int
    step: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    group: Collectives = field(default_factory=Collectives)
    poll: Callable[[], None] = _nothing
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


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
    """Named parameter sets of one backbone; see `gencontrol.models.roles`."""

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
    """The contract that `tests/contracts.py` checks on every algorithm."""

    @property
    def roles(self) -> RolesProtocol: ...

    def collect(self, ctx: StepContext) -> Collected:
        """Run the data rule of this step (rollouts, rewards, sets, or a batch of data)."""
        ...

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[Any]:
        """Return the micro-batches of optimizer update number `update` of this step."""
        ...

    def loss(self, micro: Any, ctx: StepContext) -> LossOut:
        """Loss of one micro-batch under the policy role."""
        ...

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the other roles (EMA, old policies) after an optimizer step that was taken."""
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
