"""Folders of policies: config.json (class, what it reads and writes, options) and model.safetensors.

The tensors are "network.*" and "encoder.*" (the averaged weights), "normalizer.<key>.shift" and ".scale" in the
environment's units, and "limits.low", "limits.high" where they are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gencontrol.config import build
from gencontrol.data.normalize import pack, unpack
from gencontrol.errors import UsageError
from gencontrol.models.folders import read_config, read_weights, write_model
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.diffusion import GenerativePolicy

Policy = TypeVar("Policy", bound=GenerativePolicy)


def write_policy(policy: GenerativePolicy, folder: Path) -> None:
    """Write the folder; the weights appear whole or not at all.

    Raises:
        UsageError: a file is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file; save_pretrained writes a folder: give another path.")
    spec = dataclasses.asdict(policy.spec)
    spec["observations"] = {key: list(shape) for key, shape in policy.spec.observations.items()}
    weights: dict[str, Tensor] = dict(policy.networks.state_dict())
    # copies: keys that share one normaliser share its tensors, which safetensors refuses
    weights |= {f"normalizer.{name}": value.clone() for name, value in pack(policy.normalizers).items()}
    if policy.limits is not None:
        weights |= {"limits.low": policy.limits[0], "limits.high": policy.limits[1]}
    table = {"spec": spec, "policy": dataclasses.asdict(policy.config)}
    write_model(folder, type(policy).__name__, table, weights)


def read_policy(kind: type[Policy], folder: Path) -> Policy:
    """Load a folder.

    Raises:
        UsageError: no such folder, a damaged or missing file, or a policy of another class.
    """
    table, weights = _read(kind.__name__, folder)
    try:
        given = dict(table["spec"])
        given["observations"] = {key: tuple(shape) for key, shape in given["observations"].items()}
        spec = PolicySpec(**given)
        config = build(kind.Config, table["policy"], "policy")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"'{folder}/config.json' does not describe a {kind.__name__}: {error}") from error
    normalizers = unpack(_under(weights, "normalizer."))
    ends = _under(weights, "limits.")
    limits = (ends["low"], ends["high"]) if {"low", "high"} <= set(ends) else None
    policy = kind(spec, config, normalizers, limits)
    mine = policy.networks.state_dict()
    theirs = {k: v for k, v in weights.items() if not k.startswith(("normalizer.", "limits."))}
    missing, unknown = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    wrong = sorted(key for key in mine.keys() & theirs.keys() if mine[key].shape != theirs[key].shape)
    if missing or unknown or wrong:
        raise UsageError(
            f"'{folder}/model.safetensors' does not fit its config.json: missing {missing[:3]}, unknown "
            f"{unknown[:3]}, other shape {wrong[:3]}; save the policy again."
        )
    with torch.no_grad():
        policy.networks.load_state_dict(theirs)
    return policy


def _read(name: str, folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Return the config and the tensors of a folder."""
    try:
        table = read_config(folder, name)
    except UsageError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"'{folder}/config.json' is damaged ({error}); copy or save the policy again.") from error
    path = folder / "model.safetensors"
    if not path.exists():
        raise UsageError(f"'{folder}' has no model.safetensors; copy or save the policy again.")
    try:
        return table, read_weights(folder)
    except Exception as error:  # safetensors raises an exception class of its own
        raise UsageError(f"'{path}' is damaged ({error}); copy or save the policy again.") from error


def _under(weights: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `start`, without it."""
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
