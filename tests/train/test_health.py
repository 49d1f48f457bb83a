"""Non-finite losses and gradients: skipped, counted, then stopped with a dump (N1–N3); evaluation faults (E2, E3)."""

from __future__ import annotations

import inspect
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from gencontrol.errors import NumericsError
from gencontrol.testing.algorithm import metric_lines, state_hash, tensor_files
from gencontrol.train.health import Health
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.training_toy import Toy, network

CONFIG = TrainConfig(steps=5, micro_batch=4, save_every=1, keep=9, lr=1e-2)


def test_n1_nan_in_one_micro_batch_skips_that_update(tmp_path: Path) -> None:
    def nan_in_second_micro_batch(step: int, calls: int) -> float:
        return math.nan if calls == 4 else 1.0

    Trainer(CONFIG, tmp_path).fit(Toy(on_loss=nan_in_second_micro_batch))
    rows = metric_lines(tmp_path)
    assert [row["health/skipped"] for row in rows] == [0, 1, 1, 1, 1]
    assert [row["updates"] for row in rows] == [1, 1, 2, 3, 4]
    assert "loss/total" not in rows[1] and math.isfinite(rows[2]["loss/total"])
    one, two = tensor_files(tmp_path, 1), tensor_files(tmp_path, 2)
    for name in ("role_policy.safetensors", "role_ema.safetensors", "optimizer.safetensors"):
        assert one[name] == two[name], "a skipped update changed the weights"


def test_n2_infinite_gradient_with_a_finite_loss_is_skipped(tmp_path: Path) -> None:
    toy = Toy()
    calls = []

    def explode(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (math.inf if len(calls) == 3 else 1.0)

    toy.roles.module[0].weight.register_hook(explode)
    metrics = Trainer(CONFIG, tmp_path).fit(toy)["metrics"]
    assert metrics["health/skipped"] == 1 and metrics["updates"] == 4


def test_n3_nan_at_every_step_stops_with_a_dump_that_reproduces_it(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="4 updates in a row were non-finite") as caught:
        Trainer(CONFIG, tmp_path).fit(Toy(on_loss=lambda step, calls: math.nan if step > 0 else 1.0))
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    dump = tmp_path / "dump/step_00000004"
    facts = json.loads((dump / "dump.json").read_text())
    assert facts["seed"] == 0 and facts["step"] == 4 and facts["loss"] == "nan" and facts["health"]["skipped"] == 4
    batch = safetensors.torch.load((dump / "batch.safetensors").read_bytes())["batch"]
    toy = Toy()
    toy.roles.module.load_state_dict(safetensors.torch.load((dump / "weights.safetensors").read_bytes()))
    assert batch.shape == (8, 2) and torch.isfinite(toy.roles.module(batch)).all()
    saved = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert saved[-1] == "step_00000004", "the last whole step stays resumable"


def test_four_frames_lie_between_fit_and_the_loss(tmp_path: Path) -> None:
    """What a person steps through: fit, the loop, a step, an update."""
    seen: list[list[str]] = []

    def look(step: int, calls: int) -> float:
        frames = [f.function for f in inspect.stack() if f"gencontrol{os.sep}train" in f.filename]
        seen.append(frames[: frames.index("fit") + 1])
        return 1.0

    Trainer(TrainConfig(steps=1), tmp_path).fit(Toy(on_loss=look))
    assert seen[0][::-1] == ["fit", "loop", "_train_step", "_update"]


def test_counts_survive_a_resume(tmp_path: Path) -> None:
    def bad(step: int, calls: int) -> float:
        return math.nan if step in (1, 2) else 1.0

    Trainer(CONFIG, tmp_path / "a").fit(Toy(on_loss=bad))
    Trainer(CONFIG, tmp_path / "b").fit(Toy(on_loss=bad), stop_at=2)
    Trainer(CONFIG, tmp_path / "b").fit(Toy(on_loss=bad))
    assert metric_lines(tmp_path / "a") == metric_lines(tmp_path / "b")
    assert metric_lines(tmp_path / "b")[-1]["health/skipped"] == 2


def test_evaluation_that_draws_from_global_generators_does_not_alter_training(tmp_path: Path) -> None:
    def careless() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    def global_draws(step: int, calls: int) -> float:
        return 1.0 + float(torch.rand(())) + float(np.random.rand()) + random.random()

    for name, on_evaluate in (("a", careless), ("b", lambda: None)):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        config = TrainConfig(steps=3, micro_batch=4, eval_every=1)
        Trainer(config, tmp_path / name).fit(Toy(on_loss=global_draws, on_evaluate=on_evaluate))
    assert metric_lines(tmp_path / "a") == metric_lines(tmp_path / "b")


def test_n3_one_percent_of_the_last_thousand_is_the_limit() -> None:
    health = Health(max_in_row=3)
    reasons = [health.note(bad=index % 50 == 0) for index in range(600)]
    assert reasons[:500] == [None] * 500
    assert reasons[500] is not None and "11 of the last 1000" in reasons[500]
    rare = Health(max_in_row=3)
    assert all(rare.note(bad=index % 101 == 0) is None for index in range(5000))
    assert rare.skipped == 50 and len(rare.recent) <= 10
    copy = Health(3)
    copy.load_state_dict(json.loads(json.dumps(rare.state_dict())))
    assert copy == rare


def test_no_updates_is_a_counted_step_that_trains_nothing(tmp_path: Path) -> None:
    toy = Toy(updates=0)
    metrics = Trainer(CONFIG, tmp_path).fit(toy)["metrics"]
    assert metrics["step"] == 5 and metrics["updates"] == 0 and "loss/total" not in metrics and "reward/mean" in metrics
    assert all(torch.equal(a, b) for a, b in zip(toy.roles.module.parameters(), network().parameters(), strict=True))


def test_e2_error_inside_an_evaluation_leaves_the_policy_and_a_checkpoint(tmp_path: Path) -> None:
    toys = []

    def fail() -> None:
        if toys[-1].rounds == 2:
            raise RuntimeError("the judge broke")

    config = TrainConfig(steps=4, micro_batch=4, save_every=2, eval_every=2, lr=1e-2)
    toys.append(Toy(on_evaluate=fail))
    with pytest.raises(RuntimeError, match="the judge broke"):
        Trainer(config, tmp_path / "a").fit(toys[-1])
    plain = Toy()
    Trainer(config, tmp_path / "b").fit(plain, stop_at=2)
    assert state_hash(toys[-1]) == state_hash(plain)
    assert (tmp_path / "a/checkpoints/step_00000002/manifest.json").is_file()


def test_e3_out_of_memory_in_an_evaluation_halves_its_batch_then_gives_up(tmp_path: Path) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) in (1, 2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")

    config = TrainConfig(steps=2, eval_every=1)
    Trainer(config, tmp_path).fit(Toy(on_evaluate=fail))
    rows = metric_lines(tmp_path)
    assert rows[0]["eval/failed"] == 1.0 and "eval/square" not in rows[0]
    assert "eval/failed" not in rows[1] and rows[1]["eval/square"] > 0, "half a batch fitted"
    assert len(calls) == 5
