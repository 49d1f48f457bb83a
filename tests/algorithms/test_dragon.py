"""DRAGON as a whole: the Trainer's contract, streams, invalid rewards, calibration, evaluation, fixed points."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.matching.dragon import Dragon, DragonConfig
from gencontrol.algorithms.online.compare import examples
from gencontrol.algorithms.online.rollout import prompts_of_step
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.errors import NumericsError, RewardError, UsageError
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.dragon_worlds import PROMPTS, FirstAxis, Share, TwoAtoms, make_dragon, make_task, two_atoms

CTX = StepContext(seed=0, step=0, micro_batch=1000)


class TestContractKto(AlgorithmContract):
    """Calibrated KTO with a reward of items, per-round reference."""

    # 1e-4: the sets come from samples that differ by float32 rounding between batch sizes
    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Dragon:
        return make_dragon(ema_decay=0.9)


class TestContractSetReward(AlgorithmContract):
    """DPO with a set reward, frozen reference, pull to the base, a part of the pairs per update."""

    accumulation_tolerance: ClassVar[float] = 1e-4

    def make(self) -> Dragon:
        return make_dragon(
            Share(), loss="dpo", reference="frozen", kl_coef=0.1, pairs_per_update=4, updates_per_round=3
        )


def weights(dragon: Dragon) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in dragon.roles.trainable()])


def test_seeded_rerun_is_bit_identical_and_another_seed_is_not(fenced_rng: None) -> None:
    runs = []
    for seed in (0, 0, 1):
        dragon = make_dragon(seed=seed)
        run_in_memory(dragon, 2, Loop(1e-2), seed=seed)
        runs.append(weights(dragon))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_samples_do_not_depend_on_micro_batches_and_differ_by_step() -> None:
    """Row i is a function of (seed, step, i); 1e-5 is float32 rounding of other batch shapes."""
    pools = [make_dragon().draw(replace(CTX, micro_batch=m))[0].latents for m in (1000, 5, 1)]
    for other in pools[1:]:
        torch.testing.assert_close(pools[0], other, atol=1e-5, rtol=0)
    later = make_dragon().draw(replace(CTX, step=1))[0].latents
    assert (later - pools[0]).abs().amax(1).min() > 1e-3
    assert (pools[0][0::2] - pools[0][1::2]).abs().amax(1).min() > 1e-3, "generations of a prompt must differ"


def test_every_prompt_is_seen_equally_often() -> None:
    """Seven steps of three prompts are three epochs of seven, each epoch in its own order."""
    drawn = [p for step in range(7) for p in prompts_of_step(PROMPTS, 3, 0, "test/prompts", step)]
    epochs = [drawn[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs) and epochs[0] != epochs[1]
    with pytest.raises(UsageError, match="empty"):
        prompts_of_step([], 3, 0, "test/prompts", 0)


def test_winners_have_the_larger_reward_and_the_same_condition() -> None:
    data = make_dragon().collect(CTX).data
    assert (data.positive[:, 0] > data.negative[:, 0]).all()
    expected = [PROMPTS.index(p) for p in prompts_of_step(PROMPTS, 6, 0, "dragon/prompts", 0)]
    assert data.cond.argmax(1).tolist() == expected


def test_invalid_rewards_are_redrawn_once_with_other_noise_then_stop() -> None:
    fine = make_dragon(FirstAxis()).collect(CTX)
    again = make_dragon(FirstAxis(broken=1)).collect(CTX)
    assert again.metrics["rollout/redrawn"] == 1.0 and fine.metrics["rollout/redrawn"] == 0.0
    assert not torch.equal(fine.data.positive, again.data.positive)
    with pytest.raises(RewardError, match="twice"):
        make_dragon(FirstAxis(broken=2)).collect(CTX)


def test_pairs_with_an_invalid_member_are_dropped() -> None:
    class OneBroken(FirstAxis):
        def __call__(self, samples: torch.Tensor, context: RewardContext) -> RewardOut:
            valid = torch.arange(len(samples)) != 3
            return RewardOut(torch.where(valid, samples[:, 0], torch.nan), valid)

    collected = make_dragon(OneBroken()).collect(CTX)
    assert len(collected.data.positive) == 5 and collected.metrics["sets/invalid"] == 1
    assert collected.metrics["reward/valid_fraction"] == pytest.approx(11 / 12)
    assert math.isfinite(collected.metrics["reward/mean"])


def test_no_pairs_means_no_updates() -> None:
    """A constant reward ties every pair: the step trains nothing and moves nothing."""

    class Constant(FirstAxis):
        def __call__(self, samples: torch.Tensor, context: RewardContext) -> RewardOut:
            return RewardOut(torch.ones(len(samples)), torch.ones(len(samples), dtype=torch.bool))

    dragon = make_dragon(Constant())
    before = weights(dragon)
    records = run_in_memory(dragon, 2, Loop(1e-2), seed=0)
    assert records[0]["sets/ties"] == 6 and torch.equal(before, weights(dragon))


def test_automatic_beta_makes_the_spread_one() -> None:
    """Fixed at the first update where θ has moved to 1/std(g) over the whole batch; then it stays."""
    dragon = make_dragon(updates_per_round=3)
    collected = dragon.collect(CTX)
    betas = []
    for update in range(3):
        micros = list(dragon.minibatches(collected.data, update, replace(CTX, micro_batch=4)))
        betas.append(micros[0].beta)
        spread = dragon._spread(micros, CTX)
        if update == 0:
            assert spread.std == pytest.approx(0.0, abs=1e-6) and betas[0] == 1.0
            assert dragon.state_dict()["beta"] is None
        if update == 1:
            assert 1e-3 < spread.std / spread.scale < 1e-1, "outside, the clamp would be what is tested"
            assert betas[1] * spread.std == pytest.approx(1.0, rel=1e-4)
        with torch.no_grad():
            for parameter in dragon.roles.trainable():
                parameter *= 0.97
    assert dragon.state_dict()["beta"] == betas[1] == betas[2]
    (micro,) = dragon.minibatches(dragon.collect(replace(CTX, step=1)).data, 0, CTX)
    assert micro.beta == betas[1]


@pytest.mark.parametrize(("factor", "product"), [(1 - 1e-4, 1000.0), (3.0, 10.0)])
def test_automatic_beta_is_bounded(factor: float, product: float) -> None:
    """A first step that hardly moves θ, or moves it wildly, gives β·ℓ_ref at the ends of the believed range."""
    dragon = make_dragon()
    data = dragon.collect(CTX).data
    with torch.no_grad():
        for parameter in dragon.roles.trainable():
            parameter *= factor
    micros = list(dragon.minibatches(data, 1, CTX))
    assert micros[0].beta * dragon._spread(micros, CTX).scale == pytest.approx(product, rel=1e-4)


def test_stop_rule_ends_the_round_and_then_the_run() -> None:
    """ℓ_θ(D+) above the bound: the round's other updates yield nothing; three dead rounds raise NumericsError."""
    dragon = make_dragon(stop_ratio=1.05, reference="frozen", beta=1.0, updates_per_round=3)
    bias = dragon.task.denoiser.network.body[-1].bias

    def updates_after_damage(step: int, first: int) -> list[int]:
        """Collect, then damage θ before update `first`; how many micro-batches each update has."""
        data, sizes = dragon.collect(replace(CTX, step=step)).data, []
        for update in range(3):
            if update == first:
                bias.data += 3.0
            sizes.append(len(list(dragon.minibatches(data, update, CTX))))
        bias.data -= 3.0
        return sizes

    assert updates_after_damage(0, first=1) == [1, 0, 0]
    assert dragon.collect(replace(CTX, step=1)).metrics["policy/halted_updates"] == 2.0
    assert updates_after_damage(1, first=0) == [0, 0, 0]
    assert updates_after_damage(2, first=0) == [0, 0, 0]
    with pytest.raises(NumericsError, match="stop_ratio"):
        updates_after_damage(3, first=0)


