"""How options are spelled: underscore = dash, the long names of diffusers' scripts, no abbreviations, nearest match."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gencontrol.errors import UsageError, nearest

#: name in other trainers → our option, or those of several methods
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
    "batch": "prompts-per-round",
}
#: commands whose --steps are sampler steps; elsewhere they are training steps
ONLY_IN = {"num-inference-steps": ("sample", "search")}

#: names of other trainers that have no twin here, with what to do instead
HINTS = {
    "gradient-accumulation-steps": "it follows from --prompts-per-round and --micro-batch",
    "num-train-epochs": "training is counted in --steps",
    "use-8bit-adam": "the optimizer is AdamW in fp32",
    "push-to-hub": "upload the folder final/ yourself: hf upload NAME RUN/final",
    "hub-token": "tokens are read from the environment (HF_TOKEN), never from a flag",
    "logging-dir": "metrics.jsonl and TensorBoard files lie in the --output folder",
    "beta": "the chosen method has none; its own options: gencontrol finetune --algorithm NAME --help",
    "group": "the chosen method has none; its own options: gencontrol finetune --algorithm NAME --help",
    "clip": "the chosen method has none; its own options: gencontrol finetune --algorithm NAME --help",
}

_SPLIT = re.compile(r"^--([^=]+)(=.*)?$", re.DOTALL)


def normalise(arguments: list[str], known: Mapping[str, str], command: str) -> list[str]:
    """Return the arguments with canonical option names.

    Args:
        arguments: what the user typed after the command's name.
        known: long option (without dashes) → "" for a flag, "one" where a value follows, "many" if it may be repeated.
        command: name of the command, for the message.

    Raises:
        UsageError: an option that the command does not have, or one that is given under two names.
    """
    result: list[str] = []
    spelled: dict[str, str] = {}
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
        before = spelled.setdefault(name, match.group(1))
        if before.replace("_", "-") != match.group(1).replace("_", "-") and known[name] != "many":
            raise UsageError(f"--{before} and --{match.group(1)} are one option, --{name}; give it once.")
        result.append(f"--{name}{value}")
        if known[name] and not value:
            result.extend([following] if (following := next(waiting, None)) is not None else [])
    return result


def _canonical(typed: str, known: Mapping[str, str], command: str) -> str:
    name = typed.replace("_", "-")
    if name in known:
        return name
    if name == "resume-from-checkpoint" and "resume" in known:
        return "resume"
    if known.get(f"{name}s") == "many":  # --key a --key b, for the list `keys`
        return f"{name}s"
    targets = [target for target in ALIASES.get(name, "").split() if target in known]
    if targets and command in ONLY_IN.get(name, (command,)):
        return targets[0]
    from gencontrol.config import RENAMED

    new = RENAMED.get(name.replace("-", "_"), "").replace("_", "-")
    if new in known:
        raise UsageError(f"--{typed} is now called --{new}; give that alone.")
    if name in HINTS:
        raise UsageError(f"'{command}' has no option --{typed}: {HINTS[name]}.")
    aliases = [alias for alias, target in ALIASES.items() if known.keys() & target.split()]
    hint = nearest(name, [*known, *aliases]).replace("'", "'--", 1)
    raise UsageError(f"'{command}' has no option --{typed}.{hint} See `gencontrol {command} --help`.")
