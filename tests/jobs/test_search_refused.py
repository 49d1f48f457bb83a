"""`search`: what is refused in one line, the plan, the settings, and pipelines of other media."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gencontrol.cli import main
from gencontrol.errors import UsageError
from gencontrol.jobs.search.config import SearchConfig, parse_branch, parse_widening
from tests.helpers.search_run import same_tree, search_command, table_rows

# ---------------------------------------------------------------- refused


def test_bad_inputs(
    tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gencontrol.jobs.search.job._load", lambda *job: pytest.fail("something was loaded"))
    (tmp_path / "nomodel").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("Geige, süß".encode("latin-1"))
    good = {"--model": tiny_model, "--prompt": "a bell", "--output": tmp_path / "run", "--reward": "spectral-centroid"}
    good |= {"--steps": 4, "--nfe": 40}
    cases: list[tuple[dict[str, object], int, str]] = [
        ({"--sampler": "dts-starr"}, 2, "Did you mean 'dts-star'?"),
        ({"--reward": "clapp"}, 2, "Did you mean 'clap'?"),
        ({"--reward": "fad-set"}, 2, "whole sets"),
        ({"--reward": "vendi"}, 2, "whole sets"),
        ({"--reward": "quality", "--sampler": "tds"}, 2, "no gradient"),
        ({"--reward": "quality", "--sampler": "das"}, 2, "no gradient"),
        ({"--reward": "quality", "--sampler": "dps"}, 2, "no gradient"),
        ({"--reward": "quality", "--set": "search.gradient=1"}, 2, "no gradient"),
        ({"--temperature": 0}, 2, "temperature = 0"),
        ({"--temperature": -1}, 2, "temperature = -1"),
        ({"--temperature": "nan"}, 2, "temperature = nan"),
        ({"--nfe": 3}, 2, "less than the 4 model calls"),
        ({"--sampler": "beam", "--nfe": 30}, 2, "less than the 31 model calls"),
        ({"--branch": "0.6"}, 2, "not in the time grid"),
        ({"--branch": "0.25"}, 2, "siblings there would be equal"),
        ({"--branch": "9"}, 2, "9 segments"),
        ({"--branch": "often"}, 2, "'often'"),
        ({"--widening": "papr"}, 2, "Did you mean 'paper'?"),
        ({"--widening": "2,3"}, 2, "alpha in (0, 1]"),
        ({"--select": "utc"}, 2, "Did you mean 'uct'?"),
        ({"--sampler": "smc", "--select": "uct"}, 2, "no effect on smc"),
        ({"--backup": "hard"}, 2, "Known: soft, max"),
        ({"--count": 0}, 2, "count = 0"),
        ({"--precision": "fp16"}, 2, "fp32"),
        ({"--prompt": " "}, 2, "no prompt"),
        ({"--prompts": tmp_path / "absent.txt"}, 2, "does not exist"),
        ({"--prompts": tmp_path / "empty.txt"}, 2, "holds no prompt"),
        ({"--prompts": tmp_path / "latin.txt"}, 2, "not UTF-8"),
        ({"--model": tmp_path / "nomodel"}, 2, "model_index.json"),
        ({"--model": "./absent"}, 2, "does not exist"),
        ({"--output": prompts}, 2, "is a file"),
        ({"--set": "search.temprature=1"}, 2, "Did you mean 'temperature'?"),
        ({"--temprature": 1}, 2, "Did you mean '--temperature'?"),
    ]
    for change, code, text in cases:
        words = [str(word) for pair in {**good, **change}.items() for word in pair]
        assert main(["search", *words]) == code, change
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, (change, error)
    assert not (tmp_path / "run").exists()


def test_no_prompt_at_all(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--model", str(tiny_model), "--output", str(tmp_path / "run")]) == 2
    assert "--prompt TEXT" in capsys.readouterr().err


def test_trees_that_do_not_belong_here(
    tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged tree, and one of another model, prompt or reward: one line each, and the file stays as it is."""
    run, other = tmp_path / "run", tmp_path / "other"
    command = search_command(tiny_model, f"{judge}:loud", run, nfe=12)
    assert main(command) == 0
    file = run / "tree.safetensors"
    whole = file.read_bytes()
    more = search_command(tiny_model, f"{judge}:loud", run, nfe=24)
    for content in (b"", whole[: len(whole) // 2], b"not a tree at all"):
        file.write_bytes(content)
        capsys.readouterr()
        assert main(more) == 3
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(file) in error and "damaged" in error
        assert file.read_bytes() == content
    for change, name in ((("a bell", "a gong"), "prompt"), ((":loud", ":slow"), "reward")):
        assert main([word.replace(*change) for word in search_command(tiny_model, f"{judge}:loud", other, nfe=12)]) == 0
        file.write_bytes((other / "tree.safetensors").read_bytes())
        capsys.readouterr()
        assert main(more) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"another (condition|prompt|reward)", error) and str(file) in error, name
        for old in sorted(other.rglob("*"), reverse=True):
            old.rmdir() if old.is_dir() else old.unlink()
    file.write_bytes(whole)
    assert main(more) == 0


def test_another_model_under_the_same_name(
    tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.fixtures_models import tiny_text_to_audio

    model = tmp_path / "model"
    tiny_text_to_audio(seed=0).save_pretrained(model)
    assert main(search_command(model, f"{judge}:loud", tmp_path / "run", nfe=12)) == 0
    tiny_text_to_audio(seed=1).save_pretrained(model)
    capsys.readouterr()
    assert main(search_command(model, f"{judge}:loud", tmp_path / "run", nfe=24)) == 2
    assert "another model" in capsys.readouterr().err


def test_a_full_disk_is_exit_code_7_and_leaves_nothing_half_written(
    tiny_model: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gencontrol.files import FileLayer

    command = search_command(tiny_model, f"{judge}:loud", tmp_path / "run", nfe=12)
    write = FileLayer.write

    def full(self: FileLayer, path: Path, data: bytes) -> str:
        if "tree" in path.name:
            path.write_bytes(data[:10])
            raise OSError(28, "No space left on device", str(path))
        return write(self, path, data)

    monkeypatch.setattr(FileLayer, "write", full)
    assert main(command) == 7
    assert "disk is full" in capsys.readouterr().err
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith(".tmp")]
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(command) == 0


# ---------------------------------------------------------------- plan and settings


def test_dry_run_loads_and_writes_nothing(
    tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gencontrol.jobs.search.job._load", lambda *job: pytest.fail("something was loaded"))
    command = ["search", "--model", str(tiny_model), "--prompts", str(prompts), "--output", str(tmp_path / "run")]
    assert main([*command, "--steps", "10", "--nfe", "100", "--branch", "0.8,0.5", "--dry-run", "search.seed=7"]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for part in (
        "100 model calls per prompt × 4 prompts = 400",
        "3 levels below the root, at times 0.8, 0.5, 0",
        "segments of 2, 3, 5 steps; widening 1·N^0.5",
        "10 whole ones to 20 that only take the last segment",
        "8×16 float32 = 0.5 KiB per node",
        "at most 200 nodes",
    ):
        assert part in out, part
    again = tmp_path / "again.toml"
    again.write_text(out[out.index("[run]") :])
    assert main(["search", "--config", str(again), "--dry-run"]) == 0
    assert "seed = 7" in capsys.readouterr().out


def test_the_saved_configuration_repeats_the_search(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    assert main(search_command(tiny_model, f"{judge}:loud", tmp_path / "a", "--branch", "3")) == 0
    assert main(["search", "--config", str(tmp_path / "a" / "config.toml"), "--output", str(tmp_path / "b")]) == 0
    same_tree(tmp_path / "a", tmp_path / "b")


def test_branch_and_widening_texts() -> None:
    assert parse_branch("7") == 7 and parse_branch("all") == "all" and parse_branch("0.8, .5") == [0.8, 0.5]
    assert parse_widening("paper") == "paper" and parse_widening("2,0.7") == (2.0, 0.7)
    for text in ("0", "-1", "1.5", "a,b", ""):
        with pytest.raises(UsageError):
            parse_branch(text)
    for text in ("2", "0,0.5", "1,0", "inf,1"):
        with pytest.raises(UsageError):
            parse_widening(text)


def test_the_table_of_samplers_names_what_the_library_has() -> None:
    from gencontrol.registry import resolve_dotted
    from gencontrol.sampling.samplers import PARTICLES, SAMPLERS, TREES
    from gencontrol.sampling.tree.rules import RULES, WIDENINGS

    assert {*TREES, *PARTICLES} == set(SAMPLERS) and len(SAMPLERS) == 10
    assert all(SAMPLERS[name].select in RULES and SAMPLERS[name].widening in WIDENINGS for name in TREES)
    assert all(callable(resolve_dotted(SAMPLERS[name].call, "sampler")) for name in PARTICLES)
    assert all(SearchConfig(sampler="dts", select=rule).select == rule for rule in RULES)
    assert all(parse_widening(name) == name for name in WIDENINGS)
    assert all(name in (SearchConfig.__doc__ or "") for name in SAMPLERS)


def test_steps_may_be_called_as_in_diffusers(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_model), "--prompt", "a", "--output", str(tmp_path / "run"), "--dry-run"]
    assert main(["search", *words, "--num_inference_steps", "6", "--reward", "quality"]) == 0
    assert "6 steps = 6 model calls" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_pictures_of_a_diffusers_pipeline(judge: str, tmp_path: Path) -> None:
    """A folder that diffusers saved: pictures at their own size, no sound."""
    from PIL import Image

    from tests.helpers.fixtures_images import tiny_sd

    tiny_sd().save_pretrained(tmp_path / "sd")
    run = tmp_path / "run"
    assert main(search_command(tmp_path / "sd", f"{judge}:loud", run, "--count", "1", nfe=12)) == 0
    with Image.open(run / table_rows(run)[0]["file"]) as image:
        assert image.size == (16, 16)
    assert not list((run / "samples").glob("*.wav"))
    assert 'class="picture"' in (run / "report.html").read_text()


def test_gradient_samplers_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward and a decoder that pass gradients; sound is refused in one line, because its decoder passes none."""
    options = ["--prompt", "3", "--reward", "digit-class", "--steps", "3", "--nfe", "12", "--count", "1"]
    for sampler in ("tds", "dps"):
        words = ["--model", "bundled-digits", "--sampler", sampler, "--output", str(tmp_path / sampler)]
        assert main(["search", *words, *options]) == 0
        assert float(table_rows(tmp_path / sampler)[0]["reward"]) <= 0


def test_sound_passes_no_gradient(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(search_command(tiny_model, "spectral-centroid", tmp_path / "run", "--sampler", "tds")) == 2
    assert "passes none" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
