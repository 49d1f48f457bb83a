"""A population of particles on one chain: what every particle sampler takes, returns, and does in micro-batches.

Noise is a pure function of (seed, row, child, step), where only a beam has children other than 0.  So a row draws the
same numbers in any micro-batch, and particles that resampling copied to several rows diverge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from gencontrol.errors import RewardError, UsageError
from gencontrol.rng import row_keys
from gencontrol.sampling.chain import Chain, Walk
from gencontrol.sampling.particles.resampling import effective_size, multinomial, normalised
from gencontrol.sampling.scoring import Scorer, Scores


@dataclass(frozen=True)
class Target:
    """The law p(x)·exp(r(x)/temperature) and how to work on it, the same for every sampler.

    Args:
        chain: the base law p, with one root (one prompt).
        scorer: the reward r; its counters grow.
        temperature: τ > 0; λ = 1/τ.
        seed: of everything drawn.
        batch: rows per model call; None is all.  It changes no result beyond rounding.
        poll: called between sampler steps; may raise to stop.

    Raises:
        UsageError: temperature or batch out of range, or several roots.
    """

    chain: Chain
    scorer: Scorer
    temperature: float = 1.0
    seed: int = 0
    batch: int | None = None
    poll: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}; it must be > 0 and finite.")
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"batch is {self.batch}; it is the number of rows per model call, at least 1.")
        if self.chain.roots != 1:
            raise UsageError(f"particles serve one prompt, not {self.chain.roots}; call the sampler once per prompt.")

    @property
    def inverse_temperature(self) -> float:
        """λ."""
        return 1.0 / self.temperature

    def keys(self, rows: Int64[Tensor, " n"], children: Int64[Tensor, " n"] | None = None) -> Int64[Tensor, " n"]:
        """Noise keys of rows, and of children of them (None: child 0)."""
        return row_keys(self.seed, "particles", rows, torch.zeros_like(rows) if children is None else children)

    def slices(self, n: int, rows_each: int = 1) -> list[slice]:
        """Micro-batches of n items that make `rows_each` model rows each."""
        size = n if self.batch is None else max(1, self.batch // rows_each)
        return [slice(start, start + size) for start in range(0, n, size)]


@dataclass(frozen=True)
class Particles:
    """Weighted samples.

    Args:
        samples: clean states [n *d], on the chain's device.
        rewards: exact rewards [n] of these samples, NaN where invalid.
        valid: [n] whether the reward could be computed.
        log_weights: [n], normalised (exp sums to 1), -inf where invalid.
        nfe: model calls: rows times calls.  Controls are part of the model: a guided (CFG) call counts once although it
            runs the network twice, and a backward pass is not counted (see extras["gradients"]).
        reward_calls: samples scored, estimates and gradients included.
        log_z: estimate of log E_p[exp(r/temperature)] over valid samples; NaN where the sampler has none.
        ess: effective number of samples, 1 to n.
        extras: what a sampler has to say beside; documented there.
    """

    samples: Shaped[Tensor, "n *d"]
    rewards: Float[Tensor, " n"]
    valid: Bool[Tensor, " n"]
    log_weights: Float[Tensor, " n"]
    nfe: int
    reward_calls: int
    log_z: float
    ess: float
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """Weights [n] that sum to 1."""
        return self.log_weights.exp()

    def best(self, k: int = 1) -> Shaped[Tensor, "m *d"]:
        """Return the k valid samples of largest reward, best first (fewer if fewer are valid)."""
        order = self.rewards.masked_fill(~self.valid, -math.inf).argsort(descending=True, stable=True)
        return self.samples[order[: min(k, int(self.valid.sum()))].to(self.samples.device)]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "m *d"]:
        """Draw n samples independently by their weights (with repeats); None uses torch's global generator."""
        place = "cpu" if generator is None else generator.device
        draws = torch.rand(n, generator=generator, dtype=torch.float64, device=place).cpu()
        return self.samples[multinomial(self.log_weights, draws).to(self.samples.device)]


def roots_of(n: int) -> Int64[Tensor, " n"]:
    """The root of n particles: the one prompt."""
    return torch.zeros(n, dtype=torch.int64)


def walk(target: Target, x: Shaped[Tensor, "n *d"], keys: Int64[Tensor, " n"], span: tuple[int, int]) -> Walk:
    """Take the steps span[0] ≤ i < span[1] in micro-batches."""
    chain, roots = target.chain, roots_of(len(x))
    parts = [chain.advance(x[s], roots[s], keys[s], span, target.poll) for s in target.slices(len(x))]
    return Walk(
        torch.cat([part.x for part in parts]),
        torch.cat([part.log_ratio for part in parts]),
        torch.cat([part.calls for part in parts]),
        torch.cat([part.log_prob for part in parts]),
    )


def base_samples(target: Target, n: int) -> tuple[Walk, Scores]:
    """Draw n whole paths of the target's chain and score where they end.

    Raises:
        UsageError: n < 1.
    """
    if n < 1:
        raise UsageError(f"{n} particles; give at least 1.")
    keys = target.keys(torch.arange(n))
    found = walk(target, target.chain.prior(keys), keys, (0, target.chain.steps))
    return found, target.scorer(found.x, roots_of(n))


def collect(
    target: Target,
    x: Shaped[Tensor, "n *d"],
    scores: Scores,
    log_weights: Float[Tensor, " n"],
    nfe: int,
    log_z: float = math.nan,
    extras: Mapping[str, Any] | None = None,
) -> Particles:
    """Return the result; invalid samples lose their weight.

    Raises:
        RewardError: no sample has a weight; the message says why samples were excluded.
    """
    log, total = normalised(log_weights.masked_fill(~scores.valid, -math.inf))
    if not math.isfinite(total):
        raise RewardError(no_weight(target))
    return Particles(
        x, scores.values, scores.valid, log, nfe, target.scorer.calls, log_z, effective_size(log), extras or {}
    )


def no_weight(target: Target) -> str:
    """The message for a population without any weight."""
    scorer = target.scorer
    why = "; ".join(f"{reason} ({count})" for reason, count in scorer.reasons.items())
    return (
        f"none of the particles has a finite weight with reward '{scorer.reward.name}'"
        + (f": {why}." if why else ".")
        + " Check the reward on samples of the model alone, and with gradients give max_norm or raise the temperature."
    )
