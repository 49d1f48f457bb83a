"""Parents with known laws, shared by the tests of composition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gencontrol.data.normalize import Normalizer
from gencontrol.models import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rng import Keyed, row_keys
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.robotics.policies.diffusion import squaredcos
from gencontrol.robotics.policies.foreign import ForeignPolicy

HORIZON, ACTIONS, KEY = 4, 2, "state"
SPEC = PolicySpec({KEY: (3,)}, ACTIONS, horizon=HORIZON, n_obs=2, n_action=2)
DIFFUSION, FLOW = GaussianProcess(squaredcos(100)), GaussianProcess(Linear())


def gaussian(mean: float, sd: float, process: GaussianProcess = DIFFUSION, size: int = HORIZON * ACTIONS):
    """A model with independent N(mean·ramp, sd²) numbers."""
    means = mean * torch.linspace(0.5, 1.0, size, dtype=torch.float64)[None]
    return GaussianMixture(means, (sd**2 * torch.eye(size).double())[None], torch.ones(1), process)


def parent(
    mean: float = 0.5,
    sd: float = 0.3,
    process: GaussianProcess = DIFFUSION,
    *,
    spec: PolicySpec = SPEC,
    shift: Sequence[float] = (0.0, 0.0),
    scale: Sequence[float] = (1.0, 1.0),
    sampler: ChunkSampler | None = None,
) -> ForeignPolicy:
    """A policy whose chunks have that law in normalised units."""
    model = gaussian(mean, sd, process, spec.horizon * spec.action_dim)
    normalizer = Normalizer(torch.tensor(shift), torch.tensor(scale))
    return ForeignPolicy(spec, model, normalizer, sampler or ChunkSampler(10, "ddim", clip=None))


def history(rows: int, spec: PolicySpec = SPEC) -> dict[str, np.ndarray]:
    """Observations that nobody looks at."""
    return {key: np.zeros((rows, spec.n_obs, *shape), np.float32) for key, shape in spec.observations.items()}


def noise(rows: int, seed: int = 0, first: int = 0) -> Keyed:
    """Streams of rows first … first + rows − 1."""
    return Keyed(row_keys(seed, "test", torch.arange(first, first + rows)))


def chunk(policy, rows: int = 3, seed: int = 0) -> Tensor:
    """Chunks of a policy."""
    return policy.sample_chunk(history(rows, policy.spec), noise(rows, seed))
