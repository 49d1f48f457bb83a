"""Each example is short, runs as its docstring says, prints something, and says in one line what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str, cwd: Path, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, by choice as if the package `without` were not installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    if without:
        block = f"import sys, runpy; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]"
        command[1:2] = ["-c", f"{block}; runpy.run_path(sys.argv[0], run_name='__main__')", command[1]]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def printed(name: str, *arguments: str, cwd: Path) -> str:
    done = run(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith('"""')


def test_there_are_at_least_six() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.slow
def test_own_reward(tmp_path: Path) -> None:
    text = printed("own_reward.py", "out", cwd=tmp_path)
    assert "blue before" in text
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_own_pipeline(tmp_path: Path) -> None:
    from tests.helpers.fixtures_images import tiny_sd3

    tiny_sd3().save_pretrained(tmp_path / "sd3")
    text = printed("finetune_own_pipeline.py", "sd3", "out", cwd=tmp_path)
    assert "reward of the last round" in text and "a picture:" in text
    assert list((tmp_path / "out" / "final" / "lora").iterdir())


@pytest.mark.slow
def test_tree_search(tmp_path: Path) -> None:
    text = printed("tree_search.py", cwd=tmp_path)
    share = float(text.split("weighted: ")[1].split()[0])
    # the chain's own law has 0.920; 20,000 calls leave a deviation of 0.011 between seeds, and 2000 draws one of 0.006
    assert abs(share - 0.920) < 0.05


@pytest.mark.slow
def test_particles(tmp_path: Path) -> None:
    text = printed("particles.py", cwd=tmp_path)
    share = {
        line.split(":")[0].strip(): float(line.split("right mode ")[1].split(",")[0]) for line in text.splitlines()[1:]
    }
    assert len(share) == 8
    for name in (
        "islands",
        "snis",
        "smc",
        "tds",
        "das",
    ):  # 400 paths: deviation below 0.03
        assert abs(share[name] - 0.920) < 0.08, name


def test_own_sampler_step(tmp_path: Path) -> None:
    lines = printed("own_sampler_step.py", cwd=tmp_path).splitlines()
    deviation = [float(line.split("deviation ")[1].split()[0]) for line in lines]
    assert abs(deviation[1] - 0.2) < abs(deviation[0] - 0.2)


@pytest.mark.slow
def test_robots(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium_robotics", reason='needs pip install "gencontrol[robotics]"')
    assert "of 4 succeeded" in printed("robot_policy.py", "robot", "2", "4", cwd=tmp_path)
    parents = ("robot/run/final", "robot/run/final")
    text = printed("compose_policies.py", *parents, "PointMaze_UMaze-v3", "2", cwd=tmp_path)
    assert text.count("of 2 succeed") == 3


@pytest.mark.parametrize("name", ["robot_policy.py", "compose_policies.py"])
def test_a_missing_extra_is_one_line(tmp_path: Path, name: str) -> None:
    done = run(name, "a", "b", "PointMaze_UMaze-v3", cwd=tmp_path, without="gymnasium_robotics")
    assert done.returncode == 1 and "gencontrol[robotics]" in done.stderr and done.stderr.count("\n") == 1
