"""`bench dts`: its measures against closed forms and brute force, and every part end to end at its smallest."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from gencontrol.bench.dts import chain as dts_chain
from gencontrol.bench.dts import digits as dts_digits
from gencontrol.bench.dts import main as dts
from gencontrol.bench.dts import measure as dts_measure
from gencontrol.bench.dts import mixture as dts_mixture
from gencontrol.bench.dts import sound as dts_sound
from gencontrol.bench.dts import tokens as dts_tokens
from gencontrol.bench.dts.measure import Law, Peer
from gencontrol.errors import UsageError
from gencontrol.models.exact import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rng import stream
from gencontrol.sampling.chain import make_chain
from gencontrol.types import RewardContext, RewardOut


def uniform_law(x: torch.Tensor) -> Law:
    return Law.of(x, torch.zeros(len(x)))


# ---- measures -----------------------------------------------------------------------------------------------------


def test_mmd2_of_two_points_is_the_formula() -> None:
    """Law: a at 3/4, b at 1/4; reference: the points c, d; every kernel written out."""
    law = Law.of(torch.tensor([[0.0], [1.0]]), torch.tensor([3.0, 1.0], dtype=torch.float64).log())
    reference = uniform_law(torch.tensor([[0.0], [2.0]]))

    def k(gap: float) -> float:
        return (math.exp(-(gap**2) / 2) + math.exp(-(gap**2) / 8)) / 2

    own = (9 / 16 + 1 / 16) * 1.0 + 2 * 3 / 16 * k(1)
    across = (3 / 4) * (k(0) + k(2)) / 2 + (1 / 4) * (k(1) + k(1)) / 2
    expected = own - 2 * across + k(2)  # the reference's pairs of different points: only (c, d)
    assert dts_measure.sample_mmd2(law, reference, (1.0, 2.0)) == pytest.approx(expected, rel=1e-12)


def test_mmd2_from_draws_is_unbiased_for_equal_laws() -> None:
    """Reference and law from one Gaussian: the mean over 200 pairs is that of the law's own diagonal, (1 - E k)/n.

    The tolerance is four standard errors of the mean.
    """
    generator = stream(0, "test/mmd")
    values, excess = [], []
    for _ in range(200):
        x, y = (torch.randn(30, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        values.append(dts_measure.sample_mmd2(uniform_law(x), uniform_law(y), (1.0,)))
        pairs = torch.exp(-torch.cdist(x, x).square() / 2)
        excess.append((1 - float(pairs.sum() - 30) / (30 * 29)) / 30)
    gap = np.array(values) - np.array(excess)
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))


def test_closed_form_to_a_mixture_agrees_with_many_draws() -> None:
    base = dts_mixture.base_mixture()
    target = base.tilt(torch.tensor([0.5, 0.2]), 0.1 * torch.eye(2))
    law = Law.of(base.sample(50, stream(1, "test/law")), torch.randn(50, generator=stream(2, "test/law")))
    draws = uniform_law(target.sample(4000, stream(3, "test/draws")))
    exact = dts_measure.mixture_mmd2(law, target, (0.5, 2.0))
    # 0.006: four standard deviations of the estimate at 4000 draws, measured over seeds
    assert dts_measure.sample_mmd2(law, draws, (0.5, 2.0)) == pytest.approx(exact, abs=0.006)


def test_closed_form_vanishes_for_draws_of_the_target() -> None:
    base = dts_mixture.base_mixture()
    found = dts_measure.mixture_mmd2(uniform_law(base.sample(4000, stream(4, "test/draws"))), base, (0.5, 2.0))
    assert 0 <= found < 1e-3  # (1 - E k)/4000 is 2e-4; a law without one mode has 0.01
    without = base.sample(4000, stream(5, "test/draws"), torch.arange(4000) % 7)
    assert dts_measure.mixture_mmd2(uniform_law(without), base, (0.5, 2.0)) > 5e-3


# ---- worlds -------------------------------------------------------------------------------------------------------


def test_chain_normaliser_is_the_sum_over_all_paths() -> None:
    chain = dts_chain.MarkovChain.random(states=3, steps=3, seed=5)
    rewards = (0.3, -1.0, 2.0)
    law = np.zeros(3)
    for path in itertools.product(range(3), repeat=4):
        p = float(chain.start[path[0]])
        for i in range(3):
            p *= float(chain.kernels[i, path[i], path[i + 1]])
        law[path[-1]] += p * math.exp(rewards[path[-1]])
    tilted, z = chain.tilted(rewards)
    assert z == pytest.approx(law.sum(), rel=1e-12)
    np.testing.assert_allclose(tilted.numpy(), law / law.sum(), rtol=1e-12)


def test_sampled_chain_has_the_exact_law() -> None:
    chain = dts_chain.MarkovChain.random()
    walk = make_chain(chain, (1,), steps=4, step=dts_chain.Draw())
    keys = torch.arange(4000) * 7919 + 13
    x = walk.advance(walk.prior(keys), torch.zeros(4000, dtype=torch.int64), keys, (0, 4)).x
    # 0.03: above three standard deviations of any of four shares at 4000 draws
    shares = torch.bincount(x[:, 0], minlength=4) / 4000
    torch.testing.assert_close(shares.double(), chain.law(), atol=0.03, rtol=0)


def test_full_trees_have_every_node_once() -> None:
    tree = dts_chain.fill_chain(dts_chain.MarkovChain.random(), trees=3, children=2, seed=1)
    assert [len(tree.nodes.at_level(level)) for level in range(5)] == [3, 6, 12, 24, 48]
    leaves = tree.nodes["value"][tree.nodes.at_level(4)]
    roots = tree.nodes.root_of(tree.nodes.at_level(4))
    for root in range(3):
        assert np.exp(tree.nodes["value"][root]) == pytest.approx(np.exp(leaves[roots == root]).mean())


def test_targets_of_the_mixture_are_the_tilted_laws() -> None:
    """log p(x) + r(x) − log Z = log of the stated law, at points near the modes; and log Z agrees with sampling."""
    base = dts_mixture.base_mixture()
    x = base.sample(100_000, stream(6, "test/target"))
    for target in dts_mixture.targets(base):
        found = base.log_prob(x[:50]) + target.reward(x[:50]) - target.log_z
        torch.testing.assert_close(found, target.law.log_prob(x[:50]), atol=1e-6, rtol=1e-9)


def test_pair_rewards_are_sums_of_neighbours() -> None:
    rewards = dts_tokens.pair_rewards(3, 3, 0)
    mixed = rewards[0, 0, 0] + rewards[1, 0, 1] - rewards[1, 0, 0] - rewards[0, 0, 1]
    assert abs(float(mixed)) < 1e-12  # first and last position do not meet
    assert rewards.std() > 0.5


def test_growth_stops_at_the_budget_and_on_demand() -> None:
    base = dts_mixture.base_mixture()
    tree = dts_measure.DiffusionTree(base, lambda x: x[:, 0], (2, 2), steps=10, leaf_batch=3, generator=0)
    dts_measure.grow(tree, 100)
    assert (tree.counts["nfe"] <= 100).all() and (tree.counts["nfe"] > 90).all()
    rounds = tree.rounds
    dts_measure.grow(tree, 1000, lambda: True)
    assert tree.rounds == rounds + 1


def test_peers_spend_the_budget() -> None:
    base = dts_mixture.base_mixture()
    chain = make_chain(base, (2,), steps=10)
    for peer in (*dts_mixture.PEERS, Peer("best-of-N", "best-of-n", {})):
        assert peer.run(chain, lambda x: x[:, 0], 105, temperature=1.0, seed=0).nfe == 100


def test_climb_reports_what_fits_into_a_budget() -> None:
    climb = dts_digits.Climb([30, 60, 90], [[1.0, 3.0], [2.0, 3.0], [4.0, 6.0]])
    assert climb.reaches(2.5) == 60 and climb.reaches(5.1) == math.inf
    assert climb.last().value == 5.0


# ---- parts --------------------------------------------------------------------------------------------------------


class Brightness:
    """Stand-in for the digit classifier: log sigmoid of ± the mean pixel, by the parity of the prompt's digit."""

    name, kind, differentiable = "brightness", "item", True

    def __call__(self, samples: torch.Tensor, context: RewardContext) -> RewardOut:
        assert context.prompts is not None
        sign = torch.tensor([1.0 - 2 * (int(prompt) % 2) for prompt in context.prompts])
        values = torch.nn.functional.logsigmoid(8 * sign * samples.flatten(1).mean(1))
        return RewardOut(values, torch.ones(len(samples), dtype=torch.bool))


