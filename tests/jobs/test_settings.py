"""Precedence of TOML, flags and overrides; the run folder's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gencontrol.config import build, dump_toml
from gencontrol.errors import CheckpointError, DiskError, UsageError
from gencontrol.jobs.setup.runs import open_run, record
from gencontrol.jobs.setup.settings import RunConfig, check_output, describe, given_flags, merge, run_mode
from gencontrol.train.config import TrainConfig


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[train]\nlr = 1.0\nsteps = 1\nseed = 1\n[run]\nmodel = "toml"\n')
    table = merge(str(file), {"train.lr": 2.0, "train.steps": 2}, ["train.lr=3.0", "algorithm.beta=4"])
    assert table["train"] == {"lr": 3.0, "steps": 2, "seed": 1}
    assert table["run"] == {"model": "toml"}
    assert table["algorithm"] == {"beta": 4}


@pytest.mark.parametrize(
    ("content", "text"), [("lr = 1\n", "Put the option"), ("[trian]\nlr = 1\n", "Did you mean 'train'")]
)
def test_unknown_sections(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match=text):
        merge(str(file), {}, [])


def test_only_given_flags_count() -> None:
    routes = {"lr": "train.lr", "reward": "run.reward", "model": "run.model"}
    assert given_flags({"lr": None, "reward": [], "model": "m", "other": 1}, routes) == {"run.model": "m"}
    assert given_flags({"lr": 0.0, "reward": ("a",)}, routes) == {"train.lr": 0.0, "run.reward": ["a"]}
    assert given_flags({"precision": "no"}, {"precision": "train.precision"}) == {"train.precision": "fp32"}


@pytest.mark.parametrize(
    "bad", [{"reward": []}, {"lora_rank": -1}, {"lora_alpha": 0.0}, {"output": ""}, {"eval_count": 0}]
)
def test_ranges(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build(RunConfig, bad, "run")


def _table(steps: int = 3, lr: float = 1e-3, model: str = "bundled") -> dict[str, dict[str, Any]]:
    return describe([("run", RunConfig(model=model)), ("train", TrainConfig(steps=steps, lr=lr))])


def _used(folder: Path) -> None:
    """Leave the folder as a run does."""
    record(open_run(str(folder), _table()), {"kind": "test"})
    (folder / "config.toml").write_text(dump_toml(_table()))


def test_the_same_configuration_resumes_and_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _used(folder)
    assert open_run(str(folder), _table()).notes == ()
    with pytest.raises(UsageError, match=r"train.lr was 0.001, now 0.01.*--allow-change train.lr"):
        open_run(str(folder), _table(lr=1e-2))
    with pytest.raises(UsageError, match="run.model"):
        open_run(str(folder), _table(model="other"))
    run = open_run(str(folder), _table(lr=1e-2), allow=["train.lr"])
    assert run.notes == ("train.lr was 0.001, now 0.01",)


def test_more_steps_are_harmless(tmp_path: Path) -> None:
    _used(tmp_path / "run")
    assert open_run(str(tmp_path / "run"), _table(steps=9)).notes == ("train.steps was 3, now 9",)


def test_modes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_run(str(folder), _table(), mode="resume")
    open_run(str(folder), _table(), mode="fresh")
    _used(folder)
    with pytest.raises(UsageError, match="not empty"):
        open_run(str(folder), _table(), mode="fresh")
    assert run_mode({"resume": None, "fresh": True}) == "fresh"


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"other files \(thesis.tex\)"):
        open_run(str(tmp_path), _table())
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "thesis.tex")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write everywhere
    with pytest.raises(DiskError, match=f"{tmp_path} cannot be written"):
        open_run(str(tmp_path / "a" / "b"), _table())


def test_every_start_is_recorded(tmp_path: Path) -> None:
    import json

    folder = tmp_path / "run"
    for _ in range(2):
        record(open_run(str(folder), _table()), {"kind": "test"})
    facts = json.loads((folder / "run.json").read_text())
    assert facts["kind"] == "test"
    assert len(facts["starts"]) == 2
    assert facts["starts"][0]["versions"]["python"].startswith("3.")
