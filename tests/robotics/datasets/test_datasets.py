"""Round trips of every format, recorded files of lerobot, and readers of the real packages where they are installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gencontrol.cli import main
from gencontrol.robotics.datasets.convert import FORMATS, format_for, read_episodes, write_episodes
from gencontrol.robotics.datasets.episodes import Episode, Episodes
from tests.helpers.episode_samples import LENGTHS, RECORDED, TASKS, flat_image, sample_episode, sample_episodes

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "lerobot_v3"
NEEDS = {"robomimic": "h5py", "lerobot": "pyarrow", "minari": "h5py", "zarr": "zarr", "dppo": "numpy"}
TARGET = {"robomimic": "demo.hdf5", "lerobot": "folder", "minari": "sample-v0", "zarr": "replay.zarr", "dppo": "dppo"}
#: formats that hold all of an Episode but, for the last two, the final observation
EXACT = ["robomimic", "minari", "lerobot", "zarr"]


def without_final(episode: Episode) -> Episode:
    """Drop row T of observations and states."""
    count = len(episode)
    rows = {key: value[:count] for key, value in episode.observations.items()}
    states = None if episode.states is None else episode.states[:count]
    return Episode(**{**vars(episode), "observations": rows, "states": states})


def assert_same(one: Episode, two: Episode) -> None:
    """Every field equal, in value and type."""
    assert set(one.observations) == set(two.observations)
    arrays = [(name, getattr(one, name), getattr(two, name)) for name in ("actions", "rewards", "states")]
    arrays += [(name, getattr(one, name), getattr(two, name)) for name in ("terminated", "truncated", "success")]
    arrays += [(key, value, two.observations[key]) for key, value in one.observations.items()]
    for name, a, b in arrays:
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and np.array_equal(a, b), name
    for name in ("task", "seed", "fps", "meta"):
        assert getattr(one, name) == getattr(two, name), name


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("kind", EXACT)
def test_round_trip(kind: str, final: bool, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[kind])
    ours = sample_episodes(final=final)
    place = write_episodes(ours, tmp_path / TARGET[kind], format=kind)
    back = read_episodes(place)
    assert back.env == ours.env and [len(episode) for episode in back] == list(LENGTHS)
    for one, two in zip(ours, back, strict=True):
        assert_same(without_final(one) if kind in ("lerobot", "zarr") else one, two)
    assert [child.name for child in tmp_path.iterdir()] == [TARGET[kind]], "a temporary file was left behind"


def test_dppo_keeps_vectors_to_rounding_and_images_exactly(tmp_path: Path) -> None:
    ours = sample_episodes(noise=False)
    back = read_episodes(write_episodes(ours, tmp_path / "dppo", format="dppo"))
    for one, two in zip(ours, back, strict=True):
        count = len(one)
        state = np.concatenate([one.observations["state"], one.observations["gripper"]], axis=1)[:count]
        assert np.abs(two.observations["state"] - state).max() < 1e-6
        assert np.abs(two.actions - one.actions).max() < 1e-6 and np.array_equal(two.rewards, one.rewards)
        assert np.array_equal(two.observations["image"], one.observations["front"][:count])
    stored = np.load(tmp_path / "dppo" / "train.npz")
    assert stored["images"].shape == (sum(LENGTHS), 3, 32, 32) and np.abs(stored["states"]).max() <= 1


@pytest.mark.parametrize("kind", FORMATS)
def test_keys_limit_and_names(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[kind])
    place = write_episodes(sample_episodes(noise=False), tmp_path / TARGET[kind], format=kind)
    back = read_episodes(place, keys=["state"], limit=2, rename={"state": "proprio"})
    assert len(back) == 2 and list(back[1].observations) == ["proprio"]


def test_demos_are_sorted_by_number_and_masks_are_splits(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    many = Episodes(tuple(sample_episode(number, number + 1, noise=False) for number in range(12)))
    place = write_episodes(many, tmp_path / "many.hdf5", format="robomimic")
    assert [len(episode) for episode in read_episodes(place)] == list(range(1, 13))
    with h5py.File(place, "a") as file:
        assert file["data"].attrs["total"] == sum(range(1, 13))
        file["mask/train"] = [b"demo_10", b"demo_2"]
    assert [len(episode) for episode in read_episodes(place, split="train")] == [3, 11]


def test_robomimic_file_without_our_fields(tmp_path: Path) -> None:
    """What robomimic's own collector writes: float64, dones, robosuite's sparse reward, no flags of ours."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "lift.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 10}})
        demo = data.create_group("demo_0")
        demo["actions"] = np.linspace(-1, 1, 6).reshape(3, 2)
        demo["rewards"], demo["dones"] = [0.0, 0.0, 1.0], [0, 0, 1]
        demo["obs/object"] = np.arange(6.0).reshape(3, 2)
        eye = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
        demo["obs/eye"] = eye.transpose(0, 3, 1, 2)
    (episode,) = read_episodes(tmp_path / "lift.hdf5")
    assert episode.actions.dtype == np.float32 and episode.observations["object"].dtype == np.float32
    assert np.array_equal(episode.observations["eye"], eye)
    assert episode.success.tolist() == episode.terminated.tolist() == [False, False, True]
    assert not episode.truncated.any() and episode.fps == 10.0 and episode.states is None


