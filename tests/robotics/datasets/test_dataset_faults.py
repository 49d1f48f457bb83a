"""Bad data sets and failed writes: one clear line each, nothing half written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gencontrol.errors import DiskError, EnvironmentMissing, UsageError
from gencontrol.files import FileLayer
from gencontrol.robotics.datasets.convert import read_episodes, write_episodes
from gencontrol.robotics.datasets.episodes import Episode, Episodes
from tests.helpers.episode_samples import sample_episode, sample_episodes

h5py = pytest.importorskip("h5py")
pq = pytest.importorskip("pyarrow.parquet")


def refused(path: Path, **request: Any) -> str:
    """Read and return the message of the refusal: one line that names the path."""
    with pytest.raises(UsageError) as caught:
        read_episodes(path, **request)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 600
    return message


def edit(demo: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace an array of an HDF5 group."""
    rows = change(demo[name][()])
    del demo[name]
    demo[name] = rows


def nan_in_row_2(rows: np.ndarray) -> np.ndarray:
    rows[2] = np.nan
    return rows


ROBOMIMIC: dict[str, tuple[Callable[[Any], object], str]] = {
    "no actions": (lambda d: d["demo_2"].pop("actions"), r"demo_2: there is no 'actions', only dones"),
    "no obs": (lambda d: d["demo_0"].pop("obs"), r"demo_0: there is no 'obs'"),
    "NaN": (lambda d: edit(d["demo_2"], "actions", nan_in_row_2), r"demo_2: actions has a value .* row 2"),
    "NaN observation": (lambda d: edit(d["demo_2"], "obs/state", nan_in_row_2), "'state' has a value .* not finite"),
    "lengths": (lambda d: edit(d["demo_0"], "rewards", lambda r: r[:-1]), r"demo_0: rewards has shape \(6,\) beside 7"),
    "obs lengths": (lambda d: edit(d["demo_0"], "obs/state", lambda r: r[:-2]), "'state' has 5 rows beside 7 actions"),
    "no step": (lambda d: edit(d["demo_1"], "actions", lambda r: r[:0]), "demo_1: the demo has no action"),
    "range": (lambda d: edit(d["demo_2"], "actions", lambda r: r * 3), r"demo_2: actions reach .* wants \[-1, 1\]"),
    "other shape": (lambda d: edit(d["demo_2"], "obs/state", lambda r: r[:, :2]), "episode 2 has arrays"),
    "no demo": (lambda d: [d.pop(name) for name in list(d)], "there is no demo"),
}


@pytest.mark.parametrize("fault", ROBOMIMIC)
def test_robomimic(fault: str, tmp_path: Path) -> None:
    place = write_episodes(sample_episodes(final=False), tmp_path / "demo.hdf5", format="robomimic")
    change, message = ROBOMIMIC[fault]
    with h5py.File(place, "a") as file:
        change(file["data"])
        if fault == "other shape":  # the last row comes from next_obs otherwise
            assert "next_obs" not in file["data/demo_2"]
    assert re.search(message, refused(place))


def test_hdf5_files_of_other_kinds(tmp_path: Path) -> None:
    place = write_episodes(sample_episodes(), tmp_path / "demo.hdf5", format="robomimic")
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in refused(place)
    place.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in refused(place)
    with h5py.File(place, "w") as file:
        file["weights"] = [1.0]
    assert "there is no group 'data', only weights" in refused(place)


