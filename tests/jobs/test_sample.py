"""`sample`: files, table, seeds, scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gencontrol.cli import main
from gencontrol.data.audio import read_audio


def _table(folder: Path) -> dict[str, object]:
    return json.loads((folder / "samples.json").read_text())


def test_files_and_scores(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["sample", "--model", str(tiny_model), "--prompt", "a bell", "--prompt", "rain", "--output", str(out)]
    assert main([*command, "--num", "2", "--num_inference_steps", "2", "--reward", "spectral-centroid"]) == 0
    table = _table(out)
    rows = table["samples"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("a bell", 0), ("a bell", 1), ("rain", 2), ("rain", 3)]
    assert all(isinstance(row["reward"], float) for row in rows)
    assert table["sampling_rate"] == 16000
    for row in rows:
        assert all((out / name).stat().st_size > 0 for name in row["files"])
        wave, rate = read_audio(out / next(name for name in row["files"] if name.endswith(".wav")))
        assert rate == 16000 and wave.shape == (1, 2048)
    assert capsys.readouterr().out.count("a bell") == 2


def test_a_seed_gives_the_same_sound_again(tiny_model: Path, tmp_path: Path) -> None:
    command = ["sample", "--model", str(tiny_model), "--prompt", "a bell", "--steps", "2"]
    assert main([*command, "--num", "2", "--seed", "5", "--output", str(tmp_path / "a")]) == 0
    assert main([*command, "--num", "1", "--seed", "6", "--output", str(tmp_path / "b")]) == 0
    first, second = read_audio(tmp_path / "a" / "000_01.wav")[0], read_audio(tmp_path / "b" / "000_00.wav")[0]
    assert (first - second).abs().max() < 1e-3  # another batch size: equal noise, rounding and 16-bit steps apart
    assert (read_audio(tmp_path / "a" / "000_00.wav")[0] - second).abs().max() > 1e-2


def test_a_set_reward_scores_the_whole(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "whole_set_judge"
    (tmp_path / f"{module}.py").write_text(
        "from gencontrol.rewards import ItemAsSet, load_reward\n\nWhole = ItemAsSet(load_reward('spectral-centroid'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["sample", "--model", str(tiny_model), "--prompt", "a bell", "--steps", "1", "--num", "2"]
    assert main([*command, "--reward", f"{module}:Whole", "--output", str(tmp_path / "out")]) == 0
    table = _table(tmp_path / "out")
    assert isinstance(table["set_reward"], float)
    assert all("reward" not in row for row in table["samples"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prompt", " "], "no prompt"),
        (["--prompt", "a", "--steps", "0"], "steps = 0"),
        (["--prompt", "a", "--num", "0"], "num = 0"),
        (["--prompt", "a", "--reference", "x"], "without --reward"),
        (["--prompt", "a", "--reward", "clapp"], "Did you mean 'clap'?"),
        (["--prompt", "a", "--lora", "absent"], "absent"),
    ],
)
def test_refusals(
    options: list[str], text: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--model", str(tiny_model), "--output", str(tmp_path / "out"), *options]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "samples.json").exists()
