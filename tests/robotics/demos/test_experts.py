"""Scripted experts and the recording of their episodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gencontrol.bench.gpc.sensed import SENSED, sensor_error
from gencontrol.cli import main
from gencontrol.errors import UsageError
from gencontrol.robotics.datasets.convert import read_episodes
from gencontrol.robotics.demos.collect import collect
from gencontrol.robotics.demos.experts import FetchPickAndPlaceExpert, Flaws, PointMazeExpert, expert_for
from gencontrol.robotics.envs.vector import make_envs

pytest.importorskip("gymnasium_robotics", reason='needs pip install "gencontrol[robotics]"')
CAMERAS = "gencontrol.bench.gpc.sensed:make_two_cameras"
MAZE = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]


def test_shortest_way_through_a_maze() -> None:
    """Distances of breadth-first search, counted by hand; cells and their centres are each other's inverse."""
    expert = PointMazeExpert(MAZE)
    distances = expert.distances((3, 1))
    assert [distances[cell] for cell in ((3, 1), (3, 3), (2, 3), (1, 3), (1, 1))] == [0, 2, 3, 4, 6]
    assert np.isinf(distances[0, 0]) and np.isinf(distances[2, 1])
    for cell in ((1, 1), (2, 3), (3, 2)):
        assert expert.cell_of(expert.centre_of(cell)) == cell
    assert expert.centre_of((1, 1)).tolist() == [-1.0, 1.0]


def test_flaws_are_functions_of_the_seed() -> None:
    """Neither the row nor its neighbours change an action; noise, delay and bias do."""
    expert = PointMazeExpert(MAZE, flaws=Flaws(noise=0.3, bias=0.1))
    seen = {
        "observation": np.array([[-1.0, 1.0, 0, 0], [0.0, -1.0, 0, 0]], np.float32),
        "desired_goal": np.array([[-1.0, -1.0], [-1.0, -1.0]], np.float32),
    }
    expert.reset(seeds=[7, 8])
    both = expert.select_action(seen)
    expert.reset([5], [8])
    alone = expert.select_action({key: value[1:] for key, value in seen.items()}, [5])
    assert np.array_equal(both[1], alone[0])
    exact = PointMazeExpert(MAZE, flaws=Flaws(noise=0.0))
    exact.reset(seeds=[7, 8])
    assert exact.select_action(seen).tolist() == [[1.0, 0.0], [-1.0, 0.0]]  # along the corridors, saturated
    late = PointMazeExpert(MAZE, flaws=Flaws(noise=0.0, delay=1))
    late.reset(seeds=[7, 8])
    first = late.select_action(seen)
    swapped = {key: value[::-1] for key, value in seen.items()}
    assert np.array_equal(late.select_action(swapped), first)
    assert not np.array_equal(late.select_action(swapped), first)
    with pytest.raises(UsageError, match="negative"):
        Flaws(noise=-1.0)


def test_bias_has_the_stated_deviation() -> None:
    """400 episodes: the standard error of a deviation is 3.5 %, so 12 % is more than three of them."""
    expert = FetchPickAndPlaceExpert(Flaws(bias=0.02))
    errors = np.stack([expert._begin(seed).error for seed in range(400)])
    assert errors.std(0) == pytest.approx([0.02, 0.02, 0.006], rel=0.12)
    cameras = np.stack([sensor_error(seed, "camera_a", 0.01) for seed in range(400)])
    assert cameras.std(0) == pytest.approx([0.01, 0.01, 0.003], rel=0.12)
    other = np.stack([sensor_error(seed, "camera_b", 0.01) for seed in range(400)])
    assert abs(np.corrcoef(cameras[:, 0], other[:, 0])[0, 1]) < 0.15  # three standard errors of 400 pairs


def test_fetch_demonstrations_succeed_and_cameras_see_with_their_error() -> None:
    """Four of four seeds: the page measured 60 of 60."""
    with make_envs(CAMERAS, 2, kwargs={"sigma_a": 0.02}, isolation="inline") as envs:
        found = collect(FetchPickAndPlaceExpert(Flaws(0.1)), envs, range(4))
        again = collect(FetchPickAndPlaceExpert(Flaws(0.1)), envs, [2, 1, 0], keep=1)
    assert (found.attempted, found.succeeded, len(found.episodes)) == (4, 4, 4)
    assert [episode.seed for episode in found.episodes] == [0, 1, 2, 3]
    first = found.episodes[0]
    assert first.observations["camera_a"].shape == (len(first) + 1, SENSED)
    error = first.observations["camera_a"][:, 3:6] - first.observations["observation"][:, 3:6]
    assert error == pytest.approx(np.broadcast_to(sensor_error(0, "camera_a", 0.02), error.shape), abs=1e-6)
    assert np.array_equal(again.episodes[0].actions, found.episodes[2].actions)  # whatever ran beside it


def test_failures_are_counted_and_none_kept_is_said() -> None:
    """A time limit of five steps is too short for anything."""
    with make_envs("PointMaze_UMaze-v3", 1, time_limit=5, isolation="inline") as envs:
        expert = expert_for("PointMaze_UMaze-v3", Flaws(0.0))
        with pytest.raises(UsageError, match="none of 2 episodes.*no success.*2"):
            collect(expert, envs, range(2))
        kept = collect(expert, envs, range(2), only_successes=False)
    assert kept.succeeded == 0 and len(kept.episodes) == 2 and kept.summary()["rejected"] == {}


def test_collect_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "maze.hdf5"
    command = ["collect", "--env", "PointMaze_UMaze-v3", "--episodes", "2", "--output", str(output)]
    assert main([*command, "--seed-start", "5"]) == 0
    facts = json.loads((tmp_path / "maze.hdf5.collection.json").read_text())
    assert facts["seeds"] == [5, 6] and facts["kept"] == 2 and facts["environment"]["env_id"] == "PointMaze_UMaze-v3"
    read = read_episodes(output)
    assert [episode.seed for episode in read] == [5, 6] and all(episode.succeeded for episode in read)
    capsys.readouterr()
    cases = [
        ([], "never overwritten"),
        (["--output", str(tmp_path / "b"), "--format", "robomimi"], "Did you mean 'robomimic'?"),
        (["--output", str(tmp_path / "b"), "--env", "PointMaze_UMaz-v3"], "Did you mean 'PointMaze_UMaze-v3'?"),
        (["--output", str(tmp_path / "b.h5"), "--format", "zarr"], "writes a folder"),
        (["--output", str(tmp_path / "b"), "--env", "Pendulum-v1"], "no scripted expert"),
        (["--output", str(tmp_path / "b"), "--policy", str(tmp_path / "absent")], "absent"),
        (["--output", str(tmp_path / "b"), "--policy", "random", "--bias", "1"], "--policy expert"),
    ]
    for change, text in cases:
        assert main([*command, *change]) == 2, change
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    assert not (tmp_path / "b").exists()
