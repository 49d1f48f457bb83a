"""`train`, `evaluate`, `collect` and `compose` as functions: live objects where the command line takes names."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gencontrol
from gencontrol.cli import main
from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.jobs.collect import collect
from gencontrol.jobs.compose import compose
from gencontrol.jobs.evaluate import evaluate
from gencontrol.jobs.train import train
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.config import DiffusionPolicyConfig
from gencontrol.robotics.policies.diffusion import DiffusionPolicy
from gencontrol.robotics.policies.loading import load_policy
from tests.helpers.policy_cases import gaussian_law
from tests.helpers.toy_envs import Homing, Point, point

POINT = "tests.helpers.toy_envs:point"
SMALL: dict[str, Any] = {"batch": 8, "horizon": 4, "n_obs": 1, "n_action": 2, "width": 16, "depth": 1, "threads": 1}


def _policy(seed: int) -> DiffusionPolicy:
    two = Normalizer(torch.zeros(2), torch.ones(2))
    config = DiffusionPolicyConfig(backbone="mlp", inference_steps=3)
    return DiffusionPolicy(PolicySpec({"place": (2,)}, 2, 8, 1, 4), config, {"place": two, "action": two}, seed=seed)


def test_train_on_episodes_in_memory(tmp_path: Path) -> None:
    """The same folder as the command makes; the same call goes on, other episodes are noticed."""
    episodes = gaussian_law(5, 12, 0.6, 0.1)
    made = train(episodes, output=tmp_path / "run", steps=2, **SMALL)
    assert made.folder == tmp_path / "run" and "loss/denoising" in made.metrics
    assert {"config.toml", "run.json", "metrics.jsonl", "final", "report.html"} <= {
        p.name for p in made.folder.iterdir()
    }
    seen = {"state": np.zeros((1, 1), np.float32)}
    for policy in (loaded := made.policy, again := load_policy(made.folder)):
        policy.reset(seeds=[0])
    assert np.array_equal(loaded.select_action(seen), again.select_action(seen))
    assert train(episodes, output=tmp_path / "run", steps=2, **SMALL).metrics == made.metrics
    with pytest.raises(UsageError, match=r"run\.dataset_hash was"):
        train(gaussian_law(5, 12, 0.5, 0.1), output=tmp_path / "run", steps=2, **SMALL)
    with pytest.raises(UsageError, match="no option 'horizn'.*horizon"):
        train(episodes, output=tmp_path / "other", horizn=4)
    assert not (tmp_path / "other").exists()


def test_evaluate_objects_is_evaluate_of_the_command(tmp_path: Path) -> None:
    """A policy and a function give the episodes that their names give, and the same files."""
    words = ["--env", POINT, "--episodes", "5", "--seed-start", "3", "--videos", "0", "--isolation", "inline"]
    names = ["tests.helpers.toy_envs:homing", "zero"]
    assert main(["evaluate", *names, "--paired", *words, "--output", str(tmp_path / "command")]) == 0
    options: dict[str, Any] = {"episodes": 5, "seed_start": 3, "isolation": "inline"}
    found = evaluate([Homing(), "zero"], point, paired=True, videos=0, output=tmp_path / "call", **options)
    assert found.folder == tmp_path / "call" and [report.policy for report in found.reports] == ["Homing", "zero"]
    assert found.reports[1].compared is not None and "McNemar" in str(found)
    results = [json.loads((tmp_path / one / "report.json").read_text()) for one in ("command", "call")]
    episodes = [[[row["actions"] for row in policy["episodes"]] for policy in one["policies"]] for one in results]
    assert episodes[0] == episodes[1]
    assert {p.name for p in (tmp_path / "command").iterdir()} >= {"report.html", "episodes.jsonl"}
    alone = evaluate(Homing(), point, **options)
    assert alone.folder is None and alone.reports[0].episodes == found.reports[0].episodes


def test_environments_that_no_other_process_can_make() -> None:
    """A function with an importable name runs in a process; a lambda says what to do."""
    assert len(evaluate(Homing(), point, episodes=2).reports[0].valid) == 2
    far = lambda **kwargs: Point(**kwargs)  # noqa: E731
    with pytest.raises(UsageError, match="isolation='inline'"):
        evaluate(Homing(), far, episodes=2)
    report = evaluate(Homing(), far, episodes=2, isolation="inline").reports[0]
    assert len(report.valid) == 2 and "<lambda>" in report.specs[0].env_id


def test_arguments_of_environments_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """KEY=VALUE is read as TOML where it is some; keywords keep their underscores and capitals."""
    typed = ["a=1", "b_c=true", "d=text", "E=[1, 2]"]
    words = [word for one in typed for word in ("--env-kwarg", one)]
    assert main(["evaluate", "zero", "--env", POINT, *words, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    table = tomllib.loads(capsys.readouterr().out)
    assert table["run"]["env_kwargs"] == {"a": 1, "b_c": True, "d": "text", "E": [1, 2]}
    assert not (tmp_path / "out").exists()


def test_the_functions_are_those_of_the_package() -> None:
    """`gencontrol.train` is also a package; both are one name."""
    job = gencontrol.train
    importlib.import_module("gencontrol.train.config")  # binds the package

    assert callable(job)
    assert gencontrol.evaluate is evaluate and gencontrol.collect is collect and gencontrol.compose is compose
    with pytest.raises(UsageError, match="there is no data set at 'nowhere'"):
        gencontrol.train("nowhere")
    with pytest.raises(AttributeError, match="evalate"):
        _ = gencontrol.evalate


def test_collect_from_a_policy_in_memory(tmp_path: Path) -> None:
    found = collect(point, policy=Homing(noise=0.0), episodes=3, keep_failures=True)
    assert found.path is None and len(found.collection.episodes) == 3
    pytest.importorskip("h5py")
    written = collect(point, policy=Homing(noise=0.0), episodes=3, output=tmp_path / "d.hdf5", keep_failures=True)
    assert written.path == tmp_path / "d.hdf5" and (tmp_path / "d.hdf5.collection.json").exists()
    for policy, options, text in (
        (Homing(), {"output": tmp_path / "d.hdf5"}, "never overwritten"),
        (Homing(), {"noise": 0.1}, "belong to --policy expert"),
        ("expert", {}, "no scripted expert"),
        (Homing(), {"episods": 3}, "Did you mean 'episodes'"),
    ):
        with pytest.raises(UsageError, match=text):
            collect(point, policy=policy, **options)


def test_compose_policies_in_memory(tmp_path: Path) -> None:
    """The folder holds copies of both; fitted weights are those of the result; what has no folder format is refused."""
    first, second = _policy(1), _policy(2)
    made = compose({"a": first, "b": second}, weights=[0.25, 0.75], output=tmp_path / "ab")
    again = load_policy(tmp_path / "ab")
    seen = {"place": np.full((1, 2), 0.3, np.float32)}
    for policy in (made.policy, again):
        policy.reset(seeds=[4])
    assert np.array_equal(made.policy.select_action(seen), again.select_action(seen))
    assert made.weights == {"a": 0.25, "b": 0.75} and made.fit is None
    fitted = compose([first, second], fit_env=point, validation=3, episodes=2, step=0.5)
    assert fitted.fit is not None and fitted.folder is None and tuple(fitted.weights.values()) == fitted.fit.best
    assert list(fitted.policy.weights) == list(fitted.fit.best)  # type: ignore[arg-type]  # numbers
    for options, text in (
        ({"validation": 3}, "give --fit-env too"),
        ({"weights": [1.0, 0.0], "fit_env": point}, "one of the two"),
        ({"operater": "and"}, "no option 'operater'"),
    ):
        with pytest.raises(UsageError, match=text):
            compose([first, second], **options)
    with pytest.raises(UsageError, match="no folder format"):
        compose({"ab": made.policy.parents[0], "c": _foreign()}, output=tmp_path / "abc")
    assert not (tmp_path / "abc").exists()


def _foreign() -> Any:
    from gencontrol.robotics.policies.foreign import ForeignPolicy

    policy = _policy(3)
    return ForeignPolicy(policy.spec, policy.denoiser, policy.action_normalizer, policy.sampler, policy.encode)
