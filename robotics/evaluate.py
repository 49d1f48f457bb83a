"""Success rates of policies that people can trust: seeds that decide everything, intervals, paired comparison.

What an episode gives is a pure function of (policy, environment, seed): the seed names the reset and the noise of the
actions, rows never share an episode's state, and networks are asked row by row (`rows_at_once`), because libraries of
linear algebra round differently in batches of different sizes (MEASURED: also at different places of equal batches).
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gencontrol.config import build
from gencontrol.errors import UsageError
from gencontrol.robotics.demos.experts import Flaws, expert_for
from gencontrol.robotics.envs.make import env_name
from gencontrol.robotics.envs.seeding import unseeded
from gencontrol.robotics.envs.types import EnvSource, EnvSpec
from gencontrol.robotics.envs.vector import Envs
from gencontrol.robotics.evaluation.files import EvaluationFolder, content_of, write_results
from gencontrol.robotics.evaluation.report import (
    Comparison,
    EpisodeResult,
    EvaluationReport,
    compare,
    result_of,
)
from gencontrol.robotics.evaluation.rollout import Actor, Rollouts
from gencontrol.robotics.evaluation.settings import Settings
from gencontrol.robotics.evaluation.videos import film
from gencontrol.robotics.policies.baselines import Baseline
from gencontrol.robotics.policies.chunked import ChunkedPolicy
from gencontrol.robotics.policies.denoising import DenoisingPolicy
from gencontrol.robotics.policies.loading import load_policy

__all__ = ["Comparison", "EpisodeResult", "EvaluationReport", "Settings", "evaluate", "evaluate_all"]

#: an evaluation stops when so many episodes in a row were invalid from the start: the environment does not work
HOPELESS = 10
#: names that are no files
NAMED = ("random", "zero", "expert")


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
    env: EnvSource | Sequence[EnvSource],
    *,
    seeds: Sequence[int],
    paired_with: Actor | str | Path | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> EvaluationReport:
    """Run a policy on seeds and return what came of it.

    Args:
        policy: an object with `reset(rows, seeds)` and `select_action(observation, rows)`, or a path or name for
            `load_policy`; "random", "zero" and "expert" are known too.
        env: see `make_env`; several are reported one by one and pooled.
        seeds: one per episode; they decide initial state and noise of actions.
        paired_with: another policy, run on the same seeds; `report.compared` then has the difference to it.
        output: a folder for report.json and videos; the same call goes on after an interruption, and
            `gencontrol report FOLDER` makes the page.
        options: fields of `Settings`.

    Raises:
        UsageError: policy and environment do not fit (before the first episode), or the folder holds something else.
        EnvironmentMissing: a package is not installed.
    """
    given = [policy] if paired_with is None else [paired_with, policy]
    envs = [env] if isinstance(env, str) or callable(env) else list(env)
    settings = build(Settings, options, "evaluate")
    return evaluate_all(named(given), envs, seeds, settings, output=output, paired=paired_with is not None)[-1]


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
    envs: Sequence[EnvSource],
    seeds: Sequence[int],
    settings: Settings | None = None,
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
    run = _Run(policies, envs, seeds, settings or Settings(), sources or policies, output, say, poll, paired=paired)
    reports = run.reports()
    if paired:
        reports = [reports[0], *(replace(other, compared=compare(reports[0], other)) for other in reports[1:])]
    if run.folder is not None:
        write_results(run.folder, reports)
    return reports


class _Run:
    """One evaluation of several policies in several environments."""

    def __init__(
        self,
        policies: Mapping[str, Actor | str],
        envs: Sequence[EnvSource],
        seeds: Sequence[int],
        settings: Settings,
        sources: Mapping[str, Actor | str],
        output: str | Path | None,
        say: Callable[[Tick], None] | None,
        poll: Callable[[], None] | None,
        *,
        paired: bool,
    ) -> None:
        self.envs, self.seeds = {env_name(env): env for env in envs}, [int(seed) for seed in seeds]
        if not envs or len(self.envs) != len(envs):
            raise UsageError(f"environments {[env_name(env) for env in envs]}: give at least one, none twice.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"{len(self.seeds)} seeds: give at least one, none twice, all at least 0.")
        if settings.videos and output is None:
            raise UsageError("videos are files; give an output folder.")
        self.settings, self._say, self._poll, self._paired = settings, say, poll, paired
        self._policies = {name: load(given) for name, given in policies.items()}
        self._contents = {name: content_of(one) if isinstance(one, str) else None for name, one in sources.items()}
        self._asked = {"env_ids": list(self.envs), "seeds": self.seeds, **asdict(settings)}
        del self._asked["allow_unseeded"]  # changes no episode
        self.folder = None if output is None else EvaluationFolder(output, self._asked, self._contents)
        self._results: dict[tuple[str, str, int], EpisodeResult] = dict(self.folder.done) if self.folder else {}
        self._specs: list[EnvSpec] = []
        self._videos: dict[str, dict[tuple[int, str], str]] = {name: {} for name in policies}
        self._notes: dict[str, list[str]] = {name: [] for name in policies}

    def reports(self) -> list[EvaluationReport]:
        """Run what is missing and return one report per policy."""
        if self._results:
            self._tick(next(iter(self._policies)), next(iter(self.envs)))  # how many were there before
        for env_id, env in self.envs.items():
            self._environment(env_id, env)
        one = self.settings.rows_at_once == 1
        protocol = {
            **self._asked,
            "autoreset": "disabled, masked reset",
            "latency": "of a call with one row" if one else "of a call, other rows with it",
            "success": {spec.env_id: f"{spec.success}, {self._at(spec)}" for spec in self._specs},
            "time_limit": {spec.env_id: f"{spec.time_limit} ({spec.limit_from})" for spec in self._specs},
        }
        return [
            EvaluationReport(
                policy=name,
                episodes=tuple(self._results[name, env_id, seed] for env_id in self.envs for seed in self.seeds),
                specs=tuple(self._specs),
                protocol=protocol,
                facts={"content": self._contents[name], **_facts(policy)},
                videos=self._videos[name],
                notes=tuple(self._notes[name]),
            )
            for name, policy in self._policies.items()
        ]

    def _at(self, spec: EnvSpec) -> str:
        return self.settings.success_at or spec.success_at

    def _environment(self, env_id: str, env: EnvSource) -> None:
        """Run all policies in one environment; first what counts, then, drawing as well, the videos."""
        missing = {
            name: [seed for seed in self.seeds if (name, env_id, seed) not in self._results] for name in self._policies
        }
        rows = min(self.settings.num_envs, max(1, max(map(len, missing.values()))))
        with self.settings.envs(env, rows) as envs:
            self._specs.append(envs.spec)
            ready = {name: bound(policy, envs.spec) for name, policy in self._policies.items()}
            for name, policy in ready.items():
                check_fit(name, policy, envs.spec)
            if any(missing.values()):
                self._check_seeding(envs)
            for name, policy in ready.items():
                self._episodes(name, policy, envs, missing[name])
        if self.settings.videos:
            assert self.folder is not None  # checked before anything ran
            for name, policy in ready.items():
                results = [self._results[name, env_id, seed] for seed in self.seeds]
                with asked_in(policy, self.settings.rows_at_once) as together:
                    made = film(policy, self.settings, env, results, self.folder.path, name, together=together)
                self._videos[name].update(made.paths)
                self._notes[name].extend(made.notes)

    def _check_seeding(self, envs: Envs) -> None:
        """Say where episodes are no function of their seed, and compare nothing there unless that is asked for.

        Raises:
            UsageError: a paired comparison of such episodes.
        """
        fault = unseeded(envs, self.seeds[0])
        if fault is None:
            return
        if self._paired and not self.settings.allow_unseeded:
            raise UsageError(f"{fault}, or compare unpaired; --allow-unseeded pairs them all the same.")
        warnings.warn(f"{fault}; until then intervals hold, pairs and repetitions do not.", UserWarning, stacklevel=2)
        for notes in self._notes.values():
            notes.append(f"{fault}.")

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
        keys = [(policy, one, seed) for policy in self._policies for one in self.envs for seed in self.seeds]
        done = [key for key in keys if key in self._results]
        valid = [self._results[key] for key in done if key[:2] == (name, env_id) and self._results[key].valid]
        self._say(Tick(name, env_id, len(done), len(keys), sum(row.success for row in valid), len(valid)))


def load(given: Actor | str) -> Actor | str:
    """Return the policy behind a path; a policy, and the names that need an environment first, as they are."""
    loaded: Actor | str = load_policy(given) if isinstance(given, str) and given not in NAMED else given
    return loaded


def bound(policy: Actor | str, spec: EnvSpec) -> Actor:
    """Return a policy that is ready for an environment."""
    if policy == "random" or policy == "zero":
        return Baseline("random" if policy == "random" else "zero", spec)
    if isinstance(policy, str):
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
