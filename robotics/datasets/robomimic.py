"""robomimic HDF5 (and LIBERO's, which has the same layout); docs/robot-interfaces.md#robomimic-files (FOUND), read with
h5py alone.

A demo's group also gets the arrays `terminated`, `truncated` and `success` and the attribute `gencontrol` (task, seed,
fps, meta), which robomimic ignores, so that our own files come back exactly.  A final observation is stored as the last
row of next_obs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets import storage
from gencontrol.robotics.datasets.episodes import Array, Episode, Episodes

#: EnvType of robomimic/envs/env_base.py (FOUND)
ROBOSUITE, GYM = 1, 2


def read(path: Path, request: storage.Request) -> Episodes:
    """Read a file; `split` names one of its masks."""
    h5py = storage.require("h5py")
    with storage.reading(path, ValueError), h5py.File(path, "r") as file:
        if "data" not in file:
            raise UsageError(f"there is no group 'data', only {', '.join(file) or 'nothing'}; robomimic files have it.")
        data = file["data"]
        env = _env(data)
        demos = [name for name in data if name.rpartition("_")[2].isdigit()]
        if request.split is not None:
            masks = list(file["mask"]) if "mask" in file else []
            if request.split not in masks:
                raise UsageError(f"there is no mask '{request.split}'; there is {', '.join(masks) or 'none'}.")
            wanted = [n.decode() if isinstance(n, bytes) else str(n) for n in file["mask"][request.split][()]]
            if missing := sorted(set(wanted) - set(demos)):
                raise UsageError(f"mask '{request.split}' names {missing[0]}, which is not in 'data'.")
            demos = wanted
        if not demos:
            raise UsageError("there is no demo; 'data' should hold demo_0, demo_1, ….")
        items = []
        for name in sorted(demos, key=lambda name: int(name.rpartition("_")[2]))[: request.limit]:
            with storage.naming(name):
                items.append(_episode(data[name], env, request))
        return Episodes(tuple(items), env)


def _env(data: Any) -> dict[str, Any]:
    """Return the decoded env_args with robomimic's and our names."""
    if "gencontrol" in data.attrs:
        return json.loads(data.attrs["gencontrol"])
    args = data.attrs.get("env_args")
    found = json.loads(args) if args else {}
    if "problem_info" in data.attrs:  # LIBERO keeps the instruction here
        found["language_instruction"] = json.loads(data.attrs["problem_info"]).get("language_instruction", "")
    return {
        **found,
        **({"env_id": found["env_name"]} if "env_name" in found else {}),
        **({"kwargs": found["env_kwargs"]} if "env_kwargs" in found else {}),
    }


def _episode(demo: Any, env: Mapping[str, Any], request: storage.Request) -> Episode:
    """Read one demo."""
    for name in ("actions", "obs"):
        if name not in demo:
            raise UsageError(f"there is no '{name}', only {', '.join(demo)}; a demo needs actions and obs.")
    actions = np.asarray(demo["actions"][()], dtype=np.float32)
    inside(actions)
    count = len(actions)
    if not count:
        raise UsageError("the demo has no action; leave it out.")
    rows, after = storage.leaves(demo["obs"]), storage.leaves(demo["next_obs"]) if "next_obs" in demo else {}
    observations = {}
    for key in request.chosen(rows):
        seen = rows[key][()]
        if key in after and len(seen) == count:
            seen = np.concatenate([seen, after[key][-1:]])
        observations[key] = storage.observation_array(seen)
    found = {name: demo[name][()] if name in demo else None for name in ("rewards", "terminated", "truncated")}
    if found["terminated"] is None and "dones" in demo:
        found["terminated"] = demo["dones"][()]
    rewards = found["rewards"]
    found["success"] = demo["success"][()] if "success" in demo else None
    # where the file has no flag: robosuite's unshaped reward is its success check (DERIVED); else it is unknown
    if (
        "success" not in demo
        and env.get("type") == ROBOSUITE
        and rewards is not None
        and np.isin(rewards, (0, 1)).all()
    ):
        found["success"] = rewards > 0
    states = demo["states"][()] if "states" in demo and demo["states"].size else None
    if states is not None and "final_state" in demo:
        states = np.concatenate([states, demo["final_state"][()]])
    fps = (env.get("env_kwargs") or {}).get("control_freq", 20.0)
    default = storage.Extras(task=env.get("language_instruction", ""), fps=float(fps))
    extras = storage.Extras.parse(demo.attrs.get("gencontrol"), default)
    return storage.episode(observations, actions, found, extras, states)


def inside(actions: Array) -> None:
    """Refuse actions that robomimic would clip.

    Raises:
        UsageError: a value is outside [-1, 1].
    """
    if actions.size and np.isfinite(actions).all() and np.abs(actions).max() > 1 + 1e-6:
        row = int(np.argmax(np.abs(actions).max(axis=tuple(range(1, actions.ndim)))))
        raise UsageError(
            f"actions reach {float(np.abs(actions[row]).max()):.4g} in row {row}; robomimic wants [-1, 1]: rescale "
            "them (and the environment's action space), or keep the data in the format lerobot, minari or zarr."
        )


def write(episodes: Episodes, target: Path) -> None:
    """Write a file, one demo at a time.

    Raises:
        UsageError: an action is outside [-1, 1].
    """
    h5py = storage.require("h5py")
    with h5py.File(target, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = episodes.frames
        env, kind = dict(episodes.env), episodes.env.get("type", GYM)
        both = {"type": kind, "env_type": kind}  # robomimic and LIBERO spell it differently
        named = {"env_name": env.get("env_id", ""), "env_version": env.get("env_version"), **both}
        args = {**env, **named, "env_kwargs": dict(env.get("kwargs") or {})}
        data.attrs["env_args"], data.attrs["gencontrol"] = storage.json_text(args), storage.json_text(env)
        for index, episode in enumerate(episodes):
            with storage.naming(f"episode {index}"):
                inside(episode.actions)
                _write(data.create_group(f"demo_{index}"), episode)


def _write(demo: Any, episode: Episode) -> None:
    """Write one demo; `dones` marks success states and the last step (done_mode 2)."""
    count = len(episode)
    demo.attrs["num_samples"] = count
    demo.attrs["gencontrol"] = storage.Extras.of(episode).text()
    demo["actions"], demo["rewards"] = episode.actions, episode.rewards
    last = np.arange(count) == count - 1
    demo["dones"] = (episode.success | episode.terminated | last).astype(np.int64)
    for name in ("terminated", "truncated", "success"):
        demo[name] = getattr(episode, name)
    # robomimic asks every demo for its states; without a simulator they are dummies
    demo["states"] = np.zeros((count, 0)) if episode.states is None else episode.states[:count]
    if episode.states is not None and len(episode.states) == count + 1:
        demo["final_state"] = episode.states[count:]
    for key, rows in episode.observations.items():
        demo[f"obs/{key}"] = rows[:count]
        if len(rows) == count + 1:
            demo[f"next_obs/{key}"] = rows[1:]
