"""Precedence of TOML, flags and overrides; the run folder's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gencontrol.config import build, dump_toml
from gencontrol.errors import CheckpointError, DiskError, UsageError
from gencontrol.jobs.finetune import RunConfig
from gencontrol.jobs.setup.runs import open_run, record
from gencontrol.jobs.setup.settings import called, check_output, describe, merge, place
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


def test_no_precision_is_fp32() -> None:
    """As accelerate and diffusers call it."""
    assert merge(None, {"train.precision": "no"}, [])["train"] == {"precision": "fp32"}


def test_python_options_find_their_section() -> None:
    sections = {"run": RunConfig, "train": TrainConfig}
    assert place({"lr": 0.1, "lora_rank": 3}, sections) == {"run": {"lora_rank": 3}, "train": {"lr": 0.1}}
    with pytest.raises(UsageError, match="there is no option 'lora_rnk'. Did you mean 'lora_rank'"):
        place({"lora_rnk": 3}, sections)
    twice = {"train": TrainConfig, "again": TrainConfig}
    with pytest.raises(UsageError, match="write train__lr or again__lr"):
        place({"lr": 0.1}, twice)
    assert place({"again__lr": 0.1}, twice) == {"train": {}, "again": {"lr": 0.1}}


def test_objects_are_recorded_by_a_readable_name() -> None:
    assert called(test_precedence) == f"{__name__}:test_precedence"
    assert called(RunConfig()) == "a loaded RunConfig"
    assert called(["a", "b"]) == "2 texts" and called(Path("x")) == "x"


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
