"""Compositions on disk and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.cli import main
from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.composition.policy import write_composition
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.diffusion import DiffusionPolicy, DiffusionPolicyConfig, FlowPolicy, FlowPolicyConfig
from gencontrol.robotics.policies.loading import load_policy

POINT = "tests.helpers.toy_envs:point"


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Path]:
    """A diffusion and a flow policy with random weights that read different keys."""
    one, two = (Normalizer(torch.zeros(n), torch.ones(n)) for n in (1, 2))
    first = DiffusionPolicyConfig(backbone="mlp", inference_steps=3)
    spec = PolicySpec({"place": (2,)}, 2, 8, 1, 4)
    # one normaliser for both keys: its tensors are shared
    DiffusionPolicy(spec, first, {"place": two, "action": two}, seed=3).save_pretrained(tmp_path / "a")
    spec = PolicySpec({"time": (1,)}, 2, 8, 1, 4)
    second = FlowPolicyConfig(backbone="mlp", inference_steps=3)
    FlowPolicy(spec, second, {"time": one, "action": two}, seed=3).save_pretrained(tmp_path / "b")
    return {name: tmp_path / name for name in ("a", "b")}


def _act(policy: ComposedPolicy) -> np.ndarray:
    policy.reset(seeds=[5])
    return policy.select_action({"place": np.full((1, 2), 0.3, np.float32), "time": np.full((1, 1), 0.4, np.float32)})


def test_a_composition_on_disk_is_the_same_policy(parents: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, after the parents have gone; and a run folder's final/ is what is copied."""
    whole = ComposedPolicy({name: load_policy(path) for name, path in parents.items()}, [0.25, 0.75])
    run = tmp_path / "run"
    run.mkdir()
    parents["a"].rename(run / "final")
    write_composition(tmp_path / "ab", {"a": run, "b": parents["b"]}, (0.25, 0.75))
    for path in (run / "final", parents["b"]):
        path.rename(tmp_path / f"away_{path.name}")
    found = load_policy(tmp_path / "ab")
    assert isinstance(found, ComposedPolicy) and found.names == ("a", "b")
    assert np.array_equal(_act(found), _act(whole))


def test_damage_and_overwriting(parents: dict[str, Path], tmp_path: Path) -> None:
    target = write_composition(tmp_path / "ab", parents, (0.5, 0.5))
    with pytest.raises(UsageError, match="never written over"):
        write_composition(target, parents, (0.5, 0.5))
    file = target / "config.json"
    text = file.read_text()
    for broken in (text[:-20], "[]", text.replace("ComposedPolicy", "Other"), text.replace('"weights"', '"wights"')):
        file.write_text(broken)
        with pytest.raises(UsageError, match=r"config\.json"):
            ComposedPolicy.from_pretrained(target)
    file.write_text(
        text.replace('"n_action": null', '"colour": 1').replace('"options": {}', '"options": {"colour": 1}')
    )
    with pytest.raises(UsageError, match="colour"):
        ComposedPolicy.from_pretrained(target)
    (target / "parents" / "1" / "model.safetensors").unlink()
    file.write_text(text)
    with pytest.raises(UsageError, match="parents/1"):
        ComposedPolicy.from_pretrained(target)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".ab")]


def test_command(parents: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(path) for path in parents.values()]
    output = tmp_path / "ab"
    assert main(["compose", *names, "--weight", "0.3", "--weight", "0.7", "--output", str(output)]) == 0
    assert json.loads((output / "config.json").read_text())["weights"] == [0.3, 0.7]
    capsys.readouterr()
    other = str(tmp_path / "other")
    cases = [
        ([*names, "--output", str(output)], "exists"),
        ([names[0], "--output", other], "two or more"),
        ([*names, "--weight", "1", "--output", other], "one each"),
        ([*names, "--weight", ".5", "--weight", ".5", "--fit-env", POINT, "--output", other], "one of the two"),
        ([*names, "--operator", "and", "--fit-env", POINT, "--output", other], "operator 'and'"),
        ([*names, "--validation", "5", "--output", other], "give --fit-env"),
        ([*names, "--operator", "xor", "--output", other], "Known: convex, and, or"),
        ([names[0], str(tmp_path / "absent"), "--output", other], "no policy at"),
    ]
    for arguments, text in cases:
        assert main(["compose", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    assert not Path(other).exists()


def test_fitted_weights_are_written(
    parents: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fitted"
    words = ["--fit-env", POINT, "--validation", "4", "--episodes", "3", "--step", "0.5", "--output", str(output)]
    assert main(["compose", *map(str, parents.values()), *words]) == 8, "none of these parents succeeds"
    table = json.loads((output / "config.json").read_text())
    assert table["weights"] == table["fit"]["best"] and len(table["fit"]["test_seeds"]) == 3
    assert not set(table["fit"]["test_seeds"]) & set(table["fit"]["validation_seeds"])
    assert "3 fresh seeds" in (output / "weights.md").read_text() and (output / "weights.svg").exists()
    said = capsys.readouterr()
    assert "3 fresh seeds" in said.out and "No pair is discordant" in said.out + said.err
    assert isinstance(load_policy(output), ComposedPolicy)


def test_one_policy_is_not_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "zero", "--env", POINT, "--paired", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "two or more" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
