"""`search` from command to report with tiny real pipelines: results, resuming to the same bits, what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from gencontrol.cli import main
from gencontrol.cli.search_settings import PARTICLES, TREES, SearchConfig, parse_branch, parse_widening
from gencontrol.config import load_toml
from gencontrol.errors import UsageError
from tests.faults.shim import Forked, in_child

REWARD = '''
import os
import pathlib
import signal

import torch

calls = 0
HERE = pathlib.Path(__file__).parent


def loud(samples, context):
    return samples.square().flatten(1).mean(1) * 100


def stopped(samples, context):
    """`loud`, and a signal in one call, once."""
    global calls
    calls += 1
    flag = HERE / "signal"
    if flag.exists() and calls == 3:
        number = int(flag.read_text())
        flag.unlink()
        os.kill(os.getpid(), number)
    return loud(samples, context)


def slow(samples, context):
    import time
    time.sleep(0.05)
    return loud(samples, context)


def picky(samples, context):
    if len(samples) > 1:
        raise RuntimeError("one at a time")
    if float(samples.sum()) > 0:
        raise ValueError("too positive")
    return loud(samples, context)


def hopeless(samples, context):
    raise RuntimeError("no judge today")
'''


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of user rewards."""
    module = f"search_judge_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


def _command(model: Path, reward: str, output: Path, *options: str, nfe: int = 24) -> list[str]:
    names = ["--model", str(model), "--prompt", "a bell", "--reward", reward, "--output", str(output)]
    return ["search", *names, "--steps", "3", "--nfe", str(nfe), "--leaf-batch", "2", "--threads", "1", *options]


def _rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _same_tree(a: Path, b: Path) -> None:
    """Equal tensors and equal facts."""
    from gencontrol.sampling.tree_file import read

    (facts, tensors), (others, theirs) = read(a / "tree.safetensors"), read(b / "tree.safetensors")
    assert facts == others
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(theirs[name])), name


def _same_results(a: Path, b: Path) -> None:
    """Equal files of samples and equal tables, but for the clock."""
    names = sorted(file.name for file in (a / "samples").iterdir())
    assert names == sorted(file.name for file in (b / "samples").iterdir())
    for name in names:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes(), name
    for row, other in zip(_rows(a), _rows(b), strict=True):
        assert row | {"seconds": ""} == other | {"seconds": ""}


# ---------------------------------------------------------------- what is written


