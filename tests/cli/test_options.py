"""Spelling of options: aliases, underscores, unknown names, and the one-line errors with their exit codes."""

from __future__ import annotations

import pytest

from gencontrol.cli import main
from gencontrol.cli.options import ALIASES, HINTS, normalise
from gencontrol.config import RENAMED
from gencontrol.errors import UsageError

KNOWN = {"steps": "one", "output": "one", "lora-rank": "one", "resume": "", "model": "one", "prompt": "many"}


def test_underscores_aliases_and_values() -> None:
    typed = ["--max_train_steps", "5", "--output_dir=runs/a", "--rank", "4", "--resume", "algorithm.beta=1"]
    assert normalise(typed, KNOWN, "finetune") == [
        *("--steps", "5", "--output=runs/a", "--lora-rank", "4", "--resume", "algorithm.beta=1"),
    ]


def test_a_value_that_looks_like_an_option_is_left_alone() -> None:
    assert normalise(["--prompt", "--output_dir"], KNOWN, "sample") == ["--prompt", "--output_dir"]
    assert normalise(["--", "--whatever"], KNOWN, "bench") == ["--", "--whatever"]


def test_diffusers_resume_is_understood() -> None:
    assert normalise(["--resume_from_checkpoint", "latest", "--steps", "3"], KNOWN, "f") == ["--resume", "--steps", "3"]
    assert normalise(["--resume_from_checkpoint=latest"], KNOWN, "f") == ["--resume"]
    with pytest.raises(UsageError, match="newest intact"):
        normalise(["--resume_from_checkpoint", "checkpoint-500"], KNOWN, "f")


@pytest.mark.parametrize("name", ["stepz", "ouput", "lora-rnk"])
def test_unknown_options_name_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match="Did you mean '--"):
        normalise([f"--{name}", "1"], KNOWN, "finetune")


def test_one_option_under_two_names_is_refused() -> None:
    with pytest.raises(UsageError, match="--steps and --max_train_steps are one option, --steps; give it once"):
        normalise(["--steps", "3", "--max_train_steps", "5"], KNOWN, "finetune")
    assert normalise(["--lora-rank", "3", "--lora_rank", "5"], KNOWN, "finetune")[-1] == "5"


def test_an_earlier_name_is_refused_with_the_one_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "adapter_size", "lora_rank")
    with pytest.raises(UsageError, match="--adapter-size is now called --lora-rank"):
        normalise(["--adapter-size", "3"], KNOWN, "finetune")


def test_the_singular_of_a_list_is_understood() -> None:
    known = {"keys": "many", "steps": "one"}
    assert normalise(["--key", "a", "--key", "b"], known, "train") == ["--keys", "a", "--keys", "b"]
    with pytest.raises(UsageError):
        normalise(["--step", "1"], known, "train")


def test_abbreviations_are_off() -> None:
    with pytest.raises(UsageError, match="no option --step"):
        normalise(["--step", "1"], KNOWN, "finetune")


def test_sampler_steps_are_not_training_steps() -> None:
    assert normalise(["--num_inference_steps", "8"], KNOWN, "sample") == ["--steps", "8"]
    with pytest.raises(UsageError):
        normalise(["--num_inference_steps", "8"], KNOWN, "finetune")


def test_every_hint_is_about_a_name_without_twin() -> None:
    assert not HINTS.keys() & ALIASES.keys()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["finetune", "--stepz", "3"], 2, "Did you mean '--steps'?"),
        (["finetun"], 2, "finetune"),
        (["finetune", "--steps", "many"], 2, "--steps"),
        (["finetune", "--gradient_accumulation_steps", "4"], 2, "--micro-batch"),
        (["finetune", "--resume", "--fresh"], 2, "exclude each other"),
        (["finetune", "beta=100"], 2, "section.key=value"),
        (["finetune", "--config", "absent.toml"], 2, "does not exist"),
        (["finetune", "--algorithm", "dragom", "--dry-run"], 2, "Did you mean 'dragon'?"),
        (["finetune", "--set", "train.step=3", "--dry-run"], 2, "Did you mean 'steps'?"),
        (["finetune", "--precision", "fp8", "--dry-run"], 2, "precision"),
        (["pretrain", "flov"], 2, "Did you mean 'flow'?"),
        (["pretrain", "flow", "--data", "absent"], 2, "pretrain sound-data"),
        (["bench", "dragn"], 2, "Did you mean 'dragon'?"),
        (["report", "absent"], 2, "does not exist"),
        (["sample"], 2, "--prompt"),
    ],
)
def test_errors_are_one_line_with_a_code(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("gencontrol: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert text in error


def test_debug_shows_the_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GENCONTROL_DEBUG", "1")
    assert main(["report", "absent"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gencontrol ")
    for command in ("finetune", "sample", "pretrain", "report", "doctor", "bench"):
        assert main([command, "--help"]) == 0, command
    assert "--lora-rank" in capsys.readouterr().out
