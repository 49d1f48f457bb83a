"""docs/methods/dts.md#e-dts-1: exactness on a discrete chain, where values, normaliser and tilted law are matrix
products (docs/methods/dts.md#experiments).

Four states, four steps, kernels drawn by NumPy's default_rng(0) from a flat Dirichlet law, rewards (0, 1, 2.5, -1),
λ = 1; levels at every step, one leaf per round, so this is the paper's sequential algorithm.  Trees of a forest are the
independent repetitions.  No setting was chosen by looking at results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gencontrol.bench.base import Check, table
from gencontrol.process import GaussianProcess, Linear
from gencontrol.process.gaussian import Time
from gencontrol.process.masked import uniform
from gencontrol.sampling.masked_steps import inverse_cdf
from gencontrol.sampling.state import Generators, State, Step
from gencontrol.sampling.steps import GaussianStep
from gencontrol.sampling.tree.nodes import Floats
from gencontrol.sampling.tree.rules import Widening
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.stats import Estimate, student_t
from gencontrol.types import Cond

REWARDS = (0.0, 1.0, 2.5, -1.0)


class ChainStart(GaussianProcess):
    """The process of a `MarkovChain`: where paths start.  The schedule only gives the time grid its meaning."""

    def __init__(self, start: Float[Tensor, " s"]) -> None:
        super().__init__(Linear())
        self.start = start

    def prior(
        self,
        shape: Sequence[int],
        generator: Generators,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.int64,
    ) -> Int64[Tensor, "b 1"]:
        """Draw the first states."""
        return inverse_cdf(self.start.log().expand(*shape, -1), uniform(shape, generator, device))


class MarkovChain(nn.Module):
    """A Markov chain over a few states as a Model: called at t it returns the law [b s] of the next state.

    Args:
        start: probabilities of the first state, [s].
        kernels: [steps s s], the first is used at t = 1; rows sum to one.
    """

    start: Tensor
    kernels: Tensor

    def __init__(self, start: Float[Tensor, " s"], kernels: Float[Tensor, "t s s"]) -> None:
        super().__init__()
        self.register_buffer("start", start.double())
        self.register_buffer("kernels", kernels.double())
        self.process = ChainStart(self.start)

    @classmethod
    def random(cls, states: int = 4, steps: int = 4, seed: int = 0) -> MarkovChain:
        """Draw start and kernels from the flat Dirichlet law."""
        draw = np.random.default_rng(seed)
        kernels = torch.from_numpy(draw.dirichlet(np.ones(states), size=(steps, states)))
        return cls(torch.from_numpy(draw.dirichlet(np.ones(states))), kernels)

    def forward(self, xt: Int64[Tensor, "b 1"], t: float, cond: Cond = None) -> Float[Tensor, "b s"]:
        """Return the law of the next state."""
        return self.kernels[round((1.0 - t) * len(self.kernels)), xt[:, 0]]

    def law(self) -> Float[Tensor, " s"]:
        """Exact law of the last state."""
        law = self.start
        for kernel in self.kernels:
            law = law @ kernel
        return law

    def tilted(self, rewards: Sequence[float]) -> tuple[Float[Tensor, " s"], float]:
        """Exact law ∝ p(x)·exp(r(x)) of the last state, and its normaliser Z."""
        weighted = self.law() * torch.tensor(rewards, dtype=torch.float64).exp()
        return weighted / weighted.sum(), float(weighted.sum())


class Draw(GaussianStep):
    """Draws the next state; the last step draws too, unlike that of a Gaussian sampler."""

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def stochastic_at(self, t_next: float) -> bool:
        """True at every step."""
        return True

    def draw(self, x: Tensor, generator: Generators) -> Tensor:
        """Uniform numbers [b 1]."""
        return uniform(tuple(x.shape), generator, x.device)

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the next states."""
        if noise is None:
            raise ValueError("a chain draws its states: give noise (step.draw(x, generator))")
        return State(inverse_cdf(model(state.x, t).log()[:, None], noise))


@dataclass(frozen=True)
class FixedBranching(Widening):
    """Every node gets `constant` children and no more, whatever its visits: the classical nested estimate."""

    def room(self, drawn: Any, visits: Any) -> Any:
        """Whether a node has fewer."""
        return drawn < self.constant


def grow_chain(
    chain: MarkovChain, trees: int, rounds: int, select: str, widening: str | tuple[float, float] | Widening, seed: int
) -> DiffusionTree:
    """Grow independent trees by one rollout a round each."""
    step: Step = Draw()
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    tree = DiffusionTree(
        chain,
        lambda x: rewards[x[:, 0]],
        (trees, 1),
        steps=len(chain.kernels),
        branch="all",
        select=select,
        widening=widening,
        leaf_batch=1,
        generator=seed,
        step=step,
        reward_batch=trees,
    )
    for _ in range(rounds):
        tree.grow(np.ones(trees, np.int64), None)
    return tree


def fill_chain(chain: MarkovChain, trees: int, children: int, seed: int) -> DiffusionTree:
    """Grow trees of `children` children per node until they are full."""
    tree = grow_chain(chain, trees, 0, "uniform", FixedBranching(children, 1.0), seed)
    leaves = trees * children ** len(chain.kernels)
    while len(tree.nodes.at_level(tree.config.last)) < leaves:
        tree.grow(np.ones(trees, np.int64), None)
    return tree


@dataclass(frozen=True)
class Exactness:
    """What trees of one kind say: estimates of Z over the true Z, and the averaged law's distance to the true one.

    Args:
        tree, weighted: exp(λ·v̂(root))/Z and the importance-weighted estimate, mean over trees with its interval.
        standard_errors: distance of both means from 1 in standard errors.
        tree_tv, weighted_tv: total variation of the mean law over trees (read-out, weighted rollouts).
    """

    tree: Estimate
    weighted: Estimate
    standard_errors: tuple[float, float]
    tree_tv: float
    weighted_tv: float


