"""What the data-set formats share: guarded imports, atomic writing, one-line errors that name the file, casts.

A format is a module with `read(path, request) -> Episodes` and `write(episodes, target, …)`; see convert.py.
Nothing here or there imports the packages that invented the formats.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.files import disk_errors, replacing
from gencontrol.robotics.datasets.episodes import Array, Episode

#: arrays of an Episode that are one number per step
FLAGS = ("rewards", "terminated", "truncated", "success")


@dataclass(frozen=True)
class Request:
    """What a reader should read.

    Args:
        keys: observation keys to keep, by the names in the file; None keeps all.
        split: name of a split that the file defines (robomimic's mask/<split>, LeRobot's splits); None takes all.
        limit: at most so many episodes, the first ones.
    """

    keys: Sequence[str] | None = None
    split: str | None = None
    limit: int | None = None

    def chosen(self, have: Iterable[str]) -> list[str]:
        """Return the keys to read.

        Raises:
            UsageError: a key is not in the file.
        """
        names = list(have)
        for key in self.keys or ():
            if key not in names:
                raise UsageError(f"there is no observation '{key}'; there are {', '.join(names)}.{nearest(key, names)}")
        return names if self.keys is None else list(self.keys)

    def no_split(self, kind: str) -> None:
        """Refuse a split where the format has none."""
        if self.split is not None:
            raise UsageError(f"{kind} data has no splits; leave out split='{self.split}'.")


def require(name: str) -> Any:
    """Import a module of the robotics extra.

    Raises:
        EnvironmentMissing: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentMissing(
            f"this data format needs the package '{name.partition('.')[0]}', which cannot be imported ({error}); "
            'pip install "gencontrol[robotics]".'
        ) from error


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Begin the message of a UsageError raised inside with the file or episode that it is about, if it lacks it."""
    try:
        yield
    except UsageError as error:
        if where.rstrip("'") in str(error):
            raise
        raise UsageError(f"{where}: {error}") from error


@contextmanager
def reading(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Turn what libraries raise about damaged files into one line about `path`."""
    known: tuple[type[Exception], ...] = (OSError, EOFError, KeyError, *damage)
    try:
        yield
    except FileNotFoundError as error:
        missing = getattr(error, "filename", None) or path
        raise UsageError(f"'{path}' is incomplete: there is no '{missing}'; copy the data set again.") from error
    except known as error:
        if isinstance(error, UsageError):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
        raise UsageError(f"'{path}' cannot be read ({reason}); it is truncated or damaged: copy it again.") from error


@contextmanager
def staged(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a new sibling to write a file or folder to, and move it to `path` when the block ends well.

    Raises:
        UsageError: something is at `path` and `overwrite` is false.
        DiskError: the disk is full or not writable.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"'{path}' exists; choose another path, delete it, or pass overwrite=True.")
    with disk_errors("the data set", path.parent), replacing(path) as sibling:
        yield sibling


def observation_array(value: Array) -> Array:
    """Cast rows to what Episode holds: images uint8 [n h w 3], all else float32.

    Images stored channels first are turned; float images whose values are all whole numbers in 0 … 255 (as in Diffusion
    Policy's PushT) become uint8.
    """
    if value.ndim == 4 and value.dtype == np.uint8 and value.shape[1] == 3 and value.shape[3] != 3:
        return np.ascontiguousarray(value.transpose(0, 2, 3, 1))
    if value.ndim == 4 and value.shape[3] == 3:
        if value.dtype == np.uint8:
            return value
        if value.dtype.kind == "f" and value.min() >= 0 and value.max() <= 255 and value.max() > 1:
            whole = value.astype(np.uint8)
            if np.array_equal(whole, value):
                return whole
    return np.asarray(value, dtype=np.float32)


def is_image(shape: Sequence[int], dtype: Any) -> bool:
    """Whether rows of this shape and type are pictures."""
    return len(shape) == 3 and shape[-1] == 3 and np.dtype(dtype) == np.uint8


@dataclass(frozen=True)
class Extras:
    """What formats have no field for; stored as one JSON string beside each episode."""

    task: str = ""
    seed: int | None = None
    fps: float = 20.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, episode: Episode) -> Extras:
        """Return those of an episode."""
        return cls(episode.task, episode.seed, episode.fps, episode.meta)

    def text(self) -> str:
        """Return JSON.

        Raises:
            UsageError: `meta` cannot be written.
        """
        return json_text({"task": self.task, "seed": self.seed, "fps": self.fps, "meta": dict(self.meta)})

    @classmethod
    def parse(cls, text: str | bytes | None, default: Extras | None = None) -> Extras:
        """Invert `text`; fields that are absent come from `default`."""
        base = default or cls()
        known = json.loads(text) if text else {}
        return replace(base, **{k: v for k, v in known.items() if k in ("task", "seed", "fps", "meta")})


def episode(
    observations: Mapping[str, Array],
    actions: Array,
    found: Mapping[str, Array | None],
    extras: Extras | None = None,
    states: Array | None = None,
) -> Episode:
    """Return an episode of what a file holds; what it lacks is filled in.

    Missing rewards are 0, missing success is false, an episode whose end is not marked was truncated at its last step.
    Arrays of shape [T 1] are flattened.

    Args:
        found: rewards, terminated, truncated and success, as far as they are there.
    """
    count = len(actions)
    rows = {
        name: np.zeros(count) if value is None else np.asarray(value).reshape(len(value))
        for name, value in {**dict.fromkeys(FLAGS), **found}.items()
    }
    terminated, truncated = rows["terminated"].astype(bool), rows["truncated"].astype(bool)
    if found.get("truncated") is None and len(truncated) == len(terminated) == count:
        truncated[-1] = not terminated[-1]
    return Episode(
        observations,
        actions.astype(np.float32),
        rows["rewards"].astype(np.float32),
        terminated,
        truncated,
        rows["success"].astype(bool),
        **vars(extras or Extras()),
        states=states,
    )


def leaves(group: Any, prefix: str = "") -> dict[str, Any]:
    """Return the data sets below an HDF5 group by their paths, joined with "/"."""
    found = {}
    for name, child in group.items():
        inner = leaves(child, f"{prefix}{name}/") if hasattr(child, "items") else {f"{prefix}{name}": child}
        found.update(inner)
    return found


def json_text(value: Any) -> str:
    """Return JSON without NaN.

    Raises:
        UsageError: there is something that JSON cannot hold.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"an episode's meta or env cannot be written as JSON ({error}).") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: the file is missing, damaged or holds something else.
    """
    with reading(path, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UsageError(f"'{path}' holds no JSON object; copy the data set again.")
    return found


def png(image: Array) -> bytes:
    """Encode uint8 [h w 3] losslessly."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def picture(data: bytes) -> Array:
    """Decode PNG or JPEG bytes to uint8 [h w 3].

    Raises:
        UsageError: they are damaged.
    """
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, ValueError) as error:
        raise UsageError(f"an image cannot be decoded ({error}); copy the data set again.") from error