@pytest.mark.parametrize("reference", ["frozen", "per_round", "ema"])
def test_reference_is_the_model_it_says(reference: str) -> None:
    """With three distinct roles ℓ_ref is computed under the base, the policy or the average."""
    dragon = make_dragon(reference=reference)
    roles = dragon.roles
    for parameter in roles.trainable():
        parameter.data *= 0.9
    roles.lerp("ema", 0.5)
    data = dragon.collect(CTX).data
    expected = {"frozen": "ref", "per_round": "policy", "ema": "ema"}[reference]
    for role in ("ref", "policy", "ema"):
        with roles.use(role), torch.no_grad():
            (micro,) = dragon._cut(data, 1, CTX)
            same = torch.equal(dragon._predict(micro, CTX)[1], micro.reference)
        assert same == (role == expected)


def test_pairs_per_update_walks_through_all_pairs() -> None:
    dragon = make_dragon(pairs_per_update=2, updates_per_round=3)
    data = dragon.collect(CTX).data
    seen = [dragon._members(data, update, 0).tolist() for update in range(3)]
    assert all(len(part) == 2 for part in seen) and sorted(sum(seen, [])) == list(range(6))


def test_evaluation_is_paired_and_samples_the_base_once() -> None:
    """At θ = base every pair is equal: win rate 1/2, gain 0, no distance; the base is scored at the first call only."""
    reward = FirstAxis()
    dragon = make_dragon(reward, eval_samples=2)
    first = dragon.evaluate(CTX)
    calls = reward.calls
    assert first.metrics["eval/win_rate"] == 0.5 and first.metrics["eval/reward/gain"] == 0.0
    assert first.metrics["eval/distance_to_base"] == 0.0 and first.metrics["eval/items"] == 8
    with torch.no_grad():
        dragon.task.denoiser.network.body[-1].bias[0] -= 0.5  # a velocity of −0.5 ends 0.5 higher at t = 0
    dragon.roles.copy("policy", "ema")
    moved = dragon.evaluate(CTX)
    assert reward.calls == calls + 1
    assert moved.metrics["eval/win_rate"] == 1.0 and moved.metrics["eval/reward/gain"] > 0.1
    assert (
        moved.metrics["eval/reward/gain_low"]
        < moved.metrics["eval/reward/gain"]
        < moved.metrics["eval/reward/gain_high"]
    )
    assert moved.metrics["eval/distance_to_base"] == pytest.approx(0.25 / 3, rel=1e-4)
    fresh = make_dragon(FirstAxis(), eval_samples=2)
    fresh.roles.load_state_dict(dragon.roles.state_dict())
    assert fresh.evaluate(CTX).metrics == moved.metrics, "a resumed run must draw the same base samples"
    rows = json.loads(moved.artefacts["prompts.json"])
    assert [row["prompt"] for row in rows[:8]] == [prompt for prompt in PROMPTS[:4] for _ in range(2)]
    assert [row["place"] for row in rows[8:]] == ["best", "upper quarter", "median", "lower quarter", "worst"]
    gains = [row["tuned_reward"] - row["base_reward"] for row in rows]
    assert gains[8:] == [sorted(gains[:8], reverse=True)[place] for place in (0, 2, 4, 5, 7)]
    assert {"base_00.txt", "tuned_00.txt", "base_12.txt", "tuned_12.txt"} <= set(moved.artefacts)


