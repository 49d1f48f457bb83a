"""The weights that come with the package: where they lie, what they should hash to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from gencontrol.errors import EnvironmentMissing

BUNDLED = Path(__file__).resolve().parent / "bundled"
MANIFEST = "manifest.json"


def bundled_path(name: str, what: str, remedy: str) -> Path:
    """Path of a file below gencontrol/bundled.

    Args:
        name: of the file, e.g. "clap/config.json".
        what: what it is, for the message.
        remedy: what to do without it, for the message.

    Raises:
        EnvironmentMissing: this installation does not hold it.
    """
    path = BUNDLED / name
    if not path.is_file():
        raise EnvironmentMissing(f"there is no {what} at {path}; {remedy}.")
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(root: Path) -> Iterator[Path]:
    """Weights and what is needed to load them; cards and measurements may change without harm."""
    for path in sorted(root.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt") and path.name not in (MANIFEST, "measured.json"):
            yield path


def write_manifest(root: Path = BUNDLED) -> Path:
    """Write `manifest.json` (file → size in bytes, sha256) for the weights and configurations; return its path."""
    table = {p.relative_to(root).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in _files(root)}
    path = root / MANIFEST
    path.write_text(json.dumps({"version": 1, "files": table}, indent=1) + "\n", encoding="utf-8")
    return path


def check_manifest(root: Path = BUNDLED) -> list[str]:
    """Return one sentence per file that is missing or altered; empty when all is intact.

    Raises:
        FileNotFoundError: there is no manifest to check against.
    """
    table = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["files"]
    faults = []
    for name, entry in table.items():
        path = root / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            faults.append(f"{name} was altered")
    return faults
