"""Folders of compositions: config.json (weights, operator) and parents/, copies of the policies that are composed.

A composition is then a policy like any other: `load_policy`, `gencontrol evaluate` and `gencontrol collect` take it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.policies.loading import load_policy

_NAME = "ComposedPolicy"


def write_composition(
    folder: str | Path,
    sources: Mapping[str, str | Path],
    weights: tuple[float, ...],
    *,
    operator: str = "convex",
    options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a composition of policies that lie on disk; the folder appears complete or not at all.

    Args:
        sources: name → what `load_policy` takes; folders and files are copied, package.module:make_policy is kept by
            its name.
        weights: one per policy.
        operator: of `ComposedPolicy`.
        options: its further arguments (horizons, n_action, allow_scale_mismatch).
        facts: kept in config.json under "fit", for people.

    Raises:
        UsageError: something is at `folder` already, or a source is not there.
    """
    target = Path(folder)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"'{target}' exists; a composition is never written over something: choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        parents = {
            name: _copied(str(source), staged / "parents", index) for index, (name, source) in _numbered(sources)
        }
        table = {
            "_class_name": _NAME,
            "parents": parents,
            "weights": list(weights),
            "operator": operator,
            "options": dict(options or {}),
            "fit": dict(facts or {}),
        }
        (staged / "config.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return target


def _numbered(sources: Mapping[str, str | Path]) -> list[tuple[int, tuple[str, str | Path]]]:
    return list(enumerate(sources.items()))


def _copied(source: str, folder: Path, index: int) -> str:
    """Copy a policy beside the others; returns its place in the composition's folder, or the name of user code."""
    place = Path(source).expanduser()
    if not place.exists():
        return source
    folder.mkdir(exist_ok=True)
    if place.is_file():
        target = folder / f"{index}{place.suffix}"
        shutil.copy2(place, target)
    else:
        final = place / "final"
        target = folder / str(index)
        shutil.copytree(final if final.is_dir() and not (place / "config.json").exists() else place, target)
    return f"parents/{target.name}"


def read_composition(folder: str | Path) -> ComposedPolicy:
    """Load a folder that `write_composition` wrote.

    Raises:
        UsageError: config.json is damaged or of something else, a parent is missing, or they cannot be composed.
    """
    place = Path(folder)
    file = place / "config.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if table["_class_name"] != _NAME:
            raise KeyError(f"_class_name {_NAME}")
        named = {str(name): str(where) for name, where in table["parents"].items()}
        weights, operator = [float(w) for w in table["weights"]], str(table["operator"])
        options = dict(table["options"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{file}' does not describe a composition ({error}); compose the policies again.") from error
    parents = {name: load_policy(where if ":" in where else place / where) for name, where in named.items()}
    try:
        return ComposedPolicy(parents, weights, operator=operator, **options)
    except TypeError as error:
        raise UsageError(f"'{file}' has options that a composition does not take: {error}.") from error
