"""Particle samplers that follow the gradient of the reward: TDS, DAS, DPS (and so classifier guidance).

They need a Gaussian model, a stochastic step, and a reward and decoder with gradients.  The arguments that they share
are in the docstring of `gencontrol.sampling.particles.particles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gencontrol.sampling.particles.particles import prepare
from gencontrol.sampling.particles.population import Particles
from gencontrol.sampling.particles.steering import ResampleAt, run_das, run_dps, run_tds
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.types import Cond, RewardContext


def tds(
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
    max_norm: float | None = None,
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
) -> Particles:
    """Run the twisted diffusion sampler (arXiv 2306.17775): SMC whose transitions climb the reward.

    Every transition's mean moves by std²·∇r(x̂0)/temperature and the weight pays it back by log p/q, so the law and
    log_z are right.  NFE = n·steps; each step but the last also costs a backward pass through model, decode and reward
    (extras["gradients"]).  Other arguments in `smc` and `gencontrol.sampling.particles.particles`.

    Args:
        max_norm: gradients longer than this are shortened (still exact).

    Raises:
        UsageError: tokens, or a reward without gradient.
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
    return run_tds(search, int(shape[0]), resample_at=resample_at, ess_threshold=ess_threshold, max_norm=max_norm)


def das(
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
    max_norm: float | None = None,
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
) -> Particles:
    """Run DAS (arXiv 2501.05803): TDS on γ·r, with γ from 0 at noise to 1 at data.

    γ = min(1.008^i - 1, 1) at step i of 100 (CODE), the same curve for other numbers of steps (ours): early estimates,
    which know little, count little.  Resampling is systematic where the public code has ssp.  Arguments as in `tds`.

    Raises:
        UsageError: tokens, or a reward without gradient.
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
    return run_das(search, int(shape[0]), resample_at=resample_at, ess_threshold=ess_threshold, max_norm=max_norm)


def dps(
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
    scale: float = 1.0,
    max_norm: float | None = None,
    importance: bool = False,
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
) -> Particles:
    """Move every transition by scale·std²·∇r(x̂0)/temperature, without resampling: DPS with a reward gradient.

    With a classifier's log p(c | x) as the reward this is classifier guidance, on the clean estimate instead of a
    noisy-data classifier.  It samples from no stated law unless the importance weights are asked for.  NFE = n·steps,
    each with a backward pass.  Other arguments in `gencontrol.sampling.particles.particles`.

    Args:
        scale: factor on the gradient, ≥ 0; 0 is the base model.
        max_norm: gradients longer than this are shortened (DTS needed it in 2-D, FOUND; the bound is the user's).
        importance: weigh by exp(r/temperature)·p/q, which makes it exact in the limit of many particles.

    extras: "log_ratio" [n] log p/q of the paths, "gradients" (backward passes).

    Raises:
        UsageError: scale < 0, tokens, or a reward without gradient.
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
    return run_dps(search, int(shape[0]), scale=scale, max_norm=max_norm, importance=importance)
