"""`evaluate`: success rates of policies with intervals, paired comparison, videos and a report page."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gencontrol.config import POSITIONAL, Count, Natural, build, dump_toml, options, to_table
from gencontrol.errors import Inconclusive, UsageError
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.settings import Start
from gencontrol.robotics.evaluation.settings import Settings

if TYPE_CHECKING:
    from gencontrol.robotics.envs.types import EnvSource
    from gencontrol.robotics.evaluate import Tick
    from gencontrol.robotics.evaluation.report import EvaluationReport


@options
class EvaluateConfig(Settings):
    """Which policies act in which episodes, and how those are run.

    Args:
        policies: policy folders, package.module:make_policy, expert, random or zero.
        env: an id, or package.module:make_fn; may be repeated.
        episodes: per policy and task.
        seed_start: first seed; the others follow.
        paired: compare the other policies with the first one, seed by seed.
        output: folder; the same command goes on.
        device: of the policies that are loaded.
        threads: CPU threads; 0 leaves it to the library.
    """

    policies: Annotated[tuple[str, ...], POSITIONAL] = ()
    env: tuple[str, ...] = ()
    episodes: Count = 50
    seed_start: Natural = 100_000
    paired: bool = False
    videos: Natural = 4
    output: str = "evaluation"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Natural = 0


@dataclass(frozen=True)
class EvaluateResult:
    """What came of an evaluation; as text, a line per policy and task, and one per comparison.

    Args:
        reports: one per policy, in their order; where paired, `report.compared` is the difference to the first.
        folder: with report.html, report.json, episodes.jsonl and videos/; None where nothing was written.
    """

    reports: tuple[EvaluationReport, ...]
    folder: Path | None = None

    @property
    def undecided(self) -> tuple[str, ...]:
        """What the episodes could not answer, one sentence each."""
        found = [
            f"{report.policy}: none of {len(report.episodes)} episodes is valid, so there is no rate."
            for report in self.reports
            if not report.valid
        ]
        compared = [report.compared for report in self.reports if report.compared is not None]
        return (*found, *(f"{one.second} − {one.first}: {said}" for one in compared if (said := one.pairs.undecided)))

    def __str__(self) -> str:
        found = []
        for report in self.reports:
            parts = [(report.policy, report)]
            if len(report.specs) > 1:
                parts += [(f"  {spec.env_id}", report.of(spec.env_id)) for spec in report.specs]
            for name, part in parts:
                low, high = part.interval
                latency = part.summary()["latency_s"]
                if part.valid:
                    found.append(
                        f"{name}: {part.successes} of {len(part.valid)} succeeded ({100 * part.rate:.1f} %, 95 % "
                        f"interval {100 * low:.1f} to {100 * high:.1f} %), return {part.returns.value:.3f}, action p50 "
                        f"{1e3 * (latency['p50'] or 0):.3g} ms (mostly from the queue), p95 "
                        f"{1e3 * (latency['p95'] or 0):.3g} ms"
                    )
                else:
                    found.append(f"{name}: none of {len(part.episodes)} episodes is valid")
                found += [f"  invalid: {count} × {reason}" for reason, count in part.invalid.items()]
        for compared in (report.compared for report in self.reports if report.compared is not None):
            found.append(str(compared))
            found += [f"  left out: {count} ({reason})" for reason, count in compared.dropped.items()]
        return "\n".join(found)


def evaluate(
    policies: Any, env: EnvSource | Sequence[EnvSource], *, output: str | Path | None = None, **options: Any
) -> EvaluateResult:
    """Measure how often policies succeed; the same call goes on where an earlier one was stopped.

    Args:
        policies: one or several: a policy (anything with reset(rows, seeds) and select_action(observation, rows)), or
            what the command line takes: a folder, package.module:make_policy, "expert", "random", "zero".
        env: one or several: an id, package.module:make_fn, or such a function itself (one that has no importable name
            needs isolation="inline").
        output: folder of the results, report.html among them; None writes nothing.
        options: fields of `EvaluateConfig`, e.g. episodes=200, seed_start=0, paired=True, num_envs=4; videos are made
            where there is an output folder.  A policy object stays on its device.

    Raises:
        UsageError: policy and environment do not fit, or the folder holds another evaluation.
        EnvironmentMissing: a package is not installed.
        Preempted: a signal; finished episodes are kept and the same call goes on.
    """
    given = list(policies) if isinstance(policies, (list, tuple)) else [policies]
    envs: list[Any] = list(env) if isinstance(env, (list, tuple)) else [env]
    table = {**options, **({"videos": 0, **options} if output is None else {"output": str(output)})}
    return _evaluated(build(EvaluateConfig, table, "evaluate"), given, envs, output)


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> None:
    """Evaluate as the options say, print the rates and where report.html is; a dry run prints the options.

    Raises:
        Inconclusive: after all is written and printed: no episode was valid, or no pair is discordant.
    """
    config = build(EvaluateConfig, table["run"], "run")
    if start.dry_run:
        print(dump_toml({"run": to_table(config)}), end="")
        return
    result = _evaluated(config, config.policies, config.env, config.output)
    print(result)
    for note in dict.fromkeys(note for report in result.reports for note in report.notes):
        print(f"gencontrol: note: {note}", file=sys.stderr)
    print(f"{config.output}/report.html")
    if result.undecided:
        raise Inconclusive(" ".join(result.undecided))


def _evaluated(
    config: EvaluateConfig, policies: Sequence[Any], envs: Sequence[EnvSource], output: str | Path | None
) -> EvaluateResult:
    """Run what is missing in the output folder and write the results."""
    prepare(threads=config.threads)
    if not policies or not envs:
        what = "policy (a folder, package.module:make_policy, expert, random or zero)" if envs else "--env"
        raise UsageError(f"there is nothing to evaluate; give at least one {what}.")
    if config.paired and len(policies) < 2:
        raise UsageError("--paired compares policies; give two or more (the first one is the reference).")
    device = choose_device(config.device)
    from gencontrol.reports.evaluation import write_evaluation
    from gencontrol.robotics.evaluate import evaluate_all, load, named
    from gencontrol.robotics.policies.diffusion import GenerativePolicy
    from gencontrol.train.signals import SignalGuard
    from gencontrol.train.tracking import Progress

    sources, ready = named(policies), {}
    for name, source in sources.items():
        policy: Any = load(source)
        movable = isinstance(source, str) and isinstance(policy, GenerativePolicy)
        ready[name] = policy.to(device) if movable and device != "cpu" else policy
    settings = Settings(**{one.name: getattr(config, one.name) for one in dataclasses.fields(Settings)})
    seeds = range(config.seed_start, config.seed_start + config.episodes)
    total = len(ready) * len(envs) * len(seeds)
    progress = Progress(total, visible=True, unit="episode", describe=lambda record: str(record["text"]))
    begun = False

    def say(tick: Tick) -> None:
        nonlocal begun
        if not begun:
            progress.start(tick.done)
            begun = True
        progress.show(tick.done, {"text": f"{tick.policy}: {tick.successes}/{tick.valid} succeeded"})

    with SignalGuard("finishing the running step; finished episodes are kept") as signals:
        try:
            reports = evaluate_all(
                ready,
                envs,
                seeds,
                settings,
                sources=sources,
                output=output,
                paired=config.paired,
                say=say,
                poll=signals.poll,
            )
        finally:
            progress.close()
    if output is not None:
        write_evaluation(output)
    return EvaluateResult(tuple(reports), None if output is None else Path(output))
