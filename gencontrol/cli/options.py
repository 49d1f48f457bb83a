"""How options are spelled: underscore = dash, the long names of diffusers' scripts, no abbreviations, nearest match."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperOption

from gencontrol.errors import UsageError, nearest

#: name in other trainers -> our option
ALIASES = {
    "out": "output",
    "output-dir": "output",
    "pretrained-model-name-or-path": "model",
    "model-name-or-path": "model",
    "max-train-steps": "steps",
    "max-steps": "steps",
    "learning-rate": "lr",
    "lr-scheduler": "lr-schedule",
    "lr-warmup-steps": "warmup",
    "mixed-precision": "precision",
    "rank": "lora-rank",
    "alpha": "lora-alpha",
    "train-batch-size": "micro-batch",
    "per-device-train-batch-size": "micro-batch",
    "checkpointing-steps": "save-every",
    "save-steps": "save-every",
    "checkpoints-total-limit": "keep",
    "save-total-limit": "keep",
    "eval-steps": "eval-every",
    "report-to": "track",
    "num-validation-images": "eval-samples",
    "num-waveforms-per-prompt": "num",
    "num-inference-steps": "steps",
    "n-episodes": "episodes",
    "n-rollouts": "episodes",
    "seed": "seed-start",
}
#: commands whose --steps are sampler steps; elsewhere they are training steps
ONLY_IN = {"num-inference-steps": ("sample", "search")}

#: names of other trainers that have no twin here, with what to do instead
HINTS = {
    "gradient-accumulation-steps": "it follows from --batch and --micro-batch",
    "num-train-epochs": "training is counted in --steps",
    "use-8bit-adam": "the optimizer is AdamW in fp32",
    "push-to-hub": "upload the folder final/ yourself: hf upload NAME RUN/final",
    "hub-token": "tokens are read from the environment (HF_TOKEN), never from a flag",
    "logging-dir": "metrics.jsonl and TensorBoard files lie in the --output folder",
    "beta": "options of the method are set as algorithm.beta=VALUE",
    "group": "options of the method are set as algorithm.group=VALUE",
    "clip": "options of the method are set as algorithm.clip=VALUE",
}

_SPLIT = re.compile(r"^--([^=]+)(=.*)?$", re.DOTALL)


class NormalisedCommand(TyperCommand):
    """A command whose long options are normalised and checked before typer sees them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite aliases and refuse unknown options with the nearest name."""
        return super().parse_args(ctx, normalise(args, self._options(ctx), self.name or ""))

    def _options(self, ctx: Any) -> dict[str, bool]:
        """Long option without its dashes -> whether a value follows."""
        known = {}
        for parameter in self.get_params(ctx):
            takes_value = isinstance(parameter, TyperOption) and not parameter.is_flag and not parameter.count
            for name in (*parameter.opts, *parameter.secondary_opts):
                if name.startswith("--"):
                    known[name[2:]] = takes_value
        return known


def normalise(arguments: list[str], known: dict[str, bool], command: str) -> list[str]:
    """Return the arguments with canonical option names.

    Args:
        arguments: what the user typed after the command's name.
        known: long option (without dashes) -> whether it takes a value.
        command: name of the command, for the message.

    Raises:
        UsageError: an option that the command does not have.
    """
    result: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        match = _SPLIT.match(argument)
        if argument == "--":
            return [*result, "--", *waiting]
        if match is None:
            result.append(argument)
            continue
        name, value = _canonical(match.group(1), known, command), match.group(2) or ""
        if name == "resume" and match.group(1).replace("_", "-") == "resume-from-checkpoint":
            value = value or next(waiting, "")  # "latest" is what --resume means, and what the same command does
            if value.removeprefix("=") not in ("latest", "true", ""):
                raise UsageError(f"--{match.group(1)} {value}: the newest intact checkpoint is used; give 'latest'.")
            value = ""
        result.append(f"--{name}{value}")
        if known[name] and not value:
            result.extend([following] if (following := next(waiting, None)) is not None else [])
    return result


def _canonical(typed: str, known: dict[str, bool], command: str) -> str:
    name = typed.replace("_", "-")
    if name in known:
        return name
    if name == "resume-from-checkpoint" and "resume" in known:
        return "resume"
    if ALIASES.get(name) in known and command in ONLY_IN.get(name, (command,)):
        return ALIASES[name]
    if name in HINTS:
        raise UsageError(f"'{command}' has no option --{typed}: {HINTS[name]}.")
    aliases = [alias for alias, target in ALIASES.items() if target in known]
    hint = nearest(name, [*known, *aliases]).replace("'", "'--", 1)
    raise UsageError(f"'{command}' has no option --{typed}.{hint} See `gencontrol {command} --help`.")
