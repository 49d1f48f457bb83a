"""What a run is made of: [run], [train] and [algorithm], merged from defaults, TOML, flags and overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gencontrol.config import apply_overrides, load_toml, options
from gencontrol.errors import UsageError, nearest

SECTIONS = ("run", "train", "algorithm")


@options
class RunConfig:
    """The [run] section: what is trained, on what, towards what, and where.

    Args:
        model: "bundled" (sound), "bundled-image", a folder or a hub id.
        task: "audio" or "image"; "auto" takes what the model is ("bundled" with "image" is "bundled-image").
        reward: reward specs such as "clap:0.7"; several are summed with their weights.
        algorithm: name in the registry.
        prompts: prompt file (txt, jsonl, csv); None takes prompts of the bundled grammar.
        eval_prompts: likewise; None takes bundled prompts that training never saw, or the first of `prompts`.
        prompt_count, eval_count: how many prompts of the bundled grammar, or of `prompts`, those are.
        reward_model: folder or hub id of the reward's network; None takes the bundled one.
        attribute_weights: attribute → weight of its classifier in the reward "classifier"; 1 where not named.
        reference: folder of sound, or a text file of captions, for set rewards that compare with a reference law.
        encoder: encoder of the set rewards; None takes theirs.
        output: the run folder.
        lora_rank: rank of the adapter; 0 trains all weights.
        lora_alpha: scale of the adapter; None means the rank.
        lora_targets: names of the linear layers; empty takes the library's choice.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        online: allow downloads from the hub.
        prompts_hash: written by a run, so that edited prompt files are noticed; not meant to be set.
    """

    model: str = "bundled"
    task: Literal["auto", "audio", "image"] = "auto"
    reward: tuple[str, ...] = ("clap",)
    algorithm: str = "dragon"
    prompts: str | None = None
    eval_prompts: str | None = None
    prompt_count: int = 2000
    eval_count: int = 16
    reward_model: str | None = None
    attribute_weights: dict[str, float] | None = None
    reference: str | None = None
    encoder: str | None = None
    output: str = "runs/finetune"
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    online: bool = False
    prompts_hash: str | None = None

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("reward is empty; name at least one, e.g. reward = ['clap']")
        if self.task not in ("auto", "audio", "image"):
            raise ValueError(f"task = {self.task!r}; expected auto, audio or image")
        for name, weight in (self.attribute_weights or {}).items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
                raise ValueError(f"attribute_weights: {name} = {weight!r}; expected a positive number")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank = {self.lora_rank}; expected 0 (all weights) or a positive rank")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha = {self.lora_alpha}; expected a positive scale (usually the rank)")
        if self.prompt_count < 1 or self.eval_count < 1:
            raise ValueError("prompt_count and eval_count must be at least 1")
        if not self.output:
            raise ValueError("output is empty; name the run folder")


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
    return apply_overrides(table, overrides)


def given_flags(parameters: Mapping[str, Any], routes: Mapping[str, str]) -> dict[str, Any]:
    """Return dotted key → value of the options that the user gave; `routes` maps option names to dotted keys."""
    given = {
        routes[name]: list(value) if isinstance(value, tuple) else value
        for name, value in parameters.items()
        if name in routes and value is not None and value not in ([], ())
    }
    for key, value in given.items():
        if isinstance(value, str) and value.startswith("~/"):  # a shell leaves it alone behind "="
            given[key] = str(Path(value).expanduser())
    if given.get("train.precision") == "no":  # as accelerate and diffusers say it
        given["train.precision"] = "fp32"
    return given


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


def run_mode(parameters: Mapping[str, Any]) -> str:
    """Return "resume", "fresh" or "auto" from the two flags; raises UsageError for both at once."""
    if parameters["resume"] and parameters["fresh"]:
        raise UsageError("--resume and --fresh exclude each other; leave one out.")
    return "resume" if parameters["resume"] else "fresh" if parameters["fresh"] else "auto"
