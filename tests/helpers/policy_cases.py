"""Small policies and demonstrations for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gencontrol.data.normalize import Normalizer
from gencontrol.robotics.datasets.episodes import Episode, Episodes
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.config import DiffusionPolicyConfig, FlowPolicyConfig
from gencontrol.robotics.policies.diffusion import DiffusionPolicy, FlowPolicy, GenerativePolicy

STATE, ACTION = 5, 3


def small_policy(
    kind: str, backbone: str, *, image: bool = False, bounded: bool = True, **options: Any
) -> GenerativePolicy:
    """A policy with random weights whose output is far from zero; actions have shift 1, scale 2 and limits −1, 3."""
    spec = PolicySpec({"state": (STATE,), **({"eye": (24, 32, 3)} if image else {})}, ACTION, 8, 2, 4)
    normalizers = {
        "state": Normalizer(torch.full((STATE,), 0.5), torch.full((STATE,), 2.0)),
        "action": Normalizer(torch.ones(ACTION), torch.full((ACTION,), 2.0)),
    }
    options = {"width": 32, "depth": 2, **options}
    limits = (torch.full((ACTION,), -1.0), torch.full((ACTION,), 3.0)) if bounded else None
    policy: GenerativePolicy
    if kind == "flow":
        policy = FlowPolicy(spec, FlowPolicyConfig(backbone=backbone, **options), normalizers, limits)
    else:
        config = DiffusionPolicyConfig(backbone=backbone, **options)
        policy = DiffusionPolicy(spec, config, normalizers, limits)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.networks.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def history(policy: GenerativePolicy, rows: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Random observations [rows n_obs …] of a policy."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for key, shape in policy.spec.observations.items():
        size = (rows, policy.spec.n_obs, *shape)
        found[key] = (
            rng.integers(0, 256, size, dtype=np.uint8)
            if len(shape) == 3
            else rng.standard_normal(size).astype(np.float32)
        )
    return found


def gaussian_law(episodes: int, length: int, slope: float, deviation: float, seed: int = 0) -> Episodes:
    """Demonstrations with a law that is known: state uniform in [−1, 1], action N(slope·state, deviation²), 1-D."""
    rng = np.random.default_rng(seed)

    def one() -> Episode:
        state = rng.uniform(-1, 1, (length, 1)).astype(np.float32)
        action = slope * state + deviation * rng.standard_normal((length, 1))
        none = np.zeros(length, bool)
        return Episode({"state": state}, action.astype(np.float32), np.zeros(length, np.float32), none, none, none)

    return Episodes(tuple(one() for _ in range(episodes)), {"env_id": "law"})
