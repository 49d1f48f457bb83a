"""Composition of policies against closed forms and its own contracts (docs/methods/gpc.md#laws)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gencontrol.bench.gpc.exact import level_times, limit_law, mixture, part_a, sampled_law
from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear
from gencontrol.process.convert import from_x0_eps, to_x0_eps
from gencontrol.robotics.compose import ComposedPolicy, compose_prediction
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.robotics.policies.diffusion import squaredcos
from gencontrol.robotics.policies.foreign import ForeignPolicy, noise_model, velocity_model
from gencontrol.sampling import compose, ddim, retime
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


class Broken(nn.Module):
    """A denoiser that must not be called."""

    process = DIFFUSION

    def forward(self, xt, t, cond=None):
        raise AssertionError("a parent of weight 0 was called")


def broken() -> ForeignPolicy:
    def refuse(found):
        raise AssertionError("a parent of weight 0 was encoded")

    return ForeignPolicy(SPEC, Broken(), sampler=ChunkSampler(10), encoder=refuse)


# ---- 1: weight 1 is the parent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["ddim", ddim(1.0), "euler", "heun"])
@pytest.mark.parametrize("place", [0, 1])
def test_weight_one_is_the_parent_bit_for_bit(step, place: int) -> None:
    only = parent(process=DIFFUSION if place else FLOW, sampler=ChunkSampler(7, step, clip=0.9))
    parents = [broken(), broken()]
    parents[place] = only
    weights = [0.0, 0.0]
    weights[place] = 1.0
    assert torch.equal(chunk(ComposedPolicy(parents, weights)), chunk(only))


def test_weight_one_through_the_queues_of_a_whole_episode() -> None:
    only = parent(sampler=ChunkSampler(5, ddim(1.0), clip=None))
    composed = ComposedPolicy([only, broken()], [1.0, 0.0])
    for policy in (only, composed):
        policy.reset(seeds=[5, 6])
    for _ in range(5):
        seen = {KEY: np.zeros((2, 3), np.float32)}
        assert np.array_equal(composed.select_action(seen), only.select_action(seen))


def test_a_schedule_that_gives_one_parent_everything_is_its_model() -> None:
    other = parent(-0.4, 0.2)
    composed = ComposedPolicy([other, broken()], schedule=lambda logsnr: [1.0, 0.0])
    composed.parents[1].encoder = None  # a schedule may need it later: it is encoded, never called
    assert torch.equal(chunk(composed), chunk(other))


# ---- 2, 3, 12: identical parents, order, batch ---------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.13, 0.87), (0.2, 0.3, 0.5)])
def test_identical_parents_give_the_parent(weights: tuple[float, ...]) -> None:
    one = parent()
    found = chunk(ComposedPolicy([one] * len(weights), weights))
    torch.testing.assert_close(found, chunk(one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("operator", ["convex", "or", "and"])
def test_order_of_parents_does_not_matter(operator: str) -> None:
    parents, weights = [parent(0.5, 0.3), parent(-0.2, 0.4), parent(0.1, 0.2)], [0.2, 0.5, 0.3]
    expected = chunk(ComposedPolicy(parents, weights, operator=operator))
    # AND solves a linear system, whose rounding depends on the order
    atol = 1e-3 if operator == "and" else 1e-5
    for order in itertools.permutations(range(3)):
        composed = ComposedPolicy([parents[i] for i in order], [weights[i] for i in order], operator=operator)
        torch.testing.assert_close(chunk(composed), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("operator", ["convex", "or", "and"])
def test_a_row_does_not_depend_on_its_batch(operator: str) -> None:
    composed = ComposedPolicy([parent(0.5, 0.3), parent(-0.2, 0.4, FLOW)], [0.4, 0.6], operator=operator)
    whole = composed.sample_chunk(history(4), noise(4))
    for row in range(4):
        torch.testing.assert_close(
            composed.sample_chunk(history(1), noise(1, first=row))[0], whole[row], atol=1e-5, rtol=0
        )


# ---- 4, 5, 8: conversions ------------------------------------------------------------------------------------------

KINDS = [Prediction.X0, Prediction.EPS, Prediction.V, Prediction.VELOCITY]


@pytest.mark.parametrize("schedule", [squaredcos(100), Linear(), VP(), Cosine(), Edm()])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_round_trip(schedule, kind: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    process = GaussianProcess(schedule)
    for t in (0.105, 0.5, 0.93):
        c, xt = schedule.at(t), process.corrupt(x0, t, eps)
        found = to_x0_eps(from_x0_eps(x0, eps, c, kind), xt, c, kind)
        torch.testing.assert_close(torch.stack(found), torch.stack([x0, eps]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.71, 0.99])
def test_diffusion_and_flow_times_round_trip_at_equal_ratio(t: float) -> None:
    there, scale = DIFFUSION.matched(t, FLOW.schedule)
    c, f = DIFFUSION.schedule.at(t), FLOW.schedule.at(there)
    assert f.s == pytest.approx(c.s / (c.a + c.s), rel=1e-10)  # docs/methods/gpc.md#noise-levels
    assert scale == pytest.approx(1 / (c.a + c.s), rel=1e-10)
    assert f.half_logsnr == pytest.approx(c.half_logsnr, rel=1e-9, abs=1e-9)
    back, inverse = FLOW.matched(there, DIFFUSION.schedule)
    assert back == pytest.approx(t, abs=1e-9) and inverse * scale == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("k, ratio, u", [(95, 16.02, 0.9413), (50, 1.045, 0.5109), (0, 0.02513, 0.0245)])
def test_the_alignment_table(k: int, ratio: float, u: float) -> None:
    c = DIFFUSION.schedule.at((k + 1) / 100)
    assert c.s / c.a == pytest.approx(ratio, rel=1e-3)
    assert DIFFUSION.matched((k + 1) / 100, FLOW.schedule)[0] == pytest.approx(u, abs=1e-4)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_composition_commutes_with_the_prediction_type_for_convex_weights_only(t: float) -> None:
    first, second = gaussian(0.5, 0.3), gaussian(-0.4, 0.6)
    x = torch.randn(3, HORIZON, ACTIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    preds, c = (first(x, t), second(x, t)), DIFFUSION.schedule.at(t)
    mixed = compose([first, second], [0.3, 0.7])(x, t)
    for kind in KINDS:
        raw = 0.3 * preds[0].to(kind) + 0.7 * preds[1].to(kind)
        torch.testing.assert_close(to_x0_eps(raw, x, c, kind)[1], mixed.eps, rtol=0, atol=1e-6)
    eps, x0 = (0.6 * preds[0].to(k) + 0.9 * preds[1].to(k) for k in (Prediction.EPS, Prediction.X0))
    assert float(((x - c.s * eps) / c.a - x0).abs().max()) > 1e-3


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.4, 0.6), (1.0, 0.0)])
def test_one_gaussian_as_diffusion_and_as_flow(weights: tuple[float, float]) -> None:
    law, same = gaussian(0.5, 0.3), gaussian(0.5, 0.3, FLOW)
    parents = [parent(0.5, 0.3), parent(0.5, 0.3, FLOW)]
    x = torch.randn(3, HORIZON, ACTIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in level_times(20)[:-1]:
        found = compose_prediction(parents, weights, x, t, [None, None])
        torch.testing.assert_close(found.eps, law(x, t).eps, rtol=0, atol=1e-7)
        torch.testing.assert_close(retime(same, DIFFUSION)(x, t).eps, law(x, t).eps, rtol=0, atol=1e-7)


@pytest.mark.parametrize("time_at_noise, sign", [(1.0, 1), (0.0, -1), (1.0, -1), (0.0, 1)])
def test_declared_flow_conventions_are_undone(time_at_noise: float, sign: int) -> None:
    law = gaussian(0.5, 0.3, FLOW)

    def network(x, time, cond):
        t = float(time[0]) if time_at_noise == 1.0 else 1 - float(time[0])
        return sign * law(x, t).velocity

    model = velocity_model(network, time_at_noise=time_at_noise, velocity_sign=sign)
    x = torch.randn(2, HORIZON, ACTIONS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x, 0.375).x0, law(x, 0.375).x0, rtol=1e-5, atol=1e-6)
    wrong = velocity_model(network, time_at_noise=time_at_noise, velocity_sign=-sign)
    assert float((wrong(x, 0.375).x0 - law(x, 0.375).x0).abs().max()) > 0.1


def test_a_noise_network_gets_the_index_of_its_level() -> None:
    asked = []

    def network(x, index, cond):
        asked.append(float(index[0]))
        return gaussian(0.5, 0.3)(x, (float(index[0]) + 1) / 100).eps

    model = noise_model(network, schedule=squaredcos(100), prediction="epsilon")
    policy = ForeignPolicy(SPEC, model, sampler=ChunkSampler(5, "ddim"))
    chunk(policy)
    assert asked == pytest.approx([80, 60, 40, 20, 0], abs=1e-4)
    asked.clear()
    chunk(ForeignPolicy(SPEC, model, sampler=ChunkSampler(100, "ddim")))
    assert asked == pytest.approx(list(range(99, -1, -1)), abs=1e-3)


# ---- 6, 7: the sampled law -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [DIFFUSION, FLOW], ids=["diffusion", "diffusion + flow"])
def test_the_law_of_gaussian_parents_is_the_closed_form(second: GaussianProcess) -> None:
    fine, times = GaussianProcess(squaredcos(1000)), level_times(1000)
    flow = second if second is FLOW else fine
    equal = compose([mixture([-1.0], [0.5], [1.0], fine), mixture([1.0], [0.5], [1.0], flow)], [0.3, 0.7])
    mean, sd = sampled_law(equal, times, 0.0)
    assert mean == pytest.approx(0.4, abs=1e-3) and sd == pytest.approx(0.5, abs=2e-3)
    unequal = compose([mixture([-1.0], [0.5], [1.0], fine), mixture([1.0], [1.0], [1.0], flow)], [0.5, 0.5])
    mean, sd = sampled_law(unequal, times, 0.0)
    assert mean == pytest.approx(-0.2259, abs=1e-3) and sd == pytest.approx(0.7071, abs=1.1e-3)
    mean, sd = sampled_law(unequal, times, 1.0)
    assert mean == pytest.approx(-0.3333, abs=2e-3) and sd == pytest.approx(0.6797, abs=2.5e-3)


def test_the_limits_of_the_table() -> None:
    assert limit_law((-1, 1), (0.5, 1.0), (0.5, 0.5), 0.0) == pytest.approx((-0.2259, 0.7071), abs=1e-4)
    assert limit_law((-1, 1), (0.5, 1.0), (0.5, 0.5), 1.0) == pytest.approx((-0.3333, 0.6797), abs=1e-4)
    assert limit_law((-1, 1), (0.5, 0.5), (1.0, 1.0), 1.0)[1] == pytest.approx(0.2887, abs=1e-4)


def test_part_a_of_the_benchmark() -> None:
    result = part_a(levels=1000, count=2000)
    failed = [check for check in result["checks"] if not check.holds]
    assert failed == []
    found = dict(result["finite"])
    assert found["10"] == pytest.approx(0.428, abs=1e-3) and found["100"] == pytest.approx(0.492, abs=1e-3)
