"""What composition does, in numbers: disagreement of the parents, correlation of their errors, cost, weights.

The errors of the parents on held-out (observations, expert chunk) pairs predict the gain for nothing
(docs/methods/gpc.md#p12): with A, B the mean squares and C the mean product of two parents' errors, the best
single-step weight lies inside (0, 1) just when C < min(A, B).  Errors are measured against the noise that was added,
whose conditional variance adds the same
number to A, B and C: neither the weight nor that condition feels it, but the ratio C/min(A, B) is drawn towards 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.process.gaussian import GaussianProcess, Time
from gencontrol.rng import Keyed
from gencontrol.robotics.composition.mixing import ByLogSnr, best_weights
from gencontrol.robotics.composition.operators import Superposed
from gencontrol.robotics.composition.policy import ComposedPolicy
from gencontrol.robotics.policies.denoising import History
from gencontrol.sampling.guidance import Composed, Control
from gencontrol.types import Cond


@dataclass(frozen=True)
class Trace:
    """One composed chunk, watched.

    Args:
        logsnr: of every step.
        disagreement: [k m m] root mean square of eps_i − eps_j, in the order of the policy's parents; NaN for parents
            without weight.
        weights: [k m], the mean over batch and chunk of what each parent weighed.
        calls: network calls of all parents.
        seconds: for the whole chunk, encoding included.
        superposed: of the operators "and" and "or": weights per row, log-densities, clipped share.
    """

    logsnr: tuple[float, ...]
    disagreement: Float[Tensor, "k m m"]
    weights: Float[Tensor, "k m"]
    calls: int
    seconds: float
    superposed: Superposed | None = None


class _Watched(Control):
    """A composition that keeps what its models said."""

    process: GaussianProcess

    def __init__(self, inner: Composed) -> None:
        super().__init__(inner.process)
        self.inner = inner
        self.logsnr: list[float] = []
        self.eps: list[list[Tensor | None]] = []
        self.weights: list[list[float]] = []

    def weights_at(self, xt: Tensor, t: Time) -> list[float | Tensor]:
        """Return the composition's weights."""
        return self.inner.weights_at(xt, t)

    def predictions(self, xt: Tensor, t: Time, cond: Cond, weights: Sequence[float | Tensor]) -> list:
        """Return the models' predictions, remembered."""
        found = self.inner.predictions(xt, t, cond, weights)
        said = iter(found)
        self.eps.append([None if isinstance(w, float) and w == 0.0 else _eps(next(said)[0]) for w in weights])
        self.weights.append([float(w.mean()) if isinstance(w, Tensor) else w for w in weights])
        self.logsnr.append(2 * float(self.process.at(t, xt).half_logsnr))
        return found

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred | TokenPred:
        """Predict as the composition does."""
        pairs = self.predictions(xt, t, cond, self.weights_at(xt, t))
        return self.inner.mixed(pairs, xt, t)


def trace(policy: ComposedPolicy, observation: History, noise: Keyed) -> Trace:
    """Sample a chunk as the policy does, and watch it.

    Args:
        observation: key → [b n_obs ...].
        noise: one stream per row.

    Raises:
        UsageError: one parent has all the weight; there is nothing to compare.
    """
    if policy.alone is not None:
        raise UsageError(
            f"'{policy.names[policy.alone]}' has all the weight; give at least two parents weight to trace."
        )
    began = time.perf_counter()
    watched, condition = _Watched(policy.model()), policy.condition(observation)
    shape = (len(noise), policy.spec.horizon, policy.spec.action_dim)
    superposed = None
    with torch.inference_mode():
        if policy.operator is None:
            policy.sampler.draw(watched, shape, noise, condition)
        else:
            superposed = policy.operator.draw(watched, policy.sampler, shape, noise, condition)
    seconds = time.perf_counter() - began
    count = len(policy.parents)
    gaps = torch.full((len(watched.eps), count, count), float("nan"))
    for step, said in enumerate(watched.eps):
        for i, first in enumerate(said):
            for j, second in enumerate(said):
                if first is not None and second is not None:
                    gap = (first - second).square().mean().sqrt()
                    gaps[step, policy.order[i], policy.order[j]] = float(gap)
    weights = torch.zeros(len(watched.weights), count)
    weights[:, policy.order] = torch.tensor(watched.weights)
    calls = sum(eps is not None for said in watched.eps for eps in said)
    return Trace(tuple(watched.logsnr), gaps, weights, calls, seconds, superposed)


