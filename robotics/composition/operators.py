"""EXPERIMENTAL: logical AND and OR of policies by superposition (SuperDiff, arXiv 2412.17762), with Itô log-densities.

GPC compares its convex mix with these; the convex mix was best overall there.  In variance-exploding coordinates
y = x/a with σ = s/a, a step of size Δ = σ² − σ'² is dy = Δ·Σ kᵢsᵢ + noise, exactly the mean of the DDPM posterior, and

    d log qᵢ = ⟨dy, sᵢ⟩ − (Δ/2)·|sᵢ|²

along any simulated path, with sᵢ the score in y (docs/methods/gpc.md#operators with f = 0; the change of coordinates
adds the same number to every parent).  A step from pure noise (a = 0) says nothing about the parents: weights stay,
nothing is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rng import Keyed, randn
from gencontrol.robotics.policies.denoising import ChunkSampler
from gencontrol.sampling.grids import make_grid
from gencontrol.sampling.steps import Ddim
from gencontrol.types import Cond, Prediction

#: AND weights are unbounded; beyond this range they are clipped and counted (docs/methods/gpc.md#operators, ours)
AND_RANGE = (-1.0, 2.0)


@dataclass(frozen=True)
class Superposed:
    """A superposed draw.

    Args:
        x: normalised chunks [b h a].
        weights: [k b m] of every step, in the order of the composition's models.
        log_densities: [k+1 b m] Itô log-density of each model along the path, 0 at its start.
        clipped: share of weights that left AND_RANGE.
    """

    x: Float[Tensor, "b h a"]
    weights: Float[Tensor, "k b m"]
    log_densities: Float[Tensor, "k1 b m"]
    clipped: float


@dataclass(frozen=True)
class StepView:
    """What an operator sees of one step: all in y coordinates, flattened to [b m d] and [b d].

    Args:
        scores: sᵢ of every model.
        noise: the step's noise, σ' /σ·√Δ·ξ.
        span: Δ.
        log_densities: log qᵢ so far [b m].
        weights: the given weights [m].
    """

    scores: Float[Tensor, "b m d"]
    noise: Float[Tensor, "b d"]
    span: float
    log_densities: Float[Tensor, "b m"]
    weights: Float[Tensor, " m"]


class Superposition(ABC):
    """An operator: weights k [b m] (sum 1) from the state of a step.  Sampling is always ancestral (DDPM)."""

    @abstractmethod
    def weigh(self, view: StepView) -> Float[Tensor, "b m"]:
        """Return the weights of one step, sum 1 in every row."""

    def draw(
        self,
        model: Any,
        sampler: ChunkSampler,
        shape: tuple[int, int, int],
        noise: Keyed,
        cond: Cond,
        x_init: Tensor | None = None,
    ) -> Superposed:
        """Sample normalised chunks.

        Args:
            model: a composition (`gencontrol.sampling.compose`) with numbers as weights.
            sampler: its steps, times and clip are used; the step is Ddim(1).
        """
        process: GaussianProcess = model.process
        times = process.times(sampler.steps) if sampler.times is None else sampler.times
        grid = make_grid(process.schedule, None if isinstance(times, (tuple, list)) else sampler.steps, times)
        process.schedule.prepare(grid)
        x = process.prior(shape, noise) if x_init is None else x_init
        given = [float(w) for w in model.weights_at(x, grid[0])]
        weights = torch.tensor([w for w in given if w > 0]).to(x)
        logq = x.new_zeros(len(x), len(weights))
        trace, densities, clipped = [], [logq], 0
        for index, (t, t_next) in enumerate(zip(grid, grid[1:])):
            xi = randn(x.shape, Keyed(noise.keys, noise.counter + index + 1), x.device, x.dtype)
            preds = [pred for pred, _ in model.predictions(x, t, cond, given)]
            x, k, logq, out = self._step(process, preds, x, (t, t_next), xi, logq, weights, sampler.clip)
            trace.append(k)
            densities.append(logq)
            clipped += out
        total = sum(k.numel() for k in trace)
        return Superposed(x, torch.stack(trace), torch.stack(densities), clipped / max(total, 1))

    def _step(
        self,
        process: GaussianProcess,
        preds: list[Pred],
        x: Tensor,
        times: tuple[float, float],
        xi: Tensor,
        logq: Tensor,
        weights: Tensor,
        clip: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """One ancestral step: next state, weights, log-densities there, and how many weights were clipped."""
        here, there = process.at(times[0], x), process.landing(times[1], x)
        w0, w1, std = Ddim(1.0).weights(process, *times, x)
        step_noise = std * xi
        k, clipped = weights.expand(len(x), -1), 0
        informed = here.a > 0
        if informed:
            sigma, sigma_next = here.s / here.a, there.s / there.a
            span = sigma**2 - sigma_next**2
            scores = torch.stack([-pred.eps.flatten(1) / sigma for pred in preds], dim=1)
            view = StepView(scores, step_noise.flatten(1) / there.a, span, logq, weights)
            free = self.weigh(view)
            clipped = int(((free < AND_RANGE[0]) | (free > AND_RANGE[1])).sum())
            bounded = free.clamp(*AND_RANGE)
            k = bounded + (1 - bounded.sum(1, keepdim=True)) / free.shape[1]  # the rows still sum to 1
        shape = (len(x), len(preds), *(1,) * (x.ndim - 1))
        v = (k.view(shape) * torch.stack([pred.v for pred in preds], dim=1)).sum(1)
        pred = Pred(v, x, preds[0].coeffs, Prediction.V)
        if clip is not None:
            pred = pred.replace(pred.x0.clamp(-clip, clip), Prediction.X0)
        after = (pred.x0 if times[1] == 0 else pred.mix(w0, w1)) + step_noise
        if informed:
            dy = (after / there.a - x / here.a).flatten(1)
            logq = logq + torch.einsum("bd,bmd->bm", dy, scores) - 0.5 * span * scores.square().sum(-1)
        return after, k, logq, clipped


@dataclass(frozen=True)
class Or(Superposition):
    """Follow whichever parent finds the path likelier: k = softmax(temperature·log q + log w + bias).

    Args:
        temperature: 0 is the plain mix, ∞ a hard switch.
        bias: one number per parent with weight, or empty.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = field(default=())

    def weigh(self, view: StepView) -> Float[Tensor, "b m"]:
        """Return the softmax."""
        if self.bias and len(self.bias) != len(view.weights):
            raise UsageError(f"OR has {len(self.bias)} biases for {len(view.weights)} parents with weight.")
        logits = self.temperature * view.log_densities + view.weights.log()
        return torch.softmax(logits + torch.tensor(self.bias).to(logits) if self.bias else logits, dim=1)


