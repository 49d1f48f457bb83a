"""Particle samplers without resampling of paths or gradients: best-of-n, importance sampling, beam.

Each takes a Search and a number of particles; `gencontrol.sampling.particles.particles` has the functions for users.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.sampling.chain import token_step
from gencontrol.sampling.particles.population import Particles, Search, base_samples, collect, roots_of
from gencontrol.sampling.particles.resampling import normalised

#: Children per survivor and step in SVDD's public code (CODE).
SVDD_CHILDREN = 10


def run_best_of_n(search: Search, n: int) -> Particles:
    """Draw n base samples; all weight on the best (shared equally by ties)."""
    found, scores = base_samples(search, n)
    values = scores.values.masked_fill(~scores.valid, -math.inf)
    log_weights = torch.where(values == values.max(), 0.0, -math.inf).double()
    return collect(search, found.x, scores, log_weights, int(found.calls.sum()))


def run_snis(search: Search, n: int) -> Particles:
    """Draw n base samples with weights softmax(r/temperature): self-normalised importance sampling."""
    found, scores = base_samples(search, n)
    log_weights = (scores.values * search.inverse_temperature).masked_fill(~scores.valid, -math.inf)
    log_z = normalised(log_weights)[1] - math.log(n)
    return collect(search, found.x, scores, log_weights, int(found.calls.sum()), log_z)


def run_beam(search: Search, n: int, *, children: int = SVDD_CHILDREN) -> Particles:
    """Run n independent greedy searches: every step draws children and keeps the one of best estimated reward.

    extras: "children".

    Raises:
        UsageError: children or n below 1, or a step that decodes blocks.
    """
    if n < 1 or children < 1:
        raise UsageError(f"{n} particles with {children} children; give at least 1 of each.")
    token_step(search.chain)
    rows = torch.arange(n)
    parts = [_beam(search, rows[s], children) for s in search.slices(n, children)]
    x = torch.cat([part for part, _ in parts])
    scores = search.scorer(x, roots_of(n))
    equal = torch.zeros(n, dtype=torch.float64)
    return collect(search, x, scores, equal, sum(calls for _, calls in parts), extras={"children": children})


def beam_calls(steps: int, children: int) -> int:
    """Model calls of one beam: one at the start, then one per child of every step but the last."""
    return 1 + children * (steps - 1)


def _beam(search: Search, rows: Int64[Tensor, " b"], children: int) -> tuple[Shaped[Tensor, "b *d"], int]:
    """The survivors of the rows, and the model calls."""
    chain, last = search.chain, search.chain.steps - 1
    x = chain.prior(search.keys(rows))
    pred, calls = chain.predict(x, roots_of(len(rows)), 0), len(rows)
    for index in range(chain.steps):
        if search.poll is not None:
            search.poll()
        # a Gaussian step to clean data draws nothing: its children would be equal
        count = children if chain.step.stochastic_at(chain.grid[index + 1]) else 1
        parents = torch.arange(len(rows)).repeat_interleave(count)
        keys = search.keys(rows[parents], torch.arange(count).repeat(len(rows)))
        x = chain.move(take(pred, parents), index, keys)
        estimates = x
        if index < last:
            pred = chain.predict(x, roots_of(len(x)), index + 1)
            calls += len(x)
            estimates = chain.estimate(pred, keys, index + 1)
        if count > 1:
            chosen = _best_child(search, estimates, count)
            x = x[chosen.to(x.device)]
            pred = take(pred, chosen) if index < last else pred
    return x, calls


def _best_child(search: Search, estimates: Shaped[Tensor, "c *d"], count: int) -> Int64[Tensor, " b"]:
    """Row of the best of each group of `count` children; an estimate that cannot be scored is the worst."""
    scores = search.scorer(estimates, roots_of(len(estimates)))
    values = scores.values.masked_fill(~scores.valid, -math.inf).reshape(-1, count)
    return values.argmax(1) + torch.arange(len(values)) * count


def take(pred: Pred | TokenPred, rows: Int64[Tensor, " m"]) -> Pred | TokenPred:
    """Rows of a prediction that was made at one time for the whole batch."""
    index = rows.to(pred.xt.device)
    if isinstance(pred, TokenPred):
        return TokenPred(pred.logits[index], pred.xt[index])
    return Pred(pred.raw[index], pred.xt[index], pred.coeffs, pred.prediction, pred.sigma_data)
