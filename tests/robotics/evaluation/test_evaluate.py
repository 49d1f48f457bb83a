"""Evaluation: what an episode gives depends on its seed alone; pairs, faults, resuming, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gencontrol.cli import main
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.reports.evaluation import write_evaluation
from gencontrol.rng import Keyed, row_keys
from gencontrol.robotics import evaluate as module
from gencontrol.robotics.envs.vector import make_envs
from gencontrol.robotics.evaluate import Settings, evaluate, evaluate_all, named
from gencontrol.robotics.evaluation.report import compare, percentiles
from gencontrol.robotics.evaluation.rollout import Rollouts
from gencontrol.robotics.evaluation.videos import choose, shrink
from gencontrol.robotics.policies.baselines import Baseline
from gencontrol.stats import clopper_pearson, wilson
from tests.helpers.chunk_toys import Network
from tests.helpers.toy_envs import Homing, Point

POINT = "tests.helpers.toy_envs:point"
SEEDS = range(20)


def run(policy: Any, seeds: Any = SEEDS, **options: Any) -> Any:
    """Evaluate in this process."""
    return evaluate(policy, POINT, seeds=seeds, **{"isolation": "inline", **options})


@pytest.mark.parametrize("policy", [Homing(), Network(), "random"])
def test_results_do_not_depend_on_the_number_of_environments(policy: Any, fenced_rng: None) -> None:
    one, three, eight = (run(policy, num_envs=count) for count in (1, 3, 8))
    assert one.episodes == three.episodes == eight.episodes  # digests of all actions are part of them
    assert len({episode.actions for episode in one.episodes}) == len(SEEDS)
    backwards = run(policy, reversed(SEEDS), num_envs=3)
    assert tuple(reversed(backwards.episodes)) == one.episodes


def test_rows_at_once_makes_actions_exact() -> None:
    """What the option is for: batches of different sizes round differently, so the default is one row per call."""
    policy = Network()
    rows = torch.linspace(-1, 1, 24).reshape(6, 2, 2).numpy()
    noise = Keyed(row_keys(0, "policy", torch.arange(6), torch.zeros(6, dtype=torch.int64)))
    whole = policy.sample_chunk({"place": rows}, noise)
    single = [policy.sample_chunk({"place": rows[i : i + 1]}, Keyed(noise.keys[i : i + 1])) for i in range(6)]
    assert torch.allclose(whole, torch.cat(single), atol=1e-5), "the same numbers but for rounding"
    policy.batches.clear()
    policy.rows_at_once = 4
    policy.reset(range(6), range(6))
    padded = policy.select_action({"place": rows[:, -1]}, range(6))
    assert policy.batches == [4, 4] and padded.shape == (6, 2)
    policy.rows_at_once = 1
    policy.reset(range(6), range(6))
    exact = policy.select_action({"place": rows[:, -1]}, range(6))
    assert np.allclose(padded, exact, atol=1e-5)
    report = run(policy, rows_at_once=0, num_envs=8)
    assert max(policy.batches) == 8 and policy.rows_at_once == 1, "set for the evaluation alone"
    assert len(report.episodes) == len(SEEDS)


def test_who_is_asked_for_several_rows_in_one_call() -> None:
    """Strangers never unless told; networks of ours not where the latency is to be that of one row."""
    asked = []
    for policy in (Network(), Homing()):
        for rows in (0, 1, 4):
            with module.asked_in(policy, rows) as together:
                asked.append(together)
    assert asked == [True, False, True, True, False, False]


def test_the_numbers_of_a_report() -> None:
    report = run(Homing(noise=0.0))
    env = Point()
    for episode in report.episodes:  # the same by hand
        env.reset(seed=episode.seed)
        total, done, steps = 0.0, False, 0
        while not done:
            action = np.clip(np.float32(-env.place[0]), -1, 1)
            _, reward, terminated, truncated, _ = env.step([action, 0.0])
            total, steps, done = total + reward, steps + 1, terminated or truncated
        assert (episode.length, episode.terminated, episode.success) == (steps, terminated, terminated)
        assert episode.total_reward == pytest.approx(total, abs=1e-5)
    assert report.successes == sum(e.success for e in report.episodes)
    assert tuple(report.interval) == clopper_pearson(report.successes, 20)
    assert report.rate == report.successes / 20


def test_policies_that_always_or_never_succeed() -> None:
    good, bad = run(Homing(noise=0.0)), run("zero", env_kwargs={"drift": 5.0})
    assert (good.rate, bad.rate) == (1.0, 0.0) and good.interval.high == 1.0 and bad.interval.low == 0.0
    assert all(episode.truncated and not episode.success for episode in bad.episodes), "truncation is no success"


def test_success_at_any_step_and_at_the_end() -> None:
    """A drift carries the point through the target and away."""
    options = {"env_kwargs": {"ends": False, "drift": 0.15}}
    report = run("zero", range(60), **options)
    lost = [e for e in report.episodes if e.success_any and not e.success_end]
    assert lost and all(episode.success for episode in lost)
    strict = run("zero", range(60), success_at="end", **options)
    assert strict.successes == sum(e.success_end for e in report.episodes) < report.successes
    assert "any" in report.protocol["success"][POINT] and "end" in strict.protocol["success"][POINT]


def test_success_by_another_rule_and_without_one() -> None:
    rule = run(Homing(), success="reward>=-0.5")
    assert rule.successes == sum(e.max_reward >= -0.5 for e in rule.episodes)
    with pytest.raises(UsageError, match="never reported info.*--success terminated"):
        evaluate(Homing(), "tests.helpers.toy_envs:silent", seeds=[0], isolation="inline")


def test_the_same_policy_twice() -> None:
    report = run(Homing(), paired_with=Homing(), num_envs=3)
    pairs = report.compared.pairs
    assert (pairs.difference.value, pairs.p, pairs.first, pairs.second, pairs.count) == (0.0, 1.0, 0, 0, 20)


def test_pairs_of_two_policies() -> None:
    weak, strong = Homing(gain=0.2, noise=0.5), Homing()
    report = run(strong, range(40), paired_with=weak, num_envs=3)
    alone, other = run(strong, range(40)), run(weak, range(40))
    assert report.episodes == alone.episodes
    pairs = report.compared.pairs
    assert pairs.difference.value == pytest.approx(alone.rate - other.rate)
    assert pairs.second - pairs.first == alone.successes - other.successes
    winners = {seed: name for seed, _, name in report.compared.discordant}
    by_seed = {e.seed: (e.success, o.success) for e, o in zip(alone.episodes, other.episodes)}
    assert set(winners) == {seed for seed, (a, b) in by_seed.items() if a != b}
    assert all((name == report.policy) == by_seed[seed][0] for seed, name in winners.items())


def test_pairs_that_are_none_are_left_out() -> None:
    first = run(Homing())
    moved = [replace(e, start="x") if e.seed == 3 else e for e in first.episodes]
    moved[5] = replace(moved[5], invalid="crash")
    found = compare(first, replace(first, episodes=tuple(moved[:-1])))
    assert found.dropped == {"began differently": 1, "invalid": 1, "not run by both": 1} and found.pairs.count == 17


@pytest.mark.parametrize("trouble", ["raise", "shape", "nan", "nan reward", "reset"])
def test_a_fault_makes_one_episode_invalid(trouble: str) -> None:
    troubled = {"trouble": trouble, "bad": [4, 9], "ends": False}
    report = run(Homing(), env_kwargs=troubled, num_envs=3)
    clean = run(Homing(), env_kwargs={"ends": False})
    bad = [e for e in report.episodes if not e.valid]
    assert [e.seed for e in bad] == [4, 9] and not any(e.success for e in bad)
    assert [e for e in report.episodes if e.valid] == [e for e in clean.episodes if e.seed not in (4, 9)]
    assert sum(report.invalid.values()) == 2 and report.summary()["valid"] == 18
    assert report.rate == report.successes / 18
    assert report.summary()["rate_if_invalid_failed"] == report.successes / 20


def test_a_hanging_process_costs_one_episode() -> None:
    """Beside a row that goes on; what a crash says is in test_envs.py."""
    report = evaluate(
        Homing(),
        POINT,
        seeds=range(4),
        env_kwargs={"trouble": "hang", "ends": False},
        num_envs=2,
        step_timeout=1.0,
    )
    assert [e.valid for e in report.episodes] == [True, False, True, True]
    assert report.episodes[1].invalid == "hang: it took longer than 1 s (at step 3)"


def test_an_action_that_is_no_number() -> None:
    report = run(Homing(nan_at=2), num_envs=3)
    assert report.invalid == {"policy: its action is not finite": 1}
    assert report.episodes[2].invalid == "policy: its action is not finite (at step 3)"


def test_an_environment_that_never_works_is_given_up() -> None:
    with pytest.raises(UsageError, match="the first 10 episodes.*all invalid, the last one by crash"):
        run(Homing(), env_kwargs={"trouble": "reset", "bad": list(SEEDS)})


def test_policies_that_do_not_fit_are_refused_before_the_first_episode(tmp_path: Path) -> None:
    for policy, said in (
        (Network(action_dim=3), "gives actions of 3 numbers, tests.helpers.toy_envs:point takes 2"),
        (Network(keys={"camera": (2,)}), "reads the observation 'camera'"),
        (Network(keys={"place": (5,)}), r"reads 'place' of shape \(5,\)"),
        (Homing(size=4), r"actions of shape \(1, 4\)"),
    ):
        with pytest.raises(UsageError, match=said):
            run(policy, output=tmp_path / "out")
    assert not (tmp_path / "out" / "episodes.jsonl").exists()


def test_settings_out_of_range() -> None:
    for wrong in ({"num_envs": 0}, {"seeds": []}, {"seeds": [1, 1]}, {"seeds": [-1]}, {"success_at": "once"}):
        with pytest.raises(UsageError):
            run(Homing(), **wrong)
    with pytest.raises(UsageError, match="time limit|time_limit"):
        run(Homing(), time_limit=0)
    with pytest.raises(UsageError, match="give an output folder"):
        run(Homing(), videos=1)


def test_clipping_is_counted() -> None:
    report = run(Homing(gain=50.0, noise=0.0), range(5))
    assert all(0 < e.clipped <= e.length for e in report.episodes)


def test_latency_of_an_action(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(np.cumsum([0.01] * 10_000).tolist())
    monkeypatch.setattr("gencontrol.robotics.evaluation.rollout.time.perf_counter", lambda: next(now))
    report = run(Homing(), range(3))
    assert percentiles(report.episodes) == pytest.approx([0.01, 0.01], rel=0.01)
    assert np.isnan(percentiles([])).all()


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    steps = iter(range(10_000))

    def poll() -> None:
        if next(steps) == 12:
            raise Stop

    settings = Settings(num_envs=3, isolation="inline")
    with pytest.raises(Stop):
        evaluate_all({"homing": Homing()}, [POINT], SEEDS, settings, output=out, poll=poll)
    lines = (out / "episodes.jsonl").read_bytes().splitlines()
    assert 2 < len(lines) < 20
    with open(out / "episodes.jsonl", "ab") as file:
        file.write(lines[0] + b"\n" + lines[1][:30])  # a doubled line and a half one, as a crash leaves it
    calls = Homing()
    (report,) = evaluate_all({"homing": calls}, [POINT], SEEDS, replace(settings, num_envs=1), output=out)
    assert report.episodes == run(Homing()).episodes
    begun = {json.loads(line)["seed"] for line in lines}
    assert len((out / "episodes.jsonl").read_bytes().splitlines()) == 20
    assert begun < set(SEEDS)
    inline = Settings(isolation="inline")
    (longer,) = evaluate_all({"homing": Homing()}, [POINT], range(25), inline, output=out)  # more may follow
    assert longer.episodes[:20] == report.episodes and len(longer.episodes) == 25
    with pytest.raises(UsageError, match="env_kwargs = {}, not {'drift': 0.5}"):
        run(Homing(), output=out, env_kwargs={"drift": 0.5})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="holds no evaluation"):
        run(Homing(), output=tmp_path / "other")


def test_files_and_videos(tmp_path: Path) -> None:
    weak = Homing(gain=0.2, noise=0.5)
    report = run(weak, output=tmp_path, videos=3, paired_with=Homing(), num_envs=2)
    assert report.notes == () and len(report.videos) == 3
    won = {e.seed: e.success for e in report.episodes}
    assert {seed for seed, _ in report.videos} == {e.seed for e in choose(report.episodes, 3)}
    for (seed, _), path in report.videos.items():
        word = "success" if won[seed] else "failure"
        assert path.endswith(f"{word}_seed{seed}.mp4") and (tmp_path / path).stat().st_size > 500
    info = json.loads((tmp_path / "Homing_2" / "eval_info.json").read_text())
    overall = info["overall"]
    assert (overall["n_episodes"], overall["n_success"]) == (20, report.successes)
    assert overall["pc_success"] == pytest.approx(100 * report.rate)
    assert overall["pc_success_ci95"] == pytest.approx([100 * end for end in wilson(report.successes, 20)])
    assert set(info) >= {"per_task", "per_group", "overall"} and len(overall["video_paths"]) == 3
    assert set(info["per_task"][0]["metrics"]) == {"sum_rewards", "max_rewards", "successes", "video_paths"}
    table = json.loads((tmp_path / "report.json").read_text())
    assert table["policies"][1]["comparison"]["mcnemar_p"] == report.compared.pairs.p
    assert [row["seed"] for row in table["policies"][0]["episodes"]] == list(SEEDS)
    page = write_evaluation(tmp_path).read_text()
    assert page.count("data:video/mp4;base64,") == 6 and "McNemar" in page and "discordant" in page
    assert "http" not in page.replace("http-equiv", "")
    for section in page.split("<h2>"):
        if "videos</h2>" in section and "success</b>" in section:
            assert "failure</b>" not in section[section.index("success</b>") :]


def test_a_camera_that_fails_costs_the_videos_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(Homing(), range(4), env_kwargs={"broken_camera": True}, output=tmp_path / "a", videos=2)
    assert report.videos == {} and len(report.valid) == 4
    assert len(report.notes) == 1 and "cannot be rendered here: OSError: no display" in report.notes[0]

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gencontrol.robotics.evaluation.videos.write_video", refuse)
    report = run(Homing(), range(4), output=tmp_path / "b", videos=1)
    assert report.videos == {} and "could not be written" in report.notes[0] and len(report.valid) == 4


def test_which_episodes_are_filmed_and_how_large() -> None:
    results = run(Homing(gain=0.2, noise=0.5)).episodes
    results = (replace(results[0], invalid="crash"), *results[1:])
    chosen = choose(results, 4)
    assert len(chosen) == 4 and results[0] not in chosen
    assert [e.success for e in choose(results, 20)] == sorted(e.success for e in results[1:])
    mixed = [replace(results[1], seed=i, success=i >= 3) for i in range(12)]
    assert [e.seed for e in choose(mixed, 4)] == [0, 3, 4, 5], "3 of 12 failed: one of four videos"
    assert [e.seed for e in choose(mixed[2:], 2)] == [2, 3] and [e.seed for e in choose(mixed, 1)] == [3]
    assert [e.seed for e in choose(mixed[:3], 2)] == [0, 1] and choose([], 3) == []
    assert shrink(np.full((481, 480, 3), 7, np.uint8)).shape == (240, 240, 3)
    assert shrink(np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)).shape == (2, 4, 3)


def test_several_tasks_are_pooled() -> None:
    report = evaluate(Homing(), [POINT, "tests.helpers.toy_envs:Point"], seeds=range(5), isolation="inline", num_envs=2)
    assert len(report.episodes) == 10 and [spec.env_id for spec in report.specs] == [
        POINT,
        "tests.helpers.toy_envs:Point",
    ]
    assert report.of(POINT).episodes == report.episodes[:5]
    assert [task["n"] for task in report.to_json()["per_task"]] == [5, 5]


def test_baselines() -> None:
    with make_envs(POINT, 1, isolation="inline") as envs:
        policy = Baseline("random", envs.spec)
        policy.reset([0, 1], [5, 5])
        actions = policy.select_action({"place": np.zeros((2, 2))}, [0, 1])
        assert np.array_equal(actions[0], actions[1]) and (np.abs(actions) <= 1).all()
        zero = Baseline("zero", replace(envs.spec, action_low=(0.5, -1.0)))
        zero.reset([0], [1])
        assert zero.select_action({"place": np.zeros((1, 2))}, [0]).tolist() == [[0.5, 0.0]]
        with pytest.raises(UsageError, match="no bounds"):
            Baseline("random", replace(envs.spec, action_low=(-np.inf, 0.0)))
        rollout = next(Rollouts(zero, envs).run([3]))
        assert rollout.episode is not None and rollout.episode.seed == 3
        assert len(rollout.episode.observations["place"]) == len(rollout.episode) + 1


def test_names_of_policies() -> None:
    assert list(named(["a", "a", "b", Homing(), Homing()])) == ["a", "a #2", "b", "Homing", "Homing #2"]


# ---- command line ---------------------------------------------------------------------------------------------------


def _command(*options: str) -> int:
    return main(["evaluate", *options, "--isolation", "inline", "--videos", "0", "--seed-start", "0"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = "tests.helpers.toy_envs"
    out = str(tmp_path / "out")
    code = _command(f"{toy}:homing", f"{toy}:homing", "--env", POINT, "--n_episodes", "12", "--paired", "--output", out)
    said = capsys.readouterr()
    assert code == 8, said.err  # equal policies
    assert "No pair is discordant (" in said.err and "so nothing tells the two apart" in said.err
    assert "12 episodes" in said.err or "episode 24/24" in said.err
    assert "+0.0 points" in said.out and "McNemar p = 1" in said.out and "report.html" in said.out
    assert said.out.splitlines()[0].startswith(f"{toy}:homing: ")
    before = (tmp_path / "out" / "episodes.jsonl").read_bytes()
    assert _command(f"{toy}:homing", f"{toy}:homing", "--env", POINT, "--episodes", "12", "--output", out) == 0
    assert (tmp_path / "out" / "episodes.jsonl").read_bytes() == before


def test_a_command_without_a_valid_episode_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, out = "tests.helpers.toy_envs", str(tmp_path / "out")
    trouble = ("--env-kwarg", "trouble=reset", "--env-kwarg", "bad=[0, 1]")
    names = (f"{toy}:homing", f"{toy}:homing", "--paired")
    code = _command(*names, "--env", POINT, "--episodes", "2", *trouble, "--output", out)
    said = capsys.readouterr()
    assert code == 8, said.err
    assert "none of 2 episodes is valid" in said.out and "nan" not in said.out
    assert "none of 2 episodes is valid, so there is no rate" in said.err and "No pair of episodes is left" in said.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "None of the episodes is valid, so there is no rate." in page and "No pair of episodes is left" in page


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = "tests.helpers.toy_envs"
    out = ["--output", str(tmp_path / "out")]
    for arguments, said in (
        ([f"{toy}:homing", "--env", POINT, "--env-kwarg", "size=3"], "actions of shape (1, 2)"),
        ([f"{toy}:homing", "--env", f"{toy}:Discrete"], "takes actions of Discrete"),
        (["nowhere", "--env", POINT], "there is no policy at 'nowhere'"),
        (["zero", "--env", POINT, "--success", "sometimes"], "give auto"),
        (["zero", "--env", POINT, "--env-kwarg", "nonsense"], "KEY=VALUE"),
        (["zero", "--env", POINT, "--time-limit", "0"], "time_limit = 0"),
    ):
        assert _command(*arguments, *out) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("gencontrol: error:") and said in error
    assert _command("zero", "--env", "robosuite/Lift", *out) == 6
    assert "pip install" in capsys.readouterr().err


# ---- simulators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env_id", "at"), [("PointMaze_UMaze-v3", "any"), ("FetchReach-v4", "end")])
def test_simulators(env_id: str, at: str) -> None:
    pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed")
    options: dict[str, Any] = {"seeds": range(4), "time_limit": 12, "isolation": "inline"}
    one, three = (evaluate("random", env_id, num_envs=count, **options) for count in (1, 3))
    assert one.episodes == three.episodes and all(e.valid for e in one.episodes)
    assert len({e.start for e in one.episodes}) == 4 and one.specs[0].success_at == at


def test_states_are_enough_where_nothing_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed")
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)  # set by whoever drew in this process before
    monkeypatch.setenv("MUJOCO_GL", "osmesa")  # as on a machine whose renderer is missing
    report = evaluate("zero", "PointMaze_UMaze-v3", seeds=[0], time_limit=3, videos=1, output=tmp_path)
    assert len(report.valid) == 1 and report.videos == {}
    assert len(report.notes) == 1 and "\n" not in report.notes[0] and "MUJOCO_GL=osmesa" in report.notes[0]


def test_module_and_missing_expert() -> None:
    assert "expert" in module.NAMED
    with pytest.raises((UsageError, EnvironmentMissing), match="no scripted expert is known"):
        run("expert", [0])


@pytest.mark.parametrize(("late", "where"), [(False, "'place' at the reset"), (True, "'place' after step 1")])
def test_episodes_that_are_no_function_of_their_seed_are_told(late: bool, where: str) -> None:
    """In one line before the first episode; pairs are refused unless asked for, and the report keeps the note."""
    restless = "tests.helpers.toy_envs:Restless"
    given: dict[str, Any] = {"seeds": range(3), "isolation": "inline", "env_kwargs": {"late": late}}
    with pytest.raises(UsageError, match=f"no function of their seed.*{where}.*--allow-unseeded"):
        evaluate(Homing(), restless, paired_with=Homing(), **given)
    with pytest.warns(UserWarning, match=where):
        report = evaluate(Homing(), restless, **given)
    assert any(where in note for note in report.notes)
    with pytest.warns(UserWarning, match=where):
        evaluate(Homing(), restless, paired_with=Homing(), allow_unseeded=True, **given)


def test_the_command_refuses_pairs_of_unseeded_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, output = "tests.helpers.toy_envs", ["--output", str(tmp_path / "out")]
    words = [f"{toy}:homing", f"{toy}:homing", "--env", f"{toy}:Restless", "--episodes", "3", "--paired", *output]
    assert _command(*words) == 2
    error = capsys.readouterr().err
    assert "--allow-unseeded" in error and error.strip().count("\n") == 0
    with pytest.warns(UserWarning, match="no function of their seed"):
        assert _command(*words, "--allow-unseeded") in (0, 8)


def test_a_faulty_start_is_no_difference() -> None:
    """Crashes show as invalid episodes; the check says nothing of them."""
    from gencontrol.robotics.envs.seeding import difference
    from gencontrol.robotics.envs.vector import make_envs

    for kwargs in ({"trouble": "reset", "bad": (0,)}, {"trouble": "raise", "bad": (0,)}, {}):
        with make_envs(POINT, 1, kwargs=kwargs, isolation="inline") as envs:
            assert difference(envs, 0) is None
