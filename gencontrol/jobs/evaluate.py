"""`gencontrol evaluate`: success rates of policies with intervals, paired comparison, videos and a report page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gencontrol.errors import UsageError
from gencontrol.jobs.setup.environment import choose_device, prepare

if TYPE_CHECKING:
    from gencontrol.robotics.evaluate import EvaluationReport, Settings, Tick


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    policies: tuple[str, ...]
    envs: tuple[str, ...]
    episodes: int
    seed_start: int
    num_envs: int
    paired: bool
    output: str
    env_kwargs: tuple[str, ...]
    time_limit: int | None
    success: str
    success_at: str | None
    isolation: str
    step_timeout: float
    rows_at_once: int
    videos: int
    device: str
    threads: int


def command(request: Request) -> None:
    """Run what is missing in the output folder, print the rates, write report.html.

    Raises:
        UsageError: policy and environment do not fit, or the folder holds another evaluation.
        Preempted: a signal; finished episodes are kept and the same command goes on.
    """
    prepare(threads=request.threads)
    if request.paired and len(request.policies) < 2:
        raise UsageError("--paired compares policies; give two or more (the first one is the reference).")
    device = choose_device(request.device)
    from gencontrol.robotics.evaluate import evaluate_all, load, named
    from gencontrol.train.signals import SignalGuard
    from gencontrol.train.tracking import Progress

    settings = _settings(request)
    policies = {name: _placed(load(given), device) for name, given in named(request.policies).items()}
    total = len(policies) * len(request.envs) * request.episodes
    progress = Progress(total, visible=True, unit="episode", describe=lambda record: str(record["text"]))
    begun = False

    def say(tick: Tick) -> None:
        nonlocal begun
        if not begun:
            progress.start(tick.done)
            begun = True
        text = f"{tick.policy}: {tick.successes}/{tick.valid} succeeded"
        progress.show(tick.done, {"text": text})

    with SignalGuard("finishing the running step; finished episodes are kept") as signals:
        try:
            reports = evaluate_all(
                policies,
                request.envs,
                range(request.seed_start, request.seed_start + request.episodes),
                settings,
                sources=named(request.policies),
                output=request.output,
                paired=request.paired,
                say=say,
                poll=signals.poll,
            )
        finally:
            progress.close()
    for line in lines(reports):
        print(line)
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        print(f"gencontrol: note: {note}", file=sys.stderr)
    print(f"{request.output}/report.html")


def _settings(request: Request) -> Settings:
    from gencontrol.config import build
    from gencontrol.robotics.envs.options import parse_kwargs
    from gencontrol.robotics.evaluate import Settings

    names = "num_envs time_limit success success_at isolation step_timeout rows_at_once videos".split()
    table = {name: getattr(request, name) for name in names}
    return build(Settings, {**table, "env_kwargs": parse_kwargs(request.env_kwargs)}, "evaluate")


def _placed(policy: Any, device: str) -> Any:
    """Move a policy of ours to the device."""
    from gencontrol.robotics.policies.diffusion import GenerativePolicy

    return policy.to(device) if isinstance(policy, GenerativePolicy) and device != "cpu" else policy


def lines(reports: Sequence[EvaluationReport]) -> list[str]:
    """Return what the command prints: a line per policy and task, and one per comparison."""
    found = []
    for report in reports:
        parts = [(report.policy, report)]
        if len(report.specs) > 1:
            parts += [(f"  {spec.env_id}", report.of(spec.env_id)) for spec in report.specs]
        for name, part in parts:
            low, high = part.interval
            facts = part.summary()
            latency = facts["latency_s"]
            found.append(
                f"{name}: {part.successes} of {len(part.valid)} succeeded ({100 * part.rate:.1f} %, 95 % interval "
                f"{100 * low:.1f} to {100 * high:.1f} %), return {part.returns.value:.3f}, action p50 "
                f"{1e3 * (latency['p50'] or 0):.3g} ms (mostly from the queue), p95 "
                f"{1e3 * (latency['p95'] or 0):.3g} ms"
            )
            found += [f"  invalid: {count} × {reason}" for reason, count in part.invalid.items()]
    for report in reports:
        if (compared := report.compared) is not None:
            pairs = compared.pairs
            change = pairs.difference
            found.append(
                f"{compared.second} − {compared.first}: {100 * change.value:+.1f} points (95 % {100 * change.low:+.1f} "
                f"to {100 * change.high:+.1f}), discordant pairs {pairs.second} : {pairs.first}, McNemar p = "
                f"{pairs.p:.3g}, {pairs.count} pairs"
            )
            found += [f"  left out: {count} ({reason})" for reason, count in compared.dropped.items()]
    return found
