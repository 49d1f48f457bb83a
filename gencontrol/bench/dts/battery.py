"""The targets of docs/methods/dts.md#e-dts-5: laws whose tilt is known in closed form, walked without any error.

Gaussian mixtures are walked by their exact transitions p(x_s | x_t), so that closed forms are the truth and nothing but
the method is judged.  The grid has the levels of a path of 50 steps (t = .8, .6, .4, .2, 0) and before each of them the
time at which such a path looks (.82 …): ten exact steps stand for fifty, and every one counts five calls.  Tokens are
revealed one by one, which is exact; a call counts ten.  Families and numbers were chosen before any method was run on
them (only the noise of a measurement was raised where the base's share was below .001), and no setting of a method was
chosen on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.bench.dts.measure import Law, median_scaled, mixture_mmd2
from gencontrol.models.exact import EnumerableTokens, GaussianMixture
from gencontrol.process import GaussianProcess, Linear, MaskedProcess
from gencontrol.process.gaussian import Time
from gencontrol.rng import randn, stream
from gencontrol.sampling.chain import Chain, make_chain
from gencontrol.sampling.masked_steps import Confidence
from gencontrol.sampling.state import Generators, State, Step
from gencontrol.sampling.steps import GaussianStep

#: times of a path: the levels, and where one looks before each of them
GRID = (1.0, 0.82, 0.8, 0.62, 0.6, 0.42, 0.4, 0.22, 0.2, 0.02, 0.0)
LEVELS = (0.8, 0.6, 0.4, 0.2)


@dataclass(frozen=True)
class ExactStep(GaussianStep):
    """Draws x_s from p(x_s | x_t) of a mixture: a component, x0 given it, and the bridge between x0 and x_t.

    x_t = a·x0 + s·e as of a Markov forward process, as the step `sde` of level 1 has it.  The model call is made by
    those who look at x̂0; the step itself needs the mixture alone.
    """

    mixture: Any = None
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def stochastic_at(self, t_next: float) -> bool:
        """True at every step, the last one too."""
        return True

    def draw(self, x: Tensor, generator: Generators) -> Float[Tensor, "b 2d+1"]:
        """Normal numbers for the component, x0 and the bridge."""
        return randn((len(x), 2 * x.shape[1] + 1), generator, x.device, torch.float64)

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Any = None, noise: Tensor | None = None
    ) -> State:
        """Return the states at t_next."""
        if noise is None:
            raise ValueError("exact transitions draw: give noise (step.draw(x, generator))")
        x, mixture, size = state.x.double(), self.mixture, state.x.shape[1]
        a, s = 1.0 - float(t), float(t)
        a_next, s_next = 1.0 - float(t_next), float(t_next)
        inverse, offset, gain, root = self._at(a, s)
        gap = x[:, None] - a * mixture.means
        joint = offset - 0.5 * (gap * torch.einsum("kij,bkj->bki", inverse, gap)).sum(-1)
        share = torch.softmax(joint, 1).cumsum(1)
        uniform = torch.special.ndtr(noise[:, :1]) * share[:, -1:]
        k = torch.searchsorted(share, uniform, right=True)[:, 0].clamp(max=share.shape[1] - 1)
        mean = mixture.means[k] + torch.einsum("bij,bj->bi", gain[k], gap[torch.arange(len(x)), k])
        x0 = mean + torch.einsum("bij,bj->bi", root[k], noise[:, 1 : size + 1])
        ratio = a / a_next
        pull = ratio * s_next**2 / s**2
        std = s_next * math.sqrt(max(s * s - (ratio * s_next) ** 2, 0.0)) / s
        return State((a_next * x0 + pull * (x - a * x0) + std * noise[:, size + 1 :]).to(state.x.dtype))

    def _at(self, a: float, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What depends on the time alone: inverse and log-density offset of x_t's components, gain and root for x0."""
        if (a, s) not in self._known:
            cov = self.mixture.covariances
            spread = a * a * cov + s * s * torch.eye(cov.shape[1], dtype=torch.float64)
            inverse = torch.linalg.inv(spread)
            gain = a * cov @ inverse
            left = cov - a * gain @ cov
            offset = self.mixture.log_weights - 0.5 * torch.logdet(spread)
            self._known[a, s] = inverse, offset, gain, _root(0.5 * (left + left.mT))
        return self._known[a, s]


