"""Results of an evaluation: one row per episode, what follows from them, and the two JSON files.

`eval_info.json` has the keys of LeRobot's (docs/robot-interfaces.md#lerobot-eval, FOUND); report.json holds everything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.robotics.envs.types import EnvSpec
from gencontrol.robotics.evaluation.rollout import Rollout, digest
from gencontrol.stats import Estimate, Interval, Pairs, average, pair, rate, wilson

SCHEMA_VERSION = 2
#: latencies are counted in bins of this ratio, so that episodes of an interrupted evaluation can be added up
_RATIO = math.log(1.02)


@dataclass(frozen=True)
class EpisodeResult:
    """One episode; two results are equal where everything but timing is.

    Args:
        success: by the convention in the report ("any" step or the "end"); False where invalid.
        success_any, success_end: the flag at any step, and at the last one.
        total_reward, max_reward: over the steps until the end, without discount.
        length: steps taken.
        clipped: numbers in actions outside the bounds.
        invalid: why the episode does not count, or None.
        start: digest of the first observation.
        actions: digest of all actions.
        latency: bin → number of actions; see `percentiles`.
    """

    seed: int
    env_id: str
    success: bool
    success_any: bool
    success_end: bool
    total_reward: float
    max_reward: float
    length: int
    terminated: bool
    truncated: bool
    clipped: int
    invalid: str | None
    start: str
    actions: str
    wall_s: float = field(default=0.0, compare=False)
    latency: Mapping[int, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def valid(self) -> bool:
        """Whether the episode counts."""
        return self.invalid is None

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**asdict(self), "latency": {str(key): count for key, count in self.latency.items()}}

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> EpisodeResult:
        """Read what `to_json` wrote."""
        return EpisodeResult(**{**table, "latency": {int(key): n for key, n in table["latency"].items()}})


def result_of(rollout: Rollout, spec: EnvSpec, success_at: str) -> EpisodeResult:
    """Return the row of a rollout.

    Raises:
        UsageError: the environment ended an episode without ever saying whether it succeeded.
    """
    episode, fault = rollout.episode, rollout.fault
    if fault is None and not rollout.reported:
        raise UsageError(
            f"{spec.env_id} never reported {spec.success}; say how success is read: --success terminated, "
            "info:KEY or reward>=NUMBER."
        )
    won, last = (False, False), (False, False)
    if fault is None and episode is not None:
        won = bool(episode.success.any()), bool(episode.success[-1])
        last = bool(episode.terminated[-1]), bool(episode.truncated[-1])
    rewards = episode.rewards.astype("float64") if episode is not None else ()
    return EpisodeResult(
        seed=rollout.seed,
        env_id=spec.env_id,
        success=won[1] if success_at == "end" else won[0],
        success_any=won[0],
        success_end=won[1],
        total_reward=float(sum(rewards)),
        max_reward=float(max(rewards, default=0.0)),
        length=len(episode) if episode is not None else 0,
        terminated=last[0],
        truncated=last[1],
        clipped=rollout.clipped,
        invalid=fault,
        start=rollout.start,
        actions=digest({"": episode.actions}) if episode is not None else "",
        wall_s=round(rollout.wall_s, 3),
        latency=dict(Counter(round(math.log(max(seconds, 1e-9)) / _RATIO) for seconds in rollout.latency_s)),
    )


def percentiles(episodes: Iterable[EpisodeResult], shares: Sequence[float] = (0.5, 0.95)) -> list[float]:
    """Return percentiles of the latency of an action in seconds, to 1 %; NaN without actions."""
    counts: Counter[int] = Counter()
    for episode in episodes:
        counts.update(episode.latency)
    total, found = sum(counts.values()), []
    for share in shares:
        left = share * total
        for key in sorted(counts):
            left -= counts[key]
            if left <= 0:
                found.append(math.exp(key * _RATIO))
                break
        else:
            found.append(math.nan)
    return found


@dataclass(frozen=True)
class EvaluationReport:
    """What came of a policy.

    Args:
        policy: its name.
        episodes: in the order of environments and seeds.
        specs: the environments.
        protocol: settings that the numbers depend on, JSON-able.
        facts: of the policy: horizon, executed steps, inference steps, content hash.
        compared: with another policy on the same seeds, None without one.
        videos: (seed, env_id) → path relative to the output folder.
        notes: what a reader has to know, e.g. why there are no videos.
    """

    policy: str
    episodes: tuple[EpisodeResult, ...]
    specs: tuple[EnvSpec, ...]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    compared: Comparison | None = None
    videos: Mapping[tuple[int, str], str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> tuple[EpisodeResult, ...]:
        """Episodes that count."""
        return tuple(episode for episode in self.episodes if episode.valid)

    @property
    def successes(self) -> int:
        """Number of successful valid episodes."""
        return sum(episode.success for episode in self.valid)

    @property
    def estimate(self) -> Estimate:
        """Success rate of the valid episodes with its exact interval, in [0, 1]."""
        return rate(self.successes, len(self.valid))

    @property
    def rate(self) -> float:
        """Success rate in [0, 1]; NaN without valid episodes."""
        return self.estimate.value

    @property
    def interval(self) -> Interval:
        """Exact 95 % interval (Clopper–Pearson) of the success rate, in [0, 1]."""
        return Interval(self.estimate.low, self.estimate.high)

    @property
    def invalid(self) -> dict[str, int]:
        """Reason → number of episodes that do not count."""
        reasons = (episode.invalid.split(" (at ")[0] for episode in self.episodes if episode.invalid is not None)
        return dict(Counter(reasons))

    @property
    def returns(self) -> Estimate:
        """Mean return of the valid episodes with the interval of `average`."""
        return average([episode.total_reward for episode in self.valid])

    def of(self, env_id: str) -> EvaluationReport:
        """Return the part of one environment."""
        return EvaluationReport(
            self.policy,
            tuple(episode for episode in self.episodes if episode.env_id == env_id),
            tuple(spec for spec in self.specs if spec.env_id == env_id),
            self.protocol,
            self.facts,
        )

    def summary(self) -> dict[str, Any]:
        """Return the numbers of all episodes."""
        valid, both = self.valid, percentiles(self.episodes)
        actions = sum(episode.length for episode in self.episodes)
        return {
            "n": len(self.episodes),
            "valid": len(valid),
            "successes": self.successes,
            "rate": _number(self.rate),
            "interval95": [_number(end) for end in self.interval],
            "success_any": sum(episode.success_any for episode in valid),
            "success_end": sum(episode.success_end for episode in valid),
            "rate_if_invalid_failed": _number(self.successes / len(self.episodes)) if self.episodes else None,
            "invalid": self.invalid,
            "return": _estimate(self.returns),
            "mean_max_reward": _mean(episode.max_reward for episode in valid),
            "mean_length": _mean(episode.length for episode in valid),
            "clipped_numbers": sum(episode.clipped for episode in self.episodes),
            "actions": actions,
            "latency_s": {"p50": _number(both[0]), "p95": _number(both[1])},
            "wall_s": round(sum(episode.wall_s for episode in self.episodes), 3),
        }

    def to_json(self) -> dict[str, Any]:
        """Return report.json's content for this policy."""
        episodes = []
        for episode in self.episodes:
            row = {key: value for key, value in episode.to_json().items() if key != "latency"}
            video, (middle,) = self.videos.get((episode.seed, episode.env_id)), percentiles([episode], (0.5,))
            episodes.append({**row, "latency_s": _number(middle), "video": video})
        return {
            "policy": {"id": self.policy, **self.facts},
            "overall": self.summary(),
            "per_task": [{"env_id": spec.env_id, **self.of(spec.env_id).summary()} for spec in self.specs],
            "comparison": None if self.compared is None else self.compared.to_json(),
            "notes": list(self.notes),
            "episodes": episodes,
        }

    def eval_info(self) -> dict[str, Any]:
        """Return eval_info.json's content, with LeRobot's keys; invalid episodes are left out and counted beside."""
        tasks, groups = [], {}
        for index, spec in enumerate(self.specs):
            part = self.of(spec.env_id)
            videos = [path for key, path in self.videos.items() if key[1] == spec.env_id]
            metrics = {
                "sum_rewards": [episode.total_reward for episode in part.valid],
                "max_rewards": [episode.max_reward for episode in part.valid],
                "successes": [episode.success for episode in part.valid],
                "video_paths": videos,
            }
            tasks.append({"task_group": spec.env_id, "task_id": index, "metrics": metrics, **_lerobot(part, videos)})
            groups[spec.env_id] = _lerobot(part, videos)
        rows = [
            {
                "episode_ix": index,
                "sum_reward": episode.total_reward,
                "max_reward": episode.max_reward,
                "success": episode.success,
                "seed": episode.seed,
            }
            for index, episode in enumerate(self.valid)
        ]
        overall = _lerobot(self, list(self.videos.values()))
        return {"per_task": tasks, "per_group": groups, "overall": overall, "per_episode": rows}


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same episodes.

    Args:
        first, second: names.
        pairs: outcomes and tests; the difference is second minus first.
        discordant: (seed, env_id, name of the one that succeeded).
        dropped: reason → number of seeds left out, because one side is invalid or began differently.
    """

    first: str
    second: str
    pairs: Pairs
    discordant: tuple[tuple[int, str, str], ...]
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        pairs, change = self.pairs, self.pairs.difference
        if not pairs.count:
            return f"{self.second} − {self.first}: no pair of episodes is left to compare"
        ends = f"95 % {100 * change.low:+.1f} to {100 * change.high:+.1f}" if pairs.count > 1 else "no interval"
        return (
            f"{self.second} − {self.first}: {100 * change.value:+.1f} points ({ends}), discordant pairs "
            f"{pairs.second} : {pairs.first}, McNemar p = {pairs.p:.3g}, {pairs.count} pairs"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        pairs = self.pairs
        return {
            "first": self.first,
            "second": self.second,
            "pairs": pairs.count,
            "both": pairs.both,
            "only_first": pairs.first,
            "only_second": pairs.second,
            "neither": pairs.neither,
            "mcnemar_p": pairs.p,
            "difference": _estimate(pairs.difference),
            "difference_newcombe": {
                "value": _number(pairs.difference.value),
                **{k: _number(v) for k, v in pairs.score._asdict().items()},
            },
            "return_difference": _estimate(pairs.returns),
            "discordant": [list(row) for row in self.discordant],
            "dropped": dict(self.dropped),
        }


def compare(first: EvaluationReport, second: EvaluationReport) -> Comparison:
    """Compare two policies on the episodes that both ran validly and from the same first observation."""
    theirs = {(episode.env_id, episode.seed): episode for episode in second.episodes}
    kept: list[tuple[EpisodeResult, EpisodeResult]] = []
    dropped: Counter[str] = Counter()
    for a in first.episodes:
        b = theirs.get((a.env_id, a.seed))
        if b is None:
            dropped["not run by both"] += 1
        elif not (a.valid and b.valid):
            dropped["invalid"] += 1
        elif a.start != b.start:
            dropped["began differently"] += 1
        else:
            kept.append((a, b))
    pairs = pair(
        [a.success for a, _ in kept],
        [b.success for _, b in kept],
        ([a.total_reward for a, _ in kept], [b.total_reward for _, b in kept]),
    )
    discordant = tuple(
        (a.seed, a.env_id, first.policy if a.success else second.policy) for a, b in kept if a.success != b.success
    )
    return Comparison(first.policy, second.policy, pairs, discordant, dict(dropped))


def _lerobot(report: EvaluationReport, videos: Sequence[str]) -> dict[str, Any]:
    """The aggregate of LeRobot, rates in percent."""
    valid = report.valid
    wall = sum(episode.wall_s for episode in report.episodes) / int(report.protocol.get("num_envs", 1))  # side by side
    return {
        "avg_sum_reward": _mean(episode.total_reward for episode in valid),
        "avg_max_reward": _mean(episode.max_reward for episode in valid),
        "pc_success": _number(100 * report.rate),
        "n_episodes": len(valid),
        "n_success": report.successes,
        "pc_success_ci95": [_number(100 * end) for end in wilson(report.successes, len(valid))],  # as LeRobot has it
        "n_invalid": len(report.episodes) - len(valid),
        "eval_s": wall,
        "eval_ep_s": wall / len(report.episodes) if report.episodes else None,
        "video_paths": list(videos),
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # NaN is no JSON


def _estimate(value: Estimate) -> dict[str, float | None]:
    return {"value": _number(value.value), "low": _number(value.low), "high": _number(value.high)}
