"""Damaged checkpoints: truncated, flipped, missing, linked, crafted; strict names and shapes (C1–C5, V3, V4)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from gencontrol.errors import CheckpointError, UsageError
from gencontrol.files import FileLayer
from gencontrol.models.roles import Roles
from gencontrol.testing.algorithm import assert_same_run
from gencontrol.train.checkpoint import Checkpoints, TrainState, decode, encode
from gencontrol.train.trainer import Trainer
from tests.helpers.shim import CONFIG, fit
from tests.helpers.training_toy import Toy

FILES = [
    "role_policy.safetensors",
    "role_ema.safetensors",
    "optimizer.safetensors",
    "algorithm.safetensors",
    "algorithm.json",
    "state.json",
    "manifest.json",
]
TWO = dataclasses.replace(CONFIG, keep=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 3 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(folder, TWO)
    assert sorted(p.name for p in (folder / "checkpoints/step_00000004").iterdir()) == sorted(FILES)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flip":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    elif how == "delete":
        path.unlink()
    elif how == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))
    else:
        size = {"empty": 0, "one": 1, "half": len(data) // 2, "last": len(data) - 1}[how]
        path.write_bytes(data[:size])


@pytest.mark.parametrize("how", ["empty", "one", "half", "last", "flip", "delete", "link"])
@pytest.mark.parametrize("name", FILES)
def test_c1_c2_c3_damage_is_named_and_the_older_one_is_used(
    run: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "checkpoints/step_00000004" / name, how)
    state = Checkpoints(run / "checkpoints", 2).load_newest()
    assert state is not None and state.step == 3
    said = capsys.readouterr().err
    assert "WARNING" in said and "going back to step_00000003" in said
    assert (name if how != "link" else "symbolic link") in said


def test_damaged_newest_is_replaced_by_training_on(finished: Path, run: Path) -> None:
    damage(run / "checkpoints/step_00000004/role_policy.safetensors", "flip")
    fit(run, TWO)
    assert_same_run(finished, run, 4)


def test_c4_all_damaged_is_exit_3_and_nothing_is_touched(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        damage(folder / "role_ema.safetensors", "half")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        fit(run, TWO)
    assert caught.value.exit_code == 3
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_linked_checkpoint_folder_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints/step_00000004"
    newest.rename(run / "outside")
    newest.symlink_to(run / "outside")
    state = Checkpoints(run / "checkpoints", 2).load_newest()
    assert state is not None and state.step == 3 and "symbolic link" in capsys.readouterr().err


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and make the manifest agree, as an attacker or a converter would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = FileLayer().write(folder / name, data)
    manifest["files"][name] = {"size": len(data), "sha256": digest}
    del manifest["digest"]  # optional: manifests of the first version had none
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "data",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        b"\x40" + bytes(7) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":1}' + bytes(8),
        b"\x02" + bytes(7) + b"{}" + b"tail",
    ],
    ids=["huge header", "broken header", "bytes without a tensor"],
)
def test_c5_crafted_tensor_files_are_refused(run: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run / "checkpoints/step_00000004", "role_policy.safetensors", data)
    state = Checkpoints(run / "checkpoints", 2).load_newest()
    assert state is not None and state.step == 3 and "does not decode" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../escape", "/etc/hostname", "a/b", ".hidden"])
def test_manifest_may_not_name_paths(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints/step_00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 0, "sha256": ""}
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    state = Checkpoints(run / "checkpoints", 2).load_newest()
    assert state is not None and state.step == 3 and f"lists the path '{name}'" in capsys.readouterr().err


def test_r7_other_format_version_is_refused_by_name(run: Path) -> None:
    folder = run / "checkpoints/step_00000004"
    state = json.loads((folder / "state.json").read_text()) | {"format": 99}
    rewrite(folder, "state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointError, match="format 99.*reads format 1"):
        Checkpoints(run / "checkpoints", 2).load_newest()


@pytest.mark.parametrize("change", ["missing", "extra", "prefix", "shape"])
def test_v3_v4_role_files_are_strict(run: Path, change: str) -> None:
    folder = run / "checkpoints/step_00000004"
    tensors = safetensors.torch.load((folder / "role_ema.safetensors").read_bytes())
    if change == "missing":
        del tensors["0.bias"]
        match = r"missing \['0.bias'\] \(1\), unexpected \[\] \(0\)"
    elif change == "extra":
        tensors["9.bias"] = torch.zeros(1)
        match = r"missing \[\] \(0\), unexpected \['9.bias'\] \(1\)"
    elif change == "prefix":
        tensors = {f"_orig_mod.{name}": value for name, value in tensors.items()}
        match = "strip '_orig_mod.' and 'module.'"
    else:
        tensors["0.bias"] = torch.zeros(3)
        match = r"shape \(3,\) in the checkpoint and \(8,\) in the model"
    rewrite(folder, "role_ema.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(CheckpointError, match=match):
        fit(run, TWO)


def test_other_roles_or_optimizer_shapes_are_refused(run: Path) -> None:
    toy = Toy()
    toy.roles = Roles(toy.roles.module, ("policy",))
    with pytest.raises(UsageError, match="holds the roles"):
        fit(run, TWO, toy=toy)


def test_v4_wrapped_modules_are_saved_and_loaded_without_prefixes(tmp_path: Path) -> None:
    plain = {"0.weight": torch.randn(2, 2, generator=torch.Generator().manual_seed(0))}
    wrapped = {f"_orig_mod.{name}": value for name, value in plain.items()}
    state = decode(encode(TrainState(1, {"policy": wrapped}, {}, {})))
    assert list(state.roles["policy"]) == ["0.weight"]
    toy = Toy()
    compiled = torch.compile(toy.roles.module, backend="eager")
    toy.roles = Roles(compiled, ("policy", "ema"))
    assert any("_orig_mod" in name for name in toy.roles.state_dict()["policy"])
    fit(tmp_path / "run", toy=toy)
    other = Toy()
    fit(tmp_path / "run", toy=other)  # a finished run is loaded into the unwrapped model
    saved = toy.roles.state_dict()["policy"]["_orig_mod.0.weight"]
    assert torch.equal(other.roles.state_dict()["policy"]["0.weight"], saved)


def test_v4_tied_weights_are_stored_once_and_retied() -> None:
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    role = {"embed.weight": weight.detach(), "head.weight": weight.detach(), "view": weight.detach()[1:]}
    files = encode(TrainState(1, {"policy": role}, {}, {}))
    stored = safetensors.torch.load(files["role_policy.safetensors"])
    assert sorted(stored) == ["embed.weight", "view"]
    loaded = decode(files).roles["policy"]
    assert all(torch.equal(loaded[name], role[name]) for name in role) and loaded.keys() == role.keys()


def test_algorithm_state_of_any_nesting_survives(tmp_path: Path) -> None:
    own = {
        "a": {"b": [torch.arange(3), {"c": torch.tensor(True)}], "t": (1, 2.5, None, "x")},
        "half": torch.ones(2).bfloat16(),
    }
    back = decode(encode(TrainState(1, {"policy": {}}, {}, own))).algorithm
    assert torch.equal(back["a"]["b"][0], own["a"]["b"][0]) and bool(back["a"]["b"][1]["c"]) is True
    assert back["a"]["t"] == [1, 2.5, None, "x"] and back["half"].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="/a/b' is a set"):
        encode(TrainState(1, {}, {}, {"a": {"b": {1}}}))
    with pytest.raises(TypeError, match="keys must be text"):
        encode(TrainState(1, {}, {}, {"a": {1: 2}}))


def test_pruning_spares_the_checkpoint_resumed_from(run: Path) -> None:
    """#4: as long as this process lives, what it began with stays, whatever `keep` says."""
    longer = dataclasses.replace(TWO, steps=7, keep=1)
    Trainer(longer, run).fit(Toy())
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000004", "step_00000007"]