def _root(matrix: Float[Tensor, "k d d"]) -> Float[Tensor, "k d d"]:
    """Symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT


@dataclass(frozen=True)
class Problem:
    """One target of the battery.

    Args:
        name: in the tables.
        chain: base law and step, one prompt.
        reward: of clean states; τ is 1.
        price: calls that a step of the chain counts.
        branch: levels.
        log_z: exact, NaN where it is not known.
        error: squared distance of a weighted sample to the target.
        share: the base's effective share.
        options: of the Scorer (decode, context).
    """

    name: str
    chain: Chain
    reward: Any
    price: int
    branch: Any
    log_z: float
    error: Callable[[Law], float]
    share: float
    options: dict[str, Any]


def _mixture(means: Tensor, covariances: Tensor, weights: Tensor) -> GaussianMixture:
    return GaussianMixture(means, covariances, weights, GaussianProcess(Linear()))


def _round(means: Tensor, std: float | Tensor) -> Float[Tensor, "k d d"]:
    """Round covariances, one std for all or one each."""
    k, d = means.shape
    return torch.as_tensor(std, dtype=torch.float64).expand(k)[:, None, None] ** 2 * torch.eye(d, dtype=torch.float64)


def _cigars(k: int, d: int, draw: torch.Generator, low: float, high: float) -> Float[Tensor, "k d d"]:
    """Covariances with random axes and standard deviations between low and high."""
    axes = torch.linalg.qr(torch.randn(k, d, d, generator=draw, dtype=torch.float64))[0]
    std = low + (high - low) * torch.rand(k, d, generator=draw, dtype=torch.float64)
    found = (axes * std.square()[:, None]) @ axes.mT
    return 0.5 * (found + found.mT)


def _problem(
    name: str, base: GaussianMixture, law: GaussianMixture, log_z: float, reward: Callable[[Tensor], Tensor]
) -> Problem:
    """A tilted mixture, with the base's share by 50,000 draws."""
    bandwidths = median_scaled(law.sample(1000, stream(0, "dts/median")))
    log_w = reward(base.sample(50_000, stream(0, "dts/share"))).double()
    share = float(torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0))) / len(log_w)
    step: Step = ExactStep(mixture=base)
    chain = make_chain(base, (base.means.shape[1],), step=step, times=GRID)
    return Problem(name, chain, reward, 5, LEVELS, log_z, lambda x: mixture_mmd2(x, law, bandwidths), share, {})


def _quadratic(
    name: str, base: GaussianMixture, linear: Tensor, curve: Tensor | None = None, constant: float = 0.0
) -> Problem:
    """r(x) = constant + linear·x − ½·xᵀ·curve·x."""

    def reward(x: Tensor) -> Tensor:
        wide = x.double()
        bent = 0.0 if curve is None else 0.5 * ((wide @ curve) * wide).sum(1)
        return constant + wide @ linear - bent

    return _problem(name, base, base.tilt(linear, curve), base.log_normaliser(linear, curve) + constant, reward)


def _observed(name: str, base: GaussianMixture, rows: Tensor, seen: Tensor, noise: float) -> Problem:
    """r(x) = −|rows·x − seen|²/(2·noise²): a linear measurement."""
    curve = rows.T @ rows / noise**2
    return _quadratic(name, base, rows.T @ seen / noise**2, curve, -float(seen @ seen) / (2 * noise**2))


def _odds(name: str, base: GaussianMixture, odds: Tensor) -> Problem:
    """r(x) = log of Σ odds·N(x)/Σ weights·N(x): the tilt moves the weights of the modes and nothing else."""
    law = _mixture(base.means, base.covariances, base.weights * odds)

    def reward(x: Tensor) -> Tensor:
        return law.log_prob(x.double()) - base.log_prob(x.double()) + log_z

    log_z = math.log(float(base.weights @ odds))
    return _problem(name, base, law, log_z, reward)


