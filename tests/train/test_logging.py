"""Lines of metrics.jsonl that sum up several steps, also across stops, kills and evaluations."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path

import pytest

from gencontrol.testing.algorithm import assert_same_run, metric_lines
from gencontrol.train.checkpoint import Checkpoints
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.actor_critic import CONFIG, ActorCritic
from tests.helpers.shim import Forked, Shim, fit, in_child, kill_self
from tests.helpers.training_toy import Toy

EACH = TrainConfig(steps=8, micro_batch=3, lr=1e-2, save_every=2, keep=9)
THREE = dataclasses.replace(EACH, log_every=3)


def test_a_line_is_the_mean_of_its_steps_and_the_last_step_always_ends_one(tmp_path: Path) -> None:
    Trainer(EACH, tmp_path / "each").fit(Toy(updates=2))
    Trainer(THREE, tmp_path / "three").fit(Toy(updates=2))
    each, three = metric_lines(tmp_path / "each"), metric_lines(tmp_path / "three")
    assert [row["step"] for row in three] == [3, 6, 8]
    for row, steps in zip(three, (each[:3], each[3:6], each[6:]), strict=True):
        assert {k: row[k] for k in ("updates", "items", "lr")} == {k: steps[-1][k] for k in ("updates", "items", "lr")}
        for key in ("loss/total", "loss/square", "grad_norm", "reward/mean"):
            assert row[key] == pytest.approx(sum(step[key] for step in steps) / len(steps), rel=1e-12), key


def test_means_are_over_items_and_over_the_updates_that_were_taken(tmp_path: Path) -> None:
    """A skipped update counts in no mean; the groups of an actor-critic have lines of their own updates."""

    def nan_in_step_1(step: int, calls: int) -> float:
        return math.nan if step == 1 else 1.0

    Trainer(EACH, tmp_path / "each").fit(Toy(on_loss=nan_in_step_1))
    Trainer(THREE, tmp_path / "three").fit(Toy(on_loss=nan_in_step_1))
    each, line = metric_lines(tmp_path / "each"), metric_lines(tmp_path / "three")[0]
    assert line["loss/total"] == pytest.approx((each[0]["loss/total"] + each[2]["loss/total"]) / 2, rel=1e-12)
    assert line["health/skipped"] == 1 and line["items"] == 16
    for every in (1, 6):
        Trainer(dataclasses.replace(CONFIG, log_every=every), tmp_path / f"ac{every}").fit(ActorCritic())
    alone, summed = metric_lines(tmp_path / "ac1"), metric_lines(tmp_path / "ac6")
    for key in ("loss/actor", "loss/critic", "critic/target", "grad_norm/actor"):
        assert summed[0][key] == pytest.approx(sum(row[key] for row in alone) / 6, rel=1e-12), key


def test_evaluations_end_a_line(tmp_path: Path) -> None:
    Trainer(dataclasses.replace(THREE, eval_every=4), tmp_path).fit(Toy())
    rows = metric_lines(tmp_path)
    assert [row["step"] for row in rows] == [0, 3, 4, 6, 8]
    assert [row["step"] for row in rows if "eval/square" in row] == [0, 4, 8]


def test_a_stop_in_the_middle_of_a_line_is_bit_equal(tmp_path: Path) -> None:
    Trainer(THREE, tmp_path / "a").fit(Toy(updates=2))
    for stop_at in (1, 4, 5, 6):
        Trainer(THREE, tmp_path / "b").fit(Toy(updates=2), stop_at=stop_at)
    Trainer(THREE, tmp_path / "b").fit(Toy(updates=2))
    assert_same_run(tmp_path / "a", tmp_path / "b", EACH.steps)


def test_kills_in_the_middle_of_a_line_are_bit_equal(tmp_path: Path) -> None:
    shim = Shim()
    fit(tmp_path / "a", THREE, shim=shim)
    points = [n for n, (op, path) in enumerate(shim.calls) if op == "append"]
    points += [n for n, (op, path) in enumerate(shim.calls) if op == "rename" and path.name.startswith("step_")]
    assert len(points) == 3 + 4
    for point in points:
        folder = tmp_path / f"kill{point}"
        assert in_child(lambda f=folder, p=point: fit(f, THREE, shim=Shim(p, kill_self))) == 137
        fit(folder, THREE)
        assert_same_run(tmp_path / "a", folder, EACH.steps)


def test_a_signal_in_the_middle_of_a_line_is_bit_equal(tmp_path: Path) -> None:
    fit(tmp_path / "a", THREE)
    child = Forked(lambda: fit(tmp_path / "b", THREE, toy=Toy(delay_s=0.05)) and 0)
    while not (tmp_path / "b/checkpoints/step_00000002").exists():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait() != 0
    fit(tmp_path / "b", THREE)
    assert_same_run(tmp_path / "a", tmp_path / "b", EACH.steps)


def test_the_interval_may_change_between_two_starts(tmp_path: Path) -> None:
    Trainer(THREE, tmp_path).fit(Toy(), stop_at=5)
    Trainer(EACH, tmp_path).fit(Toy())
    rows = metric_lines(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 7, 8]


def test_checkpoints_without_window_and_begun_updates_go_on(tmp_path: Path) -> None:
    """What the versions before `log_every` wrote."""
    Trainer(EACH, tmp_path / "a").fit(Toy(updates=2))
    Trainer(EACH, tmp_path / "b").fit(Toy(updates=2), stop_at=4)
    checkpoints = Checkpoints(tmp_path / "b/checkpoints", 9)
    state = checkpoints.load_newest()
    assert state is not None
    del state.meta["window"], state.meta["counters"]["begun"]
    checkpoints.save(state)
    Trainer(EACH, tmp_path / "b").fit(Toy(updates=2))
    assert_same_run(tmp_path / "a", tmp_path / "b", EACH.steps)
