"""One search of one problem: grow a forest over all prompts together, or run a particle sampler prompt by prompt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.pipelines.search.searchable import Problem
from gencontrol.rng import stream_seed
from gencontrol.sampling.chain import cond_leaves, make_chain
from gencontrol.sampling.loop import model_device
from gencontrol.sampling.particles import Target, spend
from gencontrol.sampling.particles.population import Particles
from gencontrol.sampling.samplers import PARTICLES
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree.readout import Progress
from gencontrol.sampling.tree.rules import Rule, Widening
from gencontrol.sampling.tree.store import fingerprint
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.types import RewardContext, index_cond

#: Most leaves per round and prompt, and the fewest rounds, that a call without `leaf_batch` takes (ours).
LEAF_BATCH, ROUNDS = 8, 8


class TreeKind(NamedTuple):
    """A named tree search: how it selects, backs up, widens and reads out."""

    select: str
    backup: str
    widening: str
    readout: str


#: arXiv 2506.20701.  DTS samples p·exp(r/τ) with the paper's widening; DTS* looks for the best sample, and its widening
#: is ours: the paper's is best-of-n for the first 36 rollouts, more than most budgets pay for.
TREES: Mapping[str, TreeKind] = {
    "dts": TreeKind("boltzmann", "soft", "paper", "sample"),
    "dts-star": TreeKind("uct", "soft", "small", "best"),
}
READOUTS = ("best", "sample")


@dataclass(frozen=True)
class Plan:
    """How to search; None is the sampler's default.

    Args:
        sampler: key of TREES or of `gencontrol.sampling.particles.table.SAMPLERS`.
        nfe: model calls per prompt.
        temperature: τ > 0.
        seed: of everything drawn.
        reward_batch: samples per decode and reward call.
        autocast: dtype of the model calls under torch.autocast; None is none.
        store: device of a tree's states.
        select, backup, widening, branch: of a tree, as in `DiffusionTree`.
        leaf_batch: paths denoised together, per prompt; of a tree also its leaves per round.
        step: of the chain.
        options: of a particle sampler.
    """

    sampler: str
    nfe: int
    temperature: float
    seed: int
    reward_batch: int
    autocast: torch.dtype | None = None
    store: torch.device | str | None = None
    select: str | Rule | None = None
    backup: str | None = None
    widening: str | tuple[float, float] | Widening | None = None
    branch: int | str | Sequence[float] | None = None
    leaf_batch: int | None = None
    step: str | Step | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search found: n states per prompt, prompt by prompt, their rewards, costs, and where they came from."""

    x: Shaped[Tensor, "b *d"]
    rewards: Float[Tensor, " b"]
    nfe: int
    reward_calls: int
    log_z: tuple[float, ...]
    tree: DiffusionTree | None = None
    particles: tuple[Particles, ...] | None = None


