"""Samplers by name at one budget of model calls: what the command line and the benchmarks run.

A sampler takes (search, nfe, options) and returns Particles; it spends at most `nfe` model calls.  A further sampler is
one more entry of SAMPLERS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gencontrol.errors import UsageError, nearest
from gencontrol.sampling.chain import Chain
from gencontrol.sampling.particles.population import Particles, Search
from gencontrol.sampling.particles.steering import run_das, run_dps, run_smc, run_tds
from gencontrol.sampling.particles.unguided import SVDD_CHILDREN, beam_calls, run_beam, run_best_of_n, run_snis
from gencontrol.sampling.scoring import Scorer

#: (search, budget of model calls, options of the sampler) → weighted samples
Sampler = Callable[[Search, int, Mapping[str, Any]], Particles]

_PARTICLES: dict[str, Callable[..., Particles]] = {
    "best-of-n": run_best_of_n,
    "snis": run_snis,
    "smc": run_smc,
    "tds": run_tds,
    "das": run_das,
    "beam": run_beam,
    "dps": run_dps,
}


def particles_for_budget(name: str, nfe: int, steps: int, *, children: int = SVDD_CHILDREN) -> int:
    """Return the largest number of particles whose model calls fit into `nfe`.

    Args:
        name: of a particle sampler.
        nfe: budget of model calls.
        steps: of a path.
        children: of a beam; others spend one call per particle and step.

    Raises:
        UsageError: unknown name, or a budget below one particle.
    """
    if name not in _PARTICLES:
        raise UsageError(f"'{name}' is no particle sampler.{nearest(name, _PARTICLES)} Known: {', '.join(_PARTICLES)}.")
    each = beam_calls(steps, children) if name == "beam" else steps
    if nfe < each:
        raise UsageError(f"nfe is {nfe}, but one particle of {name} costs {each} model calls; give at least that many.")
    return nfe // each


def _sampler(name: str) -> Sampler:
    """A particle sampler with as many particles as the budget pays for."""
    call = _PARTICLES[name]
    known = [p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def run(search: Search, nfe: int, options: Mapping[str, Any]) -> Particles:
        for key in options:
            if key not in known:
                raise UsageError(f"{name} has no option '{key}'; it takes: {', '.join(known) or 'none'}.")
        children = int(options.get("children", SVDD_CHILDREN))
        return call(search, particles_for_budget(name, nfe, search.chain.steps, children=children), **options)

    return run


SAMPLERS: dict[str, Sampler] = {name: _sampler(name) for name in _PARTICLES}


def run_particles(
    name: str,
    chain: Chain,
    scorer: Scorer,
    nfe: int,
    temperature: float,
    seed: int,
    *,
    batch: int | None = None,
    poll: Callable[[], None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Particles:
    """Spend at most `nfe` model calls on p(x)·exp(r(x)/temperature) with the named sampler.

    Args:
        name: key of SAMPLERS.
        chain: the base law, for one prompt.
        scorer: the reward; a fresh one per run, since it counts calls.
        nfe: budget; tokens that are done early are not paid for, so less may be spent.
        options: of the sampler, by the names of its keyword arguments (`resample_at`, `potential`, `children`, …).

    Raises:
        UsageError: unknown name or option, a budget below one particle, or a chain that does not fit the sampler
            (twisted, several roots, tokens for a gradient sampler).
    """
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler '{name}'.{nearest(name, SAMPLERS)} Known: {', '.join(SAMPLERS)}.")
    if chain.twist is not None:
        raise UsageError("samplers add their own gradient proposal; give a chain without a twist.")
    return SAMPLERS[name](Search(chain, scorer, temperature, seed, batch, poll), nfe, options or {})
