"""`gencontrol bench crd`: every row runs through its class, passes are counted, finished runs are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gencontrol.bench.crd_digits import PIXELS, PromptedClass, World
from gencontrol.bench.crd_runs import METHODS, Plan, available, kept_run
from gencontrol.bench.crd_tables import checks, curves, drift_at_reward, method_table
from gencontrol.bench.toys import toy_flow
from gencontrol.rewards.gaussian import Gaussian

PLAN = Plan(rounds=2, groups=4, generations=3, demo_steps=3, measured=(1, 2))


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
    return World(toy_flow(PIXELS, conditions=11, width=192), reward, Judge(), components, real, 0, 0, 2, 2)


@pytest.mark.parametrize("method", available(), ids=lambda m: m.label)
def test_every_row_runs_and_counts_its_passes(method: object, world: World, tmp_path: Path) -> None:
    run = kept_run(tmp_path, method, PLAN, world, 0)
    assert set(run) == {"reward", "judge", "fd", "passes"} and set(run["fd"]) == {1, 2}
    assert run["passes"][2] == 2 * run["passes"][1] > 0
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({"reward": {"1": 7.0}}))
    assert kept_run(tmp_path, method, PLAN, world, 0) == {"reward": {1: 7.0}}  # taken from the folder


def test_passes_of_crd_are_rollouts_plus_four_per_trained_row(world: World, tmp_path: Path) -> None:
    run = kept_run(tmp_path, METHODS[0], PLAN, world, 0)
    assert run["passes"][1] == 12 * 3 + 12 * 6 * 4  # policy, old, and the guided base twice


def test_a_run_that_ended_early_shows_as_missing() -> None:
    run = {"reward": {1: 0.5, 2: 0.98}, "fd": {1: 1.0, 2: 2.0}, "judge": {1: 0.5, 2: 0.9}, "passes": {1: 10.0, 2: 20.0}}
    short = {key: {1: value[1]} for key, value in run.items()}
    results = {method.label: [run, run] for method in METHODS} | {"AWM": [run, short]}
    assert drift_at_reward(results, "CRD", 0.97).value == 2.0
    assert math.isnan(drift_at_reward(results, "AWM", 0.97).value)
    text = method_table(results, {"reward": 0.2, "fd": 0.1, "judge": 0.2}, (1, 2), 0.97)
    assert "AWM + anchor" in text and "–" in text
    verdict = {check.claim: check.holds for check in checks(results, (1, 2), 0.97)}
    assert verdict["at reward 0.97 FD(CRD) is at most FD(NFT + the same anchor)"]
    assert not verdict["the anchor matters: without it FD is at least twice"]
    assert set(curves(results)) == {"reward", "drift (FD)"}
