"""A base law as a Markov chain over a time grid: what trees and particles walk on, and where they count model calls.

p(x0) is then the law of the chain: prior, then the stochastic transitions of a Step.  Every row carries a key, and the
noise of a transition is a pure function of (key, index of the step), so a row does not depend on its batch.  Each row
belongs to a root (a prompt), whose condition it uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.process.masked import MaskedProcess
from gencontrol.rng import Keyed, randn
from gencontrol.sampling.grids import make_grid
from gencontrol.sampling.loop import make_step, model_device
from gencontrol.sampling.masked_steps import Ancestral, Confidence, MaskedStep, inverse_cdf
from gencontrol.sampling.state import State, Step
from gencontrol.sampling.steps import Sde, StochasticStep
from gencontrol.types import Cond, index_cond, map_cond

#: (x0 estimate [b *d], root of every row [b]) → a differentiable value [b] to climb
Value = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Twist:
    """A proposal that climbs a value: the mean of every transition moves by scale(t)·std²·∇ value(x0 estimate of x_t).

    This is DPS with the reward gradient, as DTS (arXiv 2506.20701, 3.6) writes it for its baselines.  The law of the
    chain changes; the log-ratio log p/q of each transition says by how much.

    Args:
        value: differentiable.
        scale: t → factor ≥ 0 on the gradient (1/temperature gives DPS-RG; DAS multiplies it by its tempering).
        max_norm: gradients longer than this are shortened to it (DTS needed clipping in 2-D; the bound is ours).
    """

    value: Value
    scale: Callable[[float], float]
    max_norm: float | None = None


@dataclass(frozen=True)
class Walk:
    """Where rows arrived: states, Σ log p/q of the transitions (0 without a twist; float64, CPU), calls per row.

    log_prob: of arriving there [b], float64 on the CPU; NaN unless the order in which tokens show themselves is fixed
    by the visible ones, so that one path alone leads to a state.
    """

    x: Shaped[Tensor, "b *d"]
    log_ratio: Float[Tensor, " b"]
    calls: Int64[Tensor, " b"]
    log_prob: Float[Tensor, " b"]


@dataclass(frozen=True)
class Chain:
    """Model, stochastic step and time grid.

    Args:
        model: any Model; controls such as cfg are part of the law that is searched.
        step: stochastic.
        grid: decreasing times; the last is 0.
        item_shape: shape of one state, without the batch axis.
        roots: number of prompts.
        cond: condition with one row per root, or None.
        device: of the states.
        autocast: context of the model calls, e.g. `lambda: torch.autocast("cuda", torch.bfloat16)`.
        twist: a gradient proposal, or None.
    """

    model: Any
    step: Step
    grid: tuple[float, ...]
    item_shape: tuple[int, ...]
    roots: int
    cond: Cond
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    twist: Twist | None = None

    @property
    def steps(self) -> int:
        """Number of steps of a whole path, and so its model calls."""
        return len(self.grid) - 1

    @property
    def masked(self) -> bool:
        """Whether states are tokens."""
        return isinstance(self.model.process, MaskedProcess)

    def prior(self, keys: Int64[Tensor, " b"]) -> Shaped[Tensor, "b *d"]:
        """Draw the states at the first time, one per key."""
        return self.model.process.prior((len(keys), *self.item_shape), Keyed(keys), self.device)

    @torch.no_grad()
    def advance(
        self,
        x: Shaped[Tensor, "b *d"],
        roots: Int64[Tensor, " b"],
        keys: Int64[Tensor, " b"],
        span: tuple[int, int],
        poll: Callable[[], None] | None = None,
    ) -> Walk:
        """Take the steps span[0] ≤ i < span[1] of the grid; one model call per row and step.

        Rows of tokens without a mask left stay as they are and cost nothing (docs/methods/dts.md#tokens, derived).
        """
        log_ratio = torch.zeros(len(x), dtype=torch.float64)
        calls = torch.zeros(len(x), dtype=torch.int64)
        log_prob = torch.full_like(log_ratio, 0.0 if isinstance(self.step, Confidence) else math.nan)
        for index in range(*span):
            if poll is not None:
                poll()
            rows = None  # all of them, without a look: a Gaussian chain copies nothing to the CPU
            if isinstance(self.model.process, MaskedProcess):
                unfinished = self.model.process.masked(x).any(1)
                rows = None if bool(unfinished.all()) else unfinished.nonzero()[:, 0]
                if rows is not None and not len(rows):
                    break
            t, t_next = self.grid[index], self.grid[index + 1]
            chosen = slice(None) if rows is None else rows.cpu()
            before, ratio = x if rows is None else x[rows], None
            if self.twist is not None and self.step.stochastic_at(t_next):
                pred, gradient, _ = self.slope(before, roots[chosen], index)
                after, ratio = self.twisted(pred, gradient, index, keys[chosen])
            else:
                stochastic = self.step.stochastic_at(t_next)
                noise = self.step.draw(before, Keyed(keys[chosen], index + 1)) if stochastic else None
                with self.autocast():
                    state = self.step(self.model, State(before), t, t_next, self.condition(roots[chosen]), noise)
                after = state.x.to(x.dtype)
                if isinstance(self.step, Confidence) and state.log_prob is not None:
                    log_prob[chosen] += state.log_prob.double().cpu()
            x = after if rows is None else x.index_copy(0, rows, after)
            calls[chosen] += 1
            if ratio is not None:
                log_ratio += ratio.double().cpu()
        return Walk(x, log_ratio, calls, log_prob)

    def condition(self, roots: Int64[Tensor, " b"]) -> Cond:
        """The condition rows of these roots."""
        if self.cond is None or self.roots == 1 and len(roots) == 1:
            return self.cond
        return index_cond(self.cond, roots.to(self.device))

    @torch.no_grad()
    def predict(self, x: Shaped[Tensor, "b *d"], roots: Int64[Tensor, " b"], index: int) -> Pred | TokenPred:
        """Call the model once at the grid's time `index`; particles look at it before they move."""
        with self.autocast():
            found: Pred | TokenPred = self.model(x, self.grid[index], self.condition(roots))
        return found

    @torch.no_grad()
    def move(self, pred: Pred | TokenPred, index: int, keys: Int64[Tensor, " b"]) -> Shaped[Tensor, "b *d"]:
        """Take step `index` from a prediction that was already made."""
        t, t_next = self.grid[index], self.grid[index + 1]
        x = pred.xt
        noise = self.step.draw(x, Keyed(keys, index + 1)) if self.step.stochastic_at(t_next) else None
        return self.step(_Known(self.model.process, pred), State(x), t, t_next, None, noise).x.to(x.dtype)

    def estimate(self, pred: Pred | TokenPred, keys: Int64[Tensor, " b"], index: int) -> Shaped[Tensor, "b *d"]:
        """One-step estimate of the clean sample: the posterior mean; masked tokens are drawn from their logits."""
        if isinstance(pred, Pred):
            return pred.x0
        process = self.model.process
        log_probs = pred.replace(process.forbid_mask(pred.logits)).log_probs
        # a counter of its own: the step to come must not reuse these numbers
        draw = Keyed(keys, len(self.grid) + index + 1).uniform(tuple(pred.xt.shape), pred.xt.device)
        return torch.where(process.masked(pred.xt), inverse_cdf(log_probs, draw), pred.xt)

    def slope(
        self, x: Float[Tensor, "b *d"], roots: Int64[Tensor, " b"], index: int
    ) -> tuple[Pred, Float[Tensor, "b *d"], Float[Tensor, " b"]]:
        """Call the model at x_t and return (prediction, gradient of the twist's value in x_t, value); one call, one
        backward pass.  A gradient that is not finite is 0; the value is NaN where it could not be computed.

        Raises:
            UsageError: there is no twist, or the value carries no gradient.
        """
        if self.twist is None:
            raise UsageError("this chain has no twist, so there is no value to differentiate.")
        with torch.enable_grad(), self.autocast():
            leaf = x.detach().requires_grad_()
            pred = self.model(leaf, self.grid[index], self.condition(roots))
            value = self.twist.value(pred.x0, roots)
            if not value.requires_grad:
                raise UsageError("the reward gives no gradient; choose a sampler that needs none (smc, dts, beam).")
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        gradient = torch.nan_to_num(gradient.detach(), 0.0, 0.0, 0.0)
        if self.twist.max_norm is not None:
            norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
            factor = (self.twist.max_norm / norm).clamp(max=1.0)
            gradient = gradient * factor.reshape(-1, *[1] * (x.ndim - 1))
        return pred.replace(pred.raw.detach()), gradient, value.detach()

    @torch.no_grad()
    def twisted(
        self, pred: Pred, gradient: Float[Tensor, "b *d"], index: int, keys: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b *d"], Float[Tensor, " b"]]:
        """Take step `index` with the moved mean; returns x and log p/q [b] of the transition."""
        if self.twist is None or not isinstance(self.step, StochasticStep):
            raise UsageError("a gradient proposal needs a twist and a Gaussian step: sde, or ddim with eta > 0.")
        x, t, t_next = pred.xt.detach(), self.grid[index], self.grid[index + 1]
        w0, w1, std = self.step.weights(self.model.process, t, t_next, x)
        if not self.step.stochastic_at(t_next):
            return pred.x0, x.new_zeros(len(x))
        mean = Pred(pred.raw, x, pred.coeffs, pred.prediction, pred.sigma_data).mix(w0, w1)
        noise = randn(x.shape, Keyed(keys, index + 1), x.device, x.dtype)
        push = self.twist.scale(t) * std * gradient  # in units of the noise
        x_next = mean + std * (push + noise)
        # log N(z + u; 0, 1) − log N(z; 0, 1); the difference of two log-densities would cancel in high dimensions
        ratio = -(push * (noise + 0.5 * push)).flatten(1).double().sum(1)
        return x_next.to(x.dtype), ratio


class _Known:
    """A Model that returns one prediction, so that a Step can start from a call that was already made."""

    def __init__(self, process: GaussianProcess | MaskedProcess, pred: Pred | TokenPred) -> None:
        self.process, self._pred = process, pred

    def __call__(self, xt: Tensor, t: Any, cond: Cond = None) -> Pred | TokenPred:
        """Return the prediction."""
        return self._pred


def make_chain(
    model: Any,
    item_shape: Sequence[int],
    *,
    roots: int = 1,
    steps: int | None = None,
    step: str | Step | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    cond: Cond = None,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    twist: Twist | None = None,
) -> Chain:
    """Return the chain of a model.

    Args:
        step: name or Step; None is sde (marginal-preserving, level 1) or ancestral.
        times: as in `sample`; must end at 0.
        device: where states live; None is the model's.

    Raises:
        UsageError: a deterministic step, a grid that does not end at 0, a twist on tokens, or a shape without axes.
    """
    masked = isinstance(model.process, MaskedProcess)
    chosen = make_step(step if step is not None else (Ancestral() if masked else Sde()), model.process)
    if not chosen.stochastic:
        good = "ancestral, or confidence with temperature > 0" if masked else "sde, or ddim with eta > 0"
        raise UsageError(
            f"{type(chosen).__name__.lower()} is deterministic: all paths from one state are equal, so there is "
            f"nothing to search; choose {good}."
        )
    grid = make_grid(None if masked else model.process.schedule, steps, times)
    if grid[-1] != 0.0:
        raise UsageError(f"the time grid ends at {grid[-1]:g}; rewards need clean samples, so it must end at 0.")
    if not item_shape:
        raise UsageError("the shape has no data axis; give (number of prompts, *shape of one sample).")
    rows = {leaf.shape[0] for leaf in cond_leaves(cond)}
    if rows - {roots}:
        raise UsageError(f"the condition has {max(rows - {roots})} rows; give one per prompt, {roots}.")
    if twist is not None and not isinstance(chosen, StochasticStep):
        raise UsageError("gradient proposals need a Gaussian model with sde or ddim (eta > 0).")
    if not masked:
        model.process.schedule.prepare(grid)
    place = torch.device(device) if device is not None else model_device(model, None)
    return Chain(model, chosen, tuple(grid), tuple(item_shape), roots, cond, place, autocast, twist)


def cond_leaves(cond: Cond) -> list[Tensor]:
    """All tensors of a condition."""
    found: list[Tensor] = []
    map_cond(lambda leaf: found.append(leaf) or leaf, cond)  # type: ignore[func-returns-value]  # append returns None
    return found


def token_step(chain: Chain) -> None:
    """Check that the chain's step makes one model call from the state it is given (particles share that call).

    Raises:
        UsageError: it decodes blocks, which call the model at other times.
    """
    if chain.masked and not isinstance(chain.step, MaskedStep):
        raise UsageError(f"{type(chain.step).__name__.lower()} calls the model several times a step; use ancestral.")


def branch_indices(chain: Chain, branch: int | str | Sequence[float]) -> tuple[int, ...]:
    """Return where in the time grid the levels lie; the last is the clean end.

    Raises:
        UsageError: a time that is not in the grid, or the one before a last step without noise, where siblings would be
            equal; a number of segments outside 1 … steps.
    """
    grid, steps = chain.grid, chain.steps
    equal = None if chain.step.stochastic_at(0.0) else steps - 1
    if branch == "all":
        return tuple(i for i in range(1, steps + 1) if i != equal)
    if isinstance(branch, int):
        if not 1 <= branch <= steps:
            raise UsageError(f"branch is {branch} segments, but the path has {steps} steps; give 1 to {steps}.")
        even = {round(i * steps / branch) for i in range(1, branch + 1)} - {0}
        return tuple(sorted(i for i in even if i != equal))
    if isinstance(branch, str):
        raise UsageError(f"unknown branch '{branch}'; give a number of segments, a list of times, or \"all\".")
    found = {steps}
    for time in branch:
        nearby = min(range(len(grid)), key=lambda i: abs(grid[i] - time))
        if abs(grid[nearby] - time) > 1e-6:
            raise UsageError(
                f"branch time {time:g} is not in the time grid; the nearest are {grid[nearby]:.6g} and "
                f"{grid[nearby + 1 if nearby < steps else nearby - 1]:.6g}."
            )
        if nearby == equal:
            raise UsageError(
                f"branch time {time:g} lies before the last step, which draws nothing: siblings there would be equal. "
                f"Take {grid[nearby - 1]:.6g} or leave it out."
            )
        found.add(nearby)
    return tuple(sorted(found))
