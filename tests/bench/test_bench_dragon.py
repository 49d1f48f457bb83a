"""The benchmark's loop is the Trainer's; its parts run end to end on tiny worlds; tables say what was measured."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gencontrol.algorithms.matching.dragon import Dragon, DragonConfig
from gencontrol.bench.base import Check, Loop, over_seeds, run_in_memory, table, verdicts, write_result
from gencontrol.bench.dragon import main as dragon
from gencontrol.bench.dragon import mixture as dragon_mixture
from gencontrol.bench.dragon import songs as dragon_songs
from gencontrol.bench.dragon import sound as dragon_sound
from gencontrol.bench.toys import EmbeddedFrechet, EmbeddedFrechetItem, toy_flow, toy_task
from gencontrol.errors import UsageError
from gencontrol.models.roles import Roles
from gencontrol.rng import stream
from gencontrol.stats import Estimate
from gencontrol.train.trainer import TrainConfig, Trainer


def small_dragon() -> Dragon:
    denoiser = toy_flow(2, width=8)
    reward = EmbeddedFrechet(lambda x: x[:, None], torch.randn(64, 2, generator=stream(0, "test/reference")))
    config = DragonConfig(prompts_per_round=8, updates_per_round=2, demo_steps=3, eval_steps=3)
    return Dragon(toy_task(denoiser, 2), reward, config, roles=Roles(denoiser.network), seed=0)


def test_memory_loop_equals_the_trainer(tmp_path: Path) -> None:
    """Same algorithm, same settings: the weights agree to float32 rounding (the Trainer may order sums otherwise)."""
    mine, theirs = small_dragon(), small_dragon()
    records = run_in_memory(mine, 3, Loop(1e-2, micro_batch=6), seed=0)
    Trainer(TrainConfig(steps=3, lr=1e-2, micro_batch=6), tmp_path / "run").fit(theirs)
    for a, b in zip(mine.roles.trainable(), theirs.roles.trainable(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    for key in ("reward/mean", "loss/positive", "policy/beta", "sets/swap_acceptance"):
        assert records[-1][key] == pytest.approx(line[key], rel=1e-4)


def test_one_frame_counts_as_a_point_mass() -> None:
    """−‖f − μ‖² − tr C, against the general formula with a vanishing covariance of two nearby frames."""
    whole = EmbeddedFrechet(lambda x: x[:, None], torch.randn(64, 2, generator=stream(1, "test/reference")))
    x = torch.randn(3, 2, generator=stream(2, "test/points"))
    values = EmbeddedFrechetItem(whole)(x, None).values
    twice = (x[:, None] + torch.tensor([[1e-4], [-1e-4]])).double()
    torch.testing.assert_close(values.double(), -whole.law.clip_distances(twice), atol=1e-3, rtol=1e-3)


def test_mixture_of_the_base_has_the_stated_weights() -> None:
    x = dragon_mixture.mixture(20_000, dragon_mixture.BASE_WEIGHTS, stream(0, "test/mixture"))
    shares = torch.bincount(torch.cdist(x, dragon_mixture.CENTRES).argmin(1), minlength=4) / 20_000
    # 0.015: four standard deviations of a share at 20 000 draws
    torch.testing.assert_close(shares, dragon_mixture.BASE_WEIGHTS, atol=0.015, rtol=0)


def test_songs_depend_on_their_prompt_and_noise_is_added_to_some() -> None:
    prompt = torch.arange(8).repeat_interleave(50)
    clean = dragon_songs.songs(prompt, stream(0, "test/songs"))
    noisy = dragon_songs.songs(prompt, stream(0, "test/songs"), noisy=0.5)
    changed = (clean != noisy).any(1).float().mean()
    assert clean.shape == (400, 96) and 0.4 < changed < 0.6
    means = clean.view(8, 50, 16, 6).mean((1, 2))
    assert torch.cdist(means, means)[0, 1:].min() > 0.05


def test_crossover_rule() -> None:
    def world(song: tuple[float, float], whole: tuple[float, float]) -> dict[str, dict[str, float]]:
        rows = {"generations": (1.0, 1.0), "per-song": song, "dataset": whole}
        return {name: {"song_fad": a, "set_fad": b} for name, (a, b) in rows.items()}

    assert dragon_songs.crossover(world((0.8, 0.9), (0.9, 0.8)))
    assert not dragon_songs.crossover(world((0.8, 0.7), (0.9, 0.8)))
    assert not dragon_songs.crossover(world((0.8, 1.1), (0.9, 0.8)))


@pytest.mark.parametrize("part", ["6a", "6b"])
def test_toy_parts_run_quickly(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dragon.main(dragon.Options(parts=part, quick=True, output=str(tmp_path))) == 0
    result = json.loads((tmp_path / f"{part}.json").read_text())
    names = [v.name for v in (dragon_mixture.VARIANTS if part == "6a" else dragon_songs.VARIANTS)]
    assert set(names) < set(result["rows"]) and len(result["checks"]) >= 3
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and (tmp_path / f"{part}.md").read_text() in printed


def test_sound_part_on_a_tiny_pipeline(tmp_path: Path) -> None:
    """Item and set targets, all four methods, with the real pipeline class; the base's weights are put back."""
    from tests.helpers.fixtures_models import tiny_text_to_audio

    pipeline = tiny_text_to_audio()
    task = pipeline.task(["a b", "c d", "e"], ["f g", "h"])
    before = copy.deepcopy(pipeline.denoiser.network.state_dict())
    rewards: dict[str, Any] = dragon_sound.load_targets(["loudness-range", "spectral-centroid"], "cpu")
    rewards["fad-set"] = Level()
    budget = dragon_sound.Budget(2, 4, 2, 2, 2, 2, 8, 2.0, 1e-2, 8, 5.0)
    result = dragon_sound.run(task, rewards, budget, seed=0, say=lambda text: None, folder=tmp_path / "sounds")
    assert set(result["rows"]) == set(rewards) and not result["skipped"]
    for found in result["rows"].values():
        assert set(found) == {"DRAGON", "positive-only", "reward-weighted", "random split"}
        assert all(0 <= cell["win_rate"].value <= 1 for cell in found.values())
    after = pipeline.denoiser.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "sounds/loudness-range_tuned_0.wav").stat().st_size > 100
    spent = dragon_sound.Budget(1, 4, 2, 1, 2, 2, 8, 1.0, 1e-2, 8, 1e-9)
    none = dragon_sound.run(task, rewards, spent, seed=0, say=print)
    assert none["skipped"] == list(rewards) and not none["checks"][0].holds