def small_world() -> dts_digits.World:
    means = torch.stack([torch.full((64,), -0.5), torch.full((64,), 0.5)])
    covariances = 0.01 * torch.eye(64).expand(2, 64, 64)
    model = GaussianMixture(means, covariances, torch.ones(2), GaussianProcess(Linear()))
    template = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    return dts_digits.World(model, lambda x: x, Brightness(), template)


def test_digit_rewards() -> None:
    world = small_world()
    rewards = dts_digits.rewards_of(world)
    x = torch.stack([3 * world.template + 5, -world.template])
    torch.testing.assert_close(rewards["template"](x), torch.tensor([12.0, -12.0]))
    torch.testing.assert_close(rewards["ink"](x)[0], torch.tensor(0.15 * 64 * 5.0))


def test_parts_on_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dts_digits.World, "bundled", classmethod(lambda cls: small_world()))
    assert dts.main(dts.Options(quick=True, parts="digits,maximum", output=str(tmp_path))) == 0
    printed = capsys.readouterr().out
    assert "E-DTS-3" in printed and "E-DTS-4" in printed and "reaches best-of-N" in printed
    rows = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert set(rows) == {*dts_measure.TREE_ROWS, *(peer.label for peer in dts_digits.PEERS)}
    picture = ElementTree.parse(tmp_path / "maximum.svg").getroot()
    assert any(node.tag.endswith("polyline") for node in picture.iter()), "curves are drawn"


