"""Writer of LeRobotDataset v3.0: parquet, images as PNG or video, statistics with quantiles, tasks.

Checked by reading the result with lerobot 0.4.4 (tests/fixtures/README.md).  Feature names: a picture `key` becomes
`observation.images.key`, any other array `observation.key`; names that begin with "observation." stay; "/" becomes
".".  The names, row shapes and the environment are kept in info.json's field "gencontrol", each episode's task, seed
and meta in the column "gencontrol" of meta/episodes.  An observation after the last action has no place in the format
and is left out.

Statistics are exact: of numbers over their rows, of pictures per channel by histograms; lerobot itself samples some
frames and interpolates quantiles in bins (FOUND, compute_stats.py), shapes and keys agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gencontrol.data.normalize import QUANTILES, statistics
from gencontrol.errors import UsageError
from gencontrol.robotics.datasets import storage
from gencontrol.robotics.datasets.episodes import Array, Episode, Episodes
from gencontrol.robotics.datasets.lerobot import DATA, EPISODES, NEXT, STATES, TASKS, VERSION, VIDEO
from gencontrol.robotics.datasets.lerobot_video import FrameWriter

Images = Literal["png", "video"]
MB = 2**20
DATA_MB, VIDEO_MB, FILES_IN_CHUNK = 100, 200, 1000
COUNTERS = {"timestamp": "float32", **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")}


def write(episodes: Episodes, target: Path, images: Images = "png", file_mb: float = DATA_MB) -> None:
    """Write a folder, one episode at a time.

    Args:
        file_mb: size in MiB at which a new parquet file begins; a video file may be twice as long.

    Raises:
        UsageError: episodes have different rates, names clash, or video cannot hold the images' size.
    """
    rates = sorted({episode.fps for episode in episodes})
    if len(rates) > 1:
        raise UsageError(f"the episodes have rates {rates}; a LeRobot data set has one: write one folder for each.")
    writer = _Writer(episodes[0], target, images, file_mb)
    try:
        for index, episode in enumerate(episodes):
            writer.add(index, episode)
    finally:
        writer.close()
    writer.write_meta(episodes)


def feature_name(key: str, *, image: bool) -> str:
    """Return the name of an observation in the file."""
    name = key.replace("/", ".")
    if name.startswith("observation."):
        return name
    return f"observation.images.{name}" if image else f"observation.{name}"


def _feature(kind: str, shape: tuple[int, ...], names: list[str] | None = None) -> dict[str, Any]:
    """Return one entry of info.json's features."""
    return {"dtype": kind, "shape": list(shape), "names": names}


