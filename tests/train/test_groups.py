"""Several losses in one update: an actor-critic with turns, periods and a Polyak target against a loop by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gencontrol.algorithms.base import LossOut, ParameterGroup, StepContext
from gencontrol.errors import NumericsError, UsageError
from gencontrol.testing.algorithm import AlgorithmContract, assert_same_run, metric_lines, tensor_files
from gencontrol.train.optim import learning_rate
from gencontrol.train.trainer import Trainer
from tests.helpers.actor_critic import ACTOR_LR, CONFIG, ActorCritic, bare_loop, weights


class TestContract(AlgorithmContract):
    """Resume, signals in the middle of a turn, evaluation, accumulation: as for every algorithm."""

    def make(self) -> Any:
        return ActorCritic()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_equals_a_loop_by_hand(tmp_path: Path, joint: bool, micro_batch: int) -> None:
    """Sequential turns (TD3) and one joint turn (FQL); the split into micro-batches changes only the rounding."""
    algorithm = ActorCritic(joint)
    Trainer(dataclasses.replace(CONFIG, micro_batch=micro_batch), tmp_path).fit(algorithm)
    found, expected = weights(algorithm), bare_loop(CONFIG.steps, joint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # float32 sums in another order through 12 AdamW steps of up to 1e-2
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=name)
    assert algorithm.stepped == [(n, (("actor", "critic") if joint else ("critic", "actor")) if n % 2 else ("critic",)) for n in range(12)]  # fmt: skip  # noqa: E501


def test_the_two_orders_differ() -> None:
    """Guards the test above: one loop could not pass for both."""
    assert not torch.allclose(bare_loop(6)["actor.0.weight"], bare_loop(6, joint=True)["actor.0.weight"], atol=1e-5)


def test_a_resume_in_the_middle_is_bit_equal_also_before_the_actor_ever_stepped(tmp_path: Path) -> None:
    class Late(ActorCritic):
        def parameter_groups(self) -> dict[str, ParameterGroup]:
            groups = super().parameter_groups()
            return groups | {"actor": dataclasses.replace(groups["actor"], every=5)}

    Trainer(CONFIG, tmp_path / "a").fit(Late())
    for stop_at in (1, 3):
        Trainer(CONFIG, tmp_path / "b").fit(Late(), stop_at=stop_at)
        moments = tmp_path / f"b/checkpoints/step_{stop_at:08d}/optimizer.safetensors"
        assert (b"actor" in moments.read_bytes()) == (stop_at == 3)
    Trainer(CONFIG, tmp_path / "b").fit(Late())
    assert_same_run(tmp_path / "a", tmp_path / "b", CONFIG.steps)


def test_lines_name_the_groups(tmp_path: Path) -> None:
    Trainer(CONFIG, tmp_path).fit(ActorCritic())
    row = metric_lines(tmp_path)[-1]
    assert row["lr/actor"] == ACTOR_LR and row["lr/critic"] == learning_rate(CONFIG, 5) and "lr" not in row
    assert row["loss/total"] == pytest.approx(row["loss/actor"] + row["loss/critic"])
    assert row["actor/value"] == pytest.approx(-row["loss/actor"]) and "critic/target" in row
    assert row["updates"] == 12 and row["items"] == 6 * 16
    assert row["grad_norm/critic"] > 0 and row["grad_norm/actor"] > 0


@pytest.mark.parametrize("bad", ["actor", "critic"])
def test_a_group_that_is_not_finite_stays_and_the_other_steps(tmp_path: Path, bad: str) -> None:
    def spoil(name: str, update: int) -> float:
        return math.nan if name == bad and update == 3 else 1.0

    algorithm = ActorCritic(spoil=spoil)
    Trainer(dataclasses.replace(CONFIG, save_every=1, keep=9), tmp_path).fit(algorithm, stop_at=2)
    other = "critic" if bad == "actor" else "actor"
    assert algorithm.stepped == [(0, ("critic",)), (1, ("critic", "actor")), (2, ("critic",)), (3, (other,))]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(algorithm).values())
    row = metric_lines(tmp_path)[-1]
    assert row["health/skipped"] == 1 and row["updates"] == 4 and f"loss/{other}" in row


def test_the_budget_of_one_group_ends_the_run_with_its_name(tmp_path: Path) -> None:
    algorithm = ActorCritic(joint=True, spoil=lambda name, update: math.nan if name == "critic" else 1.0)
    with pytest.raises(NumericsError, match="step 1: critic: 4 updates in a row were non-finite"):
        Trainer(CONFIG, tmp_path).fit(algorithm)
    assert json.loads((tmp_path / "dump/step_00000001/dump.json").read_text())["group"] == "critic"


def test_a_loss_reaches_its_own_group_alone(tmp_path: Path) -> None:
    """The actor's loss runs through the critic, which must not move when its own loss is left out."""

    class ActorOnly(ActorCritic):
        def loss(self, micro: torch.Tensor, ctx: StepContext) -> dict[str, LossOut]:
            return {name: out for name, out in super().loss(micro, ctx).items() if name == "actor"}

    algorithm = ActorOnly()
    before = weights(algorithm)
    Trainer(CONFIG, tmp_path).fit(algorithm)
    after = weights(algorithm)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("actor.")}
    assert "loss/critic" not in metric_lines(tmp_path)[-1]


