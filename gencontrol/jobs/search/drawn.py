"""Particles of a search: drawn prompt by prompt, kept as they are finished, and islands kept one by one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol.errors import CheckpointError, UsageError
from gencontrol.files import FileLayer, disk_errors
from gencontrol.jobs.search.config import SearchConfig, branch_of
from gencontrol.jobs.search.results import Found, clean, headline
from gencontrol.sampling.samplers import sampler

if TYPE_CHECKING:
    from torch import Tensor

    from gencontrol.pipelines.search.problem import Problem
    from gencontrol.pipelines.search.tree_search import TreeSearchPipeline
    from gencontrol.sampling.particles import Particles, Target
    from gencontrol.sampling.particles.islands import Island
    from gencontrol.train.signals import SignalGuard

_FORMAT = "gencontrol-particles-1"


@dataclass(frozen=True)
class Kept:
    """Particles of one prompt as a file keeps them: samples, rewards, log_weights and base [1 *d]; and what they cost.

    Args:
        facts: base_reward, budget (what was asked for), nfe, reward_calls, excluded, log_z, ess, reasons, warnings,
            seconds.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def write(self, file: Path, mark: str) -> None:
        """Write the file; mark: fingerprint of the model."""
        from safetensors.torch import save

        plain = json.dumps({"format": _FORMAT, "model": mark, **self.facts})
        tensors = {name: value.cpu().contiguous() for name, value in self.tensors.items()}
        with disk_errors("the particles", file.parent):
            FileLayer().replace_file(file, save(tensors, metadata={"particles": plain}))

    @classmethod
    def read(cls, file: Path, mark: str) -> Kept:
        """Read the particles of a finished prompt.

        Raises:
            CheckpointError: the file is damaged.
            UsageError: they are of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as opened:
                plain = json.loads((opened.metadata() or {})["particles"])
                tensors = {name: opened.get_tensor(name) for name in ("samples", "rewards", "log_weights", "base")}
            model = plain["model"]
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"'{file}' is damaged ({str(error)[:200]}); delete it, and the same command draws its prompt again."
            ) from error
        if model != mark:
            raise UsageError(f"'{file}' holds particles of another model; give the same --model, or another --output.")
        return cls(tensors, plain)

    def found(self, prompt: str, count: int, readout: str, seed: int) -> Found:
        """Return the samples of the prompt: the "best", or "distinct" draws by weight."""
        import torch

        from gencontrol.pipelines.search.tree_search import take
        from gencontrol.sampling.particles import Particles

        facts, samples, rewards = self.facts, self.tensors["samples"], self.tensors["rewards"]
        valid, cost = torch.isfinite(rewards), (facts["nfe"], facts["reward_calls"], math.nan, facts["ess"])
        chosen = take(Particles(samples, rewards, valid, self.tensors["log_weights"], *cost), count, readout, seed)
        scored, base = rewards[valid].tolist(), facts["base_reward"]
        stats = {"rollouts": len(rewards), "leaves": len(scored), "best": max(scored, default=None)}
        summary = {
            "stats": stats | {name: facts[name] for name in ("excluded", "log_z", "ess")},
            "warnings": facts.get("warnings", []),
            "reward_calls": facts["reward_calls"],
            "base_rewards": [] if base is None else [base],
            "grown_rewards": scored,
        }
        return Found(prompt, chosen[0], chosen[1].tolist(), self.tensors["base"], base, facts["nfe"], summary)


_ISLANDS_FORMAT = "gencontrol-islands-1"
_ISLAND_TENSORS = ("x", "rewards", "valid", "tilt", "log_weights", "seen", "places", "origin")


def write_islands(file: Path, mark: str, done: Sequence[Island], counters: Mapping[str, Any], seconds: float) -> None:
    """Write finished islands, atomically; counters: of the scorer, mark: fingerprint of the model."""
    from safetensors.torch import save

    names = [field.name for field in fields(done[0]) if field.name not in _ISLAND_TENSORS]
    plain = [{name: getattr(each, name) for name in names} for each in done]
    facts = {"format": _ISLANDS_FORMAT, "model": mark, "counters": counters, "seconds": seconds, "islands": plain}
    tensors = {
        f"{place}.{name}": getattr(each, name).cpu().contiguous()
        for place, each in enumerate(done)
        for name in _ISLAND_TENSORS
    }
    with disk_errors("the islands", file.parent):
        FileLayer().replace_file(file, save(tensors, metadata={"islands": json.dumps(facts)}))


def read_islands(file: Path, mark: str, target: Target) -> tuple[list[Island], float]:
    """Return the islands of a file, and the seconds they took; the target's scorer counts on.  Without a file: none.

    Raises:
        CheckpointError: the file is damaged.
        UsageError: they are of another model.
    """
    from safetensors import SafetensorError, safe_open

    from gencontrol.sampling.particles.islands import Island

    if not file.exists():
        return [], 0.0
    try:
        with safe_open(str(file), framework="pt") as opened:
            facts = json.loads((opened.metadata() or {})["islands"])
            done = []
            for place, plain in enumerate(facts["islands"]):
                tensors = {name: opened.get_tensor(f"{place}.{name}") for name in _ISLAND_TENSORS}
                tensors["x"] = tensors["x"].to(target.chain.device)
                plain |= {"betas": tuple(plain["betas"]), "trace": {int(k): v for k, v in plain["trace"].items()}}
                done.append(Island(**tensors, **plain))
            model, counters, seconds = facts["model"], facts["counters"], facts["seconds"]
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"'{file}' is damaged ({str(error)[:200]}); delete it, and the same command draws its prompt again."
        ) from error
    if model != mark:
        raise UsageError(f"'{file}' holds islands of another model; give the same --model, or another --output.")
    target.scorer.set_counters(counters)
    return done, seconds


def draw_all(
    path: Path, config: SearchConfig, loaded: TreeSearchPipeline, problem: Problem, prompts: Sequence[str]
) -> tuple[list[Found], dict[str, Any]]:
    """Run the sampler for every prompt; finished prompts and islands are kept, so a stopped search goes on from there.

    Raises:
        Preempted: a signal came; finished prompts and islands are kept.
        UsageError, CheckpointError: kept particles are of another model, or damaged.
        RewardError, DiskError: as the sampler and the disk have it.
    """
    from gencontrol.rng import stream_seed
    from gencontrol.sampling.tree.store import fingerprint
    from gencontrol.train.run_folder import MetricsFile
    from gencontrol.train.signals import SignalGuard
    from gencontrol.train.tracking import Progress

    metrics = MetricsFile(path / "metrics.jsonl", FileLayer())
    metrics.rewind(0)
    bar = Progress(len(prompts), visible=True, unit="prompt", describe=headline)
    mark = fingerprint(problem.model)
    kept: list[Kept] = []
    reasons: dict[str, int] = {}
    bar.start(0)
    with SignalGuard() as guard:
        try:
            for index in range(len(prompts)):
                guard.poll()
                file = path / f"particles_{index:03d}.safetensors"
                mine = Kept.read(file, mark) if file.exists() else None
                if mine is None or (sampler(config.sampler).anytime and mine.facts["budget"] < config.nfe):
                    mine = _drawn(path, config, loaded, problem, index, guard, mark)
                    mine.write(file, mark)
                kept.append(mine)
                facts = [each.facts for each in kept]
                for reason, count in facts[-1]["reasons"].items():
                    reasons[reason] = reasons.get(reason, 0) + count
                row = {
                    "step": len(kept),
                    "nfe": sum(each["nfe"] for each in facts),
                    "reward_calls": sum(each["reward_calls"] for each in facts),
                    "reward/best": sum(float(each.tensors["rewards"].nan_to_num(-math.inf).max()) for each in kept)
                    / len(kept),
                    "log_z": facts[-1]["log_z"],
                    "ess": facts[-1]["ess"],
                    "excluded": sum(each["excluded"] for each in facts),
                    "time/wall": sum(each["seconds"] for each in facts),
                }
                metrics.append(row)
                bar.show(index + 1, row)
        finally:
            bar.close()
            metrics.sync()
    how = "best" if sampler(config.sampler).readout == "best" else "distinct"
    found = [
        each.found(prompt, config.count, how, stream_seed(config.seed, "search/readout", prompt))
        for prompt, each in zip(prompts, kept, strict=True)
    ]
    return found, {"seconds": row["time/wall"], "excluded": reasons}


def _drawn(
    path: Path,
    config: SearchConfig,
    loaded: TreeSearchPipeline,
    problem: Problem,
    index: int,
    guard: SignalGuard,
    mark: str,
) -> Kept:
    """Run the sampler for one prompt; the base sample beside it costs one more path, which is not counted."""
    from gencontrol.rng import stream_seed
    from gencontrol.sampling.particles import options_of, spend
    from gencontrol.sampling.particles.population import base_samples

    begin, seed = time.monotonic(), stream_seed(config.seed, "search", index)
    wanted = {
        "resample_at": branch_of(config, problem.steps),
        "max_norm": config.max_grad_norm or None,
        "children": config.children,
    }
    own = options_of(config.sampler)
    target = loaded.target(problem, index, seed, batch=config.leaf_batch, poll=guard.poll)
    options = {key: value for key, value in wanted.items() if key in own}
    if sampler(config.sampler).anytime:
        found, before = _grown(path / f"islands_{index:03d}.safetensors", mark, target, config.nfe, options)
    else:
        found, before = spend(config.sampler, target, config.nfe, **options), 0.0
    base, scores = base_samples(loaded.target(problem, index, seed), 1)
    facts = {
        "base_reward": clean(float(scores.values[0])),
        "budget": config.nfe,
        "nfe": found.nfe,
        "reward_calls": found.reward_calls,
        "excluded": target.scorer.excluded,
        "log_z": clean(found.log_z),
        "ess": found.ess,
        "reasons": dict(target.scorer.reasons),
        "warnings": list(found.extras.get("warnings", [])),
        "seconds": before + time.monotonic() - begin,
    }
    tensors = {"samples": found.samples, "rewards": found.rewards, "log_weights": found.log_weights, "base": base.x}
    return Kept({name: value.cpu() for name, value in tensors.items()}, facts)


def with_peers(
    config: SearchConfig, loaded: TreeSearchPipeline, problem: Problem, found: Sequence[Found]
) -> list[Found]:
    """Draw best of n for every prompt with the model calls that its search took; `summary["peer"]` has what came of it.

    Raises:
        Preempted: a signal came; the search itself is kept.
        RewardError: as the reward has it.
    """
    from gencontrol.rng import stream_seed
    from gencontrol.sampling.particles import spend
    from gencontrol.train.signals import SignalGuard

    peers = []
    with SignalGuard() as guard:
        for index, each in enumerate(found):
            seed = stream_seed(config.seed, "search/peer", index)
            target = loaded.target(problem, index, seed, batch=config.leaf_batch, poll=guard.poll)
            drawn = spend("best-of-n", target, max(each.nfe, problem.steps))
            best = clean(float(drawn.rewards[drawn.valid].max())) if bool(drawn.valid.any()) else None
            peer = {"count": len(drawn.rewards), "nfe": drawn.nfe, "best": best}
            peers.append(replace(each, summary={**each.summary, "peer": peer}))
    return peers


def _grown(file: Path, mark: str, target: Target, nfe: int, options: Mapping[str, Any]) -> tuple[Particles, float]:
    """Run the islands that the budget still pays for, each kept when finished; and the seconds of earlier ones."""
    from gencontrol.sampling.particles import particles_for_budget
    from gencontrol.sampling.particles.islands import grow, pool

    done, before = read_islands(file, mark, target)
    begin = time.monotonic()
    for island in grow(target, done, particles_for_budget("islands", nfe, target.chain.steps), **options):
        done.append(island)
        write_islands(file, mark, done, target.scorer.counters(), before + time.monotonic() - begin)
    return pool(target, done), before
