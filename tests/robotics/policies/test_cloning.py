"""Cloning: the closed form of a Gaussian law, the algorithm's contract, padding, splits, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gencontrol.algorithms.agents.behavior_cloning import (
    DiffusionPolicyPretrain,
    FlowPolicyPretrain,
    PolicyMicro,
    PolicyPretrain,
    PolicyPretrainConfig,
)
from gencontrol.algorithms.base import Algorithm, StepContext
from gencontrol.errors import UsageError
from gencontrol.process.convert import from_x0_eps
from gencontrol.rng import Keyed
from gencontrol.robotics.datasets.episodes import Episode, Episodes
from gencontrol.robotics.policies.cloning import ChunkSizes, fingerprint, prepare, split_episodes
from gencontrol.robotics.policies.config import DiffusionPolicyConfig, FlowPolicyConfig, PolicyConfig
from gencontrol.robotics.policies.diffusion import DiffusionPolicy, FlowPolicy
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.train.config import TrainConfig
from gencontrol.train.trainer import Trainer
from tests.helpers.policy_cases import gaussian_law

SLOPE, DEVIATION = 0.6, 0.3


def _algorithm(
    kind: str, episodes: Episodes, sizes: ChunkSizes, options: PolicyPretrainConfig, **changes: Any
) -> PolicyPretrain:
    config: PolicyConfig
    if kind == "flow":
        config = FlowPolicyConfig(**changes)
        made = prepare(FlowPolicy, episodes, config, sizes, held_out=0.2)
        return FlowPolicyPretrain(made.policy, made.train, options, held_out=made.held_out, seed=0)
    config = DiffusionPolicyConfig(**changes)
    made = prepare(DiffusionPolicy, episodes, config, sizes, held_out=0.2)
    return DiffusionPolicyPretrain(made.policy, made.train, options, held_out=made.held_out, seed=0)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_a_gaussian_law_is_learned(kind: str, tmp_path: Path) -> None:
    """state → N(0.6·state, 0.3²): the trained prediction against the posterior in closed form, and the sampled law.

    With x_t = a·x0 + s·eps and x0 ~ N(m, v): E[x0 | x_t] = m + a·v·(x_t − a·m)/(a²·v + s²).  Targets have variance
    about 1; 300 steps leave an excess error below 0.02 (measured 0.002 and 0.008), an untrained network has above 0.5.
    """
    data = gaussian_law(40, 50, SLOPE, DEVIATION)
    norm: dict[str, Any] = {"action_norm": "identity", "state_norm": "identity", "limits": "none"}
    size: dict[str, Any] = {"backbone": "mlp", "width": 64, "depth": 2, "inference_steps": 50}
    algorithm = _algorithm(kind, data, ChunkSizes(1, 1, 1), PolicyPretrainConfig(ema=0.99), **norm, **size)
    config = TrainConfig(steps=300, lr=5e-3, lr_schedule="cosine", micro_batch=256, save_every=10_000)
    Trainer(config, tmp_path / "run").fit(algorithm)
    policy = algorithm.policy
    assert isinstance(policy, DiffusionPolicy | FlowPolicy)
    with algorithm.roles.use("ema"), torch.no_grad():
        rows = 4000
        draws = Keyed(torch.arange(rows)).uniform((rows, 2)).float()
        state, t = 2 * draws[:, :1] - 1, draws[:, 1] * 0.98 + 0.01
        eps = Keyed(torch.arange(rows), 1).normal((rows, 1, 1))
        own = Keyed(torch.arange(rows), 2).normal((rows, 1, 1))
        mean = SLOPE * state[:, None]
        process: Any = policy.denoiser.process
        at = process.at(t, eps)
        xt = at.a * (mean + DEVIATION * own) + at.s * eps
        variance = DEVIATION**2
        x0 = mean + at.a * variance * (xt - at.a * mean) / (at.a**2 * variance + at.s**2)
        exact = from_x0_eps(x0, (xt - at.a * x0) / at.s, at, policy.denoiser.prediction)
        cond = policy.encoder({"state": state[:, None]})
        excess = (policy.denoiser(xt, t, cond).raw - exact).square().mean()
        assert float(excess) < 0.02
        chunk = policy.draw(torch.full((rows, 1), 0.5), Keyed(torch.arange(rows), 3))
    # 4 standard errors of 4000 samples, and the excess error's share (measured 0.02 and 3 %)
    assert float(chunk.mean()) == pytest.approx(SLOPE * 0.5, abs=0.04)
    assert float(chunk.std()) == pytest.approx(DEVIATION, rel=0.1)


class _Contract(AlgorithmContract):
    kind = ""
    accumulation_tolerance = 2e-5

    def make(self) -> Algorithm:
        """A small policy on pictures and states, with padding at every episode's ends."""
        rng = np.random.default_rng(0)

        def one() -> Episode:
            none = np.zeros(4, bool)
            seen = {
                "state": rng.standard_normal((4, 3)).astype(np.float32),
                "eye": rng.integers(0, 256, (4, 18, 20, 3), dtype=np.uint8),
            }
            actions = rng.uniform(-1, 1, (4, 2)).astype(np.float32)
            return Episode(seen, actions, np.zeros(4, np.float32), none, none, none)

        options = PolicyPretrainConfig(batch=6, mask_padding=True, eval_items=4, eval_times=2)
        episodes = Episodes(tuple(one() for _ in range(4)))
        backbone: Any = "unet" if self.kind == "diffusion" else "transformer"
        size: dict[str, Any] = {"backbone": backbone, "width": 32, "depth": 1, "inference_steps": 3}
        return _algorithm(self.kind, episodes, ChunkSizes(4, 2, 2), options, **size)


