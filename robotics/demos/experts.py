"""Scripted experts: policies that read the true state, so that demonstrations can be made on any machine.

An expert is a policy (`reset`, `select_action`) over the rows of a vector environment.  `Flaws` make it imperfect on
purpose: two different ones give two different imperfect sets of demonstrations.  Everything random in an episode is a
pure function of its seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gencontrol.errors import UsageError
from gencontrol.rng import Keyed, row_keys, stream
from gencontrol.robotics.envs.gymnasium import GymnasiumEnv
from gencontrol.robotics.envs.make import env_name, make_env
from gencontrol.robotics.envs.types import EnvSource

Rows = NDArray[np.float32]
Observation = Mapping[str, Any]


@dataclass(frozen=True)
class Flaws:
    """What is wrong with an expert.

    Args:
        noise: standard deviation of Gaussian noise on every action, in action units (environments take [-1, 1]).
        delay: steps by which the expert's view of the world is late.
        bias: standard deviation, in metres, of an error of the perceived target (the object to grasp, the goal of a
            maze) that stays the same for a whole episode; 0.3 of it vertically.

    Raises:
        UsageError: a number is negative.
    """

    noise: float = 0.1
    delay: int = 0
    bias: float = 0.0

    def __post_init__(self) -> None:
        if min(self.noise, self.delay, self.bias) < 0:
            raise UsageError(f"flaws of an expert cannot be negative: {self}.")


@dataclass
class _Episode:
    """One row in progress."""

    seed: int
    error: Rows
    step: int = 0
    seen: deque[dict[str, Rows]] = field(default_factory=deque)
    memory: dict[str, Any] = field(default_factory=dict)


class Expert(ABC):
    """A scripted policy with flaws; subclasses give `act`."""

    def __init__(self, flaws: Flaws | None = None) -> None:
        """Set up without any episode."""
        self.flaws = Flaws() if flaws is None else flaws
        self._rows: dict[int, _Episode] = {}

    @abstractmethod
    def act(self, seen: Mapping[str, Rows], episode: _Episode) -> Rows:
        """Return the intended action [A] for what is perceived; `episode.error` [3] displaces the target."""

    def reset(self, rows: Sequence[int] | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin new episodes in `rows` (None: forget all) with these seeds (None: the row numbers)."""
        if rows is None:
            self._rows.clear()
            rows = range(len(seeds)) if seeds is not None else ()
        for index, row in enumerate(rows):
            self._rows[int(row)] = self._begin(int(row) if seeds is None else int(seeds[index]))

    def select_action(self, observation: Observation, rows: Sequence[int] | None = None) -> Rows:
        """Return the next action of each row, float32 [b A] in [-1, 1]."""
        count = len(next(iter(observation.values())))
        numbers = range(count) if rows is None else rows
        episodes = [self._rows.setdefault(int(row), self._begin(int(row))) for row in numbers]
        intended = []
        for index, episode in enumerate(episodes):
            episode.seen.append({key: np.asarray(value[index]) for key, value in observation.items()})
            while len(episode.seen) > self.flaws.delay + 1:
                episode.seen.popleft()
            intended.append(self.act(episode.seen[0], episode))
        actions = np.stack(intended).astype(np.float32)
        if self.flaws.noise:
            seeds = torch.tensor([episode.seed for episode in episodes])
            keys = row_keys(0, "expert/noise", seeds, torch.tensor([episode.step for episode in episodes]))
            actions += (self.flaws.noise * Keyed(keys).normal(actions.shape)).numpy()
        for episode in episodes:
            episode.step += 1
        return np.clip(actions, -1.0, 1.0)

    def _begin(self, seed: int) -> _Episode:
        scale = self.flaws.bias * torch.tensor([1.0, 1.0, 0.3])
        error = scale * torch.randn(3, generator=stream(seed, "expert/bias"))
        return _Episode(seed, error.numpy().astype(np.float32))


class FetchPickAndPlaceExpert(Expert):
    """Above the object, down, close, to the goal, by proportional control; for gymnasium-robotics' Fetch tasks.

    It reads `observation` (gripper position in columns 0-2, object position in 3-5, finger widths in 9-10) and
    `desired_goal`.  Whether the object is held is judged from fingers and distance, so the script has almost no memory.
    """

    #: metres per unit of action and step, and the gain that reaches a target without overshoot (ours)
    GAIN = 10.0
    #: height from which the gripper descends, distances that count as "above" and "there", metres (ours)
    ABOVE, ALIGNED, REACHED = 0.06, 0.02, 0.012
    #: steps of closing before the lift
    CLOSING = 3

    def act(self, seen: Mapping[str, Rows], episode: _Episode) -> Rows:
        """Move by the phase that the state shows."""
        state, goal = seen["observation"], seen["desired_goal"]
        grip, thing = state[:3], state[3:6] + episode.error
        gap = thing - grip
        closed = int(episode.memory.get("closed", 0))
        if closed and float(np.abs(gap).max()) > 0.06:  # it slipped: begin again
            closed = 0
        near = float(np.linalg.norm(gap)) < self.REACHED
        if closed or near:
            closed += 1
            move = goal - thing if closed > self.CLOSING else gap
            fingers = -1.0
        else:
            aligned = float(np.linalg.norm(gap[:2])) < self.ALIGNED
            move = gap if aligned else gap + np.array([0.0, 0.0, self.ABOVE], dtype=np.float32)
            fingers = 1.0
        episode.memory["closed"] = closed
        return np.concatenate([np.clip(self.GAIN * move, -1.0, 1.0), [fingers]]).astype(np.float32)


