"""Checks of what a reward returned, adapters between items and sets, weighted sums, loading by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gencontrol.errors import EnvironmentMissing, RewardError, UsageError
from gencontrol.jobs.setup.checks import check_medium
from gencontrol.registry import REWARDS, find
from gencontrol.rewards import InfluenceAsItem, ItemAsSet, compose_rewards, load_reward, load_rewards, require_valid
from gencontrol.rewards.base import Reward, SetReward, checked
from gencontrol.rewards.compose import WeightedItems, WeightedSets, weighted
from gencontrol.rewards.distribution import VendiReward, metric_name, vendi_score
from gencontrol.rewards.loading import UserItemReward, parse_spec
from gencontrol.rewards.sets.states import VendiState
from gencontrol.types import RewardContext, RewardOut

NONE = RewardContext()


class First:
    """Item reward: first coordinate; NaN stays NaN."""

    name, kind, differentiable = "first", "item", True

    def __call__(self, samples, context):
        return checked(self.name, samples[:, 0], len(samples))


class Sum:
    """Item reward: sum of coordinates; refuses negative ones."""

    name, kind, differentiable = "sum", "item", False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, samples, context):
        return checked(self.name, self.scale * samples.sum(1), len(samples), samples[:, 0] >= 0)


class Spread:
    """Set reward: Vendi score of the samples themselves."""

    name, kind, differentiable = "spread", "set", False

    def __call__(self, samples, context):
        features = self.features(samples, context)
        return RewardOut(torch.full((len(samples),), self.evaluate(features)), features["valid"])

    def features(self, samples, context):
        return {"rows": samples, "valid": torch.isfinite(samples).all(1)}

    def evaluate(self, features):
        return vendi_score(features["rows"][features["valid"]])

    def state(self, pool, chosen):
        return VendiState(pool["rows"], pool["valid"], chosen)


def plain_function(samples, context):
    return [None if row[0] < 0 else float(row[0]) for row in samples]


def broken(samples, context):
    raise KeyError("no such thing")


def short(samples, context):
    return [1.0]


A_NUMBER = 3

SAMPLES = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.5, 4.0], [2.0, 2.0]])


def test_output_becomes_float32_with_invalid_items_as_nan() -> None:
    out = checked("r", [1, float("nan"), None, float("inf")], 4)
    assert out.values.dtype == torch.float32 and out.values[0] == 1
    assert out.valid.tolist() == [True, False, False, False]
    assert out.values[1:].isnan().all()  # never 0
    assert out.mean() == 1.0 and out.valid_fraction() == 0.25
    assert checked("r", torch.ones(2, 1, dtype=torch.float64), 2).values.shape == (2,)


@pytest.mark.parametrize("bad", [[1.0], torch.ones(3), torch.ones(2, 2), ["a", "b"], 1.0, torch.ones(2).cfloat()])
def test_output_of_another_form_is_refused_by_name(bad) -> None:
    with pytest.raises(RewardError, match="'mine'"):
        checked("mine", bad, 2)


def test_a_reward_output_keeps_its_own_mask_and_extras() -> None:
    given = RewardOut(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]), {"a": 1})
    out = checked("r", given, 3, torch.tensor([True, False, True]))
    assert out.valid.tolist() == [True, False, False] and out.extras == {"a": 1}
    with pytest.raises(RewardError, match="mask"):
        checked("r", torch.ones(3), 3, torch.ones(2, dtype=torch.bool))


def test_gradient_passes_the_check() -> None:
    samples = SAMPLES.clone().requires_grad_()
    out = checked("r", torch.cat([samples[:3, 0], torch.tensor([float("nan")])]), 4)
    out.values[out.valid].sum().backward()
    assert samples.grad is not None and samples.grad[:, 0].tolist() == [1, 1, 1, 0]


def test_too_few_valid_items_stop_the_run() -> None:
    out = checked("r", [1.0, None, 1.0, 1.0], 4)
    assert require_valid(out, "r", min_valid=0.75) is out
    with pytest.raises(RewardError, match="3 of 4"):
        require_valid(out, "r")


def test_item_as_set_is_the_mean_and_its_state_is_exact() -> None:
    reward = ItemAsSet(First())
    assert isinstance(reward, SetReward) and reward.kind == "set"
    features = reward.features(SAMPLES, NONE)
    assert reward.evaluate(features) == pytest.approx(1.625)
    state = reward.state(features, torch.tensor([0, 1]))
    assert state.value() == 2.0 and state.propose(0, 3) == 2.5 and state.value() == 2.0
    state.swap(0, 3)
    assert state.value() == 2.5
    assert state.influence().tolist() == [2.5 - 3.0, 2.5 - 2.0]  # R(S) − R(S without it)
    assert reward(SAMPLES, NONE).extras["set_value"] == pytest.approx(1.625)


def test_item_as_set_keeps_invalid_items_out() -> None:
    samples = SAMPLES.clone()
    samples[2] = float("nan")
    reward = ItemAsSet(First())
    features = reward.features(samples, NONE)
    assert reward.evaluate(features) == pytest.approx(2.0)
    state = reward.state(features, torch.tensor([0, 1]))
    assert state.propose(0, 2) == -math.inf
    with pytest.raises(RewardError):
        state.swap(0, 2)
    with pytest.raises(RewardError):
        reward.state(features, torch.tensor([0, 2]))


def test_influence_as_item_is_leave_one_out_of_the_valid_batch() -> None:
    samples = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    samples[4] = float("nan")
    out = InfluenceAsItem(Spread())(samples, NONE)
    good = [0, 1, 2, 3, 5]
    whole = vendi_score(samples[good])
    assert out.valid.tolist() == [True] * 4 + [False, True] and out.values[4].isnan()
    for i in good:
        rest = [j for j in good if j != i]
        assert float(out.values[i]) == pytest.approx(whole - vendi_score(samples[rest]), abs=1e-6)  # float32 output


def test_influence_of_an_item_reward_ranks_like_the_reward() -> None:
    out = InfluenceAsItem(ItemAsSet(First()))(SAMPLES, NONE)
    assert torch.equal(out.values.argsort(), SAMPLES[:, 0].argsort())


def test_weighted_items_add_up_and_share_their_masks() -> None:
    samples = torch.cat([SAMPLES, torch.tensor([[-1.0, 0.0]])])
    reward = compose_rewards([(First(), 0.7), (Sum(), -0.3)])
    assert isinstance(reward, WeightedItems) and reward.kind == "item" and not reward.differentiable
    out = reward(samples, NONE)
    torch.testing.assert_close(out.values[:4], 0.7 * SAMPLES[:, 0] - 0.3 * SAMPLES.sum(1))
    assert out.valid.tolist() == [True] * 4 + [False] and out.values[4].isnan()
    assert set(out.extras["parts"]) == {"first", "sum"} and reward.name == "0.7*first+-0.3*sum"


def test_an_item_that_any_part_refuses_is_invalid_in_the_sum() -> None:
    def refusing(samples, context):
        return RewardOut(samples[:, 0], torch.tensor([True, False, True, True]))  # with a finite value beside it

    refusing_reward = UserItemReward("refusing", refusing)
    unchecked = type("Unchecked", (First,), {"__call__": lambda self, samples, context: refusing(samples, context)})()
    for part in (refusing_reward, unchecked):
        out = weighted([(First(), 1.0), (part, 1.0)])(SAMPLES, NONE)
        assert out.valid.tolist() == [True, False, True, True] and out.values[1].isnan()


def test_a_sum_with_a_set_reward_is_a_set_reward() -> None:
    reward = weighted([(First(), 2.0), (Spread(), 0.5)])
    assert isinstance(reward, WeightedSets) and isinstance(reward, SetReward) and reward.kind == "set"
    features = reward.features(SAMPLES, NONE)

    def value(rows: list[int]) -> float:
        return float(2.0 * SAMPLES[rows, 0].mean() + 0.5 * vendi_score(SAMPLES[rows]))

    assert reward.evaluate(features) == pytest.approx(value([0, 1, 2, 3]))
    out = reward(SAMPLES, NONE)
    assert out.values.tolist() == pytest.approx([value([0, 1, 2, 3])] * 4)
    assert out.extras["set_size"] == 4 and metric_name(out, "x") == "x@4"
    state = reward.state(features, torch.tensor([0, 1, 2]))
    assert state.propose(1, 3) == pytest.approx(value([0, 3, 2]))
    state.swap(1, 3)
    assert state.value() == pytest.approx(value([0, 3, 2]))
    assert float(state.influence()[0]) == pytest.approx(value([0, 3, 2]) - value([3, 2]))


def test_a_negative_weight_does_not_turn_an_invalid_candidate_into_a_good_one() -> None:
    samples = SAMPLES.clone()
    samples[3] = float("nan")
    reward = weighted([(First(), -1.0), (Spread(), 1.0)])
    features = reward.features(samples, NONE)
    assert reward.state(features, torch.tensor([0, 1])).propose(0, 3) == -math.inf


def test_weights_that_mean_nothing_are_refused() -> None:
    for weight in (0.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="weight"):
            weighted([(First(), weight)])
    with pytest.raises(UsageError, match="no reward"):
        weighted([])
    single = First()
    assert weighted([(single, 1.0)]) is single


def test_specs_are_split_at_the_weight() -> None:
    assert parse_spec("clap:0.7") == ("clap", 0.7)
    assert parse_spec("clap") == ("clap", 1.0)
    assert parse_spec("pkg.mod:Name") == ("pkg.mod:Name", 1.0)
    assert parse_spec("pkg.mod:Name:-2") == ("pkg.mod:Name", -2.0)


def test_unknown_names_and_options_are_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'quality'"):
        load_reward("qualty")
    with pytest.raises(UsageError, match="cannot be imported"):
        load_reward("no.such:Thing")
    with pytest.raises(UsageError, match="no option 'colour'"):
        load_reward("quality", colour="red")
    with pytest.raises(UsageError, match="takes the option reference"):
        load_rewards(["quality"], reference="bundled")
    with pytest.raises(UsageError, match="list"):
        load_rewards("quality")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no name"):
        load_rewards([":0.5"])


def test_shared_options_reach_the_rewards_that_have_them() -> None:
    reward = load_rewards(["quality:0.5", "vendi:0.5"], encoder="mel", device="cpu")
    assert isinstance(reward, WeightedSets)
    vendi = reward.parts[1]
    assert isinstance(vendi, VendiReward) and vendi.encoder.name.startswith("mel")
    assert load_rewards(["quality"], device="cpu").name == "quality"


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """This file as an importable module of the user's."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return Path(__file__).stem


