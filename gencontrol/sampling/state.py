"""State and Step: the two notions that samplers, trees, particles and policy gradients share.

A Step is stateless: `(model, state, t, t_next, cond, noise) -> State` may be called from any intermediate state, for a
whole batch at one time (floats) or with a time per item (tensors [b]).  A State is immutable, so branches can share it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gencontrol.process.gaussian import Time
from gencontrol.process.schedule import Scalar
from gencontrol.rng import Keyed
from gencontrol.types import Cond, map_cond

Generators = torch.Generator | Sequence[torch.Generator] | Keyed | None


@dataclass(frozen=True)
class State:
    """Where a batch stands between two steps.

    Args:
        x: samples [b *d] (floats, or int64 tokens [b n]).
        log_prob: [b] log-density of the step that led here, None if that step was deterministic.
        history: what a multistep method keeps; tensors in it have the batch axis first.
    """

    x: Shaped[Tensor, "b *d"]
    log_prob: Float[Tensor, " b"] | None = None
    history: tuple[Any, ...] = ()

    def select(self, index: Tensor) -> State:
        """Return the rows `index` [m] of the batch (repeats allowed): branching and resampling."""
        rows = tuple(item[index] if isinstance(item, Tensor) and item.ndim else item for item in self.history)
        return State(self.x[index], None if self.log_prob is None else self.log_prob[index], rows)


@dataclass(frozen=True)
class Step(ABC):
    """One stateless step of a sampler.

    Attributes:
        kind: which process it works on.
        order: order of convergence in the number of steps.
        evaluations: model calls per step (one less in a last step to t = 0 of a two-call method).
    """

    kind: ClassVar[Literal["gaussian", "masked"]]
    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether the step needs noise; a Gaussian step to t = 0 is deterministic all the same."""

    def stochastic_at(self, t_next: float) -> bool:
        """Whether the step to t_next draws anything: a Gaussian step to clean data does not."""
        return self.stochastic and (t_next > 0 or self.kind == "masked")

    @abstractmethod
    def draw(self, x: Tensor, generator: Generators) -> Tensor | None:
        """Draw the noise of one step for the batch x; row i depends on generator i alone if a list is given."""

    @abstractmethod
    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next < t."""


def gaussian_log_prob(x: Float[Tensor, "b *d"], mean: Float[Tensor, "b *d"], std: Scalar) -> Float[Tensor, " b"]:
    """Return log N(x; mean, std²) [b], summed over *d in float32 (float64 if x is); 0 where std = 0 (no density)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    residual = (x.to(wide) - mean.to(wide)).flatten(1)
    if not isinstance(std, Tensor):
        if std == 0.0:
            return residual.new_zeros(len(residual))
        constant = math.log(std) + 0.5 * math.log(2 * math.pi)
        return (residual / std).square().sum(1) * -0.5 - residual.shape[1] * constant
    std = std.to(wide).reshape(-1, 1).expand(len(residual), 1)
    safe = torch.where(std > 0, std, torch.ones_like(std))
    value = -0.5 * (residual / safe).square().sum(1)
    value = value - residual.shape[1] * (safe[:, 0].log() + 0.5 * math.log(2 * math.pi))
    return torch.where(std[:, 0] > 0, value, torch.zeros_like(value))


def repeat_cond(cond: Cond, count: int) -> Cond:
    """Expand a condition of batch 1 to `count` rows; any other batch is returned as it is."""
    return map_cond(lambda leaf: leaf.expand(count, *leaf.shape[1:]) if leaf.shape[0] == 1 else leaf, cond)
