"""Reader of LeRobotDataset v3.0 (docs/robot-interfaces.md#lerobot-dataset, FOUND) with pyarrow, Pillow and PyAV; no
lerobot, no pandas.

Observations keep the file's feature names (`observation.state`, …) unless we wrote the file: then info.json's field
"gencontrol" holds the names and shapes that they had.  The format has no place for an observation after the last
action.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets import storage
from gencontrol.robotics.datasets.episodes import Array, Episode, Episodes
from gencontrol.robotics.datasets.lerobot_video import read_frames

VERSION = "v3.0"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
TASKS = "meta/tasks.parquet"
#: simulator states, under a name that lerobot's policies do not read
STATES = "sim_states"
#: Episode's arrays → feature
NEXT = {
    "rewards": "next.reward",
    "terminated": "next.terminated",
    "truncated": "next.truncated",
    "success": "next.success",
}


def read(path: Path, request: storage.Request) -> Episodes:
    """Read a folder; `split` names one of info.json's splits."""
    info = storage.read_json(path / "meta" / "info.json")
    check_version(info, path)
    if "action" not in info.get("features", {}):
        raise UsageError("there is no feature 'action'; policies need one.")
    rows = _episode_rows(path)
    if request.split is not None:
        known = info.get("splits", {})
        if request.split not in known:
            raise UsageError(f"there is no split '{request.split}'; there is {', '.join(known) or 'none'}.")
        first, _, last = str(known[request.split]).partition(":")  # half open
        rows = rows[int(first) : int(last)]
    rows = rows[: request.limit]
    if not rows:
        raise UsageError("there is no episode.")
    mine = info.get("gencontrol", {})
    file = path / TASKS
    with storage.reading(file, ValueError):
        table = storage.require("pyarrow.parquet").read_table(file)
        # pandas stores the sentence as an index column of any name
        names = [name for name in table.column_names if name != "task_index"]
        if "task_index" not in table.column_names or not names:
            raise UsageError(f"'{file}' has columns {', '.join(table.column_names)}; it needs task_index and task.")
        tasks = dict(zip(table["task_index"].to_pylist(), map(str, table[names[0]].to_pylist()), strict=True))
    reader = _Reader(path, info, mine.get("keys", {}), request, tasks)
    items = tuple(reader.episodes(rows))
    env = mine.get("env") or ({"robot_type": info["robot_type"]} if info.get("robot_type") else {})
    return Episodes(items, env)


def check_version(info: Mapping[str, Any], path: Path) -> None:
    """Refuse data sets of other generations.

    Raises:
        UsageError: the folder is not v3; the message says how to convert.
    """
    version = str(info.get("codebase_version", "unknown"))
    if version.startswith("v3."):
        return
    if version.startswith(("v2.", "v1.")):
        raise UsageError(
            f"'{path}' is a LeRobot {version} data set; convert it to v3.0 in lerobot's own environment with "
            "`python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=NAME --root=FOLDER "
            "--push-to-hub=false`, then read the result."
        )
    raise UsageError(f"'{path}' is a LeRobot data set of version {version}; this reader knows {VERSION}.")


