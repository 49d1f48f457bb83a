"""Policies by name: a folder of ours, a run folder, a folder or file of another library, or user code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.registry import find, resolve_dotted

#: `_class_name` in config.json → the class, whose `from_pretrained` takes the folder; imported when it is met, because
#: a composition is built from loaded policies and so lives above this room
POLICIES = {
    "DiffusionPolicy": "gencontrol.robotics.policies.diffusion:DiffusionPolicy",
    "FlowPolicy": "gencontrol.robotics.policies.diffusion:FlowPolicy",
    "ComposedPolicy": "gencontrol.robotics.composition.policy:ComposedPolicy",
}
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
        if ":" not in text or "/" in text.partition(":")[0]:
            raise UsageError(f"there is no policy at '{text}'; {_EXPECTED}.")
        policy = resolve_dotted(text, "policy")()
        for method in ("reset", "select_action"):
            if not callable(getattr(policy, method, None)):
                raise UsageError(
                    f"'{text}' returned a {type(policy).__name__} without {method}(); a policy needs both."
                )
        return policy
    if place.is_file():
        if place.suffix not in (".pth", ".pt", ".ckpt"):
            raise UsageError(f"'{place}' is neither a folder nor a robomimic checkpoint (.pth); {_EXPECTED}.")
        from gencontrol.robotics.policies.robomimic import load_robomimic

        return load_robomimic(place)
    if not (place / "config.json").exists() and (place / "final" / "config.json").exists():
        place = place / "final"
    file = place / "config.json"
    if not file.exists():
        unfinished = " (its training is not finished: run the same command again)" * (place / "metrics.jsonl").exists()
        raise UsageError(f"'{place}' holds no policy{unfinished}; {_EXPECTED}.")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        name, kind = table.get("_class_name"), table.get("type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"'{file}' is damaged ({error}); copy or save the policy again.") from error
    if name in POLICIES:
        return find(POLICIES, name, "policy").from_pretrained(place)
    if name is None and kind is not None and "input_features" in table:
        from gencontrol.robotics.policies.lerobot import load_lerobot

        return load_lerobot(place)
    raise UsageError(f"'{file}' describes a {name or kind or 'model without a class'}, not a policy; {_EXPECTED}.")