@pytest.mark.parametrize("part", ["chain", "mixture", "tokens", "throughput"])
def test_part(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dts_mixture, "STEPS", 10)
    assert dts.main(dts.Options(quick=True, parts=part, output=str(tmp_path))) == 0
    result = json.loads((tmp_path / f"{part}.json").read_text())
    assert all(check["claim"] in (tmp_path / f"{part}.md").read_text() for check in result["checks"])
    assert "measured" in capsys.readouterr().out


class SmallPipe:
    """A pipeline's surface over a mixture: the "sound" is the latent."""

    device, sampling_rate, latent_shape = torch.device("cpu"), 16_000, (2,)

    def __init__(self) -> None:
        self.denoiser = dts_mixture.base_mixture()

    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Factors on the modes: a prompt excludes none."""
        return torch.ones(len(prompts), 8)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_sound_on_a_small_model() -> None:
    def reward(samples: torch.Tensor, context: RewardContext) -> torch.Tensor:
        assert context.prompts is not None and len(context.prompts) == len(samples)
        return samples[:, 0] * torch.tensor([float(prompt) for prompt in context.prompts])

    budget = dts_sound.SoundBudget(nfe=400, steps=10)
    said: list[str] = []
    found = dts_sound.run(dts_sound.SoundSearch(SmallPipe(), reward, ["1", "-1", "2"], budget), seed=0, say=said.append)
    assert found["nfe"] == 400 and len(found["rows"]["DTS*"]) == 3
    assert found["reward_calls"]["best-of-N"] == 120 < found["reward_calls"]["DTS*"]
    gain = [a - b for a, b in zip(found["rows"]["DTS*"], found["rows"]["best-of-N"], strict=True)]
    assert found["difference"].value == pytest.approx(np.mean(gain))
    assert found["checks"][0].holds == (found["difference"].low > 0)
    short = dataclasses.replace(budget, minutes=1e-9)
    tiny = dts_sound.run(dts_sound.SoundSearch(SmallPipe(), reward, ["1", "2"], short), seed=0, say=said.append)
    assert tiny["nfe"] == 10  # one path at least


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown part 'mixtur'. Did you mean"):
        dts.main(dts.Options(parts="mixtur"))
    with pytest.raises(ValueError, match="seeds = 1; expected at least 2"):
        dts.Options(seeds=1)


def test_checks_say_what_was_measured() -> None:
    """A claim that fails is printed as such: SMC better than the tree."""
    rows = {
        name: {
            label: dts_mixture.Found({10: [value, value]}, {10: [0.0, 0.0]})
            for label, value in (
                *((label, 0.5) for label in dts_measure.TREE_ROWS),
                *((peer.label, 0.1) for peer in dts_mixture.PEERS),
            )
        }
        for name in ("resp", "sharp", "tail")
    }
    checks = dts_mixture._checks(rows, [10])
    assert [check.holds for check in checks[:3]] == [False, False, False]
    for row in rows.values():
        for label in dts_measure.TREE_ROWS:
            row[label].mmd2[10] = [0.03, 0.03]
    assert [check.holds for check in dts_mixture._checks(rows, [10])[:3]] == [True, True, True]


def test_chain_checks_reject_a_bias() -> None:
    estimate = SimpleNamespace(value=0.5, low=0.4, high=0.6)
    row = dts_chain.Exactness(estimate, estimate, (-9.0, -9.0), 0.2, 0.2)  # type: ignore[arg-type]
    names = ["fixed branching, 2 children", "uniform, paper, M = 5", "uniform, small, M = 5", "boltzmann, paper, M = 5"]
    assert [check.holds for check in dts_chain._checks(dict.fromkeys(names, row), [5])] == [False] * 5 + [True]