def _place(number: int) -> dict[str, int]:
    """Return chunk and file of the number-th file."""
    return {"chunk_index": number // FILES_IN_CHUNK, "file_index": number % FILES_IN_CHUNK}


class Numbers:
    """Rows of several features, side by side in one table: a single pass serves all of them."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, columns: Mapping[str, Array]) -> None:
        """Add feature → [T *d]; scalars become [T 1]."""
        self.shapes = {name: rows.shape[1:] or (1,) for name, rows in columns.items()}
        flat = [rows.reshape(len(rows), -1).astype(np.float64) for rows in columns.values()]
        self.parts.append(np.concatenate(flat, axis=1))

    def statistics(self) -> dict[str, dict[str, Array]]:
        """Return feature → statistic → [*d]."""
        table = statistics(np.concatenate(self.parts))
        count = table.pop("count")
        found, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + math.prod(shape)
            found[name] = {key: value[start:end].reshape(shape) for key, value in table.items()} | {"count": count}
            start = end
        return found


class Pictures:
    """Histograms of the three channels."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), dtype=np.int64)
        self.frames = 0

    def add(self, images: Array) -> None:
        """Add uint8 [T h w 3]."""
        self.frames += len(images)
        for channel in range(3):
            self.counts[channel] += np.bincount(images[..., channel].reshape(-1), minlength=256)

    def statistics(self) -> dict[str, Array]:
        """Return statistic → [3 1 1] of values in [0, 1]."""
        share = self.counts / self.counts.sum(axis=1, keepdims=True)
        values = np.arange(256) / 255
        mean = share @ values
        below = np.cumsum(share, axis=1)
        found = {
            "min": values[np.argmax(self.counts > 0, axis=1)],
            "max": values[255 - np.argmax(self.counts[:, ::-1] > 0, axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(share @ values**2 - mean**2, 0)),
            # the least value that at least this share of the pixels does not exceed
            **{name: values[np.argmax(below >= level - 1e-12, axis=1)] for name, level in QUANTILES.items()},
        }
        shaped = {name: value.reshape(3, 1, 1) for name, value in found.items()}
        return {**shaped, "count": np.array([self.frames])}


class _Writer:
    """Files that grow episode by episode."""

    def __init__(self, first: Episode, target: Path, images: Images, file_mb: float) -> None:
        self.pa, self.pq = storage.require("pyarrow"), storage.require("pyarrow.parquet")
        self.number = -1  # of the open parquet file
        self.file: Any = None
        self.parquet: Any = None
        self.target, self.file_mb, self.fps = target, file_mb, first.fps
        self.pictures = "video" if images == "video" else "image"
        #: feature → our key
        self.keys: dict[str, str] = {}
        self.features = self._features(first)
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.frames = 0
        self.videos: dict[str, tuple[int, FrameWriter]] = {}
        self.numbers = Numbers()
        self.cameras = {name: Pictures() for name, one in self.features.items() if one["dtype"] in ("image", "video")}

    def _features(self, episode: Episode) -> dict[str, dict[str, Any]]:
        """Return info.json's features."""
        found: dict[str, dict[str, Any]] = {}
        for key, rows in episode.observations.items():
            image = storage.is_image(rows.shape[1:], rows.dtype)
            name = feature_name(key, image=image)
            if name in found:
                raise UsageError(
                    f"observations '{self.keys[name]}' and '{key}' would both be named '{name}'; rename one of them."
                )
            self.keys[name] = key
            if image:
                found[name] = _feature(self.pictures, rows.shape[1:], ["height", "width", "channels"])
            else:
                found[name] = _feature(rows.dtype.name, rows.shape[1:] or (1,))
        found["action"] = _feature("float32", episode.actions.shape[1:])
        if episode.states is not None:
            found[STATES] = _feature(episode.states.dtype.name, episode.states.shape[1:])
        found |= {name: _feature("float32" if field == "rewards" else "bool", (1,)) for field, name in NEXT.items()}
        found["next.done"] = _feature("bool", (1,))
        return {**found, **{name: _feature(kind, (1,)) for name, kind in COUNTERS.items()}}

    def add(self, index: int, episode: Episode) -> None:
        """Append one episode to the open files."""
        count = len(episode)
        columns = self._columns(index, episode, self.tasks.setdefault(episode.task, len(self.tasks)))
        row: dict[str, Any] = {"episode_index": index, "tasks": [episode.task], "length": count}
        stats = self._statistics(columns)
        row |= {f"stats/{name}/{key}": value.tolist() for name, one in stats.items() for key, value in one.items()}
        for name in self.cameras:
            if self.features[name]["dtype"] == "video":
                row |= self._video(name, columns.pop(name))
        table = self.pa.table({name: self._arrow(rows, self.features[name]) for name, rows in columns.items()})
        if self.file is None or self.file.tell() >= self.file_mb * MB:
            self._end_parquet()
            self.number += 1
            self.file = open(self._at(DATA, self.number), "wb")
            self.parquet = self.pq.ParquetWriter(self.file, table.schema, compression="snappy")
        self.parquet.write_table(table, row_group_size=len(table))
        row |= {f"data/{key}": value for key, value in _place(self.number).items()}
        row |= {f"meta/episodes/{key}": value for key, value in _place(0).items()}
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + count}
        self.rows.append({**row, "gencontrol": storage.Extras.of(episode).text()})
        self.frames += count

    def _statistics(self, columns: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """Return those of one episode and add it to those of all."""
        one = Numbers()
        plain = {name: rows for name, rows in columns.items() if name not in self.cameras}
        one.add(plain)
        self.numbers.add(plain)
        found = one.statistics()
        for name, total in self.cameras.items():
            pictures = Pictures()
            pictures.add(columns[name])
            total.add(columns[name])
            found[name] = pictures.statistics()
        return found

    def _columns(self, index: int, episode: Episode, task: int) -> dict[str, Array]:
        """Return the rows of all features, [T ...]."""
        count = len(episode)
        number = np.arange(count, dtype=np.int64)
        found = {name: episode.observations[key][:count] for name, key in self.keys.items()}
        found["action"] = episode.actions
        if STATES in self.features:
            if episode.states is None:
                raise UsageError(f"episode {index} has no states, episode 0 has; leave them out of all.")
            found[STATES] = episode.states[:count]
        found |= {name: getattr(episode, field) for field, name in NEXT.items()}
        found["next.done"] = episode.terminated | episode.truncated
        return found | {
            "timestamp": (number / self.fps).astype(np.float32),
            "frame_index": number,
            "episode_index": np.full(count, index),
            "index": number + self.frames,
            "task_index": np.full(count, task),
        }

    def _video(self, name: str, images: Array) -> dict[str, Any]:
        """Append frames to a camera's file; a new one begins when the open one is full."""
        number, writer = self.videos.get(name, (-1, None))
        if writer is None or writer.size() >= 2 * self.file_mb * MB:
            if writer is not None:
                writer.close()
            number += 1
            path = self.target / VIDEO.format(video_key=name, **_place(number))
            writer = FrameWriter(path, self.fps, *images.shape[1:3])
            self.videos[name] = (number, writer)
        start, end = writer.write(images)
        found = {**_place(number), "from_timestamp": start, "to_timestamp": end}
        return {f"videos/{name}/{key}": value for key, value in found.items()}

    def _arrow(self, rows: Array, feature: Mapping[str, Any]) -> Any:
        """Turn [T ...] into a column: scalars, fixed lists, nested lists, or PNG bytes."""
        pa = self.pa
        if feature["dtype"] == "image":
            kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            return pa.array([{"bytes": storage.png(row), "path": None} for row in rows], type=kind)
        shape = feature["shape"]
        values = pa.array(np.ascontiguousarray(rows).reshape(-1))
        if shape == [1]:
            return values
        if len(shape) == 1:
            return pa.FixedSizeListArray.from_arrays(values, shape[0])
        for size in reversed(shape):
            values = pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), values)
        return values

    def _at(self, pattern: str, number: int = 0) -> Path:
        """Return the path of the number-th file of a kind, in a folder that exists."""
        path = self.target / pattern.format(**_place(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _end_parquet(self) -> None:
        """Write the footer of the open file."""
        if self.file is not None:
            self.parquet.close()
            self.file.close()
            self.file = None

    def close(self) -> None:
        """Finish all files."""
        self._end_parquet()
        for _, writer in self.videos.values():
            writer.close()

    def write_meta(self, episodes: Episodes) -> None:
        """Write meta/: info, statistics, tasks and the table of episodes."""
        meta = self.target / "meta"
        found = self.numbers.statistics() | {name: total.statistics() for name, total in self.cameras.items()}
        stats = {name: {key: value.tolist() for key, value in one.items()} for name, one in found.items()}
        self.pq.write_table(self.pa.Table.from_pylist(self.rows), self._at(EPISODES), compression="snappy")
        # pandas reads this table as a frame with the sentences for an index
        kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
        columns = [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
            for name, (kind, dtype) in kinds.items()
        ]
        pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        table = self.pa.table({"task_index": np.fromiter(self.tasks.values(), np.int64), "task": list(self.tasks)})
        self.pq.write_table(table.replace_schema_metadata({"pandas": storage.json_text(pandas)}), self._at(TASKS))
        (meta / "stats.json").write_text(storage.json_text(stats), encoding="utf-8")
        (meta / "info.json").write_text(storage.json_text(self._info(episodes)), encoding="utf-8")

    def _info(self, episodes: Episodes) -> dict[str, Any]:
        """Return meta/info.json."""
        for name, (_, writer) in self.videos.items():
            self.features[name]["info"] = writer.info()
        shapes = {name: list(episodes[0].observations[key].shape[1:]) for name, key in self.keys.items()}
        return {
            "codebase_version": VERSION,
            "robot_type": episodes.env.get("robot_type"),
            "total_episodes": len(episodes),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_IN_CHUNK,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "splits": {"train": f"0:{len(episodes)}"},
            "data_path": DATA,
            "video_path": VIDEO if self.videos else None,
            "features": self.features,
            "gencontrol": {
                "keys": {name: {"key": key, "shape": shapes[name]} for name, key in self.keys.items()},
                "env": dict(episodes.env),
            },
        }