@dataclass(frozen=True)
class ErrorTable:
    """Errors of the parents at some noise levels.

    Args:
        names: of the parents.
        logsnr: levels, increasing.
        gram: [l m m] E⟨err_i, err_j⟩ per number of a chunk, errors of eps against the noise that was added.
    """

    names: tuple[str, ...]
    logsnr: tuple[float, ...]
    gram: Float[Tensor, "l m m"]

    def weights(self) -> Float[Tensor, "l m"]:
        """Return the convex weights with the least error of the mix at every level."""
        return torch.stack([best_weights(level) for level in self.gram])

    def correlation(self, first: int = 0, second: int = 1) -> Float[Tensor, " l"]:
        """Return C/min(A, B) of two parents at every level; below 1 a mix has less error than either."""
        pair = self.gram[:, first, second]
        return pair / torch.minimum(self.gram[:, first, first], self.gram[:, second, second])

    def gain(self) -> Float[Tensor, " l"]:
        """Return by how much the best mix lowers the mean squared error of the best parent, in [0, 1)."""
        weights = self.weights()
        mixed = torch.einsum("li,lij,lj->l", weights, self.gram, weights)
        return 1 - mixed / self.gram.diagonal(dim1=1, dim2=2).amin(1)

    def schedule(self) -> ByLogSnr:
        """Return the best weights as a schedule over the log-SNR ("residual" weights, ours)."""
        rows = self.weights()
        return ByLogSnr(self.logsnr, tuple(tuple((row / row.sum()).tolist()) for row in rows))

    def table(self) -> str:
        """Return the levels as a Markdown table."""
        head = ["log-SNR", *[f"error {name}" for name in self.names], "C/min(A, B)", "best weights", "gain"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        pair = self.correlation() if len(self.names) == 2 else torch.full((len(self.logsnr),), float("nan"))
        for level, gram, ratio, row, gain in zip(self.logsnr, self.gram, pair, self.weights(), self.gain()):
            cells = [f"{level:.1f}", *[f"{float(e):.4f}" for e in gram.diagonal()], f"{float(ratio):.3f}"]
            shares = ", ".join(f"{float(w):.2f}" for w in row)
            lines.append("| " + " | ".join([*cells, shares, f"{float(gain):.3f}"]) + " |")
        return "\n".join(lines) + "\n"


def parent_errors(
    policy: ComposedPolicy,
    observation: History,
    chunks: Float[Tensor, "n h a"],
    *,
    logsnr: Sequence[float] = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0),
    noise: Keyed,
) -> ErrorTable:
    """Measure the parents' errors on held-out pairs of observations and expert chunks.

    Args:
        policy: its parents, weights aside.
        observation: key → [n n_obs ...].
        chunks: what the expert did, in the environment's units, from the oldest observation on.
        logsnr: increasing levels; where the reference does not reach one, its end is used.
        noise: one stream per row; level k takes counter k.

    Raises:
        UsageError: chunks of another shape, or parents that predict different parts of a chunk.
    """
    shape = (len(noise), policy.spec.horizon, policy.spec.action_dim)
    if tuple(chunks.shape) != shape:
        raise UsageError(f"chunks have shape {tuple(chunks.shape)}; give {shape}, one per row of noise.")
    if not bool(policy.composed.all()):
        raise UsageError("the parents predict different parts of a chunk; errors are compared for equal horizons.")
    count = len(policy.parents)
    even = policy.with_weights([1.0 / count] * count)
    model, condition = even.model(), even.condition(observation)
    process = model.process
    assert isinstance(process, GaussianProcess)  # ComposedPolicy checked its parents
    x0 = policy.parents[policy.reference].action_normalizer.normalize(chunks.float())
    grams = []
    with torch.inference_mode():
        for level, value in enumerate(logsnr):
            t = process.schedule.time_at(float(value))
            eps = Keyed(noise.keys, noise.counter + level).normal(shape, x0.device)
            pairs = model.predictions(process.corrupt(x0, t, eps), t, condition, [1.0 / count] * count)
            errors = torch.empty(count, eps.numel(), dtype=torch.float64)
            for place, (pred, _) in enumerate(pairs):
                errors[policy.order[place]] = (_eps(pred) - eps).double().flatten()
            grams.append(errors @ errors.T / eps.numel())
    return ErrorTable(policy.names, tuple(float(v) for v in logsnr), torch.stack(grams))


def _eps(pred: Pred | TokenPred) -> Tensor:
    """The predicted noise; parents are Gaussian."""
    assert isinstance(pred, Pred)
    return pred.eps