class TestDiffusion(_Contract):
    """The contract of algorithms, diffusion with a U-Net."""

    kind = "diffusion"


class TestFlow(_Contract):
    """The contract of algorithms, flow with a transformer."""

    kind = "flow"


def _plain(mask: bool, batch: int = 16) -> PolicyPretrain:
    data = gaussian_law(4, 6, SLOPE, DEVIATION)
    options = PolicyPretrainConfig(batch=batch, mask_padding=mask)
    return _algorithm("flow", data, ChunkSizes(8, 1, 8), options, backbone="mlp", width=8, depth=1)


def _micro(algorithm: PolicyPretrain) -> PolicyMicro:
    context = StepContext(seed=0, step=0, micro_batch=64)
    return next(iter(algorithm.minibatches(algorithm.collect(context).data, 0, context)))


@pytest.mark.parametrize("mask", [True, False])
def test_padding_is_in_the_loss_only_without_the_mask(mask: bool) -> None:
    """Targets of padded actions are changed: the masked loss does not move, the plain one does."""
    algorithm = _plain(mask)
    micro = _micro(algorithm)
    padded = _micro(_plain(True)).weight
    assert padded is not None and bool((padded == 0).any())
    torch.testing.assert_close(padded.mean(1), torch.ones(len(padded)))
    cond = algorithm.policy.encoder(micro.observations)
    denoiser = algorithm.policy.denoiser
    xt = denoiser.process.corrupt(micro.x0, micro.t, micro.noise)  # type: ignore[union-attr]
    output = denoiser(xt, micro.t, cond).raw
    squares = (output - denoiser.target(micro.x0, micro.noise, micro.t)).square()[..., 0]
    expected = (squares * padded).mean(1) if mask else squares.mean(1)
    torch.testing.assert_close(algorithm.errors(micro, cond), expected)


def test_every_window_once_per_epoch() -> None:
    """Positions of two epochs visit all windows twice, in two orders, across batches that straddle the border."""
    algorithm = _plain(False)
    count = len(algorithm.data)
    visited = algorithm._items(torch.arange(2 * count))
    first, second = visited[:count], visited[count:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(count))
    assert not torch.equal(first, second)
    again = _plain(False)._items(torch.arange(count - 3, count + 3))
    assert torch.equal(again, visited[count - 3 : count + 3])


def test_times_fill_the_unit_interval() -> None:
    """Times of a batch are stratified in (0, 1]: one per sixteenth."""
    t = _micro(_plain(False)).t
    assert sorted(((1.0 - t) * 16).floor().int().tolist()) == list(range(16))


def test_normalisers_see_training_episodes_alone() -> None:
    """The held-out episode's outlier is in no normaliser and in no limit."""
    episodes = gaussian_law(6, 5, SLOPE, DEVIATION)
    _, other = split_episodes(episodes, 0.1, seed=0)
    assert other is not None and len(other) == 1
    index = next(i for i, e in enumerate(episodes) if e is other[0])
    items = list(episodes)
    items[index] = dataclasses.replace(items[index], actions=items[index].actions + 100.0)
    made = prepare(FlowPolicy, Episodes(tuple(items)), FlowPolicyConfig(backbone="mlp"), ChunkSizes(4, 1, 4))
    assert made.episodes == (5, 1) and made.held_out is not None
    assert made.policy.limits is not None and float(made.policy.limits[1]) < 5
    assert float(made.train.actions.abs().max()) <= 1 + 1e-6 < 50 < float(made.held_out.actions.abs().max())


def test_fingerprint_sees_other_data() -> None:
    """Another action, another number of episodes, another hash; the same data, the same hash."""
    data = gaussian_law(3, 5, SLOPE, DEVIATION)
    changed = dataclasses.replace(data[1], actions=data[1].actions + np.float32(1e-4))
    hashes = {fingerprint(d) for d in (data, data[:2], Episodes((data[0], changed, data[2])))}
    assert len(hashes) == 3 and fingerprint(gaussian_law(3, 5, SLOPE, DEVIATION)) in hashes


def test_what_cannot_be_trained_is_refused() -> None:
    """A key that is not there, a share out of range, a horizon that the U-Net cannot halve."""
    data = gaussian_law(3, 5, SLOPE, DEVIATION)
    mlp = FlowPolicyConfig(backbone="mlp")
    with pytest.raises(UsageError, match="no observation 'eye'; it has state"):
        prepare(FlowPolicy, data, mlp, ChunkSizes(), keys=["eye"])
    with pytest.raises(UsageError, match="held_out is 1"):
        prepare(FlowPolicy, data, mlp, ChunkSizes(), held_out=1.0)
    with pytest.raises(UsageError, match="horizon 6 is no multiple of 4"):
        prepare(FlowPolicy, data, FlowPolicyConfig(), ChunkSizes(6, 1, 2))
    with pytest.raises(UsageError, match="n_action"):
        prepare(FlowPolicy, data, mlp, ChunkSizes(4, 2, 4))
    with pytest.raises(UsageError, match="takes a FlowPolicyConfig"):
        prepare(FlowPolicy, data, DiffusionPolicyConfig(backbone="mlp"), ChunkSizes(4, 1, 4))
