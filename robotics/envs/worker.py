"""The process of one row: `python -m gencontrol.robotics.envs.worker FD REQUEST`, started by `rows.ProcessRow`.

Messages in both directions are a JSON head and raw arrays; nothing is unpickled.  Loads the simulator and NumPy, never
torch.  Ends when its parent is gone, even while the simulator hangs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.robotics.envs.make import family_of, make_env
from gencontrol.robotics.envs.types import Array, EnvSpec, RobotEnv, Transition

_WATCH_S = 1.0


def pack(head: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> bytes:
    """Return one message."""
    laid = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    table = [(name, array.dtype.str, array.shape) for name, array in laid.items()]
    first = json.dumps({**head, "arrays": table}).encode()
    return b"".join([len(first).to_bytes(4, "little"), first, *(array.tobytes() for array in laid.values())])


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return head and arrays of a message."""
    end = 4 + int.from_bytes(message[:4], "little")
    head = json.loads(message[4:end])
    arrays = {}
    for name, dtype, shape in head.pop("arrays"):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(message, dtype, count, end).reshape(shape)
        end += count * np.dtype(dtype).itemsize
    return head, arrays


def pack_transition(step: Transition) -> bytes:
    """Write what a step returned."""
    head = {"reward": step.reward, "terminated": step.terminated, "truncated": step.truncated, "success": step.success}
    return pack(head, step.observation)


def unpack_transition(head: Mapping[str, Any], arrays: dict[str, Array]) -> Transition:
    """Read what `pack_transition` wrote."""
    return Transition(arrays, head["reward"], head["terminated"], head["truncated"], head["success"])


def spec_to_json(spec: EnvSpec) -> dict[str, Any]:
    """Return the description as JSON can hold it; infinite bounds become "inf" and "-inf"."""
    table = asdict(spec)
    for name in ("action_low", "action_high"):
        table[name] = [str(value) for value in table[name]]
    return table


def spec_from_json(table: Mapping[str, Any]) -> EnvSpec:
    """Read what `spec_to_json` wrote."""
    values = dict(table)
    for name in ("action_low", "action_high"):
        values[name] = tuple(float(value) for value in values[name])
    values["observations"] = {key: tuple(shape) for key, shape in values["observations"].items()}
    values["images"] = tuple(values["images"])
    return EnvSpec(**values)


def main(descriptor: int, request: str) -> None:
    """Make the environment and serve until the parent says stop or goes away."""
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    link = Connection(descriptor)
    asked = json.loads(request)
    if not asked["render"] and ":" not in asked["env"] and not family_of(asked["env"]).draws:
        os.environ["MUJOCO_GL"] = "disable"  # states are computed even where nothing can be drawn
    try:
        env = make_env(**asked)
    except Exception as error:  # whatever a stranger's constructor raises is told to the parent
        kind = next((k.__name__ for k in (EnvironmentMissing, UsageError) if isinstance(error, k)), "")
        link.send_bytes(pack({"error": str(error) if kind else describe(error), "kind": kind}))
        return
    link.send_bytes(pack({"spec": spec_to_json(env.spec)}))
    while True:
        try:
            message = link.recv_bytes()
        except EOFError:
            break
        link.send_bytes(answer(env, message))
    env.close()


def answer(env: RobotEnv, message: bytes) -> bytes:
    """Do what a message asks; an exception becomes a message."""
    head, arrays = unpack(message)
    try:
        if head["op"] == "reset":
            return pack_transition(Transition(env.reset(head["seed"]), 0.0, False, False, None))
        if head["op"] == "step":
            return pack_transition(env.step(arrays["action"].copy()))
        return pack({}, {"frame": np.ascontiguousarray(env.render())})
    except Exception as error:  # a fault of this episode alone
        return pack({"error": describe(error)})


def describe(error: BaseException) -> str:
    """Return type and first line of an exception."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