class Level:
    """Set reward on sound: minus the Fréchet distance of clip levels and means to fixed statistics."""

    name, differentiable = "level", False
    kind = "set"

    def __init__(self) -> None:
        self.inner = EmbeddedFrechet(self.embed, 0.1 * torch.randn(64, 2048, generator=stream(0, "test/sounds")))

    def __call__(self, samples: torch.Tensor, context: Any) -> Any:
        return self.inner(samples, context)

    @staticmethod
    def embed(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (2, -1)).std(-1)[..., None]

    def features(self, samples: torch.Tensor, context: Any) -> dict[str, torch.Tensor]:
        return self.inner.features(samples, context)

    def evaluate(self, features: Any) -> float:
        return self.inner.evaluate(features)

    def state(self, pool: Any, chosen: torch.Tensor) -> Any:
        return self.inner.state(pool, chosen)


def test_wrong_options_are_named() -> None:
    with pytest.raises(UsageError, match="6c"):
        dragon.main(dragon.Options(parts="6c"))
    with pytest.raises(ValueError, match="seeds = 0"):
        dragon.Options(seeds=0)
    with pytest.raises(UsageError, match="fad/clap"):
        dragon_sound.load_targets(["fad/clip"], "cpu")


def test_tables_and_results(tmp_path: Path) -> None:
    printed = table("title", ("a", "b"), [["x", Estimate(0.5, 0.4, 0.6)], ["y", float("nan")]])
    assert "| x | 0.5 ±0.1 |" in printed and "| y | –        |" in printed
    assert over_seeds([{"fd": 1.0, "z": 1.0}, {"fd": 3.0}])["fd"].value == 2.0
    lines = verdicts([Check("one", "1", True), Check("two", "2", False)])
    assert lines.startswith("confirmed: one") and "NOT CONFIRMED: two" in lines
    path = write_result(tmp_path, "part", {"rows": {"x": Estimate(1.0, math.nan, 2.0)}}, 1.23)
    assert json.loads(path.read_text())["rows"]["x"] == {"value": 1.0, "low": None, "high": 2.0}
