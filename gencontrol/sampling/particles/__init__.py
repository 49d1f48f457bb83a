"""Particle samplers, the inference-time peers of tree search: best-of-n, importance sampling, SMC, TDS, DAS, beam, DPS.

All steer samples of one prompt towards p(x)·exp(r(x)/temperature), with arguments as in `sample`:

    particles = run("islands", model, reward, (64, 4, 64, 64), steps=50, temperature=0.1, generator=0, cond=cond)
    particles.best(1), particles.sample(16), particles.log_z

| name | target | reward used on the way | gradient |
|---|---|---|---|
| islands | p·exp(r/τ), the default for draws: SMC that learns how far to trust the estimate | value of it | no |
| best-of-n | the maximum of n base samples | no | no |
| snis | p·exp(r/τ), the honest baseline while its ess/n is above about 5 % | no | no |
| smc | p·exp(r/τ) | value of the one-step estimate | no |
| tds, das | p·exp(r/τ) | value and gradient of the one-step estimate | yes |
| beam | a greedy maximum (biased) | value of the one-step estimate | no |
| dps | biased; p·exp(r/τ) with importance=True | gradient of the one-step estimate | yes |

The functions of these names in `unguided` and `steering` say what each does and which options it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.registry import resolve_dotted
from gencontrol.rng import seed_of
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.particles.population import Particles, Target
from gencontrol.sampling.samplers import PARTICLES, SAMPLERS, sampler
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.types import Cond, RewardContext, map_cond

__all__ = ["Particles", "Target", "options_of", "particles_for_budget", "run", "spend"]


def run(
    name: str,
    model: Any,
    reward: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | int | None = None,
    step: str | Step | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    cond: Cond = None,
    decode: Callable[[Tensor], Any] | None = None,
    context: RewardContext | None = None,
    batch: int | None = None,
    reward_batch: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    poll: Callable[[], None] | None = None,
    **options: Any,
) -> Particles:
    """Run a particle sampler on shape[0] particles.

    Args:
        name: see the table above.
        model: any Model, Gaussian or masked; controls (cfg …) are part of the base law.
        reward: item reward, or a function of the (decoded) samples that returns one number each; higher is better.
        shape: (number of particles, *shape of one clean state).
        steps, step, times: as in `sample`; the step must be stochastic (None: sde or ancestral), the grid must end
            at 0.
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
        options: of the sampler, by the names of its keyword arguments (`resample_at`, `potential`, `children`, …).

    Samples whose reward is NaN or raises have weight 0 and are marked in `Particles.valid`.

    Raises:
        UsageError: an argument that does not fit (unknown name or option, deterministic step, temperature ≤ 0, cond of
            another batch than 1, tokens or a reward without gradient for a gradient sampler).
        RewardError: a reward that breaks its contract or scores nothing.
    """
    if len(shape) < 2 or shape[0] < 1:
        raise UsageError(f"shape is {tuple(shape)}; give (number of particles, *shape of one sample).")

    def one_row(leaf: Tensor) -> Tensor:
        if leaf.shape[0] != 1:
            raise UsageError(
                f"cond has batch {leaf.shape[0]}; particles serve one prompt: give a condition of batch 1."
            )
        return leaf

    map_cond(one_row, cond)
    chain = make_chain(
        model, shape[1:], steps=steps, step=step, times=times, cond=cond, device=device, autocast=autocast
    )
    scorer = Scorer(reward, decode, context or RewardContext(), reward_batch)
    target = Target(chain, scorer, temperature, seed_of(generator), batch, poll)
    return _function(name, options)(target, int(shape[0]), **options)


def spend(name: str, target: Target, nfe: int, **options: Any) -> Particles:
    """Run a particle sampler on as many particles as `nfe` model calls pay for.

    Args:
        target: with a fresh scorer, since it counts calls.
        nfe: budget; tokens that are done early are not paid for, so less may be spent.
        options: as in `run`.

    Raises:
        UsageError: as `run`; a budget below one particle.
    """
    call = _function(name, options)
    if target.chain.twist is not None:
        raise UsageError("samplers add their own gradient proposal; give a chain without a twist.")
    return call(target, particles_for_budget(name, nfe, target.chain.steps, options.get("children")), **options)


def particles_for_budget(name: str, nfe: int, steps: int, children: int | None = None) -> int:
    """Return the largest number of particles whose model calls fit into `nfe`.

    Args:
        name: of a particle sampler.
        nfe: budget of model calls.
        steps: of a path.
        children: of a beam; None is its default.

    Raises:
        UsageError: a budget below one particle.
    """
    each = sampler(name).cost(steps, children)
    if nfe < each:
        raise UsageError(f"nfe is {nfe}, but one particle of {name} costs {each} model calls; give at least that many.")
    return nfe // each


def options_of(name: str) -> list[str]:
    """Return the names of a particle sampler's options."""
    parameters = inspect.signature(_function(name, {})).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _function(name: str, options: Any) -> Callable[..., Particles]:
    """The sampler's function, its options checked."""
    if sampler(name).tree:
        raise UsageError(f"'{name}' is no particle sampler.{nearest(name, PARTICLES)} Known: {', '.join(PARTICLES)}.")
    call: Callable[..., Particles] = resolve_dotted(SAMPLERS[name].call, "sampler")
    for key in options:
        if key not in (known := options_of(name)):
            raise UsageError(f"{name} has no option '{key}'; it takes: {', '.join(known) or 'none'}.")
    return call
