"""Particle samplers without resampling of paths or gradients: best-of-n, importance sampling, beam.

Each takes a target and a number of particles; `gencontrol.sampling.particles.run` is the call for users.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.sampling.chain import token_step
from gencontrol.sampling.particles.population import Particles, Target, base_samples, collect, roots_of
from gencontrol.sampling.particles.resampling import normalised


def best_of_n(target: Target, n: int) -> Particles:
    """Draw n base samples; all weight on the best (shared equally by ties).  NFE = n·steps."""
    found, scores = base_samples(target, n)
    values = scores.values.masked_fill(~scores.valid, -math.inf)
    log_weights = torch.where(values == values.max(), 0.0, -math.inf).double()
    return collect(target, found.x, scores, log_weights, int(found.calls.sum()))


def snis(target: Target, n: int) -> Particles:
    """Draw n base samples with weights softmax(r/temperature): self-normalised importance sampling.

    Consistent for any reward, log_z is the log of an unbiased estimate; ess/n is the base model's own effective share,
    which says how hard the target is.  NFE = n·steps.
    """
    found, scores = base_samples(target, n)
    log_weights = (scores.values * target.inverse_temperature).masked_fill(~scores.valid, -math.inf)
    log_z = normalised(log_weights)[1] - math.log(n)
    return collect(target, found.x, scores, log_weights, int(found.calls.sum()), log_z)


def beam(target: Target, n: int, *, children: int = 10) -> Particles:
    """Run n greedy searches: each step draws children and keeps the one of best r(x̂0) (SVDD, arXiv 2408.08252).

    SVDD in its limit of temperature 0, with r(x̂0) as the value: it maximises and samples from no stated law, so weights
    are equal and the temperature does not matter.  Every child's model call counts: NFE = n·(1 + children·(steps - 1)).

    Args:
        children: per survivor and step; 10 in SVDD's code (CODE).

    extras: "children".

    Raises:
        UsageError: children or n below 1, or a step that decodes blocks.
    """
    if n < 1 or children < 1:
        raise UsageError(f"{n} particles with {children} children; give at least 1 of each.")
    token_step(target.chain)
    rows = torch.arange(n)
    parts = [_beam(target, rows[s], children) for s in target.slices(n, children)]
    x = torch.cat([part for part, _ in parts])
    scores = target.scorer(x, roots_of(n))
    equal = torch.zeros(n, dtype=torch.float64)
    return collect(target, x, scores, equal, sum(calls for _, calls in parts), extras={"children": children})


def _beam(target: Target, rows: Int64[Tensor, " b"], children: int) -> tuple[Shaped[Tensor, "b *d"], int]:
    """The survivors of the rows, and the model calls."""
    chain, last = target.chain, target.chain.steps - 1
    x = chain.prior(target.keys(rows))
    pred, calls = chain.predict(x, roots_of(len(rows)), 0), len(rows)
    for index in range(chain.steps):
        if target.poll is not None:
            target.poll()
        # a Gaussian step to clean data draws nothing: its children would be equal
        count = children if chain.step.stochastic_at(chain.grid[index + 1]) else 1
        parents = torch.arange(len(rows)).repeat_interleave(count)
        keys = target.keys(rows[parents], torch.arange(count).repeat(len(rows)))
        x = chain.move(take(pred, parents), index, keys)
        estimates = x
        if index < last:
            pred = chain.predict(x, roots_of(len(x)), index + 1)
            calls += len(x)
            estimates = chain.estimate(pred, keys, index + 1)
        if count > 1:
            # an estimate that cannot be scored is the worst of its group
            scores = target.scorer(estimates, roots_of(len(estimates)))
            values = scores.values.masked_fill(~scores.valid, -math.inf).reshape(-1, count)
            chosen = values.argmax(1) + torch.arange(len(values)) * count
            x = x[chosen.to(x.device)]
            pred = take(pred, chosen) if index < last else pred
    return x, calls


def take(pred: Pred | TokenPred, rows: Int64[Tensor, " m"]) -> Pred | TokenPred:
    """Rows of a prediction that was made at one time for the whole batch."""
    index = rows.to(pred.xt.device)
    if isinstance(pred, TokenPred):
        return TokenPred(pred.logits[index], pred.xt[index])
    return Pred(pred.raw[index], pred.xt[index], pred.coeffs, pred.prediction, pred.sigma_data)
