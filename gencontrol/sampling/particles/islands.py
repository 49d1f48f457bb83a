"""Calibrated islands: sequential Monte Carlo whose trust in the lookahead is learned from its own earlier runs (ours).

SMC steers by ψ(x_t) = exp(β·λ·r(x̂0)).  β = 1 is FK steering, β = 0 importance sampling, and which of them is better
depends on the target; any β gives an unbiased Ẑ and a consistent law, since credit is taken back at the end.  The best
β of a level minimises KL(π_t ‖ p_t·ψ/Z_β), convex in β; there E[λ·r(x̂0)] is equal under p_t·ψ and under the target
(docs/methods/particles.md#islands, derived).  Both sides are known from earlier particles.  So the budget is cut into
islands, runs that do not meet: the first takes a ramp, each later one the β that all earlier ones say.  Fitted from
earlier islands alone, β is predictable, and E[Ẑ_i | past] = Z for every island.

A lookahead that misleads can hide a mode from an island, and what was never seen cannot be learned.  So a few plain
paths go first, the scouts, and ψ keeps a floor: ψ = α + (1 - α)·exp(β·v)/E_p[exp(β·v)].  Every part of the law is then
drawn at least α times as often as by the base alone, and no weight is larger than 1/α times that of importance sampling
(defensive mixtures, Hesterberg 1995).

Islands are pooled unnormalised: one that missed a mode has a small Ẑ, and so a small say.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rng import stream_seed
from gencontrol.sampling.particles.population import Particles, Target, collect
from gencontrol.sampling.particles.resampling import normalised
from gencontrol.sampling.particles.steering import POTENTIALS, ResampleAt, resampling_levels, settle, travel
from gencontrol.sampling.scoring import Scores

#: Below so many particles there is one island; above, the first takes this share (chosen in pilots on other targets).
ALONE, FIRST = 200, 0.4
#: Share of the plain paths that go first; the floor α of the potentials (derived: at worst 1/α times importance
#: sampling's squared error, and 1/(1 - α) times that of the potential without it).
SCOUTS, FLOOR = 0.05, 0.2
#: Later islands multiply the number of particles by about this much.
GROWTH = 3.0
#: Weight of the ramp in a fitted β, in effective particles (chosen in pilots on other targets).
PRIOR_WEIGHT = 2.0
#: Range of β: a lookahead may be worth more than it says, but never less than nothing.
LOWEST, HIGHEST = 0.0, 1.2
#: What the warnings call few and far (orders of magnitude, derived); with fewer starts than MUTE an island's own error
#: is not known, so it disagrees with nobody.
FEW, FAR, NOTHING, MUTE = 30.0, 3.0, 0.1, 5.0


@dataclass(frozen=True)
class Island:
    """One finished run.

    Args:
        x: clean states [n *d].
        rewards, valid: of these states [n].
        tilt: λ·reward [n].
        log_weights: unnormalised [n]; the mean of their exp is Ẑ.
        seen: λ·value [levels n] of the ancestors at the resampling times, NaN where it could not be scored.
        places: [levels n] which particle of that time each one descends from.
        origin: [n] where it started.
        betas: β of the levels.
        nfe: model calls; reward_calls: samples scored.
        trace: grid index → effective sample size before resampling there; resampled: where it happened.
    """

    x: Shaped[Tensor, "n *d"]
    rewards: Float[Tensor, " n"]
    valid: Bool[Tensor, " n"]
    tilt: Float[Tensor, " n"]
    log_weights: Float[Tensor, " n"]
    seen: Float[Tensor, "l n"]
    places: Int64[Tensor, "l n"]
    origin: Int64[Tensor, " n"]
    betas: tuple[float, ...]
    nfe: int
    reward_calls: int
    trace: Mapping[int, float]
    resampled: Sequence[int]

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def log_z(self) -> float:
        """log Ẑ; exp of it is unbiased."""
        return normalised(self.log_weights)[1] - math.log(len(self))

    @property
    def ess(self) -> float:
        """Effective number of independent starts (Σ_a W_a)²/Σ_a W_a², W_a the weight that descends from start a."""
        return grouped_size(self.log_weights, self.origin)


def islands(target: Target, n: int, *, resample_at: ResampleAt = None, ess_threshold: float = 0.5) -> Particles:
    """Run calibrated islands: SMC that learns from its own first particles how far the lookahead can be trusted (ours).

    The default for draws of p·exp(r/temperature): near the better of `snis` and `smc` whichever that is, often better
    than both (docs/methods/particles.md#islands).  NFE = n·steps, as SMC.

    Args:
        resample_at: number of equal segments, "all", or times of the grid; None is five segments (DTS table 2, FOUND).
        ess_threshold: resample where the effective sample size of an island is below this share (0: never).

    Weights give every island a say by its effective starts; log_z takes coefficients by numbers of particles, so that
    exp of it is unbiased.  ess is the pooled number of effective independent starts.

    extras: "betas" [island][level], "sizes", "log_z_each" and "ess_each" [island], "log_z_law" (log Z with the
    coefficients of the law), "warnings" (texts, also given as UserWarning).

    Raises:
        UsageError: a count or threshold out of range, or times that are not in the grid.
    """
    done = list(grow(target, [], n, resample_at=resample_at, ess_threshold=ess_threshold))
    found = pool(target, done)
    for text in found.extras["warnings"]:
        warnings.warn(text, stacklevel=3)
    return found


def grow(
    target: Target, done: Sequence[Island], n: int, *, resample_at: ResampleAt = None, ess_threshold: float = 0.5
) -> Iterator[Island]:
    """Run islands until there are n particles, those of earlier calls included; yields each one when it is finished.

    An island is a pure function of (seed, its number, the islands before it, its size), so a run that was stopped
    between two of them goes on to the same bits; n may be raised at any time.

    Raises:
        UsageError: n < 1, a threshold out of range, or times that are not in the grid.
    """
    if n < 1:
        raise UsageError(f"{n} particles; give at least 1.")
    levels, done = resampling_levels(target, resample_at), list(done)
    while sum(map(len, done)) < n:
        size = next_size([len(each) for each in done], n)
        scouting = not done and size < n
        betas = (0.0,) * len(levels) if scouting else calibrate(done, len(levels))
        shape = _potential(done, dict(zip((level - 1 for level in levels), betas, strict=True)), target)
        own = replace(target, seed=stream_seed(target.seed, "islands", len(done)))
        before = target.scorer.calls
        cloud, scores = travel(own, size, levels, ess_threshold, POTENTIALS["diff"], shape)
        settle(own, cloud, scores)
        nothing = torch.zeros(0, size)
        done.append(
            Island(
                cloud.x,
                scores.values,
                scores.valid,
                scores.values * target.inverse_temperature,
                cloud.log_weights + cloud.log_z + math.log(size),
                torch.stack(cloud.seen) if levels else nothing.double(),
                torch.stack(cloud.places) if levels else nothing.long(),
                cloud.origin,
                betas,
                cloud.nfe,
                target.scorer.calls - before,
                cloud.trace,
                cloud.resampled,
            )
        )
        yield done[-1]


def next_size(sizes: Sequence[int], n: int) -> int:
    """Return the size of the next island of a run of n particles, of which these are done.

    A run that stopped goes on as it would have without the stop.
    """
    have = sum(sizes)
    if not have:
        return n if n < ALONE else max(2, round(SCOUTS * n))
    if len(sizes) == 1 and have < min(ALONE, FIRST * n):
        return round(FIRST * n)
    steps = max(1, round(math.log(n / have) / math.log(GROWTH)))
    return n - have if steps == 1 else round(have * (n / have) ** (1 / steps)) - have


def _potential(done: Sequence[Island], betas: Mapping[int, float], target: Target) -> Callable[[int, Tensor], Tensor]:
    """What an island's particles are weighed by: log ψ in units of the reward, a function of (grid index, values)."""
    scale, heights = target.inverse_temperature, {}
    if done:
        weights, tilt = (torch.cat([getattr(each, name) for each in done]) for name in ("log_weights", "tilt"))
        seen = torch.cat([each.seen for each in done], 1)
        for level, (index, beta) in enumerate(betas.items()):
            known = torch.isfinite(seen[level]) & torch.isfinite(weights)
            base = weights[known] - tilt[known]
            if bool(known.any()):
                top = torch.logsumexp(base + beta * seen[level][known], 0) - torch.logsumexp(base, 0)
                heights[index] = float(top)

    def log_psi(index: int, values: Tensor) -> Tensor:
        steep = betas[index] * scale * values
        if index in heights:
            high = steep - heights[index] + math.log(1.0 - FLOOR)
            steep = torch.logaddexp(high, torch.full_like(high, math.log(FLOOR)))
        return steep / scale

    return log_psi


def ramp(levels: int) -> tuple[float, ...]:
    """β of the first island: lookahead counts in proportion to the part of the path that lies behind."""
    return tuple((place + 1) / (levels + 1) for place in range(levels))


def calibrate(done: Sequence[Island], levels: int) -> tuple[float, ...]:
    """Return β of every level: the fit to all earlier islands, drawn towards the ramp where few particles carry it."""
    prior = ramp(levels)
    if not done:
        return prior
    weights, tilt = (torch.cat([getattr(each, name) for each in done]) for name in ("log_weights", "tilt"))
    seen, places = torch.cat([each.seen for each in done], 1), joined([each.places for each in done])
    betas = []
    for level in range(levels):
        known = torch.isfinite(seen[level]) & torch.isfinite(weights)
        values, target = seen[level][known], weights[known]
        # what a path counts under the base law is its weight without the reward
        fit = matched(values, target - tilt[known], target)
        trust = 0.0 if fit is None else grouped_size(target, places[level][known])
        betas.append((trust * (fit or 0.0) + PRIOR_WEIGHT * prior[level]) / (trust + PRIOR_WEIGHT))
    return tuple(betas)


def matched(
    values: Float[Tensor, " m"], log_base: Float[Tensor, " m"], log_target: Float[Tensor, " m"], rounds: int = 40
) -> float | None:
    """Return the β at which E[v] under base·exp(β·v) is E[v] under the target, by bisection in [LOWEST, HIGHEST].

    Args:
        values: v, finite.
        log_base, log_target: weights of the same points under both laws, of any scale.

    Returns: None where the values are all equal, or there is no weight: any β is as good.
    """
    if not len(values) or float(values.max()) == float(values.min()):
        return None
    goal = float(normalised(log_target)[0].exp() @ values)
    low, high = LOWEST, HIGHEST
    for _ in range(rounds):
        middle = (low + high) / 2
        if float(normalised(log_base + middle * values)[0].exp() @ values) < goal:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def pool(target: Target, done: Sequence[Island]) -> Particles:
    """Return the particles of all islands as one weighted sample; `islands` says what is in it.

    The law is Σ_i a_i·mean_j exp(lw_ij)·δ(x_ij) with a_i ∝ the effective starts of island i (Chan & Lai 2013, Lee &
    Whiteley 2018), not normalised per island.

    Raises:
        RewardError: no sample has a weight.
    """
    sizes = torch.tensor([len(each) for each in done], dtype=torch.float64)
    each_z = torch.tensor([each.log_z for each in done], dtype=torch.float64)
    ess = torch.tensor([each.ess for each in done], dtype=torch.float64)
    share = torch.log(ess / ess.sum()) if float(ess.sum()) > 0 else torch.zeros_like(ess)
    log = torch.cat([each.log_weights + a - math.log(len(each)) for each, a in zip(done, share.tolist(), strict=True)])
    starts = joined([each.origin[None] for each in done])[0]
    pooled = grouped_size(log, starts)
    extras: dict[str, Any] = {
        "betas": [list(each.betas) for each in done],
        "sizes": [len(each) for each in done],
        "log_z_each": each_z.tolist(),
        "ess_each": ess.tolist(),
        "log_z_law": float(torch.logsumexp(share + each_z, 0)),
    }
    extras["warnings"] = _warnings(extras, pooled)
    scores = Scores(torch.cat([each.rewards for each in done]), torch.cat([each.valid for each in done]))
    log_z = float(torch.logsumexp(torch.log(sizes / sizes.sum()) + each_z, 0))
    nfe = sum(each.nfe for each in done)
    found = collect(target, torch.cat([each.x for each in done]), scores, log, nfe, log_z, extras)
    return replace(found, ess=pooled, reward_calls=sum(each.reward_calls for each in done))


def _warnings(extras: Mapping[str, Any], pooled: float) -> list[str]:
    """What a user should know before trusting the result."""
    found, log_z, ess, betas = [], extras["log_z_each"], extras["ess_each"], extras["betas"]
    if pooled < FEW:
        found.append(
            f"few independent starts carry the law (effective number {pooled:.1f}): shares are good to about "
            f"±{1 / math.sqrt(max(pooled, 1)):.2f}; give more nfe, or raise the temperature."
        )
    gaps = [
        abs(log_z[i] - log_z[j]) / math.sqrt(1 / ess[i] + 1 / ess[j])
        for i in range(len(ess))
        for j in range(i)
        if min(ess[i], ess[j]) >= MUTE
    ]
    if any(gap > FAR for gap in gaps):
        each = ", ".join(f"{value:.2f}" for value in log_z)
        found.append(f"islands disagree (log Z {each}): a mode may be missing; give more nfe.")
    if len(betas) > 1 and betas[-1] and max(betas[-1]) < NOTHING:
        found.append("the lookahead says nothing here; the result is that of importance sampling.")
    return found


def grouped_size(log_weights: Float[Tensor, " n"], groups: Int64[Tensor, " n"]) -> float:
    """Return (Σ_g W_g)²/Σ_g W_g², W_g the weight of group g; 0 where there is no weight."""
    log, total = normalised(log_weights)
    if not math.isfinite(total):
        return 0.0
    _, group = groups.unique(return_inverse=True)
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, log.exp())
    return float(1.0 / sums.square().sum())


def joined(indices: Sequence[Int64[Tensor, "l _"]]) -> Int64[Tensor, "l _"]:
    """Return indices of several islands side by side, with no number in common."""
    shifts = [0, *torch.tensor([each.shape[1] for each in indices]).cumsum(0).tolist()]
    return torch.cat([each + shift for each, shift in zip(indices, shifts)], 1)