def test_examples_are_chosen_by_their_gain() -> None:
    gains = {item: float(-item) for item in range(64)} | {7: 100.0}
    assert examples(gains) == [
        (7, "best"), (16, "upper quarter"), (32, "median"), (47, "lower quarter"), (63, "worst")
    ]  # fmt: skip
    assert examples({3: 1.0}) == [(3, "best")] and examples({}) == []
    assert examples({3: 1.0, 4: 2.0}) == [(4, "best"), (3, "worst")]


def test_evaluation_of_a_set_reward_uses_subsets() -> None:
    dragon = make_dragon(Share(), eval_samples=8)
    metrics = dragon.evaluate(CTX).metrics
    assert metrics["eval/win_rate"] == 0.5 and metrics["eval/items"] == 32
    assert metrics["eval/reward/mean"] == metrics["eval/reward/base_mean"]


def test_lora_roles_tune_adapters_only() -> None:
    task = make_task()
    roles = Roles(task.denoiser.network, lora=LoraConfig(rank=2, targets=("2", "4")))
    config = DragonConfig(prompts_per_round=6, updates_per_round=2, demo_steps=4, eval_steps=4)
    dragon = Dragon(task, FirstAxis(), config, roles=roles, seed=0)
    before = {name: p.clone() for name, p in task.denoiser.network.named_parameters() if "lora" not in name}
    run_in_memory(dragon, 2, Loop(1e-2), seed=0)
    after = dict(task.denoiser.network.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert dragon.evaluate(CTX).metrics["eval/distance_to_base"] > 0


def test_two_atom_law_has_its_fixed_point_at_one_half() -> None:
    """R = −(p − ½)²: from p = 0.9 repeated rounds end near ½ and stay; an item reward runs on to one side.

    The network is the exact posterior mean of the two-atom law, with logit p as its one parameter.  0.08 is two
    standard deviations of the share in the 64 samples that one round sees, √(¼/64) = 0.06, damped by the steps.
    """
    config = DragonConfig(prompts_per_round=64, updates_per_round=2, demo_steps=8, eval_steps=8, ema_decay=0.0)

    def trained(reward: Any, rounds: int) -> list[float]:
        task, path = two_atoms(0.9), []
        network = task.denoiser.network
        assert isinstance(network, TwoAtoms)
        dragon = Dragon(task, reward, config, roles=Roles(network, ("policy", "ref")), seed=0)
        run_in_memory(dragon, rounds, Loop(0.08), seed=0, on_step=lambda step: path.append(network.share()))
        return path

    class Down(FirstAxis):
        def __call__(self, samples: torch.Tensor, context: RewardContext) -> RewardOut:
            out = super().__call__(samples, context)
            return RewardOut((samples[:, 0] < 0).float(), out.valid)

    balanced = trained(Share(), 30)
    assert balanced[0] > 0.8
    assert all(abs(share - 0.5) < 0.08 for share in balanced[-8:])
    assert trained(Down(), 30)[-1] < 0.25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "ppo"}, "loss"),
        ({"beta": -1.0}, "beta"),
        ({"generations": 1}, "generations"),
        ({"generations": 3, "grouping": "halves"}, "even"),
        ({"stop_ratio": 0.9}, "stop_ratio"),
        ({"reference": "ema", "ema_decay": 0.0}, "ema_decay"),
        ({"min_valid": 1.5}, "min_valid"),
        ({"prompts_per_round": 0}, "prompts_per_round"),
        ({"sweeps": 0}, "sweeps"),
        ({"demo_steps": 0}, "demo_steps"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DragonConfig(**options)


def test_wrong_set_up_is_refused() -> None:
    task = make_task()
    with pytest.raises(UsageError, match="roles"):
        Dragon(task, FirstAxis(), DragonConfig(), roles=Roles(task.denoiser.network, ("policy", "ref")), seed=0)
    with pytest.raises(UsageError, match="unconditional"):
        make_dragon(guidance_scale=3.0)
    with pytest.raises(UsageError, match="evaluation prompts"):
        bare = replace(task, eval_prompts=[])
        Dragon(bare, FirstAxis(), DragonConfig(), roles=Roles(task.denoiser.network), seed=0)
