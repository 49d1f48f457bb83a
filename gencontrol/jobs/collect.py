"""`gencontrol collect`: demonstrations of a scripted expert or a policy, as a data set that training reads."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.files import FileLayer
from gencontrol.jobs.setup.environment import prepare


@dataclass(frozen=True)
class Request:
    """The options of the command; `flaws` are noise, delay and bias of a scripted expert."""

    env: str
    policy: str
    episodes: int
    env_kwargs: tuple[str, ...]
    time_limit: int | None
    flaws: tuple[float, int, float]
    keep_failures: bool
    attempts: int | None
    seed_start: int
    num_envs: int
    isolation: str
    output: str
    format: str | None
    threads: int


def command(request: Request) -> None:
    """Record, write the data set, and beside it NAME.collection.json with seeds, counts and versions.

    Raises:
        UsageError: the output exists, or policy or environment cannot be had; nothing is written.
    """
    prepare(threads=request.threads)
    target = _free(request.output)
    from gencontrol.robotics.datasets.convert import format_for, write_episodes
    from gencontrol.robotics.demos.collect import collect
    from gencontrol.robotics.envs.options import parse_kwargs
    from gencontrol.robotics.envs.vector import make_envs
    from gencontrol.train.tracking import Progress

    name = format_for(target, request.format)
    policy = _policy(request)
    most = request.attempts or 3 * request.episodes
    seeds = range(request.seed_start, request.seed_start + most)
    progress = Progress(request.episodes, visible=True, unit="episode", describe=lambda record: str(record["text"]))
    with make_envs(
        request.env,
        min(request.num_envs, request.episodes),
        kwargs=parse_kwargs(request.env_kwargs),
        time_limit=request.time_limit,
        isolation=request.isolation,  # type: ignore[arg-type]  # checked there
    ) as envs:

        def say(kept: int, attempted: int, succeeded: int) -> None:
            progress.show(kept, {"text": f"success {succeeded / attempted:.0%} of {attempted}"})

        progress.start(0)
        found = collect(policy, envs, seeds, keep=request.episodes, only_successes=not request.keep_failures, say=say)
        progress.close()
        spec = asdict(envs.spec)
    write_episodes(found.episodes, target, format=name)
    facts = {"command": sys.argv, "policy": request.policy, "environment": spec, **found.summary()}
    beside = target.with_name(f"{target.name}.collection.json")
    FileLayer().replace_file(beside, json.dumps(facts, indent=1, default=str).encode())
    print(f"{target}: {len(found.episodes)} episodes, {found.episodes.frames} frames ({name})")
    print(f"attempted {found.attempted}, succeeded {found.succeeded}; counts and seeds: {beside}")
    if len(found.episodes) < request.episodes:
        print(f"gencontrol: note: {request.episodes} episodes were asked for; more seeds: --attempts.", file=sys.stderr)


def _free(output: str) -> Path:
    target = Path(output)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"--output {output} exists; choose another name, a data set is never overwritten.")
    return target


def _policy(request: Request) -> Any:
    noise, delay, bias = request.flaws
    if request.policy == "expert":
        from gencontrol.robotics.demos.experts import Flaws, expert_for
        from gencontrol.robotics.envs.options import parse_kwargs

        return expert_for(request.env, Flaws(noise, delay, bias), parse_kwargs(request.env_kwargs))
    if delay or bias:
        raise UsageError("--delay and --bias belong to --policy expert; a policy has the flaws that it has.")
    from gencontrol.robotics.policies.loading import load_policy

    return load_policy(request.policy)
