"""Success rates of policies that people can trust: seeds that decide everything, intervals, paired comparison.

What an episode gives is a pure function of (policy, environment, seed): the seed names the reset and the noise of the
actions, rows never share an episode's state, and networks are asked row by row (`rows_at_once`), because libraries of
linear algebra round differently in batches of different sizes (MEASURED: also at different places of equal batches).
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gencontrol.errors import UsageError
from gencontrol.robotics.envs.types import EnvSpec, Timeouts
from gencontrol.robotics.envs.vector import Envs, Isolation, make_envs
from gencontrol.robotics.evaluation.files import EvaluationFolder, content_of
from gencontrol.robotics.evaluation.report import (
    Comparison,
    EpisodeResult,
    EvaluationReport,
    compare,
    result_of,
)
from gencontrol.robotics.evaluation.rollout import Actor, Rollouts
from gencontrol.robotics.policies.baselines import Baseline
from gencontrol.robotics.policies.chunked import ChunkedPolicy
from gencontrol.robotics.policies.denoising import DenoisingPolicy

__all__ = ["Comparison", "EpisodeResult", "EvaluationReport", "Settings", "evaluate", "evaluate_all"]

#: an evaluation stops when so many episodes in a row were invalid from the start: the environment does not work
HOPELESS = 10
#: names that are no files
NAMED = ("random", "zero", "expert")


@dataclass(frozen=True)
class Settings:
    """How policies are evaluated; see `evaluate`.

    Raises:
        UsageError: a value out of range.
    """

    env_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    num_envs: int = 1
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    time_limit: int | None = None
    success: str = "auto"
    success_at: Literal["any", "end"] | None = None
    isolation: Isolation = "process"
    timeouts: Timeouts = field(default_factory=Timeouts)
    rows_at_once: int = 1
    videos: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.env_ids or len(set(self.env_ids)) != len(self.env_ids):
            raise UsageError(f"environments {list(self.env_ids)}: give at least one, none twice.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"{len(self.seeds)} seeds: give at least one, none twice, all at least 0.")
        if self.success_at not in (None, "any", "end"):
            raise UsageError(f"success_at '{self.success_at}': give any or end.")
        if self.num_envs < 1 or min(self.rows_at_once, self.videos) < 0:
            raise UsageError("num_envs of at least 1, rows_at_once and videos of at least 0 are needed.")
        if self.time_limit is not None and self.time_limit < 1:
            raise UsageError(f"time_limit {self.time_limit}: give at least 1 step.")

    def envs(self, env_id: str, num_envs: int, *, render: bool = False) -> Envs:
        """Make the rows of one environment."""
        return make_envs(
            env_id,
            num_envs,
            kwargs=self.env_kwargs,
            time_limit=self.time_limit,
            success=self.success,
            isolation="process" if render else self.isolation,  # a broken renderer may end its process
            timeouts=self.timeouts,
            render=render,
        )


@dataclass(frozen=True)
class Tick:
    """How far an evaluation is: handed to `say` after every episode, and first if some were there before."""

    policy: str
    env_id: str
    done: int
    total: int
    successes: int
    valid: int


def evaluate(
    policy: Actor | str | Path,
    env_id: str | Sequence[str],
    *,
    seeds: Sequence[int],
    num_envs: int = 1,
    paired_with: Actor | str | Path | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    time_limit: int | None = None,
    success: str = "auto",
    success_at: Literal["any", "end"] | None = None,
    isolation: Isolation = "process",
    timeouts: Timeouts | None = None,
    rows_at_once: int = 1,
    videos: int = 0,
    output: str | Path | None = None,
) -> EvaluationReport:
    """Run a policy on seeds and return what came of it; results do not depend on `num_envs`.

    Args:
        policy: an object with `reset(rows, seeds)` and `select_action(observation, rows)`, or a path or name for
            `load_policy`; "random", "zero" and "expert" are known too.
        env_id: see `make_env`; several are reported one by one and pooled.
        seeds: one per episode; they decide initial state and noise of actions.
        paired_with: another policy, run on the same seeds; `report.compared` then has the difference to it.
        time_limit: steps of an episode; None: the environment's own, or 1000 where it names none.
        success: how success is read; "auto" is the environment's own flag.
        success_at: "any" step or the "end"; None: the convention of the environment (Fetch: end, others: any).
        isolation: "process" survives crashes and hangs of the simulator, "inline" catches exceptions only.
        rows_at_once: rows in one call of a network; more than 1 pads to this size and is faster, but the last bits of
            an action then depend on its place in the batch, and 0 takes all rows that ask, whatever their number.
        videos: most videos per policy and environment, failures first; they need `output`.
        output: a folder; the same call goes on after an interruption.

    Raises:
        UsageError: policy and environment do not fit (before the first episode), or the folder holds something else.
        EnvironmentMissing: a package is not installed.
    """
    settings = Settings(
        env_ids=(env_id,) if isinstance(env_id, str) else tuple(env_id),
        seeds=tuple(int(seed) for seed in seeds),
        num_envs=num_envs,
        env_kwargs=dict(env_kwargs or {}),
        time_limit=time_limit,
        success=success,
        success_at=success_at,
        isolation=isolation,
        timeouts=timeouts or Timeouts(),
        rows_at_once=rows_at_once,
        videos=videos,
    )
    given = [policy] if paired_with is None else [paired_with, policy]
    return evaluate_all(named(given), settings, output=output, paired=paired_with is not None)[-1]


def named(policies: Sequence[Actor | str | Path]) -> dict[str, Actor | str]:
    """Return name → policy; a name that occurs again gets a number."""
    found: dict[str, Actor | str] = {}
    for policy in policies:
        given: Actor | str = str(policy) if isinstance(policy, Path) else policy
        base = given if isinstance(given, str) else type(given).__name__
        number = sum(name.split(" #")[0] == base for name in found)
        found[base if number == 0 else f"{base} #{number + 1}"] = given
    return found


def evaluate_all(
    policies: Mapping[str, Actor | str],
    settings: Settings,
    *,
    sources: Mapping[str, Actor | str] | None = None,
    output: str | Path | None = None,
    paired: bool = False,
    say: Callable[[Tick], None] | None = None,
    poll: Callable[[], None] | None = None,
) -> list[EvaluationReport]:
    """Evaluate policies on the same seeds; with `paired`, each further one is compared with the first.

    Args:
        policies: name → policy, or what `load_policy` takes.
        sources: name → where a policy that was loaded before came from; its files are hashed for the report.
        say: called after every episode.
        poll: called between steps; may raise to stop.

    Raises:
        UsageError, EnvironmentMissing: see `evaluate`.
    """
    run = _Run(policies, settings, sources or policies, output, say, poll)
    reports = run.reports()
    if paired:
        reports = [reports[0], *(replace(other, compared=compare(reports[0], other)) for other in reports[1:])]
    if run.folder is not None:
        from gencontrol.robotics.evaluation.page import write_results

        write_results(run.folder, reports)
    return reports


class _Run:
    """One evaluation of several policies in several environments."""

    def __init__(
        self,
        policies: Mapping[str, Actor | str],
        settings: Settings,
        sources: Mapping[str, Actor | str],
        output: str | Path | None,
        say: Callable[[Tick], None] | None,
        poll: Callable[[], None] | None,
    ) -> None:
        if settings.videos and output is None:
            raise UsageError("videos are files; give an output folder.")
        self.settings, self._say, self._poll = settings, say, poll
        self._given = dict(policies)
        self._loaded = {name: load(given) for name, given in policies.items()}
        contents = {name: content_of(given) if isinstance(given, str) else None for name, given in sources.items()}
        self._contents = contents
        self.folder = None if output is None else EvaluationFolder(output, asdict(settings), contents)
        self._results: dict[tuple[str, str, int], EpisodeResult] = dict(self.folder.done) if self.folder else {}
        self._specs: list[EnvSpec] = []
        self._videos: dict[str, dict[tuple[int, str], str]] = {name: {} for name in policies}
        self._notes: dict[str, list[str]] = {name: [] for name in policies}

    def reports(self) -> list[EvaluationReport]:
        """Run what is missing and return one report per policy."""
        if self._results:
            self._tick(next(iter(self._given)), self.settings.env_ids[0])  # how many were there before
        for env_id in self.settings.env_ids:
            self._environment(env_id)
        shown = {key: value for key, value in asdict(self.settings).items() if key != "seeds"}
        protocol = {**shown, "seeds": list(self.settings.seeds), "autoreset": "disabled, masked reset"}
        protocol["latency"] = (
            "of a call with one row" if self.settings.rows_at_once == 1 else "of a call, other rows with it"
        )
        protocol["success"] = {spec.env_id: f"{spec.success}, {self._at(spec)}" for spec in self._specs}
        protocol["time_limit"] = {spec.env_id: f"{spec.time_limit} ({spec.limit_from})" for spec in self._specs}
        return [self._report(name, protocol) for name in self._given]

    def _report(self, name: str, protocol: Mapping[str, Any]) -> EvaluationReport:
        keys = [(name, env_id, seed) for env_id in self.settings.env_ids for seed in self.settings.seeds]
        facts = {"content": self._contents[name], **_facts(self._loaded[name])}
        return EvaluationReport(
            policy=name,
            episodes=tuple(self._results[key] for key in keys),
            specs=tuple(self._specs),
            protocol=protocol,
            facts=facts,
            videos=self._videos[name],
            notes=tuple(self._notes[name]),
        )

    def _at(self, spec: EnvSpec) -> str:
        return self.settings.success_at or spec.success_at

    def _environment(self, env_id: str) -> None:
        """Run all policies in one environment."""
        missing = {name: self._missing(name, env_id) for name in self._given}
        rows = min(self.settings.num_envs, max(1, max(map(len, missing.values()))))
        with self.settings.envs(env_id, rows) as envs:
            self._specs.append(envs.spec)
            ready = {name: bound(policy, envs.spec) for name, policy in self._loaded.items()}
            for name, policy in ready.items():
                check_fit(name, policy, envs.spec)
            for name, policy in ready.items():
                self._episodes(name, policy, envs, missing[name])
        if self.settings.videos:
            for name, policy in ready.items():
                self._film(name, policy, env_id)

    def _missing(self, name: str, env_id: str) -> list[int]:
        return [seed for seed in self.settings.seeds if (name, env_id, seed) not in self._results]

    def _episodes(self, name: str, policy: Actor, envs: Envs, seeds: Sequence[int]) -> None:
        """Run the seeds and keep their results."""
        spec, invalid, works = envs.spec, 0, False
        with asked_in(policy, self.settings.rows_at_once) as together:
            for rollout in Rollouts(policy, envs, together=together).run(seeds, self._poll):
                result = result_of(rollout, spec, self._at(spec))
                self._results[name, spec.env_id, result.seed] = result
                if self.folder is not None:
                    self.folder.add(name, result)
                works, invalid = works or result.valid, invalid + 1
                if not works and invalid >= HOPELESS:
                    raise UsageError(
                        f"the first {HOPELESS} episodes of '{name}' in {spec.env_id} were all invalid, the last one by "
                        f"{result.invalid}; mend the environment or the policy."
                    )
                self._tick(name, spec.env_id)

    def _tick(self, name: str, env_id: str) -> None:
        if self._say is None:
            return
        rows = [self._results.get((name, env_id, seed)) for seed in self.settings.seeds]
        found = [row for row in rows if row is not None]
        total = len(self._given) * len(self.settings.env_ids) * len(self.settings.seeds)
        wanted = set(self.settings.seeds)
        done = sum(key[0] in self._given and key[2] in wanted for key in self._results)
        valid = [row for row in found if row.valid]
        self._say(Tick(name, env_id, done, total, sum(row.success for row in valid), len(valid)))

    def _film(self, name: str, policy: Actor, env_id: str) -> None:
        """Render some episodes again; nothing that goes wrong here touches the results."""
        from gencontrol.robotics.evaluation.videos import film

        assert self.folder is not None  # checked before anything ran
        results = [self._results[name, env_id, seed] for seed in self.settings.seeds]
        with asked_in(policy, self.settings.rows_at_once) as together:
            made = film(policy, self.settings, env_id, results, self.folder.path, name, together=together)
        self._videos[name].update(made.paths)
        self._notes[name].extend(made.notes)


def load(given: Actor | str) -> Actor | str:
    """Return the policy behind a path; a policy, and the names that need an environment first, as they are."""
    if not isinstance(given, str) or given in NAMED:
        return given
    from gencontrol.robotics.policies.loading import load_policy

    loaded: Actor = load_policy(given)
    return loaded


def bound(policy: Actor | str, spec: EnvSpec) -> Actor:
    """Return a policy that is ready for an environment."""
    if policy == "random" or policy == "zero":
        return Baseline("random" if policy == "random" else "zero", spec)
    if isinstance(policy, str):
        from gencontrol.robotics.demos.experts import Flaws, expert_for

        return expert_for(spec.env_id, Flaws(0.0), spec.kwargs)
    return policy


def check_fit(name: str, policy: Actor, spec: EnvSpec) -> None:
    """Refuse a policy that cannot act in an environment.

    Raises:
        UsageError: action sizes or observations differ; the message names them.
    """
    if not isinstance(policy, ChunkedPolicy):
        return  # it declares nothing; its first action is checked
    if policy.spec.action_dim != spec.action_dim:
        raise UsageError(
            f"'{name}' gives actions of {policy.spec.action_dim} numbers, {spec.env_id} takes {spec.action_dim}; "
            "evaluate it in the environment that it was trained for."
        )
    for key, shape in policy.spec.observations.items():
        if key not in spec.observations:
            raise UsageError(
                f"'{name}' reads the observation '{key}', which {spec.env_id} does not give; it gives "
                f"{', '.join(spec.observations)}."
            )
        if tuple(shape) != tuple(spec.observations[key]):
            raise UsageError(
                f"'{name}' reads '{key}' of shape {tuple(shape)}, {spec.env_id} gives {tuple(spec.observations[key])}."
            )


@contextmanager
def asked_in(policy: Actor, rows_at_once: int) -> Iterator[bool]:
    """Have a policy asked in batches of this size inside the block; yields whether all rows go in one call.

    One row at a time is also asked for alone, so that the measured latency is that of one row.
    """
    if not isinstance(policy, ChunkedPolicy):
        yield rows_at_once == 0  # what a stranger's code does with a batch is not known: row by row
        return
    before = policy.rows_at_once
    policy.rows_at_once = rows_at_once or None
    try:
        yield rows_at_once != 1
    finally:
        policy.rows_at_once = before


def _facts(policy: Actor | str) -> dict[str, Any]:
    """What the report says about a policy beside its name."""
    if not isinstance(policy, ChunkedPolicy):
        return {"class": policy if isinstance(policy, str) else type(policy).__name__}
    spec = policy.spec
    found: dict[str, Any] = {"class": type(policy).__name__, "horizon": spec.horizon, "n_obs": spec.n_obs}
    found["executed_steps"] = spec.n_action
    if isinstance(policy, DenoisingPolicy):
        found["inference_steps"] = policy.sampler.steps
    return found


if __name__ == "__main__":  # the same as `gencontrol evaluate`
    sys.argv = ["gencontrol", "evaluate", *sys.argv[1:]]
    runpy.run_module("gencontrol", run_name="__main__")