def test_lerobots_own_files() -> None:
    """tests/fixtures/lerobot_v3 was written by lerobot 0.4.4 from the formulas of sample_episode."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    back = read_episodes(FIXTURE, split="train")
    assert [len(episode) for episode in back] == list(RECORDED)
    for number, (episode, count) in enumerate(zip(back, RECORDED, strict=True)):
        ours = sample_episode(number, count)
        seen = {key.removeprefix("observation."): value for key, value in episode.observations.items()}
        assert np.array_equal(seen["state"], ours.observations["state"][:count])
        assert np.array_equal(seen["gripper"], ours.observations["gripper"][:count])
        grid = np.stack([np.outer([1, 2], row[:3]).astype(np.float32) for row in ours.observations["state"][:count]])
        assert np.array_equal(seen["grid"], grid)
        assert np.array_equal(episode.actions, ours.actions) and np.array_equal(episode.rewards, ours.rewards)
        assert np.array_equal(episode.success, ours.success) and episode.task == (TASKS[number] or "nothing")
        assert episode.terminated.tolist() == [False] * (count - 1) + [True] and episode.fps == 10.0
        exact = np.stack([flat_image(number, step) for step in range(count)])
        assert np.array_equal(seen["images.wrist"], exact[..., ::-1])
        # one step of the formula is 15 levels of red: an error under 7 is no other frame's picture
        assert np.abs(seen["images.front"].astype(int) - exact).max() < 7


def test_video_keeps_frames_in_their_places(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    from gencontrol.robotics.datasets.lerobot_write import write

    ours = sample_episodes(final=False, noise=False)
    place = write_episodes(ours, tmp_path / "video", format="lerobot", images="video")
    assert len(list(place.rglob("*.mp4"))) == 1
    write(ours, tmp_path / "small", "video", file_mb=1e-5)  # a new file as soon as there is a byte
    assert len(list((tmp_path / "small").rglob("*.parquet"))) == len(LENGTHS) + 2
    assert len(list((tmp_path / "small").rglob("*.mp4"))) > 1
    for folder in (place, tmp_path / "small"):
        for one, two in zip(ours, read_episodes(folder), strict=True):
            assert np.abs(one.observations["front"].astype(int) - two.observations["front"]).max() < 7
            assert np.array_equal(one.observations["state"], two.observations["state"])


def test_lerobot_tables_agree_with_each_other(tmp_path: Path) -> None:
    """Lengths sum to the total, ranges touch, index counts, timestamp = frame_index/fps in float32."""
    pq = pytest.importorskip("pyarrow.parquet")
    place = write_episodes(sample_episodes(), tmp_path / "folder", format="lerobot")
    info = json.loads((place / "meta/info.json").read_text(encoding="utf-8"))
    rows = pq.read_table(place / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert info["total_frames"] == sum(row["length"] for row in rows) == sum(LENGTHS)
    assert info["splits"] == {"train": "0:3"} and info["total_tasks"] == 3
    edges = np.cumsum([0, *LENGTHS]).tolist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == list(zip(edges, edges[1:]))
    file = pq.ParquetFile(place / "data/chunk-000/file-000.parquet")
    assert file.num_row_groups == len(LENGTHS)
    table = file.read()
    assert table["index"].to_pylist() == list(range(sum(LENGTHS)))
    times = table["timestamp"].to_numpy()
    assert times.dtype == np.float32
    assert np.array_equal(times, (table["frame_index"].to_numpy() / info["fps"]).astype(np.float32))
    stats = json.loads((place / "meta/stats.json").read_text(encoding="utf-8"))
    assert set(stats) == set(info["features"])
    actions = np.concatenate([episode.actions for episode in sample_episodes()]).astype(np.float64)
    assert np.allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), rtol=1e-12)
    pixels = np.concatenate([episode.observations["wrist/rgb"][: len(episode)] for episode in sample_episodes()]) / 255
    found = stats["observation.images.wrist.rgb"]
    for name, value in (
        ("mean", pixels.mean((0, 1, 2))),
        ("std", pixels.std((0, 1, 2))),
        ("max", pixels.max((0, 1, 2))),
    ):
        assert np.allclose(np.reshape(found[name], 3), value, rtol=1e-9), name
    assert np.shape(found["q10"]) == (3, 1, 1) and found["count"] == [sum(LENGTHS)]
    level = np.quantile(pixels, 0.1, axis=(0, 1, 2), method="inverted_cdf")
    assert np.allclose(np.reshape(found["q10"], 3), level, rtol=1e-9)


@pytest.mark.parametrize("only", [False, True])
def test_minari_itself_reads_ours(only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    ours = sample_episodes()
    if only:
        ours = Episodes(
            tuple(Episode(**{**vars(e), "observations": {"observation": e.observations["state"]}}) for e in ours)
        )
    write_episodes(ours, tmp_path / "sample-v0", format="minari")
    data = minari.load_dataset("sample-v0")
    assert data.total_episodes == 3 and data.total_steps == sum(LENGTHS)
    for one, two in zip(ours, data.iterate_episodes(), strict=True):
        assert np.array_equal(two.actions, one.actions) and np.array_equal(two.terminations, one.terminated)
        seen = two.observations if only else two.observations["wrist"]["rgb"]
        assert np.array_equal(seen, one.observations["observation" if only else "wrist/rgb"])


def test_we_read_what_minari_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box, Dict
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    ours = sample_episodes(noise=False)
    space = Dict({"state": Box(-np.inf, np.inf, (4,)), "front": Box(0, 255, (32, 32, 3), np.uint8)})
    buffers = [
        EpisodeBuffer(
            seed=e.seed,
            observations={key: list(e.observations[key]) for key in ("state", "front")},
            actions=list(e.actions),
            rewards=e.rewards.tolist(),
            terminations=e.terminated.tolist(),
            truncations=e.truncated.tolist(),
            infos={"is_success": [False, *e.success.tolist()]},
        )
        for e in ours
    ]
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers("theirs-v0", buffers, observation_space=space, action_space=Box(-1, 1, (3,)))
    for one, two in zip(ours, read_episodes(tmp_path / "theirs-v0"), strict=True):
        assert np.array_equal(one.observations["state"], two.observations["state"]) and one.seed == two.seed
        assert np.array_equal(one.success, two.success) and np.array_equal(one.truncated, two.truncated)
        # minari stores pictures as JPEG
        assert np.abs(one.observations["front"].astype(int) - two.observations["front"]).max() < 7


def test_zarr_of_diffusion_policy(tmp_path: Path) -> None:
    """A zip store with float images in 0 … 255 and without any field of ours, as in its PushT data."""
    zarr = pytest.importorskip("zarr")
    place = tmp_path / "pusht.zarr.zip"
    with zarr.storage.ZipStore(place, mode="w") as store:
        root = zarr.open_group(store, mode="w", zarr_format=2)
        root.create_group("data"), root.create_group("meta")
        images = np.arange(5 * 12, dtype=np.float32).reshape(5, 2, 2, 3) * 4
        for name, rows in {"action": np.zeros((5, 2)), "state": np.ones((5, 5)), "img": images}.items():
            root["data"].create_array(name, data=rows)
        root["meta"].create_array("episode_ends", data=np.array([2, 5]))
    back = read_episodes(place)
    assert [len(episode) for episode in back] == [2, 3] and back[0].observations["img"].dtype == np.uint8
    assert np.array_equal(back[1].observations["img"], images[2:]) and back[1].truncated.tolist() == [
        False,
        False,
        True,
    ]


def test_convert_says_in_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert [format_for(name) for name in ("a.hdf5", "b/c.zarr", "folder")] == ["robomimic", "zarr", "lerobot"]
    for words in (["nowhere", "target", "--format", "zar"], ["nowhere", "target"], ["--limit", "x"], ["one"]):
        assert main(["convert", *words]) == 2 and capsys.readouterr().err.count("\n") == 1, words


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zarr")
    source = write_episodes(sample_episodes(), tmp_path / "demo.hdf5", format="robomimic")
    assert main(["convert", str(source), str(tmp_path / "out.zarr"), "--format", "zarr", "--limit", "2"]) == 0
    assert "2 episodes, 8 frames" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "out.zarr"), "--format", "zarr"]) == 2
    assert "exists" in capsys.readouterr().err
    assert len(read_episodes(tmp_path / "out.zarr")) == 2
    assert main(["convert", str(source), str(tmp_path / "out.zarr"), "--format", "zarr", "--overwrite"]) == 0
    assert len(read_episodes(tmp_path / "out.zarr")) == 3
    key = next(iter(sample_episodes()[0].observations))
    assert main(["convert", str(source), str(tmp_path / "named.zarr"), "--keys", key, "--rename", f"{key}=other"]) == 0
    assert list(read_episodes(tmp_path / "named.zarr")[0].observations) == ["other"]


def test_lerobot_done_is_not_truncation(tmp_path: Path) -> None:
    """Without our column next.terminated, an episode is terminated where it is done and not truncated."""
    pq = pytest.importorskip("pyarrow.parquet")
    place = write_episodes(sample_episodes(), tmp_path / "folder", format="lerobot")
    file = place / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["next.terminated"]), file)
    for one, two in zip(sample_episodes(), read_episodes(place), strict=True):
        assert np.array_equal(one.terminated, two.terminated) and np.array_equal(one.truncated, two.truncated)