def test_paths(tmp_path: Path) -> None:
    place = write_episodes(sample_episodes(), tmp_path / "demo.hdf5", format="robomimic")
    assert "Did you mean 'demo.hdf5'?" in refused(tmp_path / "demo.hdf")
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refused(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    assert "no data set that can be read" in refused(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="unknown format 'lerobt'.* Did you mean 'lerobot'"):
        read_episodes(place, format="lerobt")
    assert "there is no observation 'stat'" in refused(place, keys=["stat"])
    assert "to rename" in refused(place, rename={"stat": "x"})
    assert "one name" in refused(place, rename={"front": "state"})
    assert "there is no mask 'train'; there is none" in refused(place, split="train")
    with pytest.raises(UsageError, match="limit is 0"):
        read_episodes(place, limit=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LeRobot folder written by us."""
    return write_episodes(sample_episodes(noise=False), tmp_path / "set", format="lerobot", images="video")


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def drop_rows(path: Path) -> None:
    """Leave out the last rows of a parquet file."""
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 3), path)


INFO, ROWS = "meta/info.json", "meta/episodes/chunk-000/file-000.parquet"
DATA, VIDEO = "data/chunk-000/file-000.parquet", "videos/observation.images.front/chunk-000/file-000.mp4"
LEROBOT: dict[str, tuple[Callable[[Path], object], str]] = {
    "v2.1": (lambda f: rewrite(f / INFO, lambda i: i.update(codebase_version="v2.1")), "convert_dataset_v21_to_v30"),
    "v9": (lambda f: rewrite(f / INFO, lambda i: i.update(codebase_version="v9.0")), "version v9.0; this reader"),
    "no action": (lambda f: rewrite(f / INFO, lambda i: i["features"].pop("action")), "no feature 'action'"),
    "no column": (
        lambda f: rewrite(f / INFO, lambda i: i["features"].update({"observation.x": i["features"]["action"]})),
        "no column 'observation.x'",
    ),
    "bad json": (lambda f: cut(f / INFO), "truncated or damaged"),
    "cut parquet": (lambda f: cut(f / DATA), "truncated or damaged"),
    "cut episodes": (lambda f: cut(f / ROWS), "truncated or damaged"),
    "no data": (lambda f: (f / DATA).unlink(), "is incomplete"),
    "no tasks": (lambda f: (f / "meta/tasks.parquet").unlink(), "is incomplete"),
    "not finalized": (lambda f: shutil.rmtree(f / "meta/episodes"), "not finalized"),
    "fewer rows": (lambda f: drop_rows(f / DATA), "episode 2: .* has 9 rows of it, meta/episodes says 12"),
    "no video": (lambda f: (f / VIDEO).unlink(), "there is no video"),
    "cut video": (lambda f: cut(f / VIDEO), "truncated or damaged|cut short"),
}


@pytest.mark.parametrize("fault", LEROBOT)
def test_lerobot(fault: str, folder: Path) -> None:
    change, message = LEROBOT[fault]
    change(folder)
    assert re.search(message, refused(folder))


def test_lerobot_splits(folder: Path) -> None:
    rewrite(folder / INFO, lambda info: info.update(splits={"train": "0:2", "val": "2:3"}))
    assert [len(e) for e in read_episodes(folder, split="val")] == [12]
    assert "there is no split 'test'; there is train, val" in refused(folder, split="test")


def test_other_formats(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    place = write_episodes(sample_episodes(), tmp_path / "a.zarr", format="zarr")
    import zarr

    root = zarr.open_group(place, mode="a")
    root["meta/episode_ends"][:] = np.array([7, 7, 20])
    assert "episode 1 has no step" in refused(place)
    root["meta/episode_ends"][:] = np.array([7, 8, 25])
    assert "data/action has 20 rows" in refused(place)
    place = write_episodes(sample_episodes(), tmp_path / "b-v0", format="minari")
    with h5py.File(place / "data/main_data.hdf5", "a") as file:
        edit(file["episode_0"], "actions", nan_in_row_2)
    assert "episode_0: actions has a value that is not finite in row 2" in refused(place)
    rewrite(place / "data/metadata.json", lambda m: m.update(data_format="arrow"))
    assert "data_format is 'arrow'" in refused(place)
    place = write_episodes(sample_episodes(noise=False), tmp_path / "c", format="dppo")
    assert "dppo data has no splits" in refused(place, split="train")
    cut(place / "train.npz")
    assert "truncated or damaged" in refused(place)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, place = sample_episodes(), tmp_path / "demo.hdf5"
    bad = Episodes((good[0], Episode(**{**vars(good[1]), "actions": good[1].actions * 9})))
    with pytest.raises(UsageError, match=r"episode 1: actions reach .* keep the data in the format lerobot"):
        write_episodes(bad, place, format="robomimic")
    assert list(tmp_path.iterdir()) == []
    write_episodes(good, place, format="robomimic")
    before = place.read_bytes()
    with pytest.raises(UsageError, match="exists; choose another path"):
        write_episodes(good, place, format="robomimic")
    with pytest.raises(UsageError, match="episode 1"):
        write_episodes(bad, place, format="robomimic", overwrite=True)
    assert place.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

    def full(self: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileLayer, "sync_tree", full)
    with pytest.raises(DiskError, match="the disk is full"):
        write_episodes(good, tmp_path / "set", format="lerobot")
    assert [child.name for child in tmp_path.iterdir()] == ["demo.hdf5"]


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    one, two = sample_episode(0, 3, noise=False), sample_episode(1, 3, noise=False)
    with pytest.raises(UsageError, match=r"have rates \[10.0, 20.0\]"):
        write_episodes([one, Episode(**{**vars(two), "fps": 20.0})], tmp_path / "a", format="lerobot")
    with pytest.raises(UsageError, match="even image sides, not 5 × 4"):
        odd = {"cam": np.zeros((3, 5, 4, 3), np.uint8)}
        write_episodes(
            [Episode(**{**vars(one), "observations": odd})], tmp_path / "a", format="lerobot", images="video"
        )
    with pytest.raises(UsageError, match="both be named 'observation.a.b'"):
        clash = {"a/b": np.zeros((3, 1), np.float32), "a.b": np.zeros((3, 1), np.float32)}
        write_episodes([Episode(**{**vars(one), "observations": clash})], tmp_path / "a", format="lerobot")
    with pytest.raises(UsageError, match="images='video' is for the format lerobot"):
        write_episodes([one], tmp_path / "a", format="robomimic", images="video")
    with pytest.raises(UsageError, match="JSON"):
        write_episodes([Episode(**{**vars(one), "meta": {"x": np.zeros(2)}})], tmp_path / "a", format="robomimic")
    with pytest.raises(UsageError, match="there is no episode"):
        write_episodes([], tmp_path / "a", format="robomimic")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(EnvironmentMissing, match=r"'h5py'.*pip install \"gencontrol\[robotics\]\""):
        write_episodes(sample_episodes(), tmp_path / "demo.hdf5", format="robomimic")
    assert list(tmp_path.iterdir()) == []
