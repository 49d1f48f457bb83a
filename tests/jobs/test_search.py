"""`search` from command to report with tiny real pipelines: results, resuming to the same bits."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from gencontrol.cli import main
from gencontrol.config import load_toml
from tests.helpers.search_run import same_results, same_tree, search_command, table_rows
from tests.helpers.shim import Forked, in_child

# ---------------------------------------------------------------- what is written


def test_results_and_report_of_a_forest(
    tiny_model: Path, judge: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = search_command(tiny_model, f"{judge}:loud", run, "--prompts", str(prompts), "--count", "2")
    assert main(command) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    rows = table_rows(run)
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

    assert main(search_command(tiny_model, f"{judge}:loud", tmp_path / "run")) == 0
    for row in table_rows(tmp_path / "run"):
        wave, _ = read_audio(tmp_path / "run" / row["file"])
        assert float(wave.square().mean() * 100) == pytest.approx(float(row["reward"]), rel=5e-3, abs=1e-3)


def test_dts_draws_distinct_leaves(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(search_command(tiny_model, f"{judge}:loud", run, "--sampler", "dts", "--count", "3")) == 0
    assert len({row["reward"] for row in table_rows(run)}) == 3
    found = json.loads((run / "search.json").read_text())["prompts"][0]
    assert found["stats"]["log_z_iw"] is not None and found["stats"]["log_z_tree"] is not None


def test_a_tree_that_never_branched_says_so_and_a_peer_is_drawn_at_equal_calls(
    tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = search_command(tiny_model, f"{judge}:loud", run, nfe=6)
    assert main(command) == 8, "two paths make no tree"
    said = capsys.readouterr()
    assert "never branched: its 2 scored samples are plain ones" in said.err
    assert "best of its 2 plain samples" in said.out and "never branched" in (run / "report.html").read_text()
    assert main([*command, "--peer"]) == 8
    row = json.loads((run / "search.json").read_text())["prompts"][0]
    assert (row["peer"]["count"], row["peer"]["nfe"]) == (2, row["nfe"]), "as many model calls, all of plain samples"
    assert f"({row['stats']['best'] - row['peer']['best']:+.4f})" in capsys.readouterr().out
    assert "Above best of n at equal calls" in (run / "report.html").read_text()
    assert row["base"]["reward"] == max(row["base_rewards"])


@pytest.mark.parametrize("sampler", ["best-of-n", "snis", "smc", "islands"])
def test_particles(sampler: str, tiny_model: Path, judge: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(search_command(tiny_model, f"{judge}:loud", run, "--sampler", sampler, "--prompt", "rain")) == 0
    rows = table_rows(run)
    assert [int(row["nfe"]) for row in rows] == [24] * len(rows)
    assert {row["prompt"] for row in rows} == {"a bell", "rain"}
    page = (run / "report.html").read_text()
    assert "particles" in page and 'class="chart tree"' not in page


def test_best_of_n_and_tree_share_no_numbers_but_the_law(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    """The best of n is the largest of the population that the summary shows."""
    run = tmp_path / "run"
    assert main(search_command(tiny_model, f"{judge}:loud", run, "--sampler", "best-of-n")) == 0
    found = json.loads((run / "search.json").read_text())["prompts"][0]
    assert float(table_rows(run)[0]["reward"]) == max(found["grown_rewards"])
    assert len(found["grown_rewards"]) == 8  # 24 calls of 3 steps


def test_samples_that_cannot_be_scored(
    tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(search_command(tiny_model, f"{judge}:picky", run, nfe=60)) == 0
    found = json.loads((run / "search.json").read_text())
    excluded = found["prompts"][0]["stats"]["excluded"]
    assert excluded > 0 and sum(found["excluded"].values()) == excluded
    assert "too positive" in (run / "report.html").read_text()
    assert main(search_command(tiny_model, f"{judge}:hopeless", tmp_path / "none")) == 5
    assert "no judge today" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- going on


def test_finished_larger_and_other_budgets(
    tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def again(nfe: int, *options: str, folder: Path = run) -> int:
        return main(search_command(tiny_model, f"{judge}:loud", folder, "--leaf-batch", "1", *options, nfe=nfe))

    assert again(24) == 0
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert again(24) == 0 and "finished before" in capsys.readouterr().err
    assert again(12) == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
    assert again(48) == 0 and "search.nfe was 24, now 48" in capsys.readouterr().err
    assert again(48, folder=tmp_path / "straight") == 0
    same_tree(run, tmp_path / "straight")  # with one leaf a round there is no narrower last round
    same_results(run, tmp_path / "straight")
    assert again(48, "--count", "1") == 0
    assert len(table_rows(run)) == 1 and not list((run / "samples").glob("000_02*"))
    capsys.readouterr()
    assert again(48, "--temperature", "3") == 2
    assert "search.temperature was 0.1, now 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_ends_with_the_same_bits(
    number: int, code: int, tiny_model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = search_command(tiny_model, f"{judge}:stopped", tmp_path / "run", nfe=30)
    (tmp_path / "signal").write_text(str(int(number)))
    assert main(command) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert "same command" in last and last.startswith("gencontrol: error: ")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(lines) < 5 and not (tmp_path / "run" / "results.csv").exists()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "not finished" in (tmp_path / "run" / "report.html").read_text()
    assert main(command) == 0
    assert main(search_command(tiny_model, f"{judge}:stopped", tmp_path / "whole", nfe=30)) == 0
    same_tree(tmp_path / "run", tmp_path / "whole")
    same_results(tmp_path / "run", tmp_path / "whole")


def test_kill_9_at_any_moment(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    """Killed at random moments until it is through; every file that is left can be read."""
    run = tmp_path / "run"
    command = search_command(tiny_model, f"{judge}:slow", run, "--save-every", "0", nfe=60)
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
    assert in_child(lambda: main(search_command(tiny_model, f"{judge}:slow", tmp_path / "whole", nfe=60))) == 0
    same_tree(run, tmp_path / "whole")
    same_results(run, tmp_path / "whole")
    assert not list(run.rglob(".tmp_*"))


def test_a_stopped_particle_search_keeps_finished_prompts(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    options = ("--sampler", "snis", "--prompt", "rain", "--prompt", "wind")
    command = search_command(tiny_model, f"{judge}:stopped", tmp_path / "run", *options)
    (tmp_path / "signal").write_text(str(int(signal.SIGINT)))  # in the third call, the first of the second prompt
    assert main(command) == 130
    assert len(list((tmp_path / "run").glob("particles_*"))) == 2
    assert main(command) == 0
    assert main(search_command(tiny_model, f"{judge}:stopped", tmp_path / "whole", *options)) == 0
    same_results(tmp_path / "run", tmp_path / "whole")


def test_stopped_islands_go_on_to_the_same_bits(
    tiny_model: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second of two islands; then a larger budget, which adds one and draws nothing again."""
    from gencontrol.sampling.particles import islands

    monkeypatch.setattr(islands, "ALONE", 4)
    options = ("--sampler", "islands", "--count", "2")
    command = search_command(tiny_model, f"{judge}:stopped", tmp_path / "run", *options, nfe=30)
    (tmp_path / "signal").write_text(str(int(signal.SIGINT)))
    assert main(command) == 130
    assert "same command" in capsys.readouterr().err.splitlines()[-1]
    assert len(list((tmp_path / "run").glob("islands_*"))) == 1 and not list((tmp_path / "run").glob("particles_*"))
    assert main(command) == 0
    assert main(search_command(tiny_model, f"{judge}:stopped", tmp_path / "whole", *options, nfe=30)) == 0
    same_results(tmp_path / "run", tmp_path / "whole")
    capsys.readouterr()
    assert main(command) == 0 and "a larger --nfe goes on" in capsys.readouterr().err
    for folder in ("run", "whole"):
        assert main(search_command(tiny_model, f"{judge}:stopped", tmp_path / folder, *options, nfe=60)) == 0
    same_results(tmp_path / "run", tmp_path / "whole")
    assert int(table_rows(tmp_path / "run")[0]["nfe"]) == 60
    found = json.loads((tmp_path / "run" / "search.json").read_text())["prompts"][0]
    assert "few independent starts" in found["warnings"][0]
    (tmp_path / "run" / "islands_000.safetensors").write_bytes(b"damaged")
    assert main(search_command(tiny_model, f"{judge}:loud", tmp_path / "run", *options, nfe=90)) != 0