def test_a_parameter_outside_the_roles_can_be_a_group(tmp_path: Path) -> None:
    """A temperature: the algorithm's state keeps its value, the checkpoint its moments."""

    class Tempered(ActorCritic):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor([0.5]))

        def parameter_groups(self) -> dict[str, ParameterGroup]:
            return super().parameter_groups() | {"temperature": ParameterGroup([self.temperature], lr=0.1)}

        def loss(self, micro: torch.Tensor, ctx: StepContext) -> dict[str, LossOut]:
            found = super().loss(micro, ctx)
            if "temperature" in ctx.due:
                found["temperature"] = LossOut(self.temperature.square().sum() * len(micro), len(micro))
            return found

        def state_dict(self) -> dict[str, Any]:
            return {"temperature": self.temperature.detach()}

        def load_state_dict(self, state: Any) -> None:
            self.temperature.data.copy_(state["temperature"])

    Trainer(CONFIG, tmp_path / "a").fit(Tempered())
    Trainer(CONFIG, tmp_path / "b").fit(Tempered(), stop_at=3)
    last = Tempered()
    Trainer(CONFIG, tmp_path / "b").fit(last)
    assert tensor_files(tmp_path / "a", 6) == tensor_files(tmp_path / "b", 6)
    assert float(last.temperature.detach()) < 0.4


def groups_of(change: Any) -> Any:
    algorithm = ActorCritic()
    plain = algorithm.parameter_groups()
    algorithm.parameter_groups = lambda: change(plain)  # type: ignore[method-assign]
    return algorithm


def test_faults_are_one_clear_line(tmp_path: Path) -> None:
    cases = [
        (lambda g: {"actor": g["actor"]}, r"parameters in no group \['critic.0.weight'"),
        (lambda g: g | {"more": g["actor"]}, "'actor.0.weight' is listed twice"),
        (lambda g: g | {"none": ParameterGroup([])}, r"groups without a parameter \['none'\]"),
    ]
    for number, (change, text) in enumerate(cases):
        with pytest.raises(UsageError, match=text) as caught:
            Trainer(CONFIG, tmp_path / str(number)).fit(groups_of(change))
        assert "\n" not in str(caught.value)
    single = ActorCritic()
    single.loss = lambda micro, ctx: LossOut(torch.zeros(()), 1)  # type: ignore[method-assign, assignment]
    with pytest.raises(UsageError, match=r"one LossOut; .* \['critic'\]"):
        Trainer(CONFIG, tmp_path / "single").fit(single)
    single.loss = lambda micro, ctx: {"critics": LossOut(torch.zeros(()), 1)}  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"losses of the groups \['critics'\]"):
        Trainer(CONFIG, tmp_path / "other").fit(single)
    for values in ({"every": 0}, {"turn": -1}, {"lr": 0.0}, {"lr_schedule": "step"}):
        with pytest.raises(ValueError, match="expected"):
            ParameterGroup([], **values)  # type: ignore[arg-type]
