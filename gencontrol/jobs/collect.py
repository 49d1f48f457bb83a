"""`collect`: demonstrations of a scripted expert or a policy, as a data set that training reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gencontrol.config import Count, Natural, NonNegative, build, dump_toml, options, to_table
from gencontrol.errors import UsageError
from gencontrol.files import FileLayer
from gencontrol.jobs.setup.environment import prepare
from gencontrol.jobs.setup.settings import Start, called

if TYPE_CHECKING:
    from gencontrol.robotics.demos.collect import Collection
    from gencontrol.robotics.envs.types import EnvSource


@options
class CollectConfig:
    """Whose episodes are recorded, and where they go.

    Args:
        env: Gymnasium id, or package.module:make_fn.
        policy: expert, a policy folder, or package.module:make_policy.
        episodes: episodes to keep.
        env_kwargs: an argument of the environment; may be repeated.
        time_limit: steps of an episode (default: the environment's own).
        noise: of a scripted expert: standard deviation of action noise (default: 0.1).
        delay: of a scripted expert: steps by which it sees late.
        bias: of a scripted expert: metres of error of its target, one per episode.
        keep_failures: keep episodes without success too.
        attempts: most seeds tried (default: three per episode).
        seed_start: first seed; the others follow.
        num_envs: environments side by side.
        isolation: process survives crashes of the simulator, inline catches exceptions only.
        output: FILE.hdf5, a folder, or FOLDER.zarr.
        format: lerobot, robomimic, minari, zarr or dppo (default: by the name of the output, else lerobot).
        threads: CPU threads; 0 leaves it to the library.
    """

    env: str = ""
    policy: str = "expert"
    episodes: Count = 100
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    time_limit: Count | None = None
    noise: NonNegative | None = None
    delay: Natural = 0
    bias: NonNegative = 0.0
    keep_failures: bool = False
    attempts: Count | None = None
    seed_start: Natural = 0
    num_envs: Count = 1
    isolation: Literal["process", "inline"] = "inline"
    output: str = "demonstrations"
    format: str | None = None
    threads: Natural = 0


@dataclass(frozen=True)
class CollectResult:
    """What was recorded.

    Args:
        collection: the episodes, with the counts of attempts and successes.
        path: the data set; seeds and counts lie beside it.  None where nothing was written.
    """

    collection: Collection
    path: Path | None = None


def collect(
    env: EnvSource, *, policy: Any = "expert", output: str | Path | None = None, **options: Any
) -> CollectResult:
    """Record episodes of a policy, the successful ones kept, every attempt accounted for.

    Args:
        env: an id, package.module:make_fn, or such a function itself.
        policy: "expert", a policy (anything with reset(rows, seeds) and select_action(observation, rows)), a folder or
            package.module:make_policy.
        output: FILE.hdf5, a folder, or FOLDER.zarr; None keeps the episodes in memory.
        options: fields of `CollectConfig`, e.g. episodes=200, noise=0.05, num_envs=4.

    Raises:
        UsageError: the output exists, nothing was kept, or policy or environment cannot be had; nothing is written.
        EnvironmentMissing: a package is not installed.
    """
    named = {"policy": called(policy), **({} if output is None else {"output": str(output)})}
    return _collected(build(CollectConfig, {**options, **named}, "collect"), env, policy, output)


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> None:
    """Record, write the data set, and beside it NAME.collection.json with seeds, counts and versions."""
    config = build(CollectConfig, table["run"], "run")
    if not config.env:
        raise UsageError("--env is missing; give a Gymnasium id, or package.module:make_fn.")
    if start.dry_run:
        print(dump_toml({"run": to_table(config)}), end="")
        return
    result = _collected(config, config.env, config.policy, config.output)
    found, path = result.collection, result.path
    print(f"{path}: {len(found.episodes)} episodes, {found.episodes.frames} frames")
    print(f"attempted {found.attempted}, succeeded {found.succeeded}; counts and seeds: {path}.collection.json")
    if len(found.episodes) < config.episodes:
        print(f"gencontrol: note: {config.episodes} episodes were asked for; more seeds: --attempts.", file=sys.stderr)


def _collected(config: CollectConfig, env: EnvSource, policy: Any, output: str | Path | None) -> CollectResult:
    prepare(threads=config.threads)
    target = None if output is None else Path(output)
    if target is not None and target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"--output {output} exists; choose another name, a data set is never overwritten.")
    from gencontrol.robotics.datasets.convert import format_for, write_episodes
    from gencontrol.robotics.demos.collect import collect as record
    from gencontrol.robotics.demos.experts import Flaws, expert_for
    from gencontrol.robotics.envs.vector import make_envs
    from gencontrol.robotics.policies.loading import load_policy
    from gencontrol.train.tracking import Progress

    kind = None if target is None else format_for(target, config.format)
    if isinstance(policy, str) and policy == "expert":
        noise = 0.1 if config.noise is None else config.noise
        actor: Any = expert_for(env, Flaws(noise, config.delay, config.bias), config.env_kwargs)
    elif config.noise is not None or config.delay or config.bias:
        raise UsageError("--noise, --delay and --bias belong to --policy expert; a policy has the flaws that it has.")
    else:
        actor = load_policy(policy) if isinstance(policy, (str, Path)) else policy
    seeds = range(config.seed_start, config.seed_start + (config.attempts or 3 * config.episodes))
    progress = Progress(config.episodes, visible=True, unit="episode", describe=lambda record: str(record["text"]))

    def say(kept: int, attempted: int, succeeded: int) -> None:
        progress.show(kept, {"text": f"success {succeeded / attempted:.0%} of {attempted}"})

    with make_envs(
        env,
        min(config.num_envs, config.episodes),
        kwargs=config.env_kwargs,
        time_limit=config.time_limit,
        isolation=config.isolation,
    ) as envs:
        progress.start(0)
        found = record(actor, envs, seeds, keep=config.episodes, only_successes=not config.keep_failures, say=say)
        progress.close()
        spec = asdict(envs.spec)
    if target is not None:
        write_episodes(found.episodes, target, format=kind)
        facts = {"command": sys.argv, "policy": config.policy, "environment": spec, **found.summary()}
        beside = target.with_name(f"{target.name}.collection.json")
        FileLayer().replace_file(beside, json.dumps(facts, indent=1, default=str).encode())
    return CollectResult(found, target)
