"""What a run is made of: [run], [train] and [algorithm], merged from defaults, TOML, flags and overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencontrol.config import RENAMED, apply_overrides, load_toml
from gencontrol.errors import UsageError, nearest

SECTIONS = ("run", "train", "algorithm")


@dataclass(frozen=True)
class Start:
    """How a job begins.

    Args:
        dry_run: check all options and print the plan; nothing is loaded or written.
        mode: "auto" goes on where there is something to go on from, "resume" insists on it, "fresh" on a new folder.
        allow: dotted options that may differ from those of the run folder.
        what: what was chosen by the first word of a command: a stage, a benchmark.
    """

    dry_run: bool = False
    mode: str = "auto"
    allow: tuple[str, ...] = ()
    what: str = ""


def merge(
    config_file: str | None, flags: Mapping[str, Any], overrides: Sequence[str], sections: Sequence[str] = SECTIONS
) -> dict[str, dict[str, Any]]:
    """Merge TOML < flags < overrides into the sections.

    Args:
        config_file: path of a TOML file with the sections, or None.
        flags: dotted key → value, only what was given.
        overrides: `section.key=value` texts; they win.
        sections: names of the sections that the command has.

    Raises:
        UsageError: an unreadable file or an unknown section.
    """
    table: dict[str, Any] = {name: {} for name in sections}
    for key, value in (load_toml(config_file) if config_file else {}).items():
        if key not in sections or not isinstance(value, Mapping):
            raise UsageError(
                f"config file '{config_file}': '{key}' is not one of the sections {', '.join(sections)}."
                f"{nearest(key, sections)} Put the option under its section."
            )
        table[key] = {name.replace("-", "_"): item for name, item in value.items()}
    for key, value in flags.items():
        section, name = key.split(".")
        table[section][name] = value
    for text in overrides:
        section_name, _, option = text.partition("=")[0].partition(".")
        if section_name not in sections or not option:
            raise UsageError(
                f"'{text}' is neither an option nor an override; write section.key=value with a section of "
                f"{', '.join(sections)}, e.g. algorithm.beta=100."
            )
    merged = apply_overrides(table, overrides)
    if merged.get("train", {}).get("precision") == "no":  # as accelerate and diffusers say it
        merged["train"]["precision"] = "fp32"
    return merged


def describe(fields_of: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return (section, dataclass) pairs as a nested table without None values."""
    return {
        section: {key: _plain(value) for key, value in dataclasses.asdict(config).items() if value is not None}
        for section, config in fields_of
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_output(folder: str | Path) -> Path:
    """Return the run folder as a path; raises UsageError where a file is in the way."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output {path} is a file; name a folder (it may not exist yet).")
    return path


def called(given: Any) -> str:
    """Return a readable name of what was given as a name, or as an object: how a run folder records it."""
    if isinstance(given, (str, Path)):
        return str(given)
    if isinstance(given, (list, tuple)):
        return f"{len(given)} texts"
    if hasattr(given, "__qualname__"):  # a class or a function
        return f"{given.__module__}:{given.__qualname__}"
    return f"a loaded {type(given).__name__}"


def place(options: Mapping[str, Any], sections: Mapping[str, type | tuple[type, ...]]) -> dict[str, dict[str, Any]]:
    """Return options by their sections, as `merge` does for the command line.

    Args:
        options: names of fields; `section__name` where two sections have a field of that name.

    Raises:
        UsageError: a name that no section has (nearest one named), or that several have.
    """
    owners: dict[str, list[str]] = {}
    for section, given in sections.items():
        kinds = given if isinstance(given, tuple) else (given,)
        for one in (one for cls in kinds for one in dataclasses.fields(cls)):
            owners.setdefault(one.name, []).append(section)
            owners[f"{section}__{one.name}"] = [section]
    table: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for name, value in options.items():
        found = owners.get(name, [])
        if not found:
            old = RENAMED.get(name, "")
            said = f" It is now called '{old}'." if old in owners else nearest(name, owners)
            raise UsageError(f"there is no option '{name}'.{said}")
        if len(found) > 1:
            both = " or ".join(f"{section}__{name}" for section in found)
            raise UsageError(f"several sections have an option '{name}'; write {both}.")
        table[found[0]][name.removeprefix(f"{found[0]}__")] = str(value) if isinstance(value, Path) else value
    return table
