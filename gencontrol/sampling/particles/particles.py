"""Inference-time peers of tree search: best-of-n, importance sampling, SMC, beam (TDS, DAS, DPS: see `guided`).

All steer samples of one prompt towards p(x)·exp(r(x)/temperature), with arguments as in `sample`:

    particles = smc(model, reward, (64, 4, 64, 64), steps=50, temperature=0.1, generator=0, cond=cond)
    particles.best(1), particles.sample(16), particles.log_z

| function | target | reward used on the way | gradient |
|---|---|---|---|
| best_of_n | the maximum of n base samples | no | no |
| importance_sampling | p·exp(r/τ), the honest baseline while its ess/n is above about 5 % | no | no |
| smc | p·exp(r/τ) | value of the one-step estimate | no |
| tds, das | p·exp(r/τ) | value and gradient of the one-step estimate | yes |
| beam | a greedy maximum (biased) | value of the one-step estimate | no |
| dps | biased; p·exp(r/τ) with importance=True | gradient of the one-step estimate | yes |

Arguments they share:
    model: any Model, Gaussian or masked; controls (cfg …) are part of the base law.
    reward: item reward, or a function of the (decoded) samples that returns one number each; higher is better.
    shape: (number of particles, *shape of one clean state).
    steps, step, times: as in `sample`; the step must be stochastic (None: sde or ancestral), the grid must end at 0.
    temperature: τ > 0, in units of the reward.
    generator: torch.Generator (one seed is drawn from it), an int, or None for torch's global generator.
    cond: condition of batch 1, or None.
    decode: clean states → what the reward takes; differentiable for the gradient samplers.
    context: prompts and metadata for the reward, one entry each.
    batch: rows per model call; None is all.  It changes no result beyond rounding.
    reward_batch: samples per decode and reward call.
    device: where states live; None is the model's.
    autocast: context of the model calls.
    poll: called between sampler steps; may raise to stop.

Errors they share: UsageError for an argument that does not fit (deterministic step, temperature ≤ 0, cond of another
batch than 1 …); RewardError for a reward that breaks its contract or scores nothing.  Samples whose reward is NaN or
raises have weight 0 and are marked in `Particles.valid`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rng import seed_of
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.particles.population import Particles, Search
from gencontrol.sampling.particles.steering import ResampleAt, run_smc
from gencontrol.sampling.particles.unguided import SVDD_CHILDREN, run_beam, run_best_of_n, run_snis
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.types import Cond, RewardContext, map_cond


def best_of_n(
    model: Any,
    reward: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    temperature: float = 1.0,
    step: str | Step | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | int | None = None,
    cond: Cond = None,
    decode: Callable[[Tensor], Any] | None = None,
    context: RewardContext | None = None,
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
) -> Particles:
    """Draw shape[0] base samples and put all weight on the best; arguments in the module's docstring.

    NFE = n·steps.  `temperature` does not matter.
    """
    search = prepare(
        model,
        shape,
        Scorer(reward, decode, context or RewardContext(), reward_batch),
        steps=steps,
        temperature=temperature,
        step=step,
        times=times,
        generator=generator,
        cond=cond,
        batch=batch,
        device=device,
        autocast=autocast,
        poll=poll,
    )
    return run_best_of_n(search, int(shape[0]))


def importance_sampling(
    model: Any,
    reward: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    temperature: float = 1.0,
    step: str | Step | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | int | None = None,
    cond: Cond = None,
    decode: Callable[[Tensor], Any] | None = None,
    context: RewardContext | None = None,
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
) -> Particles:
    """Draw base samples with weights softmax(r/temperature) (SNIS); arguments in the module's docstring.

    Consistent for any reward, log_z is the log of an unbiased estimate; ess/n is the base model's own effective share,
    which says how hard the target is.  NFE = n·steps.
    """
    search = prepare(
        model,
        shape,
        Scorer(reward, decode, context or RewardContext(), reward_batch),
        steps=steps,
        temperature=temperature,
        step=step,
        times=times,
        generator=generator,
        cond=cond,
        batch=batch,
        device=device,
        autocast=autocast,
        poll=poll,
    )
    return run_snis(search, int(shape[0]))


def smc(
    model: Any,
    reward: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    temperature: float = 1.0,
    step: str | Step | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | int | None = None,
    cond: Cond = None,
    decode: Callable[[Tensor], Any] | None = None,
    context: RewardContext | None = None,
    resample_at: ResampleAt = None,
    ess_threshold: float = 0.5,
    potential: str = "diff",
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
) -> Particles:
    """Run sequential Monte Carlo on the base chain: FK steering (arXiv 2501.06848) with weights carried correctly.

    Values are rewards of one-step estimates x̂0, taken from the model calls that are made anyway: NFE = n·steps.
    Resampling is systematic, and the final weights are returned, so that the law is right for every potential; exp of
    log_z is unbiased.  Other arguments in the module's docstring.

    Args:
        resample_at: number of equal segments, "all", or times of the grid; None is five segments (DTS table 2, FOUND).
        ess_threshold: resample where the effective sample size is below this share of n (0: never, 1: always).
        potential: "diff" exp(λΔv), "max" exp(λ·max v), "add" exp(λ·Σv); or "fk-published", which reproduces the public
            code's bias (CODE, dts.md P14): differences, weights forgotten wherever it does not resample, multinomial,
            clamped at 1e10, equal final weights, no log_z.  It is there to compare with, not to use.

    extras: "ess" {grid index: effective sample size}, "resampled" [grid index], "origins" (starting particles with
    descendants).

    Raises:
        UsageError: unknown potential, or a resampling time that is not in the grid.
    """
    search = prepare(
        model,
        shape,
        Scorer(reward, decode, context or RewardContext(), reward_batch),
        steps=steps,
        temperature=temperature,
        step=step,
        times=times,
        generator=generator,
        cond=cond,
        batch=batch,
        device=device,
        autocast=autocast,
        poll=poll,
    )
    return run_smc(search, int(shape[0]), resample_at=resample_at, ess_threshold=ess_threshold, potential=potential)


def beam(
    model: Any,
    reward: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    temperature: float = 1.0,
    step: str | Step | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | int | None = None,
    cond: Cond = None,
    decode: Callable[[Tensor], Any] | None = None,
    context: RewardContext | None = None,
    children: int = SVDD_CHILDREN,
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
) -> Particles:
    """Run shape[0] greedy searches: each step draws children and keeps the one of best r(x̂0) (SVDD, arXiv 2408.08252).

    SVDD in its limit of temperature 0, with r(x̂0) as the value: it maximises and samples from no stated law, so weights
    are equal and `temperature` does not matter.  Every child's model call counts: NFE = n·(1 + children·(steps - 1)).

    Args:
        children: per survivor and step; 10 in SVDD's code (CODE).

    Raises:
        UsageError: children < 1.
    """
    search = prepare(
        model,
        shape,
        Scorer(reward, decode, context or RewardContext(), reward_batch),
        steps=steps,
        temperature=temperature,
        step=step,
        times=times,
        generator=generator,
        cond=cond,
        batch=batch,
        device=device,
        autocast=autocast,
        poll=poll,
    )
    return run_beam(search, int(shape[0]), children=children)


def prepare(
    model: Any,
    shape: Sequence[int],
    scorer: Scorer,
    *,
    steps: int | None,
    temperature: float,
    step: str | Step | None,
    times: str | Sequence[float] | Tensor | None,
    generator: torch.Generator | int | None,
    cond: Cond,
    batch: int | None,
    device: torch.device | str | None,
    autocast: Callable[[], AbstractContextManager[Any]],
    poll: Callable[[], None] | None,
) -> Search:
    """Return the search of a public call.

    Raises:
        UsageError: a shape without particles or data axes, or a condition of another batch than 1.
    """
    if len(shape) < 2 or shape[0] < 1:
        raise UsageError(f"shape is {tuple(shape)}; give (number of particles, *shape of one sample).")
    map_cond(_one_row, cond)
    chain = make_chain(
        model, shape[1:], steps=steps, step=step, times=times, cond=cond, device=device, autocast=autocast
    )
    return Search(chain, scorer, temperature, seed_of(generator), batch, poll)


def _one_row(leaf: Tensor) -> Tensor:
    """The leaf of a condition, checked to belong to one prompt."""
    if leaf.shape[0] != 1:
        raise UsageError(f"cond has batch {leaf.shape[0]}; particles serve one prompt: give a condition of batch 1.")
    return leaf
