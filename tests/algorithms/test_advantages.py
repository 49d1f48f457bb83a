"""Advantages inside prompt groups, and the anchor to the (guided) base."""

from __future__ import annotations

import pytest
import torch

from gencontrol.algorithms.online.base import anchor_penalty, reference_prediction
from gencontrol.algorithms.online.rollout import combined_advantages, group_advantages, zero_spread_share
from gencontrol.errors import UsageError
from gencontrol.models.roles import Roles
from gencontrol.rng import stream
from tests.helpers.dragon_worlds import PROMPTS, encode, make_task

VALUES = torch.randn(12, generator=stream(0, "test/advantages"), dtype=torch.float64)
ALL = torch.ones(12, dtype=torch.bool)


def test_invalid_items_enter_nothing() -> None:
    valid = ALL.clone()
    valid[[1, 6]] = False
    broken = VALUES.clone()
    broken[1], broken[6] = torch.nan, 1e9
    found = group_advantages(broken, valid, 4, spread="group")
    assert found[1] == 0 and found[6] == 0
    alone = group_advantages(VALUES[[0, 2, 3]], ALL[:3], 3, spread="group")
    torch.testing.assert_close(found[[0, 2, 3]], alone)


def test_extremes_are_clipped_and_equal_rewards_give_zero() -> None:
    spike = torch.zeros(64)
    spike[0] = 1.0
    assert group_advantages(spike, torch.ones(64, dtype=torch.bool), 64)[0] == 5.0
    assert torch.equal(group_advantages(torch.ones(8), ALL[:8], 4), torch.zeros(8))
    assert zero_spread_share(torch.tensor([1.0, 1.0, 0.0, 1.0]), ALL[:4], 2) == 0.5


def test_normalise_then_sum_is_deaf_to_units() -> None:
    """The unit of one reward (here ×1000) changes nothing but what the floor of 1e-4 lets through."""
    second = VALUES.flip(0)
    for rule in ("gdpo", "normalised-sum"):
        one = combined_advantages([(VALUES, 1.0), (second, 0.5)], ALL, 4, rule)
        other = combined_advantages([(1000 * VALUES, 1.0), (second, 0.5)], ALL, 4, rule)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["gdpo", "normalised-sum", "sum"])
def test_invalid_items_count_in_no_combination(rule: str) -> None:
    valid = ALL.clone()
    valid[[1, 6]] = False
    broken = VALUES.clone()
    broken[1], broken[6] = torch.nan, 1e9
    found = combined_advantages([(broken, 1.0), (VALUES.flip(0), 0.5)], valid, 4, rule)
    same = combined_advantages([(VALUES, 1.0), (VALUES.flip(0), 0.5)], valid, 4, rule)
    assert found[1] == found[6] == 0 and torch.equal(found, same)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 5"):
        group_advantages(VALUES, ALL, 5)


def test_guided_reference_is_u_plus_s_times_c_minus_u() -> None:
    from dataclasses import replace

    task = replace(make_task(), uncond=torch.zeros(1, len(PROMPTS)))
    roles = Roles(task.denoiser.network, ("policy", "ref"))
    with torch.no_grad():
        for parameter in roles.trainable():
            parameter.add_(0.3)
    xt, t, cond = torch.randn(4, 3, generator=stream(0, "x")), torch.full((4,), 0.4), encode(PROMPTS[:4])
    with roles.use("ref"), torch.no_grad():
        given, free = task.denoiser(xt, t, cond).velocity, task.denoiser(xt, t, torch.zeros(4, len(PROMPTS))).velocity
    found = reference_prediction(task, roles, xt, t, cond, 4.5).velocity
    torch.testing.assert_close(found, free + 4.5 * (given - free))
    assert not found.requires_grad
    torch.testing.assert_close(reference_prediction(task, roles, xt, t, cond, 1.0).velocity, given)
    task_without = replace(task, uncond=None)
    reference_prediction(task_without, roles, xt, t, cond, 1.0)  # no unconditional pass at scale 1
    with pytest.raises(UsageError, match="unconditional"):
        reference_prediction(task_without, roles, xt, t, cond, 4.5)


def test_penalty_is_the_mean_square_and_flat_at_the_reference() -> None:
    v = torch.randn(2, 3, 5, requires_grad=True)
    penalty = anchor_penalty(v, v.detach() - 2.0)
    torch.testing.assert_close(penalty, torch.full((2,), 4.0))
    (gradient,) = torch.autograd.grad(anchor_penalty(v, v.detach()).sum(), v)
    assert torch.equal(gradient, torch.zeros_like(v))
