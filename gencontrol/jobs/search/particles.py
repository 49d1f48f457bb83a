"""Particle samplers of a search, prompt by prompt.

A finished prompt is kept, so a stopped search goes on with the next.  Within a prompt nothing is saved: started again,
it draws the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gencontrol.errors import CheckpointError, UsageError
from gencontrol.files import FileLayer, disk_errors
from gencontrol.jobs.search.model import SearchModel
from gencontrol.jobs.search.output import PromptResult, write_results
from gencontrol.jobs.search.settings import SearchConfig, branch_of
from gencontrol.jobs.search.summary import clean
from gencontrol.jobs.search.tree import clean_staging
from gencontrol.rng import stream_seed
from gencontrol.types import RewardContext, index_cond

if TYPE_CHECKING:
    from gencontrol.jobs.search.search import SearchJob
    from gencontrol.sampling.chain import Chain
    from gencontrol.sampling.scoring import Scorer
    from gencontrol.train.signals import SignalGuard

#: samplers whose particles have no weights to draw by: the best are taken
_MAXIMISE = ("best-of-n", "beam", "dps")
_FORMAT = "gencontrol-particles-1"


@dataclass(frozen=True)
class _Found:
    """Particles of one prompt as they are kept in a file."""

    samples: Tensor
    rewards: Tensor
    log_weights: Tensor
    base: Tensor
    base_reward: float | None
    facts: Mapping[str, Any]


def run(job: SearchJob, model: SearchModel, reward: Any) -> None:
    """Run the sampler for every prompt and write the results.

    Raises:
        Preempted: a signal came; finished prompts are kept.
        UsageError, CheckpointError: kept particles are of another model, or damaged.
        RewardError, DiskError: as the sampler and the disk have it.
    """
    from gencontrol.sampling.tree.store import fingerprint
    from gencontrol.train.run_folder import MetricsFile
    from gencontrol.train.signals import SignalGuard
    from gencontrol.train.tracking import Progress

    path = job.folder.path
    clean_staging(path)
    metrics = MetricsFile(path / "metrics.jsonl", FileLayer())
    metrics.rewind(0)
    progress = Progress(len(job.prompts), visible=True, unit="prompt", describe=_headline)
    mark = fingerprint(model.problem.model)
    found: list[_Found] = []
    reasons: dict[str, int] = {}
    progress.start(0)
    with SignalGuard() as guard:
        try:
            for index in range(len(job.prompts)):
                guard.poll()
                file = path / f"particles_{index:03d}.safetensors"
                found.append(_read(file, mark) if file.exists() else _search(job, model, reward, index, guard))
                if not file.exists():
                    _write(file, found[-1], mark)
                _merge(reasons, found[-1].facts["reasons"])
                metrics.append(row := _row(found))
                progress.show(index + 1, row)
        finally:
            progress.close()
            metrics.sync()
    seconds = sum(item.facts["seconds"] for item in found)
    results = [_result(job, prompt, item, seconds) for prompt, item in zip(job.prompts, found, strict=True)]
    write_results(job, model, results, reasons)


def _search(job: SearchJob, model: SearchModel, reward: Any, index: int, guard: SignalGuard) -> _Found:
    """Run the sampler for one prompt; the base sample beside it costs one more path, which is not counted."""
    from gencontrol.sampling.chain import make_chain
    from gencontrol.sampling.particles import Target, spend

    config, begin = job.search, time.monotonic()
    problem = model.problem
    chain = make_chain(
        problem.model,
        problem.item_shape,
        steps=problem.steps,
        times=problem.times,
        cond=index_cond(problem.cond, slice(index, index + 1)),
        autocast=model.autocast,
    )
    scorer = _scorer(model, reward, index)
    seed = stream_seed(config.seed, "search", index)
    target = Target(chain, scorer, config.temperature, seed, config.leaf_batch, guard.poll)
    found = spend(config.sampler, target, config.nfe, **_options(config, problem.steps))
    base, base_reward = _base(job, model, reward, index, chain)
    facts = {
        "nfe": found.nfe,
        "reward_calls": found.reward_calls,
        "excluded": scorer.excluded,
        "log_z": clean(found.log_z),
        "ess": found.ess,
        "reasons": dict(scorer.reasons),
        "seconds": time.monotonic() - begin,
    }
    return _Found(found.samples.cpu(), found.rewards, found.log_weights, base.cpu(), base_reward, facts)


def _scorer(model: SearchModel, reward: Any, index: int) -> Scorer:
    from gencontrol.sampling.scoring import Scorer

    problem = model.problem
    context = RewardContext(prompts=[problem.prompts[index]], sampling_rate=problem.sampling_rate)
    return Scorer(reward, problem.decode, context)


def _options(config: SearchConfig, steps: int) -> dict[str, Any]:
    """The options that the sampler has."""
    from gencontrol.sampling.particles import options_of

    known = options_of(config.sampler)
    wanted = {
        "resample_at": branch_of(config, steps),
        "max_norm": config.max_grad_norm or None,
        "children": config.children,
    }
    return {name: value for name, value in wanted.items() if name in known}


def _base(job: SearchJob, model: SearchModel, reward: Any, index: int, chain: Chain) -> tuple[Tensor, float | None]:
    """One sample of the model alone, and its reward."""
    from gencontrol.sampling.particles.population import Target, base_samples

    seed = stream_seed(job.search.seed, "search", index)
    target = Target(chain, _scorer(model, reward, index), job.search.temperature, seed)
    walk, scores = base_samples(target, 1)
    return walk.x, clean(float(scores.values[0]))


def _write(file: Path, found: _Found, mark: str) -> None:
    from safetensors.torch import save

    plain = {"format": _FORMAT, "model": mark, "base_reward": found.base_reward, **found.facts}
    tensors = {
        "samples": found.samples.contiguous(),
        "rewards": found.rewards,
        "log_weights": found.log_weights,
        "base": found.base.contiguous(),
    }
    with disk_errors("the particles", file.parent):
        FileLayer().replace_file(file, save(tensors, metadata={"particles": json.dumps(plain)}))


def _read(file: Path, mark: str) -> _Found:
    """Read the particles of a finished prompt.

    Raises:
        CheckpointError: the file is damaged.
        UsageError: they are of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            plain = json.loads((opened.metadata() or {})["particles"])
            parts = {name: opened.get_tensor(name) for name in ("samples", "rewards", "log_weights", "base")}
        base_reward, model = plain.pop("base_reward"), plain.pop("model")
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"'{file}' is damaged ({str(error)[:200]}); delete it, and the same command draws its prompt again."
        ) from error
    if model != mark:
        raise UsageError(f"'{file}' holds particles of another model; give the same --model, or another --output.")
    return _Found(**parts, base_reward=base_reward, facts=plain)


