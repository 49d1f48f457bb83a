"""Configuration: flat dataclasses from defaults, a TOML file and dotted overrides, checked before anything loads.

Precedence: dataclass default < TOML (`--config`) < override (`--set algorithm.beta=100` or `algorithm.beta=100`).
Unknown keys and wrong types are errors that name the nearest key.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gencontrol.errors import UsageError, nearest

T = TypeVar("T")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; raises UsageError with the line when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise UsageError(f"config file '{path}' does not exist; check the path.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"config file '{path}' cannot be read as TOML: {error}.") from error


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value`; the value is read as TOML, or kept as a string where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"override '{text}' is not of the form key=value, e.g. algorithm.beta=100.")
    try:
        return key.strip().replace("-", "_"), tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip().replace("-", "_"), value


def apply_overrides(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a nested table with dotted overrides set."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    for text in overrides:
        key, value = parse_override(text)
        *path, last = key.split(".")
        node = result
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UsageError(f"override '{text}': '{part}' is a value, not a section.")
        node[last] = value
    return result


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple))
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else True


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build a config dataclass from a flat table; `__post_init__` may raise ValueError for a range.

    Raises:
        UsageError: an unknown key (nearest one suggested), a wrong type, or a value out of range.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    values: dict[str, Any] = {}
    for raw, value in table.items():
        key = raw.replace("-", "_")
        if key not in fields:
            raise UsageError(
                f"[{where}] has no option '{raw}'.{nearest(key, fields)} Options: {', '.join(sorted(fields))}."
            )
        if not _fits(value, hints[key]):
            if typing.get_origin(hints[key]) is typing.Literal:
                known = ", ".join(str(choice) for choice in typing.get_args(hints[key]))
                raise UsageError(f"[{where}] {key} = {value!r} is unknown; choose from {known}.")
            kind = getattr(hints[key], "__name__", None) or str(hints[key])
            raise UsageError(f"[{where}] {key} = {value!r} is a {type(value).__name__}; expected {kind}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"[{where}] {error}") from error


def to_table(config: Any) -> dict[str, Any]:
    """Return a config dataclass as a plain nested dictionary without None values (TOML and JSON can hold it)."""
    instance = dataclasses.is_dataclass(config) and not isinstance(config, type)  # a class has fields but no values
    table = dataclasses.asdict(config) if instance else dict(config)
    return {key: value for key, value in table.items() if value is not None}


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{text}"'


def dump_toml(table: Mapping[str, Any]) -> str:
    """Write a table of scalars, lists and one level of sections, mappings inside them inline, as TOML."""
    top = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for name, section in table.items():
        if isinstance(section, Mapping):
            rows = [f"{key} = {_toml_value(value)}" for key, value in section.items() if value is not None]
            top += ["", f"[{name}]", *rows]
    return "\n".join(top) + "\n"
