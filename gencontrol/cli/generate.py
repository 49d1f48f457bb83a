"""Commands whose options are made from dataclass fields: name, type, default and help stand in the job's classes alone.

The order of precedence is default < `--config FILE.toml` < option < `section.key=value`.  What a command hands to its
job is the merged table without defaults, so that a job can tell what was given from what it chooses itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

from gencontrol.cli.options import ALIASES, normalise
from gencontrol.cli.table import Entry
from gencontrol.errors import UsageError

#: options that do not belong to a class; which of them a command has is said in its Entry
_SHARED = {
    "config": (str, "--config", "Options in sections, as in a run folder's config.toml.", "FILE.toml"),
    "set": (list[str], "--set", "The same as an option; may be repeated.", "SECTION.KEY=VALUE"),
    "dry_run": (bool, "--dry-run", "Check all options, print the plan, load no weights.", None),
    "resume": (bool, "--resume", "Require a checkpoint to go on from; the same command resumes anyway.", None),
    "fresh": (bool, "--fresh", "Refuse a run folder that was used before.", None),
    "allow_change": (
        list[str],
        "--allow-change",
        "Go on although this option differs from the run folder's.",
        "SECTION.KEY",
    ),
}
#: marks of a field: `gencontrol.config.POSITIONAL`, whose module costs `--help` 0.3 s, and what a help says of it
_POSITIONAL, _HIDDEN = "positional", "not meant to be set"


def load(name: str) -> Any:
    """Return the object called "module:attribute"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


class JobCommand(TyperCommand):
    """A command that asks its job for its options when it is called, and not before."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help, rich_help_panel=entry.panel)
        self.entry = entry

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Make the options, then rewrite aliases and refuse unknown ones with the nearest name."""
        app = typer.Typer()
        app.command(self.name)(_function(self.entry, sections_of(self.entry, args)))
        made = typer.main.get_command(app)
        # --install-completion and --show-completion are typer's, not ours
        self.params = [p for p in made.params if not p.name or not p.name.endswith("_completion")]
        self.callback = made.callback
        known = {
            word[2:]: "" if not isinstance(p, TyperOption) or p.is_flag else "many" if p.multiple else "one"
            for p in self.get_params(ctx)
            for word in (*p.opts, *p.secondary_opts)
            if word.startswith("--")
        }
        return super().parse_args(ctx, normalise(args, known, self.name or ""))


def sections_of(entry: Entry, args: Sequence[str] = ()) -> dict[str, tuple[Any, ...]]:
    """Return section → classes of options, those of the chosen variant included.

    A class may be represented by an instance whose values are the defaults that its run will have.

    Raises:
        UsageError: no variant has the name that was given.
    """
    found: dict[str, Any] = {section: load(name) for section, name in entry.sections.items()}
    if entry.variants:
        found |= load(entry.variants)(_choice(entry, args))
    return {section: kinds if isinstance(kinds, tuple) else (kinds,) for section, kinds in found.items()}


