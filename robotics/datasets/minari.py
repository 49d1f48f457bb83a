"""Minari 0.5's HDF5 storage, read and written with h5py alone (FOUND, minari/dataset/_storages/hdf5_storage.py).

A data set is a folder with data/main_data.hdf5 (episode_0, episode_1, … with observations of T + 1 rows) and
data/metadata.json.  Written under `$MINARI_DATASETS_PATH/<id>`, it opens with `minari.load_dataset("<id>")`.  Where an
episode has no observation after its last action, the last one is repeated and marked, so that it comes back as it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets import storage
from gencontrol.robotics.datasets.episodes import Array, Episode, Episodes

FILE, METADATA = "main_data.hdf5", "metadata.json"
#: minari refuses versions that it does not know; 0.5.3 and 0.5.4 do not differ here
MINARI_VERSION = "0.5.3"
#: a single array of observations gets this name, as in gymnasium-robotics
ONLY = "observation"


def read(path: Path, request: storage.Request) -> Episodes:
    """Read a data set's folder, its data folder or its main_data.hdf5."""
    request.no_split("minari")
    h5py = storage.require("h5py")
    folder = path.parent if path.is_file() else (path / "data" if (path / "data").is_dir() else path)
    metadata = storage.read_json(folder / METADATA)
    if metadata.get("data_format", "hdf5") != "hdf5":
        raise UsageError(
            f"its data_format is '{metadata['data_format']}'; make it again with minari's data_format='hdf5'."
        )
    spec = json.loads(metadata.get("env_spec") or "{}")
    recorded = {"env_id": spec["id"], "kwargs": spec.get("kwargs", {})} if "id" in spec else {}
    env = dict(metadata.get("gencontrol") or recorded)
    file = folder / FILE
    with storage.reading(file, ValueError), h5py.File(file, "r") as stored:
        names = sorted((n for n in stored if n.startswith("episode_")), key=lambda n: int(n.rpartition("_")[2]))
        if not names:
            raise UsageError("there is no episode.")
        items = []
        for name in names[: request.limit]:
            with storage.naming(name):
                items.append(_episode(stored[name], request))
    return Episodes(tuple(items), env)


def _episode(group: Any, request: storage.Request) -> Episode:
    """Read one episode."""
    for name in ("observations", "actions"):
        if name not in group:
            raise UsageError(f"there is no '{name}', only {', '.join(group)}.")
    if hasattr(group["actions"], "items"):
        raise UsageError("its actions are a dictionary; policies here need one array.")
    actions = group["actions"][()]
    if actions.ndim != 2 or actions.dtype.kind != "f":
        raise UsageError(f"its actions are {actions.dtype} {actions.shape}; policies here need numbers [T A].")
    if not len(actions):
        raise UsageError("it has no step; leave it out.")
    stored = group["observations"]
    rows = storage.leaves(stored) if hasattr(stored, "items") else {ONLY: stored}
    observations = {key: storage.observation_array(_decoded(rows[key])) for key in request.chosen(rows)}
    default = storage.Extras(seed=int(group.attrs["seed"]) if "seed" in group.attrs else None)
    extras = storage.Extras.parse(group.attrs.get("gencontrol"), default)
    if "gencontrol_repeated" in group.attrs:
        for key in json.loads(group.attrs["gencontrol_repeated"]):
            if key in observations:
                observations[key] = observations[key][:-1]
    infos = storage.leaves(group["infos"]) if "infos" in group else {}
    flag = next((infos[name] for name in ("success", "is_success") if name in infos), None)
    found = {
        "rewards": group["rewards"][()],
        "terminated": group["terminations"][()],
        "truncated": group["truncations"][()],
        # infos begin with that of the reset
        "success": None if flag is None else flag[()][-len(actions) :],
    }
    states = infos["states"][()] if "states" in infos else None
    return storage.episode(observations, actions, found, extras, states)


def _decoded(stored: Any) -> Array:
    """Return rows; a JPEG per row (one byte string each, of equal or unequal lengths) becomes pictures."""
    rows = stored[()]
    jpeg = rows.dtype == object or (rows.dtype == np.uint8 and rows.ndim == 2 and bytes(rows[0, :2]) == b"\xff\xd8")
    return np.stack([storage.picture(bytes(row)) for row in rows]) if jpeg else rows


def write(episodes: Episodes, target: Path, name: str) -> None:
    """Write a folder.

    Args:
        name: the data set's id in its metadata, e.g. "fetch-pick-v0"; the folder's name.
    """
    h5py = storage.require("h5py")
    folder = target / "data"
    folder.mkdir(parents=True)
    with h5py.File(folder / FILE, "w", track_order=True) as file:
        for index, episode in enumerate(episodes):
            _write(file.create_group(f"episode_{index}"), index, episode)
    first = episodes[0]
    root: dict[str, Any] = {"type": "Dict", "subspaces": {}}
    for key, rows in first.observations.items():
        *outer, last = key.split("/")  # "a/b" is an entry of a dictionary within
        place = root
        for part in outer:
            place = place["subspaces"].setdefault(part, {"type": "Dict", "subspaces": {}})
        place["subspaces"][last] = _box(rows)
    spaces = root["subspaces"][ONLY] if set(first.observations) == {ONLY} else root
    metadata = {
        "dataset_id": name,
        "total_episodes": len(episodes),
        "total_steps": episodes.frames,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(spaces),
        "action_space": json.dumps(_box(first.actions)),
        "minari_version": MINARI_VERSION,
        "dataset_size": round((folder / FILE).stat().st_size / 1e6, 1),
        "gencontrol": dict(episodes.env),
    }
    (folder / METADATA).write_text(storage.json_text(metadata), encoding="utf-8")


def _box(rows: Array) -> dict[str, Any]:
    """Return a serialised Box without bounds, or of bytes."""
    low, high = (0, 255) if rows.dtype == np.uint8 else (-np.inf, np.inf)
    shape = rows.shape[1:]
    full = [np.full(shape, value, dtype=rows.dtype).tolist() for value in (low, high)]
    return {"type": "Box", "dtype": rows.dtype.name, "shape": list(shape), "low": full[0], "high": full[1]}


def _write(group: Any, index: int, episode: Episode) -> None:
    """Write one episode."""
    count = len(episode)
    group.attrs["id"], group.attrs["total_steps"] = index, count
    if episode.seed is not None:
        group.attrs["seed"] = episode.seed
    group.attrs["gencontrol"] = storage.Extras.of(episode).text()
    repeated = [key for key, rows in episode.observations.items() if len(rows) == count]
    if repeated:
        group.attrs["gencontrol_repeated"] = storage.json_text(repeated)
    flat = set(episode.observations) == {ONLY}
    for key, rows in episode.observations.items():
        full = np.concatenate([rows, rows[-1:]]) if key in repeated else rows
        group["observations" if flat else f"observations/{key}"] = full
    group["actions"], group["rewards"] = episode.actions, episode.rewards
    group["terminations"], group["truncations"] = episode.terminated, episode.truncated
    group["infos/success"] = np.concatenate([[False], episode.success])
    if episode.states is not None:
        group["infos/states"] = episode.states