def _merge(total: dict[str, int], part: Mapping[str, int]) -> None:
    for reason, count in part.items():
        total[reason] = total.get(reason, 0) + count


def _row(found: list[_Found]) -> dict[str, Any]:
    """The metrics after a prompt."""
    best = [float(item.rewards.nan_to_num(-float("inf")).max()) for item in found]
    return {
        "step": len(found),
        "nfe": sum(item.facts["nfe"] for item in found),
        "reward_calls": sum(item.facts["reward_calls"] for item in found),
        "reward/best": sum(best) / len(best),
        "log_z": found[-1].facts["log_z"],
        "ess": found[-1].facts["ess"],
        "excluded": sum(item.facts["excluded"] for item in found),
        "time/wall": sum(item.facts["seconds"] for item in found),
    }


def _headline(record: Mapping[str, Any]) -> str:
    return f"best {record['reward/best']:.4g}"


def _result(job: SearchJob, prompt: str, found: _Found, seconds: float) -> PromptResult:
    """Choose the samples of a prompt: the best, or distinct draws by weight."""
    valid = torch.isfinite(found.rewards) & torch.isfinite(found.log_weights)
    if job.search.sampler in _MAXIMISE:
        valid = torch.isfinite(found.rewards)
        keys = found.rewards
    else:
        seed = stream_seed(job.search.seed, "search/readout", prompt)
        uniform = torch.rand(len(found.rewards), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        keys = found.log_weights - torch.log(-torch.log(uniform))  # largest Gumbel keys: a draw without replacement
    order = keys.masked_fill(~valid, -float("inf")).argsort(descending=True, stable=True)
    order = order[: min(job.search.count, int(valid.sum()))]
    order = order[found.rewards[order].argsort(descending=True, stable=True)]
    rewards = found.rewards[torch.isfinite(found.rewards)].tolist()
    stats = {"rollouts": len(found.rewards), "leaves": len(rewards), "excluded": found.facts["excluded"]}
    stats |= {"log_z": found.facts["log_z"], "ess": found.facts["ess"], "best": max(rewards, default=None)}
    summary = {
        "stats": stats,
        "warnings": [],
        "reward_calls": found.facts["reward_calls"],
        "base_rewards": [] if found.base_reward is None else [found.base_reward],
        "grown_rewards": rewards,
    }
    return PromptResult(
        prompt,
        found.samples[order],
        found.rewards[order].tolist(),
        found.base,
        found.base_reward,
        found.facts["nfe"],
        seconds,
        summary,
    )
