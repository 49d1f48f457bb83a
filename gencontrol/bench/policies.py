"""`gencontrol bench policies`: diffusion policies cloned from scripted experts succeed on fresh episodes.

Tasks: "maze" (PointMaze_UMaze-v3, at least 90 %) and "fetch" (FetchPickAndPlace-v4, at least 80 %, read at the last
step).  Demonstrations, training and evaluation have seeds of their own; results do not depend on --num-envs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gencontrol.bench.base import Check, table
from gencontrol.bench.gpc.fetch import cloned
from gencontrol.bench.parts import PartOptions, chosen_parts, run_parts
from gencontrol.config import Count, Natural, options
from gencontrol.robotics.demos.collect import collect
from gencontrol.robotics.demos.experts import Flaws, expert_for
from gencontrol.robotics.envs.vector import make_envs
from gencontrol.robotics.evaluate import evaluate
from gencontrol.robotics.policies.diffusion import DiffusionPolicy, DiffusionPolicyConfig

KEYS = ("observation", "desired_goal")


@dataclass(frozen=True)
class Task:
    """An environment with its claim: demonstrations (first seed 1 000 000), optimizer steps of batch 256, success."""

    env_id: str
    demos: int
    steps: int
    claim: float


TASKS = {
    "maze": Task("PointMaze_UMaze-v3", 400, 8000, 0.9),
    "fetch": Task("FetchPickAndPlace-v4", 150, 8000, 0.8),
}


def run_task(task: Task, *, episodes: int, num_envs: int, seed: int, quick: bool) -> dict[str, Any]:
    """Record, clone, evaluate; returns "table", "checks" and the numbers of the evaluation."""
    demos, steps = (2, 5) if quick else (task.demos, task.steps)
    isolation: Any = "inline" if num_envs == 1 else "process"
    with make_envs(task.env_id, num_envs, isolation=isolation) as envs:
        first = 1_000_000 + 10_000 * seed
        data = collect(expert_for(task.env_id, Flaws(0.1)), envs, range(first, first + 3 * demos), keep=demos)
    config = DiffusionPolicyConfig(backbone="mlp", state_norm="mean_std")
    policy = cloned(DiffusionPolicy, config, data.episodes, KEYS, steps, seed)
    seeds = range(100_000, 100_000 + (2 if quick else episodes))
    rows = []
    reports: dict[str, dict[str, Any]] = {}
    for name, actor in (("cloned", policy), ("random", "random")):
        report = evaluate(actor, task.env_id, seeds=seeds, num_envs=num_envs, isolation=isolation)
        low, high = report.interval
        reports[name] = {"successes": report.successes, "episodes": len(report.episodes), "interval": [low, high]}
        rows.append([name, f"{report.successes} of {len(report.episodes)}", f"{low:.3f} – {high:.3f}"])
    share = reports["cloned"]["successes"] / reports["cloned"]["episodes"]
    claim = f"{task.env_id}: the cloned policy succeeds in at least {task.claim:.0%} of fresh episodes"
    title = f"{task.env_id}: {demos} demonstrations ({data.attempted} tried), {steps} steps, seed {seed}"
    return {
        "table": table(title, ["policy", "success", "95 %"], rows),
        "checks": [Check(claim, f"{share:.1%}", share >= task.claim)],
        "reports": reports,
        "collection": data.summary(),
    }


@options
class Options(PartOptions):
    """Options of the benchmark.

    Args:
        parts: comma-separated tasks (default: all).
        episodes: fresh episodes of each task.
        num_envs: environments side by side.
        seed: of demonstrations and training.
    """

    episodes: Count = 100
    num_envs: Count = 1
    seed: Natural = 0
    output: str = "runs/bench/policies"


def main(options: Options) -> int:
    """Run the chosen tasks, print tables and verdicts, write one JSON file each.

    Raises:
        UsageError: an unknown task.
        EnvironmentMissing: gymnasium-robotics is not installed.
    """
    chosen = chosen_parts(options.parts, list(TASKS))
    given: dict[str, Any] = {
        "episodes": options.episodes,
        "num_envs": options.num_envs,
        "seed": options.seed,
        "quick": options.quick,
    }
    print("recording, cloning, evaluating: minutes per task", file=sys.stderr, flush=True)
    run_parts({part: partial(run_task, TASKS[part], **given) for part in chosen}, Path(options.output))
    return 0