def _episode_rows(path: Path) -> list[dict[str, Any]]:
    """Return meta/episodes in order, without the statistics."""
    pq = storage.require("pyarrow.parquet")
    files = sorted((path / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise UsageError("meta/episodes holds no parquet file; the data set was not finalized: record it again.")
    rows: list[dict[str, Any]] = []
    for file in files:
        with storage.reading(file, ValueError):
            names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
            rows += pq.read_table(file, columns=names).to_pylist()
    return sorted(rows, key=lambda row: row["episode_index"])


class _Reader:
    """Reads episodes file by file."""

    def __init__(
        self,
        path: Path,
        info: Mapping[str, Any],
        mine: Mapping[str, Any],
        request: storage.Request,
        tasks: dict[int, str],
    ) -> None:
        self.path, self.info, self.tasks, self.mine = path, info, tasks, mine
        self.features: dict[str, Any] = info["features"]
        seen = [name for name in self.features if name.startswith("observation")]
        names = {mine.get(name, {}).get("key", name): name for name in seen}
        #: our key → feature
        self.keys = {key: names[key] for key in request.chosen(names)}
        self.fps = float(info["fps"])

    def episodes(self, rows: Sequence[dict[str, Any]]) -> Iterator[Episode]:
        """Yield the episodes of meta rows, opening each data file once."""
        groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["data/chunk_index"], row["data/file_index"]), []).append(row)
        for (chunk, number), group in groups.items():
            file = self.path / self.info.get("data_path", DATA).format(chunk_index=chunk, file_index=number)
            table = self._table(file)
            owner = table["episode_index"].to_numpy()
            videos = {key: self._videos(name, group) for key, name in self.keys.items() if self._is_video(name)}
            for place, row in enumerate(group):
                index = int(row["episode_index"])
                with storage.naming(f"episode {index}"):
                    found = np.flatnonzero(owner == index)
                    if len(found) != row["length"]:
                        raise UsageError(
                            f"'{file.name}' has {len(found)} rows of it, meta/episodes says {row['length']}; the data "
                            "set is incomplete or was not finalized."
                        )
                    # consecutive rows are cut out without a copy
                    whole = len(found) and found[-1] - found[0] == len(found) - 1
                    part = table.slice(int(found[0]), len(found)) if whole else table.take(found)
                    yield self._episode(part, row, {key: frames[place] for key, frames in videos.items()})

    def _is_video(self, name: str) -> bool:
        return self.features[name]["dtype"] == "video"

    def _table(self, file: Path) -> Any:
        """Read the columns that are needed of one data file."""
        pq = storage.require("pyarrow.parquet")
        with storage.reading(file, ValueError):
            have = pq.read_schema(file).names
            wanted = [name for name in self.keys.values() if not self._is_video(name)]
            wanted += ["action", "episode_index", "frame_index"]
            if missing := [name for name in wanted if name not in have]:
                raise UsageError(f"'{file}' has no column '{missing[0]}', which meta/info.json names; copy it again.")
            more = [n for n in ("task_index", "next.done", STATES, *NEXT.values()) if n in have]
            return pq.read_table(file, columns=[*wanted, *more])

    def _videos(self, name: str, group: Sequence[dict[str, Any]]) -> list[Array]:
        """Decode one camera's frames of some episodes, file by file."""
        frames: dict[int, Array] = {}
        files: dict[tuple[int, int], list[int]] = {}
        for place, row in enumerate(group):
            files.setdefault((row[f"videos/{name}/chunk_index"], row[f"videos/{name}/file_index"]), []).append(place)
        pattern = self.info.get("video_path") or VIDEO
        for (chunk, number), places in files.items():
            file = self.path / pattern.format(video_key=name, chunk_index=chunk, file_index=number)
            spans = [(float(group[p][f"videos/{name}/from_timestamp"]), int(group[p]["length"])) for p in places]
            frames.update(zip(places, read_frames(file, spans, self.fps), strict=True))
        return [frames[place] for place in range(len(group))]

    def _episode(self, table: Any, row: Mapping[str, Any], videos: Mapping[str, Array]) -> Episode:
        """Build one episode from its rows."""
        if not np.array_equal(table["frame_index"].to_numpy(), np.arange(len(table))):
            raise UsageError("its frame_index does not count 0, 1, 2, …; the data set is damaged.")
        observations = {}
        for key, name in self.keys.items():
            value = videos[key] if key in videos else self._column(table, name)
            shape = self.mine.get(name, {}).get("shape")
            observations[key] = value if shape is None else value.reshape(len(value), *shape)
        found = {field: _numbers(table, name) for field, name in NEXT.items()}
        if found["terminated"] is None and (done := _numbers(table, "next.done")) is not None:
            truncated = found["truncated"]
            found["terminated"] = done if truncated is None else done.astype(bool) & ~truncated.astype(bool)
        numbers = table["task_index"].to_pylist() if "task_index" in table.column_names else []
        tasks = [self.tasks.get(number, "") for number in dict.fromkeys(numbers)]
        meta = {"tasks": tasks} if len(tasks) > 1 else {}
        extras = storage.Extras.parse(
            row.get("gencontrol"), storage.Extras(tasks[0] if tasks else "", None, self.fps, meta)
        )
        actions = self._column(table, "action")
        if actions.ndim == 1:
            actions = actions[:, None]
        return storage.episode(observations, actions, found, extras, _numbers(table, STATES))

    def _column(self, table: Any, name: str) -> Array:
        """Return one feature of all rows, images decoded."""
        with storage.naming(f"'{name}'"):
            kind = self.features[name]["dtype"]
            if kind == "image":
                return np.stack([self._image(cell) for cell in table[name].to_pylist()])
            if kind == "string":
                raise UsageError("it holds text; leave it out with keys=[…].")
            value = _array(table[name]).astype(np.float32)
            return value[:, None] if value.ndim == 1 else value

    def _image(self, cell: Mapping[str, Any] | None) -> Array:
        """Decode one image cell: bytes in the table, or a file beside it."""
        if cell is None or (cell.get("bytes") is None and not cell.get("path")):
            raise UsageError("a row has no image; record the episode again.")
        if cell.get("bytes") is not None:
            return storage.picture(cell["bytes"])
        file = self.path / cell["path"]
        with storage.reading(file):
            return storage.picture(file.read_bytes())


def _numbers(table: Any, name: str) -> Array | None:
    """Return a column of numbers, or None where there is none."""
    return _array(table[name]) if name in table.column_names else None


def _array(column: Any) -> Array:
    """Turn a column of numbers or of (nested, equally long) lists into an array."""
    pa = storage.require("pyarrow")
    values = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    shape = [len(values)]
    while (
        pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type) or pa.types.is_large_list(values.type)
    ):
        if values.null_count:
            raise UsageError("a row is empty; record the episode again.")
        outer, values = len(values), values.flatten()
        if len(values) % max(outer, 1):
            raise UsageError("rows have unequal lengths; record the episode again.")
        shape.append(len(values) // max(outer, 1))
    if values.null_count:
        raise UsageError("a value is missing; record the episode again.")
    return values.to_numpy(zero_copy_only=False).reshape(shape)
