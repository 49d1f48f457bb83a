"""Composition of the trained kinds of policies, and the weight search over a real environment loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.robotics.compose import ComposedPolicy, fit_weights
from gencontrol.robotics.evaluate import evaluate
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.robotics.policies.diffusion import squaredcos
from gencontrol.robotics.policies.foreign import ForeignPolicy, noise_model
from tests.helpers.composition_parents import noise
from tests.helpers.policy_cases import history, small_policy

POINT = "tests.helpers.toy_envs:point"


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("backbone", ["unet", "mlp"])
def test_weight_one_is_the_policy_bit_for_bit(kind: str, backbone: str) -> None:
    policy = small_policy(kind, backbone, image=backbone == "unet")
    other = small_policy("flow" if kind == "diffusion" else "diffusion", "mlp")
    composed = ComposedPolicy([other, policy], [0.0, 1.0])
    seen = history(policy)
    assert torch.equal(composed.sample_chunk(seen, noise(3)), policy.sample_chunk(seen, noise(3)))


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_two_copies_are_the_policy(kind: str) -> None:
    """The composition steps through the general sampler, the policy through the fast one: equal to rounding."""
    policy = small_policy(kind, "unet")
    composed = ComposedPolicy([policy, small_policy(kind, "unet")], [0.4, 0.6])
    seen = history(policy)
    found, expected = composed.sample_chunk(seen, noise(3)), policy.sample_chunk(seen, noise(3))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_diffusion_and_flow_with_another_observation_each() -> None:
    diffusion, flow = small_policy("diffusion", "unet", image=True), small_policy("flow", "mlp")
    composed = ComposedPolicy({"dp": diffusion, "flow": flow}, [0.5, 0.5])
    assert composed.reference == 0 and set(composed.spec.observations) == {"state", "eye"}
    seen = history(diffusion)
    found = composed.sample_chunk(seen, noise(3))
    assert bool(torch.isfinite(found).all())
    assert float(found.min()) >= -1.0 and float(found.max()) <= 3.0  # the limits of the data hold for the mix too
    ends = [policy.sample_chunk(composed.part(i, seen), noise(3)) for i, policy in enumerate(composed.parents)]
    assert all(float((found - end).abs().max()) > 1e-2 for end in ends)
    swapped = ComposedPolicy({"flow": flow, "dp": diffusion}, [0.5, 0.5]).sample_chunk(seen, noise(3))
    torch.testing.assert_close(swapped, found, rtol=0, atol=1e-5)


def test_policies_of_other_normalisers_are_refused() -> None:
    policy, other = small_policy("diffusion", "mlp"), small_policy("flow", "mlp")
    other.action_normalizer = Normalizer(torch.ones(3), torch.full((3,), 2.5))
    with pytest.raises(UsageError, match="differ in scale"):
        ComposedPolicy([policy, other], [0.5, 0.5])


def steering(gain: float) -> ForeignPolicy:
    """A diffusion policy that predicts the clean action gain·place, as a network of the noisy chunk would."""

    def network(x: torch.Tensor, index: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return (gain * place)[:, None].expand_as(x)

    spec = PolicySpec({"place": (2,)}, 2, horizon=2, n_obs=1, n_action=1)
    model = noise_model(network, schedule=squaredcos(100), prediction="sample")
    sampler = ChunkSampler(4, "ddim", clip=1.0)
    return ForeignPolicy(
        spec, model, sampler=sampler, encoder=lambda seen: torch.as_tensor(seen["place"][:, -1]).float()
    )


def test_weights_are_fitted_in_an_environment() -> None:
    """Gains of −7 and +1: alone the first overshoots and the second flees; half and half is −3, which settles."""
    composed = ComposedPolicy({"overshoots": steering(-7.0), "flees": steering(1.0)}, [1.0, 0.0])
    inline = {"isolation": "inline", "rows_at_once": 0}
    fit = fit_weights(
        composed,
        POINT,
        validation_seeds=range(6),
        test_seeds=range(100, 106),
        method="grid",
        step=0.5,
        num_envs=4,
        evaluation=inline,
    )
    assert fit.best == (0.5, 0.5) and fit.rate.value == 1.0
    report = evaluate(composed.with_weights(fit.best), POINT, seeds=range(100, 106), isolation="inline")
    assert [episode.success for episode in report.episodes] == list(fit.test["composed"])
    assert sum(fit.test["flees"]) < 3


def test_an_episode_that_cannot_be_run_ends_the_search() -> None:
    composed = ComposedPolicy([steering(-2.0), steering(1.0)], [1.0, 0.0])
    with pytest.raises(UsageError, match="seed 1 of .* could not be run"):
        fit_weights(
            composed,
            POINT,
            validation_seeds=range(3),
            test_seeds=[9],
            step=1.0,
            evaluation={"isolation": "inline", "env_kwargs": {"trouble": "reset"}},
        )


def test_an_evaluation_does_not_depend_on_the_number_of_environments() -> None:
    composed = ComposedPolicy([steering(-3.0), steering(-1.0)], [0.5, 0.5], operator="or")
    outcomes = [
        [
            (episode.success, episode.length, episode.total_reward)
            for episode in evaluate(composed, POINT, seeds=range(6), num_envs=envs, isolation="inline").episodes
        ]
        for envs in (1, 3)
    ]
    assert outcomes[0] == outcomes[1] and np.isfinite([row[2] for row in outcomes[0]]).all()