class PointMazeExpert(Expert):
    """The shortest way through the cells of a maze, followed by a damped force; for gymnasium-robotics' PointMaze.

    Args:
        maze: rows of cells, 1 is a wall.
        size: metres of a cell.
        flaws: see `Flaws`; bias displaces the perceived goal.
    """

    #: force per metre and per metre/second (ours: no overshoot at the environment's mass and time step)
    STIFFNESS, DAMPING = 10.0, 2.5

    def __init__(self, maze: Sequence[Sequence[Any]], size: float = 1.0, flaws: Flaws | None = None) -> None:
        super().__init__(flaws)
        self.walls = np.array([[cell == 1 for cell in row] for row in maze], dtype=bool)
        self.size = size

    def cell_of(self, place: Rows) -> tuple[int, int]:
        """Return (row, column) of a point; x grows with the column, y falls with the row."""
        height, width = self.walls.shape
        row = int(np.floor((height * self.size / 2 - place[1]) / self.size))
        column = int(np.floor((place[0] + width * self.size / 2) / self.size))
        return min(max(row, 0), height - 1), min(max(column, 0), width - 1)

    def centre_of(self, cell: tuple[int, int]) -> Rows:
        """Return the point in the middle of a cell."""
        height, width = self.walls.shape
        x = (cell[1] + 0.5) * self.size - width * self.size / 2
        y = height * self.size / 2 - (cell[0] + 0.5) * self.size
        return np.array([x, y], dtype=np.float32)

    def distances(self, goal: tuple[int, int]) -> NDArray[np.float64]:
        """Return the number of cells from each cell to the goal (infinite in walls), by breadth-first search."""
        found = np.full(self.walls.shape, np.inf)
        found[goal] = 0
        front = deque([goal])
        while front:
            row, column = front.popleft()
            for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                inside = 0 <= cell[0] < self.walls.shape[0] and 0 <= cell[1] < self.walls.shape[1]
                if inside and not self.walls[cell] and np.isinf(found[cell]):
                    found[cell] = found[row, column] + 1
                    front.append(cell)
        return found

    def act(self, seen: Mapping[str, Rows], episode: _Episode) -> Rows:
        """Push towards the next cell on the way, or the goal itself in its own cell."""
        place, speed = seen["observation"][:2], seen["observation"][2:4]
        goal = seen["desired_goal"] + episode.error[:2]
        target_cell = self.cell_of(goal)
        if episode.memory.get("target") != target_cell:
            episode.memory |= {"target": target_cell, "distances": self.distances(target_cell)}
        distances = episode.memory["distances"]
        here = self.cell_of(place)
        target = goal
        if here != target_cell:
            row, column = here
            steps = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
            known = [cell for cell in steps if all(0 <= c < n for c, n in zip(cell, distances.shape))]
            best = min(known, key=lambda cell: float(distances[cell]))
            target = self.centre_of(best) if best != target_cell else goal
        return np.clip(self.STIFFNESS * (target - place) - self.DAMPING * speed, -1.0, 1.0).astype(np.float32)


def expert_for(env: EnvSource, flaws: Flaws | None = None, kwargs: Mapping[str, Any] | None = None) -> Expert:
    """Return the expert of an environment, found by the class of the simulation behind the id.

    Args:
        env, kwargs: see `gencontrol.robotics.envs.make.make_env`.

    Raises:
        UsageError: no expert is known for it, or no such environment.
        EnvironmentMissing: its package is not installed.
    """
    made = make_env(env, kwargs=kwargs)
    try:
        inner = made.env.unwrapped if isinstance(made, GymnasiumEnv) else None
        names = {kind.__name__ for kind in type(inner).__mro__}
        if "MujocoFetchPickAndPlaceEnv" in names:
            return FetchPickAndPlaceExpert(flaws)
        if inner is not None and "PointMazeEnv" in names:
            return PointMazeExpert(inner.maze.maze_map, inner.maze.maze_size_scaling, flaws)
    finally:
        made.close()
    raise UsageError(
        f"no scripted expert is known for '{env_name(env)}'; they exist for FetchPickAndPlace and PointMaze. Give a "
        "policy folder or package.module:make_policy instead."
    )
