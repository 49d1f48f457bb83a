"""Manifests of files to train on: JSON lines that name samples beside their prompts, checked line by line.

    {"prompt": "a red cube", "chosen": "good/1.png", "rejected": "bad/1.png"}

Paths are relative to the manifest.  A sample is an image (png, jpg, webp, bmp), a sound, or a .safetensors file with
the tensor "latent", which is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencontrol.data.audio import AUDIO_SUFFIXES, read_audio, resample
from gencontrol.errors import UsageError, nearest

#: File name endings that are read as images.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Entry:
    """A line of a manifest: its text fields, its files by field name, other fields, and where it stands."""

    texts: Mapping[str, str]
    files: Mapping[str, Path]
    other: Mapping[str, Any]
    place: str


def read_manifest(
    path: str | Path, *, texts: Sequence[str], files: Sequence[str], other: Sequence[str] = ()
) -> list[Entry]:
    """Return the entries of a manifest; every field named is required, and no other is allowed.

    Raises:
        UsageError: no such file, no entry, a line that is no JSON object, a missing or unknown field, a field of the
            wrong kind, or a file that does not exist; the message gives the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"manifest '{path}' cannot be read ({error}); give a file of JSON lines.") from error
    fields = (*texts, *files, *other)
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{place} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UsageError(f"{place} is a {type(row).__name__}; expected a JSON object.")
        for key in row:
            if key not in fields:
                raise UsageError(f"{place}: unknown field '{key}'.{nearest(key, fields)} Fields: {', '.join(fields)}.")
        for field in fields:
            if field not in row:
                raise UsageError(f"{place}: field '{field}' is missing; fields: {', '.join(fields)}.")
        for field in (*texts, *files):
            if not isinstance(row[field], str):
                raise UsageError(f"{place}: '{field}' is a {type(row[field]).__name__}; expected text.")
        found = {field: path.parent / row[field] for field in files}
        for field, file in found.items():
            if not file.is_file():
                raise UsageError(f"{place}: {field} '{row[field]}' does not exist under '{path.parent}'.")
        entries.append(Entry({f: row[f] for f in texts}, found, {f: row[f] for f in other}, place))
    if not entries:
        raise UsageError(f"manifest '{path}' has no entry; each line is a JSON object with {', '.join(fields)}.")
    return entries


def check_labels(entry: Entry) -> None:
    """Check the field "labels" of an entry: an object of texts that prompts can carry.

    Raises:
        UsageError: it is none; the message gives the line.
    """
    labels = entry.other["labels"]
    if not isinstance(labels, dict) or not labels or not all(isinstance(v, str) for v in labels.values()):
        raise UsageError(f"{entry.place}: labels {labels!r}; expected an object of texts, {{attribute: value}}.")
    for text in (*labels, *labels.values()):
        if not text.strip() or any(mark in text for mark in "=,|"):
            raise UsageError(f"{entry.place}: label '{text}' is empty, or contains one of = , |.")


def read_sample(path: Path, sampling_rate: int | None) -> tuple[Tensor, bool]:
    """Return a sample, image [3 h w] in [0, 1] or sound [n] at the rate, or a latent; and whether it is a latent.

    Raises:
        UsageError: a file that cannot be read, or of another kind than the model makes.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))["latent"].float(), True
        except (OSError, KeyError, SafetensorError) as error:
            raise UsageError(f"'{path}' holds no tensor 'latent' ({error}).") from error
    if suffix in AUDIO_SUFFIXES and sampling_rate is not None:
        wave, rate = read_audio(path)
        return resample(wave.mean(0), rate, sampling_rate), False
    if suffix in IMAGE_SUFFIXES and sampling_rate is None:
        import numpy as np
        from PIL import Image

        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        except (OSError, ValueError) as error:
            raise UsageError(f"'{path}' cannot be read as an image ({error}); save it again as png.") from error
        return torch.from_numpy(pixels / 255.0).permute(2, 0, 1), False
    known = AUDIO_SUFFIXES if sampling_rate is not None else IMAGE_SUFFIXES
    raise UsageError(f"'{path}' is no sample of this model; expected {', '.join(known)} or .safetensors.")
