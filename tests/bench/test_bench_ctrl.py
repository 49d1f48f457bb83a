"""`bench ctrl`: parts run end to end at toy sizes, and their measures are right where that is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gencontrol.bench.base import kept
from gencontrol.bench.ctrl.digits import DigitsWorld
from gencontrol.bench.ctrl.exact import chain_law, mode_shares
from gencontrol.bench.ctrl.main import Options, main
from gencontrol.bench.ctrl.optimum import best_control
from gencontrol.bench.ctrl.peers import cfg_samples, write_manifest
from gencontrol.bench.ctrl.scenes import labelled_pairs, render_class, seen_in
from gencontrol.bench.ctrl.worlds import ExactNetwork, Slope, make_ctrl
from gencontrol.errors import UsageError
from gencontrol.process import Linear


@pytest.mark.parametrize("part", ["mixture", "linear"])
def test_part_writes_its_numbers(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Options(parts=part, quick=True, output=str(tmp_path))) == 0
    result = json.loads((tmp_path / f"{part}.json").read_text())
    assert len(next(iter(result["rows"].values()))) == 2  # seeds
    assert list((tmp_path / "runs").glob(f"{part}_*.json"))
    assert all(check["claim"] and check["measured"] for check in result["checks"])
    printed = capsys.readouterr().out
    assert "E-CTRL" in printed and "onfirmed" in printed.replace("NOT CONFIRMED", "onfirmed")


def test_best_control_of_a_linear_reward_is_the_closed_form() -> None:
    """V is linear at every step, so that moving means loses nothing: J = a²·Var(x0)/2, shift a·Var(x0)
    (docs/methods/ctrl.md#e-ctrl-3).
    """
    ctrl = make_ctrl(
        Slope(1.0), ExactNetwork([[0.0, 0.0]], [1.0], 1.0), 2, seed=0, steps=6, prompts_per_round=2, bound_samples=2
    )
    found = best_control(ctrl.chain(), lambda x: 1.3 * x[:, 0], samples=20_000, seed=0)
    variance = chain_law(Linear(), ctrl.plan.grid, 1.0)
    # the first noise has mean ±0.007, a grid of 0.05 rounds less than that
    assert found.j == pytest.approx(1.3**2 * variance / 2, abs=0.02)
    assert float(found.x[:, 0].mean()) == pytest.approx(1.3 * variance, abs=0.03)
    assert float(found.x[:, 1].mean()) == pytest.approx(0.0, abs=0.03)


def test_kept_runs_are_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, float]:
        made.append(1)
        return {"a": 1.5, "b": float("nan")}

    for settings in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        found = kept(tmp_path, "part", settings, make)
        assert found["a"] == 1.5 and found["b"] != found["b"]
    assert len(made) == 2 and len(list(tmp_path.glob("part_*.json"))) == 2


def test_cfg_row_is_the_algorithm(tmp_path: Path) -> None:
    """The files that `cfg-finetune` reads hold the few images; samples come out for every stop and scale."""
    world = DigitsWorld.bundled()
    few = world.few(1, seed=7)
    entries = [json.loads(line) for line in write_manifest(few, tmp_path).read_text().splitlines()]
    assert [entry["labels"]["y"] for entry in entries] == [str(i) for i in range(10)]
    found = cfg_samples(world, few, torch.tensor([3, 4]), (1.0, 2.0), (1, 2), seed=7)
    assert set(found) == {(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)}
    assert all(x.shape == (2, 1, 8, 8) and bool(x.isfinite().all()) for x in found.values())


def test_scenes_measure_knows_right_from_wrong() -> None:
    images = render_class("red", "large", 40, seed=0)
    assert {seen_in(image) for image in images} == {("circle", "red", "large")}
    images, labels = labelled_pairs(2, seed=0)
    assert len(images) == len(labels) == 20 and not {(0, 1), (2, 0)} & {tuple(row) for row in labels.tolist()}


def test_unknown_part() -> None:
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        main(Options(parts="digit"))


def test_mode_shares_count_weights() -> None:
    x = torch.tensor([[-2.0, 0.1], [2.0, 0.0], [0.1, 2.0], [-1.9, 0.0]])
    assert mode_shares(x, torch.tensor([1.0, 2.0, 3.0, 2.0])).tolist() == pytest.approx([3 / 8, 2 / 8, 3 / 8])
