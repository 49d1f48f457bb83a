"""`gencontrol bench crd`: every row runs through its class, passes are counted, finished runs are kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gencontrol.bench.crd import scenes as crd_scenes
from gencontrol.bench.crd.claims import (
    at_equal_accuracy,
    gain,
    round_reaching,
    scenes_checks,
    share_of_samples,
    words_checks,
)
from gencontrol.bench.crd.digits import PIXELS, PromptedClass, World, blank_flow, shifted_times
from gencontrol.bench.crd.runs import METHODS, SCENES_PLAN, Plan, kept_run, of_part
from gencontrol.bench.crd.tables import DIGITS, curves, digits_checks, drift_at_reward, method_table
from gencontrol.rewards.sets.gaussian import Gaussian

PLAN = Plan(rounds=2, groups=4, generations=3, demo_steps=3, train_times=3, measured=(1, 2))


@pytest.fixture(scope="module")
def world() -> World:
    """An untrained base with random judges: enough to run every method."""

    class Judge:
        def predict(self, x: object) -> object:
            return torch.zeros(len(x)).numpy()  # type: ignore[arg-type]

    torch.manual_seed(0)
    reward = PromptedClass(torch.randn(10, PIXELS), torch.zeros(10))
    components = torch.linalg.qr(torch.randn(PIXELS, 16))[0]
    real = Gaussian.of(torch.randn(100, 16).double())
    return World(blank_flow(), reward, Judge(), components, real, 0, "test", per_class=2, eval_steps=2)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_every_row_runs_and_counts_its_passes(method: object, world: World, tmp_path: Path) -> None:
    run = kept_run(tmp_path, method, PLAN, world, 0)
    assert set(run) == {"reward", "judge", "fd", "passes"} and set(run["fd"]) == {1, 2}
    assert run["passes"][2] == 2 * run["passes"][1] > 0
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({"result": {"reward": {"1": 7.0}}}))
    assert kept_run(tmp_path, method, PLAN, world, 0) == {"reward": {1: 7.0}}  # taken from the folder


def test_passes_of_crd_are_rollouts_plus_four_per_trained_row(world: World, tmp_path: Path) -> None:
    run = kept_run(tmp_path, METHODS[0], PLAN, world, 0)
    assert run["passes"][1] == 12 * 3 + 12 * 3 * 4  # policy, old, and the guided base twice


def test_a_run_that_ended_early_shows_as_missing() -> None:
    run = {"reward": {1: 0.5, 2: 0.98}, "fd": {1: 1.0, 2: 2.0}, "judge": {1: 0.5, 2: 0.9}, "passes": {1: 10.0, 2: 20.0}}
    short = {key: {1: value[1]} for key, value in run.items()}
    results = {method.label: [run, run] for method in METHODS} | {"AWM": [run, short]}
    assert drift_at_reward(results, "CRD", 0.97).value == 2.0
    assert math.isnan(drift_at_reward(results, "AWM", 0.97).value)
    text = method_table(
        results,
        {"reward": 0.2, "fd": 0.1, "judge": 0.2},
        (1, 2),
        DIGITS,
        {"at": lambda label: drift_at_reward(results, label, 0.97)},
    )
    assert "AWM + anchor" in text and "–" in text
    verdict = {check.claim: check.holds for check in digits_checks(results, (1, 2), 0.97)}
    assert verdict["at reward 0.97 FD(CRD) is at most FD(NFT + the same anchor)"]
    assert not verdict["the anchor matters: without it FD is at least twice"]
    assert set(curves(results, DIGITS)) == {"reward", "FD", "judge"}


def test_claims_on_scenes_are_worked_out_per_seed() -> None:
    base = {"exact": 0.4, "fd": 1.0, "diversity": 2.0}
    fast = {"exact": {10: 0.8, 20: 0.9}, "fd": {10: 1.2, 20: 1.4}, "diversity": {10: 1.8, 20: 1.6}}
    slow = {"exact": {10: 0.5, 20: 0.6}, "fd": {10: 1.5, 20: 2.0}, "diversity": {10: 2.0, 20: 1.9}}
    results = {"CRD": [fast, fast], "Flow-GRPO": [slow, slow], "RWR": [fast, fast]}
    bases = [base, base]
    assert round_reaching(fast, base, 0.6) == pytest.approx(5.0)  # halfway from .4 to .8
    assert math.isnan(round_reaching(slow, base, 0.7))
    assert share_of_samples(results, bases, "Flow-GRPO").value == pytest.approx(0.25)
    assert gain(results, bases, "CRD").value == pytest.approx(0.5)
    assert at_equal_accuracy(results, bases, "Flow-GRPO", "fd").value == pytest.approx(1.1 / 2.0)
    verdict = {check.claim: check.holds for check in scenes_checks(results, bases)}
    assert list(verdict.values()) == [True, True, True, True]
    assert not words_checks({"CRD": [slow]}, [base | {"exact": 0.5}])[0].holds


def test_scenes_rows_hold_every_peer_with_and_without_the_anchor() -> None:
    labels = {method.label for method in of_part("scenes")}
    assert {f"{m}{a}" for m in ("AWM", "RWR", "Flow-GRPO") for a in ("", " + anchor")} <= labels
    assert {"CRD", "CRD, no anchor", "NFT + anchor", "NFT, official GenEval"} <= labels
    assert {method.label for method in of_part("words")} == {"CRD", "Flow-GRPO", "Flow-GRPO, exponential step"}


def test_shifted_times_are_the_schedulers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    assert shifted_times(3.0, 10) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("part", ["scenes", "words"])
def test_the_parts_on_the_bundled_model_run(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crd_scenes, "EVAL_STEPS", 2)
    world = crd_scenes.build_world(part, 0, per_kind=2)
    small = {"rounds": 1, "groups": 2, "generations": 2, "demo_steps": 2, "train_times": 1, "measured": (1,)}
    run = kept_run(tmp_path, of_part(part)[0], replace(SCENES_PLAN, compiled=False, **small), world, 0)
    assert set(run) == {"reward", "exact", "fd", "diversity", "passes"}
    assert run["passes"][1] == 4 * 2 + 4 * 4 and world.floor > 0  # the rollout; policy, old and the guided base
    fresh = {name: weight.clone() for name, weight in world.base.state_dict().items()}
    assert all(torch.equal(weight, fresh[name]) for name, weight in world.task().denoiser.state_dict().items())
