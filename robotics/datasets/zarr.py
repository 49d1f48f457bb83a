"""Diffusion Policy's replay.zarr: data/<key> [rows ...] and meta/episode_ends;
docs/robot-interfaces.md#diffusion-policy (FOUND).

We write zarr format 2, which Diffusion Policy's own zarr 2 reads; reading knows 2, 3 and *.zip.  `data` also gets
reward, terminated, truncated, success and states, and the root attribute "gencontrol" holds task, seed, rate and meta
of every episode.  An observation after the last action has no place in the format and is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets import storage
from gencontrol.robotics.datasets.episodes import Array, Episodes

#: our arrays → name in data/
NAMES = {"rewards": "reward", "terminated": "terminated", "truncated": "truncated", "success": "success"}
RESERVED = {"action", "states", *NAMES.values()}
CHUNK_BYTES = 2 * 2**20


def read(path: Path, request: storage.Request) -> Episodes:
    """Read a folder or a zip file."""
    request.no_split("zarr")
    zarr = storage.require("zarr")
    with ExitStack() as stack:
        stack.enter_context(storage.reading(path, ValueError, RuntimeError))
        store: Any = path
        if path.is_file():
            store = stack.enter_context(zarr.storage.ZipStore(path, mode="r"))
        root = zarr.open_group(store, mode="r")
        if "data" not in root or "meta" not in root or "episode_ends" not in root["meta"]:
            raise UsageError("a replay.zarr needs data/ and meta/episode_ends; this store does not have them.")
        data, ends = root["data"], np.asarray(root["meta"]["episode_ends"][:], dtype=np.int64)
        if not len(ends):
            raise UsageError("meta/episode_ends is empty; there is no episode.")
        if (bad := np.flatnonzero(np.diff(ends, prepend=0) <= 0)).size:
            raise UsageError(f"episode {bad[0]} has no step: meta/episode_ends must increase; leave the episode out.")
        if "action" not in data:
            raise UsageError(f"there is no data/action, only {', '.join(data)}.")
        if data["action"].shape[0] != ends[-1]:
            raise UsageError(f"data/action has {data['action'].shape[0]} rows, meta/episode_ends ends at {ends[-1]}.")
        known = json.loads(root.attrs.get("gencontrol", "{}"))
        keys = {known.get("keys", {}).get(name, name): name for name in sorted(set(data) - RESERVED)}
        names = {key: keys[key] for key in request.chosen(keys)}
        ends = ends[: request.limit]
        arrays: dict[str, Array] = {}
        for name in [*names.values(), *(RESERVED & set(data))]:
            if not data[name].shape or data[name].shape[0] < ends[-1]:
                raise UsageError(f"data/{name} has shape {data[name].shape}, meta/episode_ends asks for {ends[-1]}.")
            arrays[name] = np.asarray(data[name][: ends[-1]])
    items = []
    for index, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
        cut = {name: rows[start:end] for name, rows in arrays.items()}
        extras = known.get("episodes", [])[index : index + 1]
        with storage.naming(f"episode {index}"):
            items.append(
                storage.episode(
                    {key: storage.observation_array(cut[name]) for key, name in names.items()},
                    cut["action"],
                    {field: cut.get(name) for field, name in NAMES.items()},
                    storage.Extras.parse(storage.json_text(extras[0]) if extras else None),
                    cut.get("states"),
                )
            )
    return Episodes(tuple(items), known.get("env", {}))


def write(episodes: Episodes, target: Path) -> None:
    """Write a folder, one array after another."""
    zarr = storage.require("zarr")
    first = episodes[0]
    if clash := sorted(RESERVED & set(first.observations)):
        raise UsageError(f"zarr needs the name '{clash[0]}' for itself; rename the observation.")
    root = zarr.open_group(target, mode="w", zarr_format=2)
    data, meta = root.create_group("data"), root.create_group("meta")
    # groups within data/ would confuse Diffusion Policy's reader
    names = {key: key.replace("/", ".") for key in first.observations}
    columns = {name: [e.observations[key][: len(e)] for e in episodes] for key, name in names.items()}
    columns["action"] = [episode.actions for episode in episodes]
    columns |= {name: [getattr(episode, field) for episode in episodes] for field, name in NAMES.items()}
    if all(episode.states is not None for episode in episodes):
        columns["states"] = [e.states[: len(e)] for e in episodes if e.states is not None]
    for name, parts in columns.items():
        _put(data, name, parts)
    _put(meta, "episode_ends", [np.cumsum([len(episode) for episode in episodes], dtype=np.int64)])
    known = [json.loads(storage.Extras.of(episode).text()) for episode in episodes]
    root.attrs["gencontrol"] = storage.json_text(
        {"env": dict(episodes.env), "episodes": known, "keys": {v: k for k, v in names.items()}}
    )


def _put(group: Any, name: str, parts: Sequence[Array]) -> None:
    """Write one array chunk by chunk, each of about 2 MiB and written once."""
    count, first = sum(map(len, parts)), parts[0]
    rows = max(1, min(count, CHUNK_BYTES // max(1, first[:1].nbytes)))
    array = group.create_array(
        name, shape=(count, *first.shape[1:]), chunks=(rows, *first.shape[1:]), dtype=first.dtype
    )
    start, held, waiting = 0, 0, []
    for part in parts:
        waiting.append(part)
        held += len(part)
        if held >= rows or start + held == count:
            block = np.concatenate(waiting)
            whole = held if start + held == count else held - held % rows
            array[start : start + whole] = block[:whole]
            start, held, waiting = start + whole, held - whole, [block[whole:]]
