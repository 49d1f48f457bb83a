"""Configuration: flat dataclasses from defaults, a TOML file and dotted overrides, checked before anything loads.

Precedence: dataclass default < TOML (`--config`) < override (`--set algorithm.beta=100` or `algorithm.beta=100`).
Unknown keys and wrong types are errors that name the nearest key.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

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


#: ranges, to be written into a field's type: `lr: Positive = 1e-4`
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NonNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Share = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]

#: mark of a field that the command line takes without a name: `policies: Annotated[tuple[str, ...], POSITIONAL]`
POSITIONAL = "positional"

#: earlier names of options; a file or a flag with one of them is refused with the name of today.  A class of options
#: whose old name means something of its own says so in a class variable `renamed` (old name → name of today).
RENAMED: dict[str, str] = {
    "pairs_per_round": "prompts_per_round",
    "advantage_clip": "adv_clip",
    "clip_ratio": "clip_range",
    "anchor": "kl_coef",
    "anchor_scale": "kl_guidance",
}

_RULES = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "too_long": "at most {max_length} entries",
    "finite_number": "a finite number",
    "too_short": "at least {min_length} entries",
    "string_too_short": "a text that is not empty",
}


@dataclass_transform(frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Make a class of options: a frozen pydantic dataclass whose errors are one line.

    A field is the only place of an option: its annotation is type and range (`Count`, `Positive`, `Share`, a Literal…),
    its default is the default, and what the class's docstring says under `Args:` is its help.  Rules between fields go
    into `__post_init__`, which raises ValueError.

    Raises (the class, when it is made):
        ValueError: a wrong type, an unknown name or a value out of range: "lr = -1; expected a number above 0".
    """
    made: Any = pydantic_dataclass(
        cls, frozen=True, config=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    )
    checked = made.__init__

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            checked(self, *args, **values)
        except ValidationError as error:
            raise ValueError(_sentence(error)) from None

    functools.update_wrapper(__init__, checked)
    vars(__init__)["__signature__"] = inspect.signature(made)
    made.__init__ = __init__
    return made


def _sentence(error: ValidationError) -> str:
    """Return the first fault as "option = value; expected …"."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    kind, given, ctx = first["type"], first["input"], first.get("ctx", {})
    if kind == "value_error":
        return str(ctx["error"])
    if kind in ("unexpected_keyword_argument", "missing"):
        return f"{name}: {first['msg'].lower()}"
    if kind == "literal_error":
        return (
            f"{name} = {given!r} is unknown; choose from {ctx['expected'].replace(' or ', ', ').replace(chr(39), '')}"
        )
    expected = _RULES[kind].format(**ctx) if kind in _RULES else first["msg"].removeprefix("Input should be ")
    return f"{'.'.join(map(str, first['loc']))} = {given!r}; expected {expected}"


def helps(cls: type) -> dict[str, str]:
    """Return option → help text: what the docstrings of a class and of its bases say under `Args:`."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, body = (inspect.cleandoc(base.__doc__ or "")).partition("Args:\n")
        for names, text in re.findall(r"^ {4}(\w+(?:, \w+)*): (.+(?:\n {6,}.+)*)", body, re.M):
            found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build a class of options from a flat table.

    Raises:
        UsageError: an unknown key (nearest one suggested), a name of an earlier version, a wrong type, or a value out
            of range.
    """
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    renamed = dict(RENAMED)
    for base in reversed(cls.__mro__):
        renamed |= vars(base).get("renamed", {})
    values: dict[str, Any] = {}
    for raw, value in table.items():
        key = raw.replace("-", "_")
        if key not in fields and renamed.get(key) in fields:
            new = renamed[key]
            both = f" {new} is given as well; leave '{raw}' out." if new in table else ""
            raise UsageError(f"[{where}] option '{raw}' is now called '{new}'.{both}")
        if key not in fields:
            raise UsageError(
                f"[{where}] has no option '{raw}'.{nearest(key, fields)} Options: {', '.join(sorted(fields))}."
            )
        values[key] = _frozen(value)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"[{where}] {error}") from error


def _frozen(value: Any) -> Any:
    """Return a value with its lists, inner ones included, as tuples."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


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
