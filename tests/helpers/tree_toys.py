"""Small models and helpers that the tests of diffusion trees share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencontrol.models.denoiser import Pred
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling import State
from gencontrol.sampling.steps import GaussianStep
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.types import Prediction


class Shrink:
    """A Gaussian model with a linear posterior mean; not exact for any data law, but a Markov chain all the same."""

    process = GaussianProcess(Linear())

    def __init__(self, gain: float = 0.7) -> None:
        self.gain = gain

    def __call__(self, xt: Tensor, t: Any, cond: Tensor | None = None) -> Pred:
        x0 = self.gain * xt + 0.1
        return Pred(x0 if cond is None else x0 + cond, xt, self.process.at(t, xt), Prediction.X0)


def first(x: Tensor) -> Tensor:
    """Reward: the first number of a state."""
    return x.flatten(1)[:, 0]


def grown(nfe: int, reward: Callable[[Tensor], Any] = first, model: Any = None, **options: Any) -> DiffusionTree:
    """A tree on a 2-D chain of 5 steps (unless options say otherwise), built to the end."""
    options = {"steps": 5, "generator": 0} | options
    tree = DiffusionTree(model or Shrink(), reward, options.pop("shape", (2,)), **options)
    for _ in tree.build(nfe) if nfe else ():
        pass
    return tree


def snapshot(tree: DiffusionTree) -> dict[str, Any]:
    """Everything that a tree holds, copied."""
    tables = {"nodes": tree.nodes, "rollouts": tree.rollouts, "counts": tree.counts}
    found: dict[str, Any] = {
        f"{name}.{key}": column.copy() for name, table in tables.items() for key, column in table.arrays().items()
    }
    found |= {f"states.{i}": p.all().clone() for i, p in enumerate(tree.pools) if p.size}
    return found | {"slots": tree.nodes.slots().copy(), "rounds": tree.rounds, "scorer": tree.scorer.counters()}


def assert_equal(a: DiffusionTree | dict[str, Any], b: DiffusionTree | dict[str, Any]) -> None:
    """Bit for bit."""
    left, right = (value if isinstance(value, dict) else snapshot(value) for value in (a, b))
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, right[key], err_msg=key)
        elif isinstance(value, Tensor):
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key


@dataclass(frozen=True)
class Jump(GaussianStep):
    """One step of a Markov chain over {0, 1, …}: the model returns the law of the next state of each row."""

    @property
    def stochastic(self) -> bool:
        return True

    def stochastic_at(self, t_next: float) -> bool:
        return True

    def draw(self, x: Tensor, generator: Any) -> Tensor:
        return generator.uniform((len(x), 1), x.device)

    def __call__(
        self, model: Any, state: State, t: Any, t_next: Any, cond: Any = None, noise: Tensor | None = None
    ) -> State:
        cumulative = model(state.x, t).cumsum(1)
        return State((noise * cumulative[:, -1:] >= cumulative).sum(1, keepdim=True).to(state.x))


class Origin(GaussianProcess):
    """Paths start at 0."""

    def prior(self, shape: Any, generator: Any, device: Any = "cpu", dtype: Any = torch.float64) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)


@dataclass(frozen=True)
class Decay(GaussianStep):
    """x' = c·x + sqrt(1 - c²)·noise, also to clean data; it keeps N(0, 1) exactly."""

    c: float = 0.6

    @property
    def stochastic(self) -> bool:
        return True

    def stochastic_at(self, t_next: float) -> bool:
        return True

    def __call__(
        self, model: Any, state: State, t: Any, t_next: Any, cond: Any = None, noise: Tensor | None = None
    ) -> State:
        return State(self.c * state.x + math.sqrt(1 - self.c**2) * noise)


class Dice:
    """4 states, 4 steps, Dirichlet kernels from NumPy's default_rng(0): docs/methods/dts.md#e-dts-1.  The prior is
    state 0.
    """

    def __init__(self, states: int = 4, steps: int = 4) -> None:
        draw = np.random.default_rng(0)
        self.kernels = torch.from_numpy(draw.dirichlet(np.ones(states), size=(steps, states)))
        self.process = Origin(Linear())

    def __call__(self, xt: Tensor, t: float, cond: Any = None) -> Tensor:
        return self.kernels[round((1 - t) * len(self.kernels)), xt[:, 0].long()]

    def law(self) -> Tensor:
        """Of the clean state."""
        found = torch.eye(self.kernels.shape[1], dtype=torch.float64)[0]
        for kernel in self.kernels:
            found = found @ kernel
        return found