def exactness(tree: DiffusionTree, chain: MarkovChain) -> Exactness:
    """Compare a forest with the exact answer."""
    target, z = chain.tilted(REWARDS)
    values = np.exp(tree.nodes["value"][: tree.roots]) / z
    log_w = [tree.rollout_weights(root) for root in range(tree.roots)]
    weighted = np.array([np.exp(w).mean() for w in log_w]) / z
    laws, weighted_laws = np.zeros(len(REWARDS)), np.zeros(len(REWARDS))
    owner = tree.nodes.root_of(tree.rollouts["leaf"].astype(np.int64))
    for root in range(tree.roots):
        leaves, law = tree.leaf_law(root)
        laws += _histogram(tree, leaves, law)
        w = np.exp(log_w[root])
        weighted_laws += _histogram(tree, tree.rollouts["leaf"][owner == root], w / w.sum())

    def distance(law: Floats) -> float:
        return float(np.abs(law / tree.roots - target.numpy()).sum() / 2)

    errors = tuple((x.mean() - 1) / (x.std(ddof=1) / np.sqrt(len(x))) for x in (values, weighted))
    return Exactness(
        student_t(values.tolist()),
        student_t(weighted.tolist()),
        (float(errors[0]), float(errors[1])),
        distance(laws),
        distance(weighted_laws),
    )


def _histogram(tree: DiffusionTree, leaves: Any, weights: Floats) -> Floats:
    """Weight on each of the states."""
    x = tree.pools[-1].take(tree.nodes["row"][leaves], tree.chain.device)[:, 0].numpy()
    return np.bincount(x, weights, len(REWARDS)).astype(np.float64)


def run(*, trees: int, rounds: Sequence[int], full: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all kinds of trees; returns rows, checks, curves and the printed table.

    Args:
        trees: independent trees of every kind at the first budget; longer ones are fewer, in proportion, but ≥ 48.
        rounds: rollouts per tree; importance weights are judged at the last.
        full: trees with fixed branching.
    """
    chain = MarkovChain.random()
    rows: dict[str, Exactness] = {"fixed branching, 2 children": exactness(fill_chain(chain, full, 2, seed=1), chain)}
    for widening in ("paper", "small"):
        for select in ("uniform", "boltzmann"):
            tree = grow_chain(chain, trees, rounds[0], select, widening, seed=0)
            rows[f"{select}, {widening}, M = {rounds[0]}"] = exactness(tree, chain)
    for m in rounds[1:]:
        tree = grow_chain(chain, max(min(48, trees), trees * rounds[0] // m), m, "boltzmann", "paper", seed=0)
        rows[f"boltzmann, paper, M = {m}"] = exactness(tree, chain)
        say(f"chain M = {m}: {rows[f'boltzmann, paper, M = {m}']}")
    printed = table(
        f"E-DTS-1. Discrete chain: estimates of Z over the true one (mean ± half the 95 % t interval over trees), and "
        f"total variation of the mean leaf law ({trees} trees; {full} with fixed branching)",
        ("selection, widening, rollouts", "tree Z", "weighted Z", "tree TV", "weighted TV"),
        [[name, row.tree, row.weighted, row.tree_tv, row.weighted_tv] for name, row in rows.items()],
    )
    curves = {
        name: {m: 1 - getattr(rows[f"boltzmann, paper, M = {m}"], key).value for m in rounds}
        for name, key in (("tree (Boltzmann)", "tree"), ("importance-weighted", "weighted"))
    }
    return {
        "rows": {name: vars(row) for name, row in rows.items()},
        "checks": _checks(rows, rounds),
        "table": printed,
        "curves": {"1 - mean estimate of Z / Z": ("rollouts per tree", curves)},
    }


def _checks(rows: dict[str, Exactness], rounds: Sequence[int]) -> list[Check]:
    """The passes of docs/methods/dts.md#e-dts-1."""

    def within(claim: str, estimate: Estimate, errors: float) -> Check:
        return Check(claim, f"{estimate.value:.4f}, {errors:+.1f} s.e.", abs(errors) <= 3)

    fixed, longest = rows["fixed branching, 2 children"], rows[f"boltzmann, paper, M = {rounds[-1]}"]
    checks = [within("fixed branching: mean exp(λ v_root)/Z within 3 s.e. of 1", fixed.tree, fixed.standard_errors[0])]
    for widening in ("paper", "small"):
        row = rows[f"uniform, {widening}, M = {rounds[0]}"]
        claim = f"uniform selection ({widening} widening): mean exp(λ v_root)/Z within 3 s.e. of 1"
        checks.append(within(claim, row.tree, row.standard_errors[0]))
    checks.append(
        within(
            f"Boltzmann selection, importance-weighted Z/Z at M = {rounds[-1]} within 3 s.e. of 1",
            longest.weighted,
            longest.standard_errors[1],
        )
    )
    tv = longest.weighted_tv
    checks.append(
        Check(f"importance-weighted leaf law at M = {rounds[-1]}: TV ≤ 0.01", f"{tv:.4f}", tv <= 0.01),
    )
    bias = ", ".join(
        f"M = {m}: {rows[f'boltzmann, paper, M = {m}'].tree.value:.3f} "
        f"(TV {rows[f'boltzmann, paper, M = {m}'].tree_tv:.3f})"
        for m in rounds
    )
    biased = all(rows[f"boltzmann, paper, M = {m}"].tree.high < 1 for m in rounds)
    claim = "plain Boltzmann selection biases exp(λ v_root)/Z below 1 (docs/methods/dts.md#p1)"
    checks.append(Check(claim, bias, biased))
    return checks
