"""DPPO's derived data: a folder with train.npz (states, actions, images, traj_lengths) and normalization.npz.

docs/robot-interfaces.md#dppo-files (FOUND, dppo/script/dataset): vectors are joined into one state and mapped to [-1,
1] by 2·((x − min)/(max − min + 1e-6) − ½), images are [n c h w] with the cameras' channels joined.  Reading inverts the
map to float32 rounding.  Everything else of an episode is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets import storage
from gencontrol.robotics.datasets.episodes import Array, Episodes

FILE, SCALES = "train.npz", "normalization.npz"


def read(path: Path, request: storage.Request) -> Episodes:
    """Read a folder or its train.npz; observations are named "state" and "image" ("image_0", … for several)."""
    request.no_split("dppo")
    file = path / FILE if path.is_dir() else path
    arrays, scales = _load(file), file.with_name(SCALES)
    if missing := {"states", "actions", "traj_lengths"} - set(arrays):
        raise UsageError(f"there is no '{sorted(missing)[0]}', only {', '.join(arrays)}.")
    lengths = arrays["traj_lengths"].astype(np.int64)
    for name in ("states", "actions", *(["images"] if "images" in arrays else [])):
        if len(arrays[name]) != lengths.sum():
            raise UsageError(f"'{name}' has {len(arrays[name])} rows, traj_lengths sum to {lengths.sum()}.")
    if scales.exists():
        known = _load(scales)
        for name, short in (("states", "obs"), ("actions", "action")):
            low, high = known[f"{short}_min"], known[f"{short}_max"]
            arrays[name] = (arrays[name].astype(np.float64) / 2 + 0.5) * (high - low + 1e-6) + low
    have = {"state": arrays["states"]}
    if (images := arrays.get("images")) is not None:  # the cameras' channels are joined: [rows, 3·cameras, h, w]
        if images.ndim != 4 or images.shape[1] % 3:
            raise UsageError(f"'images' have shape {images.shape}; expected [rows, 3·cameras, h, w].")
        parts = np.split(images.astype(np.uint8), images.shape[1] // 3, axis=1)
        names = ["image"] if len(parts) == 1 else [f"image_{index}" for index in range(len(parts))]
        have |= {name: np.ascontiguousarray(part.transpose(0, 2, 3, 1)) for name, part in zip(names, parts)}
    chosen = {key: storage.observation_array(have[key]) for key in request.chosen(have)}
    ends = np.cumsum(lengths)[: request.limit]
    items = []
    for index, (count, end) in enumerate(zip(lengths, ends)):
        with storage.naming(f"episode {index}"):
            if count < 1:
                raise UsageError("it has no step; leave it out.")
            rows = slice(end - count, end)
            found = {"rewards": arrays["rewards"][rows] if "rewards" in arrays else None}
            seen = {key: value[rows] for key, value in chosen.items()}
            items.append(storage.episode(seen, arrays["actions"][rows], found))
    return Episodes(tuple(items))


def _load(file: Path) -> dict[str, Array]:
    """Read all arrays of an npz."""
    from zipfile import BadZipFile

    with storage.reading(file, ValueError, BadZipFile), np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def write(episodes: Episodes, target: Path) -> None:
    """Write a folder.

    Raises:
        UsageError: an observation is neither a vector nor a picture.
    """
    first = episodes[0].observations
    pictures = [key for key, rows in first.items() if storage.is_image(rows.shape[1:], rows.dtype)]
    vectors = [key for key in first if key not in pictures]
    for key in vectors:
        if first[key].ndim != 2:
            raise UsageError(
                f"dppo holds vectors and images; observation '{key}' has rows of shape {first[key].shape[1:]}."
            )
    if not vectors:
        raise UsageError("dppo needs at least one vector observation beside the images.")

    def joined(keys: list[str], axis: int) -> Array:
        rows = [np.concatenate([e.observations[key][: len(e)] for e in episodes]) for key in keys]
        return np.concatenate(rows, axis=axis)

    parts = {"states": joined(vectors, 1), "actions": np.concatenate([episode.actions for episode in episodes])}
    scales: dict[str, Array] = {}
    arrays: dict[str, Array] = {}
    for name, short in (("states", "obs"), ("actions", "action")):
        low, high = parts[name].min(0).astype(np.float64), parts[name].max(0).astype(np.float64)
        scales |= {f"{short}_min": low, f"{short}_max": high}
        arrays[name] = (2 * ((parts[name] - low) / (high - low + 1e-6) - 0.5)).astype(np.float32)
    if pictures:
        arrays["images"] = joined(pictures, 3).transpose(0, 3, 1, 2)
    arrays["rewards"] = np.concatenate([episode.rewards for episode in episodes])
    arrays["traj_lengths"] = np.array([len(episode) for episode in episodes])
    target.mkdir()
    files: dict[str, dict[str, Any]] = {FILE: arrays, SCALES: scales}
    for name, content in files.items():
        np.savez(target / name, **content)
