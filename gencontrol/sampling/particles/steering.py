"""Particle samplers that steer on the way: SMC (FK steering), TDS, DAS and DPS.

All four are one scheme.  Particles carry log-weights: the log-ratio log p/q of the transitions taken, plus potentials
at the resampling times that tell which paths look good.  Potentials are only advice: what a particle was credited is
taken back at the end, where its weight becomes exp(r(x0)/temperature)·p/q, so samples and log Z are right for any
potentials (Del Moral 2004).

The value of x_t is the reward of its one-step estimate x̂0.  It comes with the model call of the step that leaves x_t,
and resampling acts on where that step arrived, as in FK steering's public code: no call is spent on values, no
prediction is kept, and copies diverge from the next step on.  The log-ratio of that one step joins the weight later,
together with the value it anticipates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from gencontrol.errors import RewardError, UsageError, nearest
from gencontrol.rng import stream
from gencontrol.sampling.chain import Twist, branch_indices, token_step
from gencontrol.sampling.particles.population import Particles, Target, base_samples, collect, no_weight, roots_of, walk
from gencontrol.sampling.particles.resampling import effective_size, multinomial, normalised, systematic
from gencontrol.sampling.samplers import NO_GRADIENT
from gencontrol.sampling.scoring import Scores
from gencontrol.sampling.steps import StochasticStep

#: Where to resample: number of equal segments, "all", or times of the grid; None is five segments (DTS table 2, FOUND).
ResampleAt = int | str | Sequence[float] | None
#: Largest potential of FK steering's public code (CODE).
FK_CLAMP = 1e10
#: Growth of the tempering of DAS, and the number of steps it was made for (CODE: das/pipeline_using_SMC, 100 steps).
DAS_GAMMA, DAS_STEPS = 0.008, 100


@dataclass(frozen=True)
class Potential:
    """How values at the resampling times become potentials G (FK steering, arXiv 2501.06848).

    A particle remembers one number m, from `start` on; at each time m' = update(m, value), and log G = λ·(m' - m) for
    differences, λ·m' otherwise.

    Args:
        start: m before the first value.
        update: (m, value) → m'.
        difference: see above.
        published: forget weights as FK steering's public code does.
    """

    start: float
    update: Callable[[Tensor, Tensor], Tensor]
    difference: bool = False
    published: bool = False


def _last(memory: Tensor, value: Tensor) -> Tensor:
    """The new value."""
    return value


POTENTIALS: dict[str, Potential] = {
    "diff": Potential(0.0, _last, difference=True),
    "max": Potential(-math.inf, torch.maximum),
    "add": Potential(0.0, torch.add),
    "rt": Potential(0.0, _last),
    "fk-published": Potential(0.0, _last, difference=True, published=True),
    "fk-published-max": Potential(0.0, torch.maximum, published=True),
    "fk-published-add": Potential(0.0, torch.add, published=True),
    "fk-published-rt": Potential(0.0, _last, published=True),
}
#: Share of n below which FK steering's public code resamples at the end, whatever it did before (CODE).
FK_LAST = 0.5
#: Effective share of n below which a run of SMC says little (order of magnitude, derived).
FEW = 0.01


def smc(
    target: Target,
    n: int,
    *,
    resample_at: ResampleAt = None,
    ess_threshold: float = 0.5,
    potential: str = "diff",
) -> Particles:
    """Run sequential Monte Carlo on the base chain: FK steering (arXiv 2501.06848) with weights carried correctly.

    Values are rewards of one-step estimates x̂0, taken from the model calls that are made anyway: NFE = n·steps.
    Resampling is systematic, and the final weights are returned, so that the law is right for every potential; exp of
    log_z is unbiased.

    Args:
        resample_at: number of equal segments, "all", or times of the grid; None is five segments (DTS table 2, FOUND).
        ess_threshold: resample where the effective sample size is below this share of n (0: never, 1: always).
        potential: "diff" exp(λΔv), "max" exp(λ·max v), "add" exp(λ·Σv), "rt" exp(λv); or "fk-published" (differences),
            "fk-published-max", "-add", "-rt", which reproduce the public code's bias (CODE, docs/methods/dts.md#p14):
            weights forgotten wherever it does not resample, multinomial, clamped at 1e10, equal final weights, no
            log_z.  They are there to compare with, not to use.

    extras: "ess" {grid index: effective sample size}, "resampled" [grid index], "origins" (starting particles with
    descendants).

    Raises:
        UsageError: unknown potential, a count or threshold out of range, or times that are not in the grid.
    """
    if potential not in POTENTIALS:
        known = ", ".join(POTENTIALS)
        raise UsageError(f"unknown potential '{potential}'.{nearest(potential, POTENTIALS)} Known: {known}.")
    return _run(target, n, resample_at, ess_threshold, POTENTIALS[potential], lambda index: 1.0)


def tds(
    target: Target,
    n: int,
    *,
    resample_at: ResampleAt = None,
    ess_threshold: float = 0.5,
    max_norm: float | None = None,
) -> Particles:
    """Run the twisted diffusion sampler (arXiv 2306.17775): SMC whose transitions climb the reward.

    Every transition's mean moves by std²·∇r(x̂0)/temperature and the weight pays it back by log p/q, so the law and
    log_z are right.  NFE = n·steps; each step but the last also costs a backward pass through model, decode and reward
    (extras["gradients"]).

    Args:
        resample_at, ess_threshold: as in `smc`.
        max_norm: gradients longer than this are shortened (still exact).

    Raises:
        UsageError: as `smc`; tokens, or a reward without gradient.
    """
    climbing = _twisted(target, "tds", lambda t: target.inverse_temperature, max_norm)
    return _run(climbing, n, resample_at, ess_threshold, POTENTIALS["diff"], lambda index: 1.0)


def das(
    target: Target,
    n: int,
    *,
    resample_at: ResampleAt = None,
    ess_threshold: float = 0.5,
    max_norm: float | None = None,
) -> Particles:
    """Run DAS (arXiv 2501.05803): TDS on γ·r, with γ from 0 at noise to 1 at data.

    γ = min(1.008^i - 1, 1) at step i of 100 (CODE), the same curve for other numbers of steps (ours): early estimates,
    which know little, count little.  The gradient of step i carries the factor of i + 1, where the step arrives (CODE).
    Resampling is systematic where the public code has ssp.

    Raises:
        UsageError: as `tds`.
    """
    share = {t: das_tempering(index + 1, target.chain.steps) for index, t in enumerate(target.chain.grid)}
    climbing = _twisted(target, "das", lambda t: target.inverse_temperature * share[t], max_norm)
    steps = target.chain.steps
    return _run(climbing, n, resample_at, ess_threshold, POTENTIALS["diff"], lambda index: das_tempering(index, steps))


def dps(
    target: Target, n: int, *, scale: float = 1.0, max_norm: float | None = None, importance: bool = False
) -> Particles:
    """Move every transition by scale·std²·∇r(x̂0)/temperature, without resampling: DPS with a reward gradient.

    With a classifier's log p(c | x) as the reward this is classifier guidance, on the clean estimate instead of a
    noisy-data classifier.  It samples from no stated law unless the importance weights are asked for.  NFE = n·steps,
    each with a backward pass.

    Args:
        scale: factor on the gradient, ≥ 0; 0 is the base model.
        max_norm: gradients longer than this are shortened (DTS needed it in 2-D, FOUND; the bound is the user's).
        importance: weigh by exp(r/temperature)·p/q, which makes it exact in the limit of many particles.

    extras: "log_ratio" [n] log p/q of the paths, "gradients" (backward passes).

    Raises:
        UsageError: scale < 0, n < 1, tokens, or a reward without gradient.
    """
    if not 0.0 <= scale < math.inf:
        raise UsageError(f"scale is {scale}; it multiplies the gradient and must be >= 0 and finite.")
    climbing = _twisted(target, "dps", lambda t: target.inverse_temperature * scale, max_norm)
    found, scores = base_samples(climbing, n)
    log_weights = torch.zeros(n, dtype=torch.float64)
    log_z = math.nan
    if importance:
        full = scores.values * target.inverse_temperature + found.log_ratio
        log_weights, total = normalised(full.masked_fill(~scores.valid, -math.inf))
        log_z = total - math.log(n)
    extras = {"log_ratio": found.log_ratio, "gradients": n * (target.chain.steps - 1)}
    return collect(target, found.x, scores, log_weights, int(found.calls.sum()), log_z, extras)


def das_tempering(index: int, steps: int) -> float:
    """Return γ = min((1 + 0.008)^i - 1, 1), which multiplies the reward at grid index `index` (CODE).

    i counts steps of a 100-step path, so that another number of steps sees the same curve (ours).
    """
    return min((1.0 + DAS_GAMMA) ** (index * DAS_STEPS / steps) - 1.0, 1.0)


def _twisted(target: Target, name: str, scale: Callable[[float], float], max_norm: float | None) -> Target:
    """The target with a proposal that climbs the reward.

    Raises:
        UsageError: tokens, a step that is not Gaussian, max_norm ≤ 0, or a reward that is not differentiable.
    """
    if target.chain.masked or not isinstance(target.chain.step, StochasticStep):
        raise UsageError(
            f"{name} needs a gradient in x, which tokens do not have; choose a sampler without: {NO_GRADIENT}."
        )
    if max_norm is not None and not max_norm > 0:
        raise UsageError(f"max_norm is {max_norm}; it bounds the length of a gradient and must be > 0.")
    twist = Twist(target.scorer.differentiable, scale, max_norm)
    return replace(target, chain=replace(target.chain, twist=twist))


@dataclass
class Cloud:
    """The particles under way.

    Args:
        x: states [n *d].
        keys: noise keys [n].
        memory: the potential's number m [n].
        potential: log G of the last look [n], as the public code clamps it (published rules alone).
        log_weights: [n], normalised.
        credit: [n] Σ log G received so far, to be taken back.
        pending: [n] Σ log p/q of steps that the weight does not contain yet.
        origin: [n] row at the start.
        log_z: log of the estimate so far.
        nfe: model calls.
        trace: grid index → effective sample size before resampling there; resampled: where it happened.
        seen: λ·value [n] at every resampling time so far, NaN where it could not be scored; places: which particle of
            that time each one descends from [n].
    """

    x: Shaped[Tensor, "n *d"]
    keys: Int64[Tensor, " n"]
    memory: Float[Tensor, " n"]
    log_weights: Float[Tensor, " n"]
    credit: Float[Tensor, " n"]
    pending: Float[Tensor, " n"]
    origin: Int64[Tensor, " n"]
    log_z: float = 0.0
    nfe: int = 0
    trace: dict[int, float] = field(default_factory=dict)
    resampled: list[int] = field(default_factory=list)
    potential: Float[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    seen: list[Float[Tensor, " n"]] = field(default_factory=list)
    places: list[Int64[Tensor, " n"]] = field(default_factory=list)

    def advance(self, target: Target, span: tuple[int, int]) -> None:
        """Take steps without looking."""
        found = walk(target, self.x, self.keys, span)
        self.x, self.pending = found.x, self.pending + found.log_ratio
        self.nfe += int(found.calls.sum())

    def reweigh(self, increment: Float[Tensor, " n"]) -> None:
        """Multiply the weights: the mean factor is one more factor of Z."""
        self.log_weights, total = normalised(self.log_weights + increment)
        self.log_z += total

    def select(self, index: Int64[Tensor, " n"]) -> None:
        """Keep the particles `index`, with everything that belongs to them, at equal weights.

        Keys belong to the places, and a place has not drawn its later noise yet: copies diverge.
        """
        self.x = self.x[index.to(self.x.device)]
        self.memory, self.credit = self.memory[index], self.credit[index]
        self.pending, self.origin = self.pending[index], self.origin[index]
        self.seen = [values[index] for values in self.seen]
        self.places = [places[index] for places in self.places]
        self.log_weights = torch.full_like(self.log_weights, -math.log(len(index)))


def _run(
    target: Target,
    n: int,
    resample_at: ResampleAt,
    ess_threshold: float,
    rule: Potential,
    fade: Callable[[int], float],
) -> Particles:
    """The scheme of this module; fade(grid index) multiplies the values.

    extras: "ess" {grid index: effective sample size before resampling}, "resampled" [grid index], "origins" (number of
    starting particles with descendants), and with a twist "gradients" (backward passes, one per row and step).
    """
    levels = resampling_levels(target, resample_at)
    cloud, scores = travel(target, n, levels, ess_threshold, rule, lambda index, values: fade(index) * values)
    return _finish(target, cloud, scores, rule)


def resampling_levels(target: Target, resample_at: ResampleAt) -> list[int]:
    """Return where in the grid particles resample.

    Raises:
        UsageError: a step that decodes blocks, or times that are not in the grid.
    """
    token_step(target.chain)
    segments = min(5, target.chain.steps) if resample_at is None else resample_at
    # the tree may also branch at the start, where there is nothing to weigh yet
    return [level for level in branch_indices(target.chain, segments)[:-1] if level > 0]


def travel(
    target: Target,
    n: int,
    levels: Sequence[int],
    ess_threshold: float,
    rule: Potential,
    shape: Callable[[int, Tensor], Tensor],
) -> tuple[Cloud, Scores]:
    """Take n particles to clean data; their weights do not contain the reward of what they became yet.

    shape(grid index, values) is what the potential sees of the values.

    Raises:
        UsageError: n < 1, or a threshold outside 0 to 1.
        RewardError: no particle has a weight.
    """
    if n < 1 or not 0.0 <= ess_threshold <= 1.0:
        raise UsageError(f"{n} particles with ess_threshold {ess_threshold}; give at least 1, and 0 to 1.")
    rows, zeros = torch.arange(n), torch.zeros(n, dtype=torch.float64)
    keys = target.keys(rows)
    equal = torch.full_like(zeros, -math.log(n))
    cloud = Cloud(target.chain.prior(keys), keys, zeros + rule.start, equal, zeros, zeros, rows)
    place = 0
    for level in levels:
        cloud.advance(target, (place, level - 1))
        _look(target, cloud, level - 1, rule, shape)
        place = level
        cloud.trace[level] = effective_size(cloud.log_weights)
        if cloud.trace[level] < ess_threshold * n:
            if rule.published:  # the public code pays back the potentials of the looks that resampled, and no others
                cloud.credit = cloud.credit + cloud.potential
            cloud.select(_ancestors(target, cloud.log_weights, level, rule))
            cloud.resampled.append(level)
    cloud.advance(target, (place, target.chain.steps))
    return cloud, target.scorer(cloud.x, roots_of(n))


def settle(target: Target, cloud: Cloud, scores: Scores) -> None:
    """Take the credit back: weights become exp(r(x0)/temperature)·p/q, 0 where the reward failed."""
    terminal = scores.values.nan_to_num(0.0) * target.inverse_temperature
    cloud.reweigh((terminal - cloud.credit + cloud.pending).masked_fill(~scores.valid, -math.inf))


def _look(target: Target, cloud: Cloud, index: int, rule: Potential, shape: Callable[[int, Tensor], Tensor]) -> None:
    """Take step `index`, and weigh the particles by the value of where it left from."""
    reached = cloud.pending
    x, values, valid, ratio = _step_and_value(target, cloud.x, cloud.keys, index)
    cloud.seen.append((target.inverse_temperature * values).masked_fill(~valid, math.nan))
    cloud.places.append(torch.arange(len(values)))
    cloud.x, cloud.nfe = x, cloud.nfe + len(x)
    memory = rule.update(cloud.memory, shape(index, values))
    gain = target.inverse_temperature * (memory - cloud.memory if rule.difference else memory)
    # an estimate that cannot be scored says nothing: its potential is 1
    gain = torch.where(valid, gain, torch.zeros_like(gain))
    cloud.memory = torch.where(valid, memory, cloud.memory)
    if rule.published:
        cloud.potential = gain.clamp(max=math.log(FK_CLAMP))
        cloud.log_weights = _published(gain, valid)
        return
    cloud.reweigh(reached + gain)
    cloud.credit, cloud.pending = cloud.credit + gain, ratio
    if not math.isfinite(cloud.log_z):
        raise RewardError(no_weight(target))


def _step_and_value(
    target: Target, x: Shaped[Tensor, "n *d"], keys: Int64[Tensor, " n"], index: int
) -> tuple[Shaped[Tensor, "n *d"], Float[Tensor, " n"], Bool[Tensor, " n"], Float[Tensor, " n"]]:
    """One model call per row: the next states, values of the states left, their validity, log p/q of the step."""
    chain, roots = target.chain, roots_of(len(x))
    moved, estimates, values, ratios = [], [], [], [torch.zeros(0)]
    for s in target.slices(len(x)):
        if target.poll is not None:
            target.poll()
        if chain.twist is None:
            pred = chain.predict(x[s], roots[s], index)
            estimates.append(chain.estimate(pred, keys[s], index))
            moved.append(chain.move(pred, index, keys[s]))
        else:
            pred, gradient, value = chain.slope(x[s], roots[s], index)
            after, ratio = chain.twisted(pred, gradient, index, keys[s])
            moved.append(after)
            values.append(value.double().cpu())
            ratios.append(ratio.cpu())
    if chain.twist is None:
        scores = target.scorer(torch.cat(estimates), roots)
        return torch.cat(moved), scores.values, scores.valid, torch.zeros(len(x), dtype=torch.float64)
    found = torch.cat(values)
    return torch.cat(moved), found, torch.isfinite(found), torch.cat(ratios).double()


def _ancestors(target: Target, log_weights: Float[Tensor, " n"], level: int, rule: Potential) -> Int64[Tensor, " n"]:
    """Who is copied where: systematic, or multinomial as published."""
    generator = stream(target.seed, "particles/resample", level)
    if rule.published:
        draws = torch.rand(len(log_weights), generator=generator, dtype=torch.float64)
        return multinomial(log_weights, draws)
    return systematic(log_weights, float(torch.rand((), generator=generator, dtype=torch.float64)))


def _published(gain: Float[Tensor, " n"], valid: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights of FK steering's public code: the newest potential alone, clamped; all equal if all are 0 (CODE)."""
    log = gain.clamp(max=math.log(FK_CLAMP)).masked_fill(~valid, -math.inf)
    return normalised(log if bool(valid.any()) else torch.zeros_like(log))[0]


def _finish(target: Target, cloud: Cloud, scores: Scores, rule: Potential) -> Particles:
    """Exact terminal weights, or the published end: resample once more if uneven, then forget the weights."""
    extras: dict[str, object] = {"ess": cloud.trace, "resampled": cloud.resampled}
    if target.chain.twist is not None:
        extras["gradients"] = len(cloud.x) * (target.chain.steps - 1)
    if rule.published:
        last = rule.update(cloud.memory, scores.values.nan_to_num(0.0))
        gain = target.inverse_temperature * (last - cloud.memory if rule.difference else last)
        log = _published(gain if rule.difference else gain - cloud.credit, scores.valid)
        if effective_size(log) < FK_LAST * len(log):
            index = _ancestors(target, log, target.chain.steps, rule)
            cloud.select(index)
            scores = Scores(scores.values[index], scores.valid[index])
        cloud.log_weights, cloud.log_z = torch.zeros_like(log), math.nan
    else:
        settle(target, cloud, scores)
    if not rule.published and (ess := effective_size(cloud.log_weights)) < FEW * len(cloud.x):
        warnings.warn(
            f"{len(cloud.x)} particles ended with an effective number of {ess:.3g}, below {FEW:.0%}: shares and log Z "
            "say little; give more particles, another potential, or the sampler islands.",
            RuntimeWarning,
            stacklevel=4,
        )
    extras["origins"] = len(cloud.origin[torch.isfinite(cloud.log_weights)].unique())
    return collect(target, cloud.x, scores, cloud.log_weights, cloud.nfe, cloud.log_z, extras)
