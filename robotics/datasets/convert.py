"""Demonstrations on disk: read and write episodes in the formats of other robot-learning projects.

    episodes = read_episodes("lift/ph/low_dim.hdf5")           # robomimic HDF5, LeRobot v3, Minari, zarr or DPPO npz
    write_episodes(episodes, "lift_lerobot", format="lerobot", images="video")

`gencontrol convert SOURCE TARGET --format F` does both on the command line.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gencontrol.errors import UsageError, nearest
from gencontrol.robotics.datasets.episodes import Episode, Episodes
from gencontrol.robotics.datasets.storage import Request, naming, reading, staged

#: format → (module with `read`, module with `write`)
FORMATS = {
    "robomimic": ("robomimic", "robomimic"),
    "lerobot": ("lerobot", "lerobot_write"),
    "minari": ("minari", "minari"),
    "zarr": ("zarr", "zarr"),
    "dppo": ("dppo", "dppo"),
}
#: ending of a name → the format that is written there; everything else is a LeRobot folder
ENDINGS = {".hdf5": "robomimic", ".h5": "robomimic", ".zarr": "zarr"}
#: a file or folder that a format always has → the format
SIGNS = {
    "meta/info.json": "lerobot",
    "data/main_data.hdf5": "minari",
    "main_data.hdf5": "minari",
    "data/metadata.json": "minari",
    "meta/episode_ends": "zarr",
    ".zgroup": "zarr",
    "zarr.json": "zarr",
    "train.npz": "dppo",
}
HDF5 = b"\x89HDF\r\n\x1a\n"


def read_episodes(
    path: str | Path,
    *,
    format: str | None = None,
    keys: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Episodes:
    """Read a data set into memory.

    Args:
        path: file or folder.
        format: "robomimic", "lerobot", "minari", "zarr" (Diffusion Policy) or "dppo"; None finds it from the path.
        keys: observations to read, by their names in the file; None reads all.
        rename: name in the file → name in the episodes, e.g. to the names that the environment uses.
        split: a robomimic mask or LeRobot split; None reads all episodes.
        limit: at most so many episodes, the first ones.

    Raises:
        UsageError: there is no readable data set, or its content is not usable; the message names file and episode.
        EnvironmentMissing: a package that the format needs is not installed.
    """
    place = Path(path).expanduser()
    if not place.exists():
        names = [child.name for child in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UsageError(f"there is no '{place}'; give the file or folder of a data set.{nearest(place.name, names)}")
    kind = find_format(place) if format is None else _known(format)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; give at least 1 episode, or None for all.")
    module = importlib.import_module(f"gencontrol.robotics.datasets.{FORMATS[kind][0]}")
    # a file that its own package did not write can be wrong in any way: the reader's surprise is its fault
    with naming(f"'{place}'"), reading(place, TypeError, ValueError, AttributeError, IndexError):
        episodes: Episodes = module.read(place, Request(keys, split, limit))
        have = episodes[0].observations
        if missing := [old for old in rename or () if old not in have]:
            raise UsageError(f"there is no observation '{missing[0]}' to rename; there are {', '.join(have)}.")
        new = {key: (rename or {}).get(key, key) for key in have}
        if len(set(new.values())) < len(new):
            raise UsageError(f"renaming gives two observations one name: {', '.join(new.values())}.")
        if not rename:
            return episodes
        items = [replace(e, observations={new[key]: rows for key, rows in e.observations.items()}) for e in episodes]
        return Episodes(tuple(items), episodes.env)


def write_episodes(
    episodes: Episodes | Sequence[Episode],
    path: str | Path,
    *,
    format: str | None = None,
    images: Literal["png", "video"] = "png",
    overwrite: bool = False,
) -> Path:
    """Write a data set and return its path; it appears complete or not at all.

    What a format has no field for (task, seed, rate, success, env) is stored where its own readers do not look, and
    `read_episodes` finds it.  Two things are left out: zarr, dppo and lerobot drop an observation after the last
    action, and dppo drops all but observations and actions.

    Args:
        path: file (robomimic) or folder (all others), which must not exist yet.
        format: "robomimic", "lerobot", "minari", "zarr" or "dppo"; None: by the name, see `format_for`.
        images: "png" keeps them exactly; "video" (lerobot alone) makes small mp4 files that lose detail.
        overwrite: replace what is at `path`.

    Raises:
        UsageError: something is at `path`, or the format cannot hold the episodes.
        EnvironmentMissing: a package that the format needs is not installed.
        DiskError: the disk is full or not writable.
    """
    kind = format_for(path, format)
    if images not in ("png", "video"):
        raise UsageError(f"images is '{images}'; choose 'png' or 'video'.")
    if images == "video" and kind != "lerobot":
        raise UsageError(f"images='video' is for the format lerobot; {kind} stores them as arrays: leave it out.")
    items = episodes if isinstance(episodes, Episodes) else Episodes(tuple(episodes))
    module = importlib.import_module(f"gencontrol.robotics.datasets.{FORMATS[kind][1]}")
    place = Path(path).expanduser()
    with staged(place, overwrite=overwrite) as target:
        if kind == "lerobot":
            module.write(items, target, images)
        elif kind == "minari":
            module.write(items, target, place.name)
        else:
            module.write(items, target)
    return place


def format_for(path: str | Path, format: str | None = None) -> str:
    """Return the format to write at a path: the given one, or robomimic for .hdf5, zarr for .zarr, else lerobot.

    Raises:
        UsageError: an unknown format, or one that writes a folder where the name says HDF5.
    """
    suffix = Path(path).suffix
    kind = ENDINGS.get(suffix, "lerobot") if format is None else _known(format)
    if suffix in (".hdf5", ".h5") and kind != "robomimic":
        raise UsageError(
            f"'{path}' is named like an HDF5 file, and {kind} writes a folder; rename it, or use robomimic."
        )
    return kind


def find_format(path: Path) -> str:
    """Return the format of an existing file or folder.

    Raises:
        UsageError: it is none of ours; the message says what was found.
    """
    if path.is_dir():
        holds = ", ".join(sorted(child.name for child in path.iterdir())[:6])
        found = next((kind for sign, kind in SIGNS.items() if (path / sign).exists()), None)
    else:
        with open(path, "rb") as file:
            head, holds = file.read(8), "no known header"
        if head == HDF5:
            return "minari" if path.name == "main_data.hdf5" else "robomimic"
        if path.suffix in (".hdf5", ".h5"):
            raise UsageError(
                f"'{path}' is no HDF5 file: it is truncated, damaged or a Git LFS pointer; fetch it again."
            )
        found = {".npz": "dppo", ".zip": "zarr"}.get(path.suffix)
    if found is None:
        raise UsageError(
            f"'{path}' is no data set that can be read ({holds or 'an empty folder'}); expected robomimic *.hdf5, a "
            "LeRobot v3, Minari or zarr folder, or DPPO's train.npz. Pass format=… if its name misleads."
        )
    return found


def _known(format: str) -> str:
    """Return a format's name, checked."""
    if format not in FORMATS:
        raise UsageError(f"unknown format '{format}'; choose from {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    return format
