"""What a run is at a step boundary: roles, optimizer, algorithm state, counters — captured, saved, restored.

A boundary is remembered as soon as a step is whole: the algorithm's own state as a copy (`collect` may change it),
roles and optimizer by reference, because nothing moves them before the first optimizer step.  A step of several updates
calls `freeze` just before its first one, which copies them too.  `save` therefore always writes a whole step.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencontrol._version import __version__
from gencontrol.algorithms.base import Algorithm
from gencontrol.errors import DiskError, EnvironmentMissing, UsageError
from gencontrol.train.accounting import Window
from gencontrol.train.checkpoint import Checkpoints, TrainState, join_tensors, restore_names, split_tensors
from gencontrol.train.config import TrainConfig
from gencontrol.train.distributed.dist import Layout, Table
from gencontrol.train.health import Health
from gencontrol.train.optim import LossScale, make_optimizers
from gencontrol.train.run_folder import settings_hash


class RunState:
    """Counters and stateful objects of a run; `step` is the number of whole steps, `record` the line of that step.

    Args:
        config: settings of the loop.
        settings: all settings of the run, stored in each checkpoint.
        algorithm: whose roles and state are saved.
        checkpoints: where.
        layout: how the weights lie; rank 0 of its group writes, another number of ranks at a resume is announced.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: Mapping[str, Any],
        algorithm: Algorithm,
        checkpoints: Checkpoints,
        layout: Layout,
    ) -> None:
        self.optimizers = make_optimizers(algorithm, config)
        self.named = {name: p for optimizer in self.optimizers.values() for name, p in optimizer.named.items()}
        self.device = _check_device(config, next(iter(self.named.values())).device)
        self.scale = LossScale.start(config)
        self.health = Health(config.max_bad_steps)
        self.step, self.updates, self.begun, self.items, self.wall_s = 0, 0, 0, 0, 0.0
        self.window = Window()
        self.record: dict[str, Any] = {"step": 0}
        self.saved_step: int | None = None
        self._settings, self._algorithm, self._checkpoints = settings, algorithm, checkpoints
        self._world_size, self._writes, self._layout = layout.group.world_size, layout.group.rank == 0, layout
        self._boundary: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self._frozen: tuple[Table, Table] | None = None

    def mark(self) -> None:
        """Remember the present state as that of a whole step."""
        tree, tensors = split_tensors(self._algorithm.state_dict())
        copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        self._boundary = (
            join_tensors(tree, copies),
            {
                "counters": {"updates": self.updates, "begun": self.begun, "items": self.items, "wall_s": self.wall_s},
                "health": self.health.state_dict(),
                "loss_scale": self.scale.state_dict(),
                "record": dict(self.record),
                "window": self.window.state_dict(),
            },
        )
        self._frozen = None

    def freeze(self) -> None:
        """Copy roles and optimizer before the first of several updates; further calls do nothing."""
        if self._frozen is None:
            now = self._algorithm.roles.state_dict(), self._moments()
            self._frozen = (self._layout.copied(now[0]), self._layout.copied(now[1]))

    def save(self) -> None:
        """Write the state of the last whole step, unless it is on disk already.

        Raises:
            DiskError: see `Checkpoints.save`.
        """
        algorithm, meta = self._boundary
        step = int(meta["record"]["step"])
        if step != self.saved_step:
            held = self._frozen or (self._algorithm.roles.state_dict(), self._moments())
            roles, optimizer = self._layout.whole(held[0]), self._layout.whole(held[1])
            if self._writes:
                self._checkpoints.save(TrainState(step, roles, optimizer, algorithm, meta | self._surroundings()))
        self.saved_step = step

    def check_space(self) -> None:
        """Fail before the first step when not even one checkpoint fits on the disk.

        Raises:
            DiskError: needed and free megabytes.
        """
        roles = self._algorithm.roles.state_dict().values()
        weights = sum(t.numel() * t.element_size() for role in roles for t in role.values())
        moments = sum(2 * p.numel() * p.element_size() for p in self.named.values())
        free = self._checkpoints.files.free_bytes(self._checkpoints.folder.parent)
        if free < weights + moments:
            raise DiskError(
                f"a checkpoint of this run needs {(weights + moments) / 1e6:.0f} MB, and "
                f"'{self._checkpoints.folder.parent}' has {free / 1e6:.0f} MB free; free some space first."
            )

    def restore(self, state: TrainState) -> list[str]:
        """Load a checkpoint; returns lines about changes that end bit-equality.

        Raises:
            UsageError: other roles.
            CheckpointError: names or shapes differ (both lists are given).
        """
        live = self._algorithm.roles.state_dict()
        if live.keys() != state.roles.keys():
            raise UsageError(
                f"the checkpoint holds the roles {sorted(state.roles)}, this algorithm has {sorted(live)}; resume with "
                "the algorithm of that run."
            )
        roles = {role: restore_names(state.roles[role], tensors, role) for role, tensors in live.items()}
        placed = self._layout.placed
        self._algorithm.roles.load_state_dict(
            {role: {name: placed(t, live[role][name]) for name, t in row.items()} for role, row in roles.items()}
        )
        self._algorithm.load_state_dict(state.algorithm)
        left = {
            name: {key: placed(t, self.named.get(name)) for key, t in row.items()}
            for name, row in state.optimizer.items()
        }
        first, *others = self.optimizers.values()
        for optimizer in others:  # a group that was never due has no moments yet
            optimizer.load_state_dict({name: left.pop(name) for name in optimizer.named if name in left})
        first.load_state_dict(left)  # refuses what no group knows
        self.health.load_state_dict(state.meta["health"])
        self.scale.load_state_dict(state.meta["loss_scale"])
        counters = state.meta["counters"]
        self.updates, self.items, self.wall_s = counters["updates"], counters["items"], counters["wall_s"]
        self.begun = counters.get("begun", self.updates)  # checkpoints of 0.1 lack it, and have a single group
        self.window.load_state_dict(state.meta.get("window", {}))
        self.step, self.record, self.saved_step = state.step, dict(state.meta["record"]), state.step
        now = self._surroundings()
        return [
            f"{name} changed from {state.meta[name]} to {now[name]}: the result may differ in the last digits."
            for name in ("topology", "versions")
            if now[name] != state.meta[name]
        ]

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        return {key: row for optimizer in self.optimizers.values() for key, row in optimizer.state_dict().items()}

    def _surroundings(self) -> dict[str, Any]:
        """What a checkpoint tells of its run, the same at every step."""
        return {
            "time_unix": time.time(),
            "versions": {
                "gencontrol": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
                "platform": sys.platform,
            },
            "topology": {
                "world_size": self._world_size,
                "device": self.device.type,
                "threads": torch.get_num_threads(),
            },
            "settings": json.loads(json.dumps(self._settings, default=str)),
            "settings_sha": settings_hash(self._settings),
        }


def _check_device(config: TrainConfig, device: torch.device) -> torch.device:
    """Return where the weights lie.

    Raises:
        EnvironmentMissing: cuda is asked for and absent.
        UsageError: the weights lie elsewhere than asked.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMissing("device = cuda, but torch sees no CUDA device; use device = cpu, or a CUDA torch.")
    if config.device not in ("auto", device.type):
        raise UsageError(f"device = {config.device}, but the weights lie on {device}; move the model first.")
    return device
