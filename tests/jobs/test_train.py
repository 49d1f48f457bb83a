"""`gencontrol train`: two steps of each policy from a data set, resume, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gencontrol.cli import main
from gencontrol.config import load_toml
from tests.helpers.policy_cases import gaussian_law

pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five short episodes as robomimic HDF5."""
    from gencontrol.robotics.datasets.convert import write_episodes

    path = tmp_path_factory.mktemp("demos") / "law.hdf5"
    write_episodes(gaussian_law(5, 12, 0.6, 0.1), path, format="robomimic")
    return path


def _command(data: Path, run: Path, *more: str) -> list[str]:
    size = ["--batch", "8", "--horizon", "4", "--n-obs", "1", "--n-action", "2", "policy.width=16", "policy.depth=1"]
    return ["train", "--dataset", str(data), "--output", str(run), "--steps", "2", "--threads", "1", *size, *more]


@pytest.mark.parametrize(("algorithm", "backbone"), [("diffusion-policy", "unet"), ("flow-policy", "mlp")])
def test_two_steps_make_a_policy(algorithm: str, backbone: str, data: Path, tmp_path: Path) -> None:
    """The result loads, knows what it reads, and its card and report say what it is."""
    from gencontrol.robotics.policies.loading import load_policy

    run = tmp_path / "run"
    assert main(_command(data, run, "--algorithm", algorithm, "--backbone", backbone, "--eval-every", "1")) == 0
    policy = load_policy(run)
    assert policy.spec.observations == {"state": (1,)} and policy.spec.horizon == 4
    assert policy.select_action({"state": np.zeros(1, np.float32)}).shape == (1,)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][-1] == 2
    assert {"loss/denoising", "eval/loss", "eval/action_mse"} <= lines[-1].keys()
    config = load_toml(run / "config.toml")
    assert config["policy"]["backbone"] == backbone and config["run"]["dataset_hash"]
    record = json.loads((run / "run.json").read_text())
    assert record["episodes"] == {"train": 4, "held_out": 1} and record["windows"]["held_out"] > 0
    card = (run / "final" / "README.md").read_text()
    assert "PolicyPipeline.from_pretrained" in card and "4 episodes" in card
    page = (run / "report.html").read_text()
    assert f"{algorithm.capitalize()} from" in page and "gencontrol evaluate" in page


def test_the_same_command_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is left alone; other data or options are noticed."""
    run = tmp_path / "run"
    assert main(_command(data, run, "--backbone", "mlp")) == 0
    assert main(_command(data, run, "--backbone", "mlp")) == 0
    assert "finished: 2 of 2" in capsys.readouterr().err
    assert main(_command(data, run, "--backbone", "mlp", "policy.clip=0.5")) == 2
    assert "policy.clip was 1.0, now 0.5" in capsys.readouterr().err
    changed = tmp_path / data.name
    shutil.copy(data, changed)
    import h5py

    with h5py.File(changed, "r+") as file:
        file["data/demo_0/actions"][0, 0] += 0.01
    assert main(_command(changed, run, "--backbone", "mlp", "--allow-change", "run.dataset")) == 2
    assert "run.dataset_hash was" in capsys.readouterr().err


def test_dry_run_writes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is printed as TOML."""
    assert main(_command(data, tmp_path / "run", "--dry-run")) == 0
    assert 'backbone = "unet"' in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--algorithm", "difusion-policy"], "Did you mean 'diffusion-policy'?"),
        (["policy.horizn=4"], "Did you mean 'horizon'?"),
        (["policy.backbone=resnet"], "choose from unet, transformer, mlp"),
        (["--algorithm", "flow-policy", "policy.sampler=ddpm"], "no option 'sampler'"),
        (["--key", "eye"], "eye"),
        (["--horizon", "3", "policy.depth=2"], "horizon 3 is no multiple of 2"),
        (["algorithm.batch=0"], "batch"),
        (["run.held_out=1.0"], "held_out"),
        (["--shard"], "shard"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], text: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that names the option, nothing written."""
    assert main(_command(data, tmp_path / "run", *options)) == 2
    error = capsys.readouterr().err.strip()
    assert text in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_missing_data_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line says how to make one."""
    assert main(["train", "--output", str(tmp_path / "run")]) == 2
    assert "--dataset is missing" in capsys.readouterr().err
    assert main(_command(tmp_path / "nowhere", tmp_path / "run")) == 2
    assert "gencontrol collect" in capsys.readouterr().err