def known_sampler(name: str) -> str:
    """Return the name of a sampler, or raise UsageError if there is none of this name."""
    known = (*TREES, *PARTICLES)
    if name not in known:
        raise UsageError(f"unknown sampler '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
    return name


def particle_readout(name: str) -> str:
    """Return how a particle sampler is read out: "sample" if it targets the tilted law, else "best"."""
    return "sample" if name in ("snis", "smc", "tds", "das") else "best"


# ---- trees ------------------------------------------------------------------------------------------------------


def plant(problem: Problem, reward: Any, plan: Plan) -> DiffusionTree:
    """Return an empty forest, one root per prompt."""
    kind = TREES[plan.sampler]
    if plan.options:
        raise UsageError(f"options are for particle samplers; {plan.sampler} takes select, backup, widening, branch.")
    return DiffusionTree(
        problem.model,
        reward,
        (len(problem.prompts), *problem.item_shape),
        steps=problem.steps,
        times=problem.times,
        branch=min(5, problem.steps) if plan.branch is None else plan.branch,
        temperature=plan.temperature,
        select=plan.select or kind.select,
        backup=plan.backup or kind.backup,
        widening=plan.widening or kind.widening,
        leaf_batch=plan.leaf_batch or max(1, min(LEAF_BATCH, plan.nfe // problem.steps // ROUNDS)),
        generator=plan.seed,
        cond=problem.cond,
        step=plan.step,
        decode=problem.decode,
        context=_context(problem),
        reward_batch=plan.reward_batch,
        autocast=_autocast(problem, plan.autocast),
        store=plan.store,
    )


def resume(source: DiffusionTree | str | Path, problem: Problem, reward: Any, plan: Plan) -> DiffusionTree:
    """Return an earlier tree of the same problem, read from its file or as it is; retilted to the plan's temperature.

    Raises:
        UsageError: it belongs to another model, condition, prompt or reward.
    """
    if isinstance(source, DiffusionTree):
        tree = source
        _same_problem(tree, problem, reward)
    else:
        tree = DiffusionTree.load(
            source,
            problem.model,
            reward,
            cond=problem.cond,
            decode=problem.decode,
            context=_context(problem),
            reward_batch=plan.reward_batch,
            autocast=_autocast(problem, plan.autocast),
            store=plan.store,
        )
    if tree.chain.steps != problem.steps or (problem.times is not None and tree.chain.grid != problem.times):
        raise UsageError(
            f"this tree was built with {tree.chain.steps} steps or another scheduler; give num_inference_steps="
            f"{tree.chain.steps} and the scheduler that it had, or build a new tree."
        )
    return tree if tree.config.temperature == plan.temperature else tree.retilt(plan.temperature)


def _same_problem(tree: DiffusionTree, problem: Problem, reward: Any) -> None:
    """Raise UsageError naming what differs between a tree's problem and this one."""
    mine, theirs = ([leaf.cpu() for leaf in cond_leaves(cond)] for cond in (problem.cond, tree.chain.cond))
    equal = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
    found = {
        "size": tree.chain.item_shape == tuple(problem.item_shape),
        "prompt": list(tree.scorer.context.prompts or []) == problem.prompts,
        "negative prompt or guidance": equal,
        "model or guidance": fingerprint(tree.chain.model) == fingerprint(problem.model),
        "reward": tree.scorer.reward.name == reward.name,
    }
    for name, same in found.items():
        if not same:
            raise UsageError(f"this tree was built with another {name}; give the same {name}, or build a new tree.")


def grow(tree: DiffusionTree, nfe: int, after: Callable[[Progress], bool]) -> None:
    """Spend up to `nfe` more model calls per prompt; `after` every round, and stop where it returns True."""
    for progress in tree.build(nfe):
        if after(progress):
            return


def read(tree: DiffusionTree, count: int, readout: str, before: tuple[int, int]) -> Found:
    """Take `count` samples of each prompt: the best leaves, or draws of the tree's law.

    Args:
        before: model and reward calls that the tree had when this search began.

    Raises:
        UsageError: fewer valid leaves than that.
    """
    parts = []
    for root in range(tree.roots):
        if readout == "best":
            leaves = tree.best(count, root=root)
        else:
            leaves = tree.draw(count, root=root, rule="robust")
        if len(leaves.x) < count:
            raise UsageError(
                f"{count} samples were asked for, but the tree has {len(leaves.x)} valid leaves; raise nfe."
            )
        parts.append(leaves)
    log_z = tuple(_log_z(tree.stats(root)) for root in range(tree.roots))
    x, rewards = torch.cat([part.x for part in parts]), torch.cat([part.rewards for part in parts])
    return Found(x, rewards, tree.nfe - before[0], tree.reward_calls - before[1], log_z, tree=tree)


def _log_z(stats: Mapping[str, float]) -> float:
    """The importance-weighted estimate, or where UCT chose the rollouts that of its fresh ones; neither is biased by
    where the search went, as the tree's own is."""
    return stats["log_z_base"] if math.isnan(stats["log_z_iw"]) else stats["log_z_iw"]


# ---- particles --------------------------------------------------------------------------------------------------


def run_sampler(
    problem: Problem, reward: Any, plan: Plan, count: int, readout: str, after: Callable[[Progress], bool]
) -> Found:
    """Run a particle sampler for each prompt and take `count` samples of each: the best, or draws by weight.

    Raises:
        UsageError: an argument that only trees take, or fewer valid samples than asked for.
    """
    trees_only = {"select": plan.select, "backup": plan.backup, "widening": plan.widening, "branch": plan.branch}
    for name, value in trees_only.items():
        if value is not None:
            raise UsageError(f"{name} is for trees ({', '.join(TREES)}), not for '{plan.sampler}'; drop it.")
    populations: list[Particles] = []
    for index in range(len(problem.prompts)):
        populations.append(_population(problem, reward, plan, index))
        if after(_progress(populations)):
            break
    x, rewards = zip(*(_take(found, count, readout, plan.seed) for found in populations), strict=True)
    return Found(
        torch.cat(x),
        torch.cat(rewards),
        sum(found.nfe for found in populations),
        sum(found.reward_calls for found in populations),
        tuple(found.log_z for found in populations),
        particles=tuple(populations),
    )


def _population(problem: Problem, reward: Any, plan: Plan, index: int) -> Particles:
    """The particles of one prompt."""
    chain = make_chain(
        problem.model,
        problem.item_shape,
        steps=problem.steps,
        times=problem.times,
        step=plan.step,
        cond=index_cond(problem.cond, slice(index, index + 1)),
        autocast=_autocast(problem, plan.autocast),
    )
    context = dataclasses.replace(_context(problem), prompts=problem.prompts[index : index + 1])
    scorer = Scorer(reward, problem.decode, context, plan.reward_batch)
    seed = stream_seed(plan.seed, "search/prompt", index)
    batch = plan.leaf_batch or LEAF_BATCH
    return spend(plan.sampler, Target(chain, scorer, plan.temperature, seed, batch), plan.nfe, **plan.options)


def _progress(populations: Sequence[Particles]) -> Progress:
    """What the populations so far have reached."""
    return Progress(
        sum(found.nfe for found in populations),
        sum(found.reward_calls for found in populations),
        tuple(float(found.rewards[found.valid].max()) for found in populations),
        tuple(found.log_z for found in populations),
        tuple(found.ess / len(found) for found in populations),
        len(populations),
    )


def _take(found: Particles, count: int, readout: str, seed: int) -> tuple[Tensor, Tensor]:
    """States and rewards of `count` samples of one population."""
    if readout == "sample":
        draw = torch.multinomial(found.weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    else:
        draw = found.rewards.masked_fill(~found.valid, -torch.inf).argsort(descending=True, stable=True)
        draw = draw[: int(found.valid.sum())][:count]
    if len(draw) < count:
        raise UsageError(f"{count} samples were asked for, but only {len(draw)} particles are valid; raise nfe.")
    return found.samples[draw.to(found.samples.device)], found.rewards[draw].double()


def _context(problem: Problem) -> RewardContext:
    """What the reward is told: prompts and sampling rate."""
    return RewardContext(prompts=problem.prompts, sampling_rate=problem.sampling_rate)


def _autocast(problem: Problem, dtype: torch.dtype | None) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context of the model calls."""
    if dtype is None:
        return nullcontext
    device = model_device(problem.model, None).type
    return lambda: torch.autocast(device, dtype)
