"""Policies made of a denoiser: encode the observations once, sample a normalised chunk, undo the normaliser.

This is what composition needs to know of a policy (`ParentModel`), and what adapters of foreign policies build.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.rng import Keyed
from gencontrol.robotics.policies.chunked import ChunkedPolicy, PolicySpec
from gencontrol.sampling import clip_x0, make_step, sample
from gencontrol.sampling.state import Step
from gencontrol.types import Cond

#: key → [b n_obs ...]
History = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ChunkSampler:
    """How a chunk is drawn.

    Args:
        steps: model calls (of one-call steps).
        step: name or Step of `gencontrol.sampling`; "ddim" is deterministic, Ddim(1.0) is DDPM.
        times: time grid; None is the process's own, else uniform (see `gencontrol.sampling.sample`).
        clip: bound on the predicted clean chunk in normalised units, or None.

    Raises:
        UsageError: steps < 1 or clip ≤ 0.
    """

    steps: int = 10
    step: str | Step = "ddim"
    times: str | tuple[float, ...] | None = None
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        """Refuse a sampler without steps."""
        if self.steps < 1 or (self.clip is not None and not self.clip > 0):
            raise UsageError(f"a chunk sampler has {self.steps} steps and clip {self.clip}; both must be above 0.")

    def draw(
        self, model: Any, shape: tuple[int, int, int], noise: Keyed, cond: Cond, x_init: Tensor | None = None
    ) -> Float[Tensor, "b h a"]:
        """Return normalised chunks of a Gaussian model.

        Args:
            noise: one stream per row; counter for the start, the following ones for stochastic steps.
            x_init: the state at the first time instead of a draw.
        """
        bounded = model if self.clip is None else clip_x0(model, self.clip)
        steps = None if isinstance(self.times, tuple) else self.steps
        return sample(
            bounded,
            shape,
            steps=steps,
            step=make_step(self.step, model.process),
            times=self.times,
            generator=noise,
            cond=cond,
            x_init=x_init,
        )


@runtime_checkable
class ParentModel(Protocol):
    """What a policy must have to be composed.

    Attributes:
        spec: what it reads and writes.
        denoiser: a Gaussian Model of normalised chunks [b horizon A]; process and prediction type declare its noise
            convention.
        action_normalizer: between normalised and environment units.
        sampler: how its own chunks are drawn.
        sampler_steps: steps of that sampler.
    """

    spec: PolicySpec
    denoiser: Any
    action_normalizer: Normalizer
    sampler: ChunkSampler

    @property
    def sampler_steps(self) -> int:
        """Steps of its own sampler."""
        ...

    def encode(self, history: History) -> Cond:
        """Return the condition of the denoiser for observations key → [b n_obs ...]."""
        ...

    def sample_chunk(self, observation: History, noise: Keyed) -> Tensor:
        """Return chunks [b horizon A] in the environment's units, by its own sampler."""
        ...

    def finish(self, chunk: Tensor) -> Tensor:
        """Return normalised chunks [b h A], of any horizon, in the environment's units."""
        ...


class DenoisingPolicy(ChunkedPolicy):
    """A chunked policy over a denoiser; subclasses give `encode`.

    Args:
        spec: what it reads and writes.
        denoiser: Gaussian Model of normalised chunks.
        action_normalizer: between normalised and environment units.
        sampler: how chunks are drawn.
    """

    def __init__(self, spec: PolicySpec, denoiser: Any, action_normalizer: Normalizer, sampler: ChunkSampler) -> None:
        super().__init__()
        self.spec = spec
        self.denoiser = denoiser
        self.action_normalizer = action_normalizer
        self.sampler = sampler

    @property
    def sampler_steps(self) -> int:
        """Steps of its own sampler."""
        return self.sampler.steps

    @abstractmethod
    def encode(self, history: History) -> Cond:
        """Return the denoiser's condition for observations key → [b n_obs ...]."""

    @torch.inference_mode()
    def sample_chunk(self, observation: History, noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return chunks in the environment's units.

        Args:
            observation: key → [b n_obs ...].
            noise: one stream per row; draw 0 is the start, draw k + 1 the noise of step k.
        """
        return self.finish(self.draw(self.encode(observation), noise))

    def draw(self, cond: Cond, noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return normalised chunks for encoded observations, by `self.sampler`."""
        return self.sampler.draw(self.denoiser, (len(noise), self.spec.horizon, self.spec.action_dim), noise, cond)

    def finish(self, chunk: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return a normalised chunk, of any horizon, in the environment's units."""
        return self.action_normalizer.denormalize(chunk)
