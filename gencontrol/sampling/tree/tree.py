"""Diffusion Tree Sampling and Search (DTS, DTS*; arXiv 2506.20701): samples of p(x)·exp(r(x)/temperature), no training.

A rollout walks down the tree by the values backed up so far, expands a node that has room for a child, draws the rest
of a path from the model, scores the clean sample and backs the reward up the path with a soft maximum.  All states that
were paid for stay in the tree, so more model calls improve one estimate (anytime), and reading samples out is free.

K leaves are made per round and denoised together, level by level.  What a rollout draws is a pure function of (seed,
root, its number), so results depend on (seed, K) alone and a loaded tree goes on bit for bit.  Levels are the branch
times; level 0 is a dummy root whose children are fresh draws from the prior, denoised to the first branch time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.rng import seed_of
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree import readout as tree_readout
from gencontrol.sampling.tree import store as tree_file
from gencontrol.sampling.tree.growth import Forest, TreeConfig, branch_indices, reward_twist
from gencontrol.sampling.tree.readout import Leaves, Progress
from gencontrol.sampling.tree.rules import RULES, WIDENINGS, Rule, Widening, named
from gencontrol.types import Cond, RewardContext

#: Rounds in a row that only chose finished leaves; then the build stops (dts.md P7; the number is ours).
MAX_IDLE_ROUNDS = 10_000


class DiffusionTree(Forest):
    """A tree (one per root) over the states of a stochastic sampler.

    Args:
        model: any Model, controls included; Gaussian or masked.
        reward: item reward, or a function of the (decoded) samples that returns one number each.
        shape: (number of prompts, *shape of one state); (n,) is short for (1, n).
        steps: sampler steps of a whole path.
        branch: number of equal segments, or the times in (0, 1] where levels lie (1 makes x_T a level of its own), or
            "all" for every time of the grid.  The paper's: 50 steps, levels at 40, 30, 20, 10: the default 5 segments.
        temperature: τ > 0; smaller follows the reward more.
        select: "boltzmann" (DTS), "uct" (DTS*), "uniform", "tempered", or a rule object.
        backup: "soft" or "max" (the limit τ → 0; the paper's choice for text).
        widening: "paper" (2·N^0.8), "text" (2·N^0.7), "small" (N^0.5), (C, alpha) or a Widening.
        leaf_batch: K, leaves per round and prompt.
        generator: torch.Generator or int; gives the seed of the tree.
        cond: condition with one row per prompt, or None.
        step, times: as in `sample`; the step must be stochastic (None: sde or ancestral).
        decode: clean states → what the reward takes.
        context: prompts and metadata for the reward, one entry per prompt.
        repeats: reward calls averaged per leaf.
        reward_batch: samples per decode and reward call.
        autocast: context of the model calls.
        max_grad_norm: for `guidance`.
        guidance: > 0 moves every transition by guidance·std²·∇r(x0 estimate)/τ (needs a differentiable reward); the
            log-ratio p/q enters backup and selection, so that the target stays the same (dts.md 3.5, derived).
        store: device of the stored states; None is the model's.

    Raises:
        UsageError: a deterministic step, a branch time that is not in the grid or where siblings would be equal,
            temperature ≤ 0, an unknown name, or a count below 1.
    """

    def __init__(
        self,
        model: Any,
        reward: Any,
        shape: Sequence[int],
        *,
        steps: int | None = None,
        branch: int | str | Sequence[float] = 5,
        temperature: float = 1.0,
        select: str | Rule = "boltzmann",
        backup: str = "soft",
        widening: str | tuple[float, float] | Widening = "paper",
        leaf_batch: int = 16,
        generator: torch.Generator | int | None = None,
        cond: Cond = None,
        step: str | Step | None = None,
        times: str | Sequence[float] | Tensor | None = None,
        decode: Callable[[Tensor], Any] | None = None,
        context: RewardContext | None = None,
        repeats: int = 1,
        reward_batch: int = 64,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        guidance: float = 0.0,
        max_grad_norm: float | None = None,
        store: torch.device | str | None = None,
    ) -> None:
        whole = (1, *shape) if len(shape) == 1 else tuple(shape)
        if not math.isfinite(temperature) or temperature <= 0:
            raise UsageError(
                f"temperature is {temperature}; it must be > 0 (for the limit 0 use backup='max', select='uct')."
            )
        if backup not in ("soft", "max"):
            raise UsageError(f"unknown backup '{backup}'.{nearest(backup, ('soft', 'max'))} Known: soft, max.")
        if leaf_batch < 1 or whole[0] < 1 or guidance < 0:
            raise UsageError(
                f"leaf_batch {leaf_batch} and the number of prompts {whole[0]} must be at least 1, guidance "
                f"{guidance} at least 0."
            )
        scorer = Scorer(reward, decode, context or RewardContext(), reward_batch, repeats)
        chain = make_chain(
            model,
            whole[1:],
            roots=whole[0],
            steps=steps,
            step=step,
            times=times,
            cond=cond,
            autocast=autocast,
            twist=reward_twist(scorer, guidance / temperature, max_grad_norm),
        )
        rule = select if not isinstance(select, str) else named(RULES, select, "selection rule")
        if isinstance(widening, str):
            room = named(WIDENINGS, widening, "widening")
        else:
            room = widening if isinstance(widening, Widening) else Widening(*widening)
        levels = branch_indices(chain, branch)
        seed = seed_of(generator)
        config = TreeConfig(temperature, levels, rule, backup == "max", room, leaf_batch, seed, guidance, max_grad_norm)
        super().__init__(chain, scorer, config, torch.device(store) if store is not None else chain.device)

    def build(self, nfe: int, *, poll: Callable[[], None] | None = None) -> Iterator[Progress]:
        """Spend up to `nfe` more model calls per root; yields after every round, and may be left and resumed at will.

        A rollout is started while a whole path still fits.  An exception inside a round (a reward that fails, Ctrl-C
        raised by `poll`) leaves the tree as it was before that round.

        Args:
            nfe: budget of this call, per root.
            poll: called between sampler steps; may raise.

        Raises:
            UsageError: the budget is smaller than one path.
            RewardError: the reward broke its contract, or nothing it scored was valid.
        """
        if nfe < self.chain.steps:
            raise UsageError(
                f"nfe is {nfe}, less than the {self.chain.steps} model calls of one path; give at least that many."
            )
        return self._rounds(nfe, poll)

    def _rounds(self, nfe: int, poll: Callable[[], None] | None) -> Iterator[Progress]:
        """The rounds of `build`."""
        limit = self.counts["nfe"] + nfe
        idle = 0
        while True:
            room = (limit - self.counts["nfe"]) // self.chain.steps
            width = np.minimum(room, self.config.leaf_batch)
            if not (width > 0).any():
                return
            spent = self.nfe
            self.grow(width, poll)
            idle = idle + 1 if self.nfe == spent else 0
            if idle >= MAX_IDLE_ROUNDS:
                warnings.warn(
                    f"the last {idle} rounds chose finished leaves only, so the build stops at {self.nfe} model calls: "
                    "the tree holds all it will find; a wider tree (larger C or alpha) goes on.",
                    stacklevel=2,
                )
                return
            yield self.progress()

    def progress(self) -> Progress:
        """What the tree has reached."""
        return tree_readout.progress(self)

    def sample(
        self,
        n: int,
        generator: torch.Generator | int | None = None,
        *,
        root: int = 0,
        rule: str | None = None,
        replace: bool = True,
    ) -> Shaped[Tensor, "n *d"]:
        """Read out samples without a model call.

        Args:
            generator: of the draws; None is a stream of the tree's seed (the same samples at each call).
            root: which prompt.
            rule: "boltzmann" walks down ∝ exp(λ v̂) (the paper's), "robust" the same with bounds on what rarely
                visited nodes weigh (ours; closer to the target in `bench dts`), "argmax" takes the best child (one
                leaf, repeated); None is "argmax" for a tree built by UCT, else "boltzmann".
            replace: False draws distinct leaves.

        Raises:
            UsageError: the tree holds no valid leaf, or fewer than n without replacement.
        """
        return tree_readout.sample(self, n, generator, root=root, rule=rule, replace=replace).x

    def best(self, k: int = 1, *, root: int = 0) -> Leaves:
        """Return the k leaves with the largest rewards, best first (fewer if there are fewer)."""
        return tree_readout.best(self, k, root=root)

    def stats(self, root: int = 0) -> dict[str, float]:
        """Return what a report needs of one root (`tree_readout.stats`); warns where estimates of log Z disagree."""
        return tree_readout.stats(self, root)

    def retilt(self, temperature: float | None = None, reward: Any = None) -> DiffusionTree:
        """Set a new temperature or score the stored leaves by a new reward, and back up again; no model call.

        The tree itself changes and is returned.  The descents' probabilities stay those of the build.

        Raises:
            UsageError: temperature ≤ 0, or a tree grown with gradient guidance gets another reward (its log-ratios
                belong to the chain and stay valid, but new rollouts would follow the old gradient).
        """
        tree_file.retilt(self, temperature, reward)
        return self

    def merge(self, other: DiffusionTree) -> DiffusionTree:
        """Take over the rollouts of another tree of the same problem and another seed.

        Root children are independent draws, so this is what one larger tree could have drawn (dts.md §9, derived).

        Raises:
            UsageError: model, grid, branch, temperature, prompts or reward differ, or the seeds are equal.
        """
        tree_file.merge(self, other)
        return self

    def save(self, path: str | Path) -> None:
        """Write the tree to one safetensors file, atomically."""
        tree_file.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        reward: Any,
        *,
        cond: Cond = None,
        decode: Callable[[Tensor], Any] | None = None,
        context: RewardContext | None = None,
        reward_batch: int = 64,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        store: torch.device | str | None = None,
    ) -> DiffusionTree:
        """Read a tree; building goes on as if it had never stopped.

        Raises:
            UsageError: not a tree file, or one of another model, condition, prompt or reward (the message says which).
        """
        plain, tensors = tree_file.read(path)
        tree = cls.__new__(cls)
        scorer = Scorer(reward, decode, context or RewardContext(), reward_batch, plain["repeats"])
        tree_file.restore(tree, plain, tensors, model, scorer, cond, autocast, store)
        return tree
