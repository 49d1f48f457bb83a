"""Policies by name: a folder of ours, a run folder, a folder or file of another library, or user code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.registry import resolve_dotted

_EXPECTED = "give a folder that save_pretrained or gencontrol train wrote, or package.module:make_policy"


def load_policy(path: str | Path) -> Any:
    """Return a policy with `reset(rows, seeds)` and `select_action(observation, rows)`.

    Args:
        path: a policy folder or composition, a run folder (its final/), a LeRobot policy folder, a robomimic
            checkpoint (.pth), or package.module:make_policy, which is called without arguments.

    Raises:
        UsageError: nothing is there, it is damaged, or it is no policy; the message names it.
    """
    text = str(path)
    place = Path(text).expanduser()
    if not place.exists():
        if ":" in text and "/" not in text.partition(":")[0]:
            return _user_policy(text)
        raise UsageError(f"there is no policy at '{text}'; {_EXPECTED}.")
    if place.is_file():
        return _file(place)
    if not (place / "config.json").exists() and (place / "final" / "config.json").exists():
        place = place / "final"
    return _folder(place)


def _user_policy(name: str) -> Any:
    """Call the user's function and check what it returns."""
    policy = resolve_dotted(name, "policy")()
    for method in ("reset", "select_action"):
        if not callable(getattr(policy, method, None)):
            raise UsageError(f"'{name}' returned a {type(policy).__name__} without {method}(); a policy needs both.")
    return policy


def _folder(folder: Path) -> Any:
    """Load a folder by what its config.json says."""
    file = folder / "config.json"
    if not file.exists():
        unfinished = " (its training is not finished: run the same command again)" * (folder / "metrics.jsonl").exists()
        raise UsageError(f"'{folder}' holds no policy{unfinished}; {_EXPECTED}.")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        name, kind = table.get("_class_name"), table.get("type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"'{file}' is damaged ({error}); copy or save the policy again.") from error
    from gencontrol.robotics.policies.diffusion import DiffusionPolicy, FlowPolicy

    ours = {policy.__name__: policy for policy in (DiffusionPolicy, FlowPolicy)}
    if name in ours:
        return ours[name].from_pretrained(folder)
    if name == "ComposedPolicy":
        from gencontrol.robotics.composition.files import read_composition

        return read_composition(folder)
    if name is None and kind is not None and "input_features" in table:
        from gencontrol.robotics.policies.lerobot import load_lerobot

        return load_lerobot(folder)
    raise UsageError(f"'{file}' describes a {name or kind or 'model without a class'}, not a policy; {_EXPECTED}.")


def _file(path: Path) -> Any:
    """Load a checkpoint by its ending."""
    if path.suffix not in (".pth", ".pt", ".ckpt"):
        raise UsageError(f"'{path}' is neither a folder nor a robomimic checkpoint (.pth); {_EXPECTED}.")
    from gencontrol.robotics.policies.robomimic import load_robomimic

    return load_robomimic(path)