def gaussians() -> list[Problem]:
    """Twelve mixtures of 2 to 32 dimensions."""
    f = torch.float64
    draw = stream(20, "dts/battery")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=f)

    angle = 2 * math.pi * torch.arange(5, dtype=f) / 5
    ring = 3.0 * torch.stack([angle.cos(), angle.sin()], 1)
    cluster = 4.0 * torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]], dtype=f)
    nested = (cluster[:, None] + 0.9 * torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]], dtype=f)).reshape(9, 2)
    board = torch.cartesian_prod(torch.arange(4, dtype=f), torch.arange(4, dtype=f)) * 1.6 - 2.4
    colour = ((torch.arange(4)[:, None] + torch.arange(4)) % 2).flatten()
    chord = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.6], [0.4, -2.2]], dtype=f)
    found = [
        _odds(
            "ring, 5 modes, 2-D",
            _mixture(ring, _round(ring, 0.5), torch.tensor([5.0, 1.0, 3.0, 1.0, 2.0])),
            torch.tensor([0.2, 5.0, 0.5, 3.0, 1.0], dtype=f),
        ),
        _quadratic(
            "slope, 6 modes, 3-D",
            _mixture(2 * normal(6, 3), _cigars(6, 3, draw, 0.2, 0.7), torch.ones(6)),
            torch.tensor([1.2, -0.8, 0.5], dtype=f),
        ),
        _observed(
            "band across 7 cigars, 2-D",
            _mixture(2.5 * normal(7, 2), _cigars(7, 2, draw, 0.1, 1.0), torch.ones(7)),
            torch.tensor([[0.8, 0.6]], dtype=f),
            torch.tensor([1.0], dtype=f),
            0.12,
        ),
        _observed(
            "2 of 8 measured, 4 modes",
            _mixture(1.5 * normal(4, 8), _cigars(4, 8, draw, 0.2, 0.8), torch.tensor([4.0, 3.0, 2.0, 1.0])),
            torch.eye(8, dtype=f)[:2],
            torch.tensor([0.7, -0.5], dtype=f),
            0.3,
        ),
        _observed(
            "3 of 16 measured, 8 modes",
            _mixture(1.2 * normal(8, 16), _cigars(8, 16, draw, 0.3, 0.6), torch.ones(8)),
            normal(3, 16) / 4,
            torch.tensor([0.5, 0.2, -0.6], dtype=f),
            0.35,
        ),
        _quadratic(
            "slope, 5 modes, 32-D",
            _mixture(normal(5, 32), _cigars(5, 32, draw, 0.1, 0.5), torch.ones(5)),
            0.45 * normal(32),
        ),  # fmt: skip
        _quadratic(
            "steep slope, 1 mode, 4-D",
            _mixture(torch.zeros(1, 4, dtype=f), _cigars(1, 4, draw, 0.5, 1.0), torch.ones(1)),
            torch.tensor([2.0, 1.5, -1.5, 0.5], dtype=f),
        ),
        _observed(
            "between the modes, 2-D",
            _mixture(chord, _round(chord, 0.35), torch.tensor([4.0, 3.0, 2.0, 1.0])),
            torch.eye(2, dtype=f),
            torch.tensor([0.2, 0.1], dtype=f),
            0.95,
        ),
        _odds(
            "3 x 3 nested modes, 2-D",
            _mixture(nested, _round(nested, 0.15), torch.ones(9)),
            torch.tensor([0.1, 6.0, 0.1, 0.5, 0.1, 4.0, 2.0, 0.2, 0.2], dtype=f),
        ),
        _odds(
            "needle among 20, 6-D",
            _mixture(2 * normal(20, 6), _cigars(20, 6, draw, 0.2, 0.5), torch.ones(20)),
            torch.cat([torch.ones(19, dtype=f), torch.tensor([60.0], dtype=f)]),
        ),
        _odds(
            "chessboard of 16, 2-D",
            _mixture(board, _round(board, 0.25), 0.2 + torch.rand(16, generator=draw, dtype=f)),
            torch.where(colour == 1, 4.0, 0.25).double() * torch.exp(0.5 * normal(16)),
        ),
        _quadratic(
            "wider tails, 2 modes, 10-D",
            _mixture(0.8 * normal(2, 10), _cigars(2, 10, draw, 0.4, 0.8), torch.ones(2)),
            torch.zeros(10, dtype=f),
            -0.45 * torch.eye(10, dtype=f),
        ),
    ]
    return found


def _table(name: str, model: EnumerableTokens, rewards: Tensor) -> Problem:
    """Tokens with rewards by table; the distance is Σ (p − q)²."""
    law = model.tilt(rewards).table.flatten()
    shape, length = rewards.shape, rewards.ndim
    base = model.table.flatten()
    z = float(base @ rewards.flatten().exp())
    share = z**2 / float(base @ (2 * rewards.flatten()).exp())
    place = torch.tensor([math.prod(shape[i + 1 :]) for i in range(length)])

    def error(found: Law) -> float:
        mine = torch.zeros(len(law), dtype=torch.float64)
        mine.index_add_(0, (found.x.long() * place).sum(1), found.weights)
        return float((mine - law).square().sum())

    chain = make_chain(model, (length,), steps=length, step=Confidence(temperature=1.0))
    levels = min(5, length)
    return Problem(name, chain, lambda x: rewards[tuple(x.unbind(1))], 10, levels, math.log(z), error, share, {})


def _along(length: int, tokens: int, pair: Sequence[int], table: Tensor) -> Tensor:
    """A table of one or two positions, as a table of all."""
    return table.reshape([tokens if place in pair else 1 for place in range(length)])


def tables() -> list[Problem]:
    """Four laws of tokens."""
    f, draw = torch.float64, stream(21, "dts/battery")

    def model(tokens: int, length: int, spread: float) -> EnumerableTokens:
        logits = spread * torch.randn((tokens,) * length, generator=draw, dtype=f)
        return EnumerableTokens(logits.exp(), MaskedProcess(tokens, tokens))

    def zeros(tokens: int, length: int) -> Tensor:
        return torch.zeros((tokens,) * length, dtype=f)

    random = 1.2 * torch.randn((5,) * 4, generator=draw, dtype=f)
    counts = torch.stack(torch.meshgrid(*[torch.arange(2)] * 10, indexing="ij"), -1).sum(-1)
    repeats, ladder = zeros(4, 6), zeros(3, 7)
    for place in range(5):
        repeats = repeats + _along(6, 4, (place, place + 1), 1.1 * torch.eye(4, dtype=f))
    for place in range(7):
        ladder = ladder + _along(7, 3, (place,), 0.9 * torch.tensor([-1.0, 0.0, 1.0], dtype=f))
    return [
        _table("random table, 5^4 tokens", model(5, 4, 1.0), random),
        _table("even number of ones, 2^10 tokens", model(2, 10, 0.7), 3.0 * (counts % 2 == 0).double()),
        _table("equal neighbours, 4^6 tokens", model(4, 6, 0.5), repeats),
        _table("sum of tokens, 3^7", model(3, 7, 0.8), ladder),
    ]