def test_results_and_report_of_a_forest(
    tiny_model: Path, judge: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = _command(tiny_model, f"{judge}:loud", run, "--prompts", str(prompts), "--count", "2")
    assert main(command) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    rows = _rows(run)
    assert [row["prompt"] for row in rows] == [
        p for p in ("a bell", "a bell", "two drums", "sad cello", "rain") for _ in "12"
    ]
    assert rows == [
        {key: str(value) for key, value in row.items()} for row in json.loads((run / "results.json").read_text())
    ]
    for row in rows:
        assert row["sampler"] == "dts-star" and 0 < int(row["nfe"]) <= 24
        assert (run / row["file"]).stat().st_size > 0 and row["file"].endswith(".wav")
    assert all(float(a["reward"]) >= float(b["reward"]) for a, b in zip(rows[::2], rows[1::2]))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[-1]["nfe"] == sum(int(row["nfe"]) for row in rows[::2])
    assert len(metrics[-1]["reward/best_each"]) == 5
    best = [float(row["reward"]) for row in rows[::2]]
    assert metrics[-1]["reward/best"] == pytest.approx(sum(best) / 5)
    assert load_toml(run / "config.toml")["search"]["nfe"] == 24
    page = (run / "report.html").read_text()
    assert page.count('class="chart tree"') == 5 and "“sad cello”" in page
    assert main(["report", str(run)]) == 0


def test_a_reward_is_the_one_of_its_file(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    """The sound on disk has the reward of the table, up to 16 bits."""
    from gencontrol.data.audio import read_audio

    assert main(_command(tiny_model, f"{judge}:loud", tmp_path / "run")) == 0
    for row in _rows(tmp_path / "run"):
        wave, _ = read_audio(tmp_path / "run" / row["file"])
        assert float(wave.square().mean() * 100) == pytest.approx(float(row["reward"]), rel=5e-3, abs=1e-3)


def test_dts_draws_distinct_leaves(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(_command(tiny_model, f"{judge}:loud", run, "--sampler", "dts", "--count", "3")) == 0
    assert len({row["reward"] for row in _rows(run)}) == 3
    found = json.loads((run / "search.json").read_text())["prompts"][0]
    assert found["stats"]["log_z_iw"] is not None and found["stats"]["log_z_tree"] is not None


@pytest.mark.parametrize("sampler", ["best-of-n", "snis", "smc"])
def test_particles(sampler: str, tiny_model: Path, judge: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(_command(tiny_model, f"{judge}:loud", run, "--sampler", sampler, "--prompt", "rain")) == 0
    rows = _rows(run)
    assert [int(row["nfe"]) for row in rows] == [24] * len(rows)
    assert {row["prompt"] for row in rows} == {"a bell", "rain"}
    page = (run / "report.html").read_text()
    assert "particles" in page and 'class="chart tree"' not in page


def test_best_of_n_and_tree_share_no_numbers_but_the_law(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    """The best of n is the largest of the population that the summary shows."""
    run = tmp_path / "run"
    assert main(_command(tiny_model, f"{judge}:loud", run, "--sampler", "best-of-n")) == 0
    found = json.loads((run / "search.json").read_text())["prompts"][0]
    assert float(_rows(run)[0]["reward"]) == max(found["grown_rewards"])
    assert len(found["grown_rewards"]) == 8  # 24 calls of 3 steps


def test_samples_that_cannot_be_scored(
    tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(_command(tiny_model, f"{judge}:picky", run, nfe=60)) == 0
    found = json.loads((run / "search.json").read_text())
    excluded = found["prompts"][0]["stats"]["excluded"]
    assert excluded > 0 and sum(found["excluded"].values()) == excluded
    assert "too positive" in (run / "report.html").read_text()
    assert main(_command(tiny_model, f"{judge}:hopeless", tmp_path / "none")) == 5
    assert "no judge today" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- going on


def test_finished_larger_and_other_budgets(
    tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def again(nfe: int, *options: str, folder: Path = run) -> int:
        return main(_command(tiny_model, f"{judge}:loud", folder, "--leaf-batch", "1", *options, nfe=nfe))

    assert again(24) == 0
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert again(24) == 0 and "finished before" in capsys.readouterr().err
    assert again(12) == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
    assert again(48) == 0 and "search.nfe was 24, now 48" in capsys.readouterr().err
    assert again(48, folder=tmp_path / "straight") == 0
    _same_tree(run, tmp_path / "straight")  # with one leaf a round there is no narrower last round
    _same_results(run, tmp_path / "straight")
    assert again(48, "--count", "1") == 0
    assert len(_rows(run)) == 1 and not list((run / "samples").glob("000_02*"))
    capsys.readouterr()
    assert again(48, "--temperature", "3") == 2
    assert "search.temperature was 0.1, now 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_ends_with_the_same_bits(
    number: int, code: int, tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _command(tiny_model, f"{judge}:stopped", tmp_path / "run", nfe=30)
    (tmp_path / "signal").write_text(str(int(number)))
    assert main(command) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert "same command" in last and last.startswith("gencontrol: error: ")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(lines) < 5 and not (tmp_path / "run" / "results.csv").exists()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "not finished" in (tmp_path / "run" / "report.html").read_text()
    assert main(command) == 0
    assert main(_command(tiny_model, f"{judge}:stopped", tmp_path / "whole", nfe=30)) == 0
    _same_tree(tmp_path / "run", tmp_path / "whole")
    _same_results(tmp_path / "run", tmp_path / "whole")


def test_kill_9_at_any_moment(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    """Killed at random moments until it is through; every file that is left can be read."""
    run = tmp_path / "run"
    command = _command(tiny_model, f"{judge}:slow", run, "--save-every", "0", nfe=60)
    kills = 0
    for delay in (0.15, 0.3, 0.6):
        child = Forked(lambda: main(command))
        begin = time.monotonic()
        while not (run / "metrics.jsonl").exists() and time.monotonic() - begin < 60:
            time.sleep(0.02)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills
    assert in_child(lambda: main(command)) == 0
    assert in_child(lambda: main(_command(tiny_model, f"{judge}:slow", tmp_path / "whole", nfe=60))) == 0
    _same_tree(run, tmp_path / "whole")
    _same_results(run, tmp_path / "whole")
    assert not list(run.rglob(".tmp_*"))


def test_a_stopped_particle_search_keeps_finished_prompts(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    options = ("--sampler", "snis", "--prompt", "rain", "--prompt", "wind")
    command = _command(tiny_model, f"{judge}:stopped", tmp_path / "run", *options)
    (tmp_path / "signal").write_text(str(int(signal.SIGINT)))  # in the third call, the first of the second prompt
    assert main(command) == 130
    assert len(list((tmp_path / "run").glob("particles_*"))) == 2
    assert main(command) == 0
    assert main(_command(tiny_model, f"{judge}:stopped", tmp_path / "whole", *options)) == 0
    _same_results(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------- refused


def test_bad_inputs(
    tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gencontrol.cli.search.search", lambda job: pytest.fail("something was loaded"))
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
    command = _command(tiny_model, f"{judge}:loud", run, nfe=12)
    assert main(command) == 0
    file = run / "tree.safetensors"
    whole = file.read_bytes()
    more = _command(tiny_model, f"{judge}:loud", run, nfe=24)
    for content in (b"", whole[: len(whole) // 2], b"not a tree at all"):
        file.write_bytes(content)
        capsys.readouterr()
        assert main(more) == 3
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(file) in error and "damaged" in error
        assert file.read_bytes() == content
    for change, name in ((("a bell", "a gong"), "prompt"), ((":loud", ":slow"), "reward")):
        assert main([word.replace(*change) for word in _command(tiny_model, f"{judge}:loud", other, nfe=12)]) == 0
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
    from tests.fixtures_models import tiny_text_to_audio

    model = tmp_path / "model"
    tiny_text_to_audio(seed=0).save_pretrained(model)
    assert main(_command(model, f"{judge}:loud", tmp_path / "run", nfe=12)) == 0
    tiny_text_to_audio(seed=1).save_pretrained(model)
    capsys.readouterr()
    assert main(_command(model, f"{judge}:loud", tmp_path / "run", nfe=24)) == 2
    assert "another model" in capsys.readouterr().err


def test_a_full_disk_is_exit_code_7_and_leaves_nothing_half_written(
    tiny_model: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gencontrol.files import FileLayer

    command = _command(tiny_model, f"{judge}:loud", tmp_path / "run", nfe=12)
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
    monkeypatch.setattr("gencontrol.cli.search.search", lambda job: pytest.fail("something was loaded"))
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
    assert main(_command(tiny_model, f"{judge}:loud", tmp_path / "a", "--branch", "3")) == 0
    assert main(["search", "--config", str(tmp_path / "a" / "config.toml"), "--output", str(tmp_path / "b")]) == 0
    _same_tree(tmp_path / "a", tmp_path / "b")


def test_branch_and_widening_texts() -> None:
    assert parse_branch("7") == 7 and parse_branch("all") == "all" and parse_branch("0.8, .5") == [0.8, 0.5]
    assert parse_widening("paper") == "paper" and parse_widening("2,0.7") == (2.0, 0.7)
    for text in ("0", "-1", "1.5", "a,b", ""):
        with pytest.raises(UsageError):
            parse_branch(text)
    for text in ("2", "0,0.5", "1,0", "inf,1"):
        with pytest.raises(UsageError):
            parse_widening(text)


def test_samplers_are_those_of_the_library() -> None:
    from gencontrol.sampling.search import SAMPLERS
    from gencontrol.sampling.tree_rules import RULES, WIDENINGS

    assert set(PARTICLES) == set(SAMPLERS)
    assert all(rule in RULES and widening in WIDENINGS for rule, widening in TREES.values())
    assert all(SearchConfig(sampler="dts", select=rule).select == rule for rule in RULES)


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

    from tests.fixtures_images import tiny_sd

    tiny_sd().save_pretrained(tmp_path / "sd")
    run = tmp_path / "run"
    assert main(_command(tmp_path / "sd", f"{judge}:loud", run, "--count", "1", nfe=12)) == 0
    with Image.open(run / _rows(run)[0]["file"]) as image:
        assert image.size == (16, 16)
    assert not list((run / "samples").glob("*.wav"))
    assert 'class="picture"' in (run / "report.html").read_text()


def test_gradient_samplers_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward and a decoder that pass gradients; sound is refused in one line, because its decoder passes none."""
    options = ["--prompt", "3", "--reward", "digit-class", "--steps", "3", "--nfe", "12", "--count", "1"]
    for sampler in ("tds", "dps"):
        words = ["--model", "bundled-digits", "--sampler", sampler, "--output", str(tmp_path / sampler)]
        assert main(["search", *words, *options]) == 0
        assert float(_rows(tmp_path / sampler)[0]["reward"]) <= 0


def test_sound_passes_no_gradient(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_command(tiny_model, "spectral-centroid", tmp_path / "run", "--sampler", "tds")) == 2
    assert "passes none" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
