"""Contracts of compositions: action spaces, schedules of weights, parents that fit (docs/methods/gpc.md#action-spaces
and docs/methods/gpc.md#laws).
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gencontrol.bench.gpc.exact import level_times, mixture, sampled_law
from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.robotics.compose import ComposedPolicy, compose_prediction
from gencontrol.robotics.composition.mixing import ByLogSnr, PerChunkIndex, PerDim
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.robotics.policies.diffusion import squaredcos
from gencontrol.robotics.policies.foreign import ForeignPolicy, noise_model, velocity_model
from gencontrol.sampling import compose, ddim
from gencontrol.types import Prediction
from tests.helpers.composition_parents import (
    ACTIONS,
    DIFFUSION,
    FLOW,
    HORIZON,
    KEY,
    SPEC,
    chunk,
    gaussian,
    history,
    noise,
    parent,
)

# ---- 10: action spaces ---------------------------------------------------------------------------------------------


def test_a_shifted_normaliser_changes_nothing() -> None:
    """The second parent has the same law of actions, told in a shifted action space."""
    shift, scale = torch.tensor([0.3, -0.7]), torch.tensor([2.0, 0.5])
    first, second = parent(0.5, 0.3, scale=scale.tolist()), parent(-0.2, 0.4, scale=scale.tolist())
    expected = chunk(ComposedPolicy([first, second], [0.4, 0.6]))
    means = second.denoiser.means - (shift / scale).repeat(HORIZON)
    moved = parent(-0.2, 0.4, shift=shift.tolist(), scale=scale.tolist())
    moved.denoiser.means.copy_(means)
    found = chunk(ComposedPolicy([first, moved], [0.4, 0.6]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_scaled_normaliser_is_refused_or_mapped_in_x0() -> None:
    first, second = parent(0.5, 0.05), parent(0.5, 0.05, scale=(1.0, 1.2))
    with pytest.raises(UsageError, match=r"differ in scale.*dimension 1"):
        ComposedPolicy([first, second], [0.5, 0.5])
    mapped = ComposedPolicy([first, second], [0.5, 0.5], allow_scale_mismatch=True)
    found = chunk(mapped, 200).mean(0)
    ramp = torch.linspace(0.5, 1.0, HORIZON * ACTIONS).reshape(HORIZON, ACTIONS)
    expected = 0.5 * ramp * torch.tensor([1.0, 1.1])  # narrow laws: the mean is the mean of the two
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    ComposedPolicy([first, parent(scale=(1.0, 1.0005))], [0.5, 0.5])  # within the tolerance


# ---- schedules of weights ------------------------------------------------------------------------------------------


def test_weights_by_dimension_and_by_place() -> None:
    parents = [parent(0.5, 0.3), parent(-0.4, 0.2)]
    by_dim = chunk(ComposedPolicy(parents, schedule=PerDim(((1.0, 0.0), (0.0, 1.0)))))
    # independent numbers: a dimension with all its weight on one parent is that parent's
    torch.testing.assert_close(by_dim[..., 0], chunk(parents[0])[..., 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(by_dim[..., 1], chunk(parents[1])[..., 1], rtol=0, atol=1e-5)
    by_place = chunk(ComposedPolicy(parents, schedule=PerChunkIndex(((1, 1, 0, 0), (0, 0, 1, 1)))))
    torch.testing.assert_close(by_place[:, :2], chunk(parents[0])[:, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(by_place[:, 2:], chunk(parents[1])[:, 2:], rtol=0, atol=1e-5)


def test_weights_by_log_snr() -> None:
    schedule = ByLogSnr((-4.0, 0.0, 4.0), ((1.0, 0.0), (0.5, 0.5), (0.2, 0.8)))
    assert schedule(-2.0) == pytest.approx([0.75, 0.25]) and schedule(9.0) == pytest.approx([0.2, 0.8])
    rows = schedule(torch.tensor([-9.0, 2.0])[:, None, None])
    assert rows[0].shape == (2, 1, 1) and rows[0].flatten().tolist() == pytest.approx([1.0, 0.35])
    parents = [parent(0.5, 0.3), parent(-0.4, 0.2)]
    constant = ComposedPolicy(parents, schedule=ByLogSnr((0.0,), ((0.3, 0.7),)))
    torch.testing.assert_close(chunk(constant), chunk(ComposedPolicy(parents, [0.3, 0.7])), rtol=0, atol=1e-6)
    late = ComposedPolicy(parents, schedule=ByLogSnr((7.0, 7.1), ((1.0, 0.0), (0.0, 1.0))))
    assert float((chunk(late) - chunk(parents[0])).abs().max()) < 0.2  # almost to the end the first parent


def test_times_per_item_have_weights_per_item() -> None:
    models = [gaussian(0.5, 0.3), gaussian(-0.4, 0.6)]
    schedule = ByLogSnr((-4.0, 4.0), ((1.0, 0.0), (0.0, 1.0)))
    mixed = compose(models, schedule)
    x, times = torch.zeros(3, HORIZON, ACTIONS, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    together = mixed(x, times).x0
    for row, t in enumerate(times.tolist()):
        torch.testing.assert_close(together[row], mixed(x[:1], t).x0[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: ByLogSnr((0.0, 0.0), ((1.0,), (1.0,))), "increase"),
        (lambda: ByLogSnr((0.0,), ((0.5, 0.6),)), "sum"),
        (lambda: PerDim(((0.5, -0.1), (0.5, 1.1))), "below 0"),
        (lambda: PerChunkIndex(((0.5, 0.1), (0.5,))), "equal length"),
    ],
)
def test_schedules_that_are_not_convex_are_refused(make, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


# ---- contracts between parents -------------------------------------------------------------------------------------


def test_parents_read_their_own_observations() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def watching(name: str, keys: dict[str, tuple[int, ...]], n_obs: int) -> ForeignPolicy:
        def encode(found):
            seen[name] = {key: value.shape for key, value in found.items()}

        spec = PolicySpec(keys, ACTIONS, horizon=HORIZON + n_obs - 1, n_obs=n_obs, n_action=2)
        made = parent(spec=spec)
        made.encoder = encode
        return made

    first = watching("first", {"state": (3,), "image": (4, 4, 3)}, 2)
    second = watching("second", {"points": (5, 3), "state": (3,)}, 1)
    composed = ComposedPolicy([first, second], [0.5, 0.5], horizons="overlap")
    assert set(composed.spec.observations) == {"state", "image", "points"} and composed.spec.n_obs == 2
    observation = {
        "state": np.zeros((3, 3), np.float32),
        "image": np.zeros((3, 4, 4, 3), np.uint8),
        "points": np.zeros((3, 5, 3), np.float32),
    }
    assert composed.select_action(observation).shape == (3, ACTIONS)
    assert seen["first"] == {"state": (3, 2, 3), "image": (3, 2, 4, 4, 3)}
    assert seen["second"] == {"points": (3, 1, 5, 3), "state": (3, 1, 3)}


def test_the_overlap_is_composed_and_the_tail_is_the_longer_parents() -> None:
    short = PolicySpec({KEY: (3,)}, ACTIONS, horizon=2, n_obs=1, n_action=2)
    first = parent(0.5, 0.3)
    second = parent(0.5, 0.3, spec=short)
    second.denoiser.means.copy_(first.denoiser.means[:, ACTIONS : 3 * ACTIONS])
    with pytest.raises(UsageError, match="horizons='overlap'"):
        ComposedPolicy([first, second], [0.5, 0.5])
    composed = ComposedPolicy([first, second], [0.5, 0.5], horizons="overlap")
    # the second parent starts at the newest observation, index n_obs − 1 = 1 of the composed chunk
    assert composed.composed.tolist() == [False, True, True, False] and composed.spec.horizon == HORIZON
    torch.testing.assert_close(chunk(composed), chunk(first), rtol=0, atol=1e-5)  # where both predict, they agree
    moved = ComposedPolicy([first, parent(-0.5, 0.3, spec=short)], [0.5, 0.5], horizons="overlap")
    gap = (chunk(moved) - chunk(first)).abs().amax((0, 2))
    assert bool((gap[1:3] > 0.1).all()) and float(gap[[0, 3]].max()) < 1e-5
    alone = ComposedPolicy([first, parent(-0.5, 0.3, spec=short)], [0.0, 1.0], horizons="overlap")
    torch.testing.assert_close(chunk(alone)[:, 1:3], chunk(alone.parents[1]))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: ComposedPolicy([], []), "at least one"),
        (lambda: ComposedPolicy([parent()], [1.0], schedule=PerDim(((1.0, 1.0),))), "either"),
        (lambda: ComposedPolicy([parent(), parent()], [0.7, 0.7]), "sum 1"),
        (lambda: ComposedPolicy([parent(), parent()], [0.5, 0.5], operator="xor"), "unknown operator"),
        (lambda: ComposedPolicy([parent(), parent()], operator="or", schedule=lambda s: [1, 0]), "convex"),
        (lambda: ComposedPolicy([parent(), object()], [0.5, 0.5]), "declares no denoiser"),
        (lambda: ComposedPolicy([ForeignPolicy(SPEC, nn.Linear(2, 2))], [1.0]), "no Gaussian noise law"),
        (lambda: ComposedPolicy([parent()], [1.0], reference=3), "reference"),
        (lambda: ComposedPolicy([parent(), parent()], [0.5, 0.5], n_action=9), "n_action"),
        (lambda: velocity_model(nn.Identity(), time_at_noise=0.5, velocity_sign=1), "time_at_noise"),
        (lambda: noise_model(nn.Identity(), schedule=squaredcos(100), prediction="flow"), "epsilon"),
    ],
)
def test_what_cannot_be_composed_is_refused(make, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"observations": {KEY: (4,)}}, "observation"),
        ({"action_dim": 3}, "action dimensions"),
        ({"n_action": 1}, "n_action="),
        ({"control": "absolute joints"}, "mean different things"),
    ],
)
def test_specs_that_differ_are_refused(change, match: str) -> None:
    base = {"observations": {KEY: (3,)}, "action_dim": ACTIONS, "horizon": HORIZON, "n_action": 2, "control": "delta"}
    first, second = PolicySpec(**base), PolicySpec(**{**base, **change})
    parents = [
        parent(spec=first),
        parent(spec=second, shift=[0.0] * second.action_dim, scale=[1.0] * second.action_dim),
    ]
    with pytest.raises(UsageError, match=match):
        ComposedPolicy(parents, [0.5, 0.5])


def test_mixing_with_a_policy_that_is_not_told_the_task_warns() -> None:
    told = PolicySpec({KEY: (3,)}, ACTIONS, horizon=HORIZON, n_obs=2, n_action=2, task_conditioned=True)
    with pytest.warns(UserWarning, match="task"):
        assert ComposedPolicy([parent(spec=told), parent()], [0.5, 0.5]).spec.task_conditioned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ComposedPolicy([parent(spec=told), parent(spec=told)], [0.5, 0.5])


def test_the_reference_is_the_parent_with_discrete_levels() -> None:
    flow, diffusion = parent(process=FLOW), parent(sampler=ChunkSampler(4, clip=None))
    composed = ComposedPolicy({"flow": flow, "dp": diffusion}, [0.5, 0.5])
    assert composed.reference == 1 and composed.sampler.steps == 4
    assert ComposedPolicy([flow, diffusion], [0.5, 0.5], reference=0).sampler.steps == 10


def test_the_mix_is_clipped_and_not_its_parts() -> None:
    """Parents beyond the limits on both sides: their mix lies inside and is untouched by the clip."""
    parents = [parent(1.5, 0.05), parent(-1.5, 0.05)]
    free = ComposedPolicy(parents, [0.5, 0.5])
    bounded = ComposedPolicy(parents, [0.5, 0.5], sampler=ChunkSampler(10, "ddim", clip=1.0))
    torch.testing.assert_close(chunk(bounded), chunk(free), rtol=0, atol=1e-5)
    assert float(chunk(ComposedPolicy(parents, [1.0, 0.0])).max()) > 1.2
    skewed = ComposedPolicy(parents, [0.95, 0.05], sampler=ChunkSampler(10, "ddim", clip=1.0))
    assert float(chunk(skewed).max()) <= 1.0


def test_keyed_noise_differs_from_step_to_step() -> None:
    """Ancestral sampling has the deviation that independent draws give; equal noise in every step would not."""
    policy = parent(0.0, 1.0, sampler=ChunkSampler(20, ddim(1.0), tuple(level_times(20)), clip=None))
    expected = sampled_law(mixture([0.0], [1.0], [1.0], DIFFUSION), level_times(20), 1.0)[1]
    found = policy.sample_chunk(history(2000), noise(2000))
    assert float(found.std()) == pytest.approx(expected, rel=0.02)


def test_denoisers_of_two_prediction_types_meet() -> None:
    """Networks that output x0 and eps of one law: any mix is that law."""
    law = gaussian(0.5, 0.3)

    class Says(nn.Module):
        def __init__(self, kind: Prediction) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x, t, cond):
            return law(x, t).to(self.kind)

    models = [Denoiser(Says(kind), DIFFUSION, kind) for kind in (Prediction.X0, Prediction.EPS)]
    parents = [ForeignPolicy(SPEC, model, Normalizer(torch.zeros(2), torch.ones(2))) for model in models]
    x = torch.randn(2, HORIZON, ACTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = compose_prediction(parents, [0.25, 0.75], x, 0.6, [None, None])
    torch.testing.assert_close(found.x0, law(x, 0.6).x0, rtol=0, atol=1e-9)
