"""Messages between `Envs` and the processes of its rows: a JSON head and raw arrays; nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from gencontrol.robotics.envs.types import Array, EnvSpec, Transition


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