@dataclass(frozen=True)
class And(Superposition):
    """Follow a path that all parents find equally likely: k makes all d log qᵢ of the step equal.

    m − 1 equations, solved by least squares around the given weights: where parents agree, those remain.
    """

    def weigh(self, view: StepView) -> Float[Tensor, "b m"]:
        """Return the weights; they may lie outside [0, 1]."""
        scores, last = view.scores, view.scores[:, -1]
        gaps = scores[:, :-1] - last[:, None]  # [b m-1 d]
        gram = view.span * gaps @ gaps.mT
        squares = scores.square().sum(-1)
        drift = view.span * last + view.noise
        right = 0.5 * view.span * (squares[:, :-1] - squares[:, -1:]) - torch.einsum("bmd,bd->bm", gaps, drift)
        start = view.weights[:-1].expand(len(scores), -1)
        residual = right - torch.einsum("bij,bj->bi", gram, start)
        # parents that agree to rounding give no direction: the bound is relative to the scores themselves
        floor = (1e-10 * view.span * squares.amax(1)).clamp_min(1e-30)
        # least squares, in the directions whose eigenvalue is above the floor
        values, vectors = torch.linalg.eigh(gram.double())
        inverse = torch.where(values > floor.double()[:, None], 1 / values.clamp_min(1e-300), torch.zeros_like(values))
        solved = torch.einsum("bij,bj,bkj,bk->bi", vectors, inverse, vectors, residual.double())
        head = start + solved.to(start)
        return torch.cat([head, 1 - head.sum(1, keepdim=True)], dim=1)