def _choice(entry: Entry, args: Sequence[str]) -> str | None:
    """Return the name of the variant that the arguments, or the file behind --config, choose."""
    if entry.chooser.isupper():
        words = [word for word in args if not word.startswith("-")]
        names = load(entry.names)
        return next((word for word in words if word in names), words[0] if words else None)
    given: dict[str, str] = {}
    for word, following in zip(args, [*args[1:], ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name == "--config":
            from gencontrol.config import load_toml

            given["file"] = load_toml(value).get("run", {}).get(entry.chooser)
        elif name == f"--{entry.chooser}":
            given["option"] = value
        if name == f"run.{entry.chooser}" or (name == "--set" and value.startswith(f"run.{entry.chooser}=")):
            given["override"] = (value if name != "--set" else value.partition("=")[2]).strip("\"'")
    return given.get("override") or given.get("option") or given.get("file")


# ---------------------------------------------------------------- from a field to an option


@dataclasses.dataclass(frozen=True)
class _Field:
    """One option: where its value goes, and what typer is told of it."""

    section: str
    name: str
    kind: Any
    read: Callable[[Any], Any]
    default: Any
    info: Any


def _function(entry: Entry, sections: Mapping[str, Sequence[Any]]) -> Callable[..., Any]:
    """Return a function with one parameter for each option, which merges what was given and calls the job."""
    made = {f"{field.section}__{field.name}": field for field in _fields(sections)}
    positional = any(isinstance(field.info, typer.models.ArgumentInfo) for field in made.values())

    def call(**given: Any) -> Any:
        from gencontrol.jobs.setup.settings import Start, merge

        if given.get("resume") and given.get("fresh"):
            raise UsageError("--resume and --fresh exclude each other; leave one out.")
        flags = {
            f"{made[key].section}.{made[key].name}": made[key].read(value)
            for key, value in given.items()
            if key in made and value is not None and value != []
        }
        overrides = [*(given.get("overrides") or []), *(given.get("set") or [])]
        mode = "resume" if given.get("resume") else "fresh" if given.get("fresh") else "auto"
        start = Start(bool(given.get("dry_run")), mode, tuple(given.get("allow_change") or ()), given.get("what") or "")
        return load(entry.job)(merge(given.get("config"), flags, overrides, tuple(sections)), start)

    parameters = []

    def add(name: str, kind: Any, info: Any, default: Any = None) -> None:
        word = inspect.Parameter.KEYWORD_ONLY
        kind = Annotated[kind if default is inspect.Parameter.empty else kind | None, info]
        parameters.append(inspect.Parameter(name, word, default=default, annotation=kind))

    if entry.chooser.isupper():
        names = ", ".join(load(entry.names))
        add("what", str, typer.Argument(metavar=entry.chooser, help=names), inspect.Parameter.empty)
    if not positional and "set" in entry.shared:
        text = "Overrides, for every option of every section."
        add("overrides", list[str], typer.Argument(metavar="[SECTION.KEY=VALUE]…", help=text, show_default=False))
    for key, field in made.items():
        add(key, field.kind, field.info, field.default)
    for key in entry.shared:
        kind, flag, text, metavar = _SHARED[key]
        add(key, kind, typer.Option(flag, help=text, metavar=metavar, show_default=False))
    vars(call)["__signature__"] = inspect.Signature(parameters)
    return call


def _fields(sections: Mapping[str, Sequence[Any]]) -> Iterator[_Field]:
    """Yield all options; where two sections have one name, the later one is --section.name."""
    from gencontrol.config import helps

    taken = {flag[2:] for _, flag, _, _ in _SHARED.values()}
    for section, kinds in sections.items():
        for one in kinds:
            cls = one if isinstance(one, type) else type(one)
            texts, hints = helps(cls), typing.get_type_hints(cls, include_extras=True)
            for field in dataclasses.fields(cls):
                flag = field.name.replace("_", "-")
                # a name that other trainers' users know, --eval-steps, keeps the meaning that it has for them
                flag = f"{section}.{flag}" if flag in taken or ALIASES.get(flag) in taken else flag
                taken.add(flag)
                kind, metavar, read, positional = _kind(hints[field.name])
                text = re.sub(r"\[(?=[a-z/])", r"\\[", texts.get(field.name, ""))  # rich would take it for a tag
                if "default:" not in text:
                    text += _shown(getattr(one, field.name, field.default) if one is not cls else _default(field))
                required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
                if positional:
                    info = typer.Argument(metavar=flag.upper() + ("…" if metavar == "…" else ""), help=text)
                else:
                    info = typer.Option(
                        f"--{flag}",
                        help=text,
                        metavar=metavar,
                        show_default=False,
                        rich_help_panel=_panel(section, cls),
                        hidden=_HIDDEN in text,
                    )
                default = inspect.Parameter.empty if required and positional else None
                yield _Field(section, field.name, kind, read, default, info)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(default: Any) -> str:
    if default in (dataclasses.MISSING, None, (), "", {}) or default is False:
        return ""
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def _panel(section: str, cls: type) -> str:
    """The heading of a section's options: its name, and what the class says of itself first."""
    first = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0].rstrip(".:")
    return f"{section}: {re.sub(rf'^The .{section}. section:? ?', '', first)}".rstrip(": ")


def _kind(hint: Any) -> tuple[Any, str | None, Callable[[Any], Any], bool]:
    """Return the type for typer, the metavar, how a value is read, and whether it is an argument without a name."""
    marks: tuple[Any, ...] = ()
    while typing.get_origin(hint) is Annotated:
        hint, *more = typing.get_args(hint)
        marks += tuple(more)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = tuple(one for one in inner if one is not type(None))
        if len(inner) == 1:
            kind, metavar, read, positional = _kind(inner[0])
            return kind, metavar, read, positional or _POSITIONAL in marks
        return str, None, _value, _POSITIONAL in marks
    if origin is Literal:
        return type(inner[0]), "|".join(map(str, inner)), _text, _POSITIONAL in marks
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return list[str], "KEY=VALUE", lambda words: dict(_pair(word) for word in words), False
    if origin in (tuple, list) and any(typing.get_origin(_bare(one)) in (tuple, list, dict) for one in inner):
        return str, "TOML", _value, False  # lists of lists: [[1, 2], [3, 4]]
    if origin is tuple and inner[-1] is not Ellipsis:
        return tuple[tuple(_kind(one)[0] for one in inner)], None, list, False  # type: ignore[misc]  # made here
    if origin in (tuple, list):
        return list[_kind(inner[0])[0]], "…" if _POSITIONAL in marks else None, list, _POSITIONAL in marks  # type: ignore[misc]
    return hint if hint in (bool, int, float, str) else str, None, _text, _POSITIONAL in marks


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _text(value: Any) -> Any:
    """A shell leaves ~ alone behind "="; accelerate and diffusers call fp32 "no"."""
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _value(text: str) -> Any:
    """A value of several possible types, read as TOML, or kept as text where it is none."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _pair(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UsageError(f"'{word}' is not of the form KEY=VALUE.")
    return key, _value(text)