def test_user_code_is_loaded_and_checked(user_module: str) -> None:
    reward = load_reward(f"{user_module}:Sum", scale=2.0)
    assert reward(SAMPLES, NONE).values.tolist() == [6.0, 8.0, 9.0, 8.0]
    out = load_reward(f"{user_module}:plain_function")(-SAMPLES, NONE)
    assert not out.valid.any()
    spread = load_reward(f"{user_module}:Spread")
    assert isinstance(spread, SetReward) and not isinstance(spread, UserItemReward)
    features = spread.features(SAMPLES, NONE)
    assert spread.state(features, torch.tensor([0, 1])).value() == pytest.approx(vendi_score(SAMPLES[:2]))
    both = load_rewards([f"{user_module}:Sum:0.5", "quality"])
    assert isinstance(both, Reward) and both.kind == "item"


def test_failures_of_user_code_carry_its_name(user_module: str) -> None:
    with pytest.raises(RewardError, match=r"broken.*KeyError.*no such thing"):
        load_reward(f"{user_module}:broken")(SAMPLES, NONE)
    with pytest.raises(RewardError, match="short"):
        load_reward(f"{user_module}:short")(SAMPLES, NONE)
    with pytest.raises(UsageError, match="no class"):
        load_reward(f"{user_module}:plain_function", scale=1.0)
    with pytest.raises(UsageError, match="int"):
        load_reward(f"{user_module}:A_NUMBER")


def test_missing_bundled_files_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    monkeypatch.setattr("gencontrol.weights.BUNDLED", tmp_path / "bundled")
    from gencontrol.rewards.audio.clap_backend import bundled_clap

    with pytest.raises(EnvironmentMissing, match="reward_model"):
        bundled_clap()
    with pytest.raises(EnvironmentMissing, match="folder of sound"):
        load_reward("fad", encoder="mel")


def test_every_registered_reward_says_what_it_is() -> None:
    for name in REWARDS:
        found = find(REWARDS, name, "reward")
        assert found.title and found.medium in ("any", "audio", "image"), name
        assert found.paper == "" or found.paper.startswith("arXiv:"), name


def test_the_medium_that_user_code_declares_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heard.py").write_text(
        "class Silence:\n    medium = 'audio'\n\n\ndef plain(samples, context):\n    return [0.0] * len(samples)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    check_medium(["heard:Silence:0.5", "heard:plain", "clap"], "bundled", "audio")
    check_medium(["heard:plain", "http://127.0.0.1:1/x", "clip:2"], "bundled-image", "image")
    for spec in ("heard:Silence:0.5", "clap", "fad-set"):
        with pytest.raises(UsageError, match="does not score images"):
            check_medium([spec], "bundled-image", "image")
