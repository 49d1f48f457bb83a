"""From episodes to a policy that can be trained: split, normalisers, windows, fresh weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gencontrol.data.normalize import fit_normalizers
from gencontrol.errors import UsageError
from gencontrol.rng import stream
from gencontrol.robotics.datasets.episodes import Episodes, shapes_of
from gencontrol.robotics.datasets.windows import Windows
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.config import ChunkSizes, PolicyConfig
from gencontrol.robotics.policies.diffusion import GenerativePolicy


@dataclass(frozen=True)
class Cloning:
    """What training starts from.

    Args:
        policy: with fresh weights and the normalisers of the training episodes.
        train, held_out: windows with normalised actions; held_out is None where no episode is kept apart.
        episodes: number of training and held-out episodes.
    """

    policy: GenerativePolicy
    train: Windows
    held_out: Windows | None
    episodes: tuple[int, int]


def split_episodes(episodes: Episodes, share: float, seed: int) -> tuple[Episodes, Episodes | None]:
    """Keep a random share of whole episodes apart, at least one if share > 0 and there are two.

    Raises:
        UsageError: the share is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise UsageError(f"held_out is {share}; give a share of the episodes in [0, 1).")
    count = min(max(1, round(share * len(episodes))), len(episodes) - 1) if share else 0
    if not count:
        return episodes, None
    order = torch.randperm(len(episodes), generator=stream(seed, "clone/split")).tolist()
    apart = set(order[:count])
    kept = tuple(episode for index, episode in enumerate(episodes) if index not in apart)
    other = tuple(episode for index, episode in enumerate(episodes) if index in apart)
    return Episodes(kept, episodes.env), Episodes(other, episodes.env)


def spec_of(episodes: Episodes, keys: Sequence[str], sizes: ChunkSizes) -> PolicySpec:
    """Return what a policy of these episodes reads and writes.

    Args:
        keys: observations to read; none reads all.

    Raises:
        UsageError: a key is not in the data, or the sizes do not fit.
    """
    shapes = shapes_of(episodes[0])
    size = shapes.pop("action")[0]
    if missing := [key for key in keys if key not in shapes]:
        raise UsageError(f"the data set has no observation '{missing[0]}'; it has {', '.join(shapes)}.")
    chosen = {key: shapes[key] for key in keys} if keys else shapes
    if not chosen:
        raise UsageError("the data set has no observation; a policy needs at least one.")
    return PolicySpec(chosen, size, sizes.horizon, sizes.n_obs, sizes.n_action)


def prepare(
    kind: type[GenerativePolicy],
    episodes: Episodes,
    config: PolicyConfig,
    sizes: ChunkSizes,
    *,
    keys: Sequence[str] = (),
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Cloning:
    """Make a policy and its training data.

    Args:
        kind: DiffusionPolicy or FlowPolicy.
        keys: observations that the policy reads; none reads all.
        held_out: share of the episodes that only the evaluation sees.
        seed: of the split and the weights.

    Raises:
        UsageError: options, keys or normalisers do not fit the data.
    """
    train, other = split_episodes(episodes, held_out, seed)
    spec = spec_of(episodes, keys, sizes)
    states = [key for key, shape in spec.observations.items() if len(shape) != 3]
    rows = {key: np.concatenate([e.observations[key][: len(e)] for e in train]) for key in states}
    actions = np.concatenate([episode.actions for episode in train])
    modes = {**dict.fromkeys(states, config.state_norm), "action": config.action_norm}
    normalizers = fit_normalizers({**rows, "action": actions}, modes)
    limits = torch.from_numpy(actions.min(0)).float(), torch.from_numpy(actions.max(0)).float()
    policy = kind(spec, config, normalizers, limits, seed=seed).to(device)

    def windows(part: Episodes) -> Windows:
        cut = Windows.of(
            part, n_obs=spec.n_obs, horizon=spec.horizon, n_action=spec.n_action, keys=list(spec.observations)
        )
        # their actions are normalised once for the whole run
        return dataclasses.replace(cut, actions=normalizers["action"].normalize(cut.actions.float())).to(device)

    held = None if other is None else windows(other)
    return Cloning(policy, windows(train), held, (len(train), 0 if other is None else len(other)))


def fingerprint(episodes: Episodes) -> str:
    """Return a short hash of shapes, lengths and actions, by which a resumed run notices other data."""
    digest = hashlib.sha256(repr((len(episodes), sorted(shapes_of(episodes[0]).items()))).encode())
    for episode in episodes:
        digest.update(np.ascontiguousarray(episode.actions).tobytes())
        for key in sorted(episode.observations):
            digest.update(np.ascontiguousarray(episode.observations[key][0]).tobytes())
    return digest.hexdigest()[:16]
