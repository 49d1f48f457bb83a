"""Exact members of the family: models whose posterior, samples, log-density and tilts are known in closed form.

GaussianMixture is a Gaussian model for every schedule: with components N(μ, Σ), x_t is a mixture of N(aμ, S),
S = a²Σ + s²I, and E[x0 | x_t, component] = μ + aΣS⁻¹(x_t - aμ), E[eps | x_t, component] = sS⁻¹(x_t - aμ).
EnumerableTokens is its masked twin: a table over V^n, whose posterior given the visible tokens is a sum.  Every method
is verified against these two; derived here.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.process.gaussian import GaussianProcess, Time
from gencontrol.process.masked import MaskedProcess, uniform
from gencontrol.process.schedule import Scalar
from gencontrol.rng import randn
from gencontrol.types import Prediction

_MAX_STATES = 1_000_000


class GaussianMixture(nn.Module):
    """A mixture of Gaussians as a Model; x is [b *d] with d numbers per item in all.

    Its condition is None or non-negative factors [b k] on the component weights, so that class-conditional models and
    classifier-free guidance have an exact member too.

    Args:
        means, covariances: of the components, any symmetric positive semi-definite covariances.
        weights: positive; normalised here.
        process: the noise law; its schedule decides what the call means by t.

    Raises:
        ValueError: shapes do not fit, a covariance is not symmetric positive semi-definite, or a weight is not > 0.
    """

    process: GaussianProcess
    means: Tensor
    covariances: Tensor
    log_weights: Tensor
    _spectrum: Tensor
    _vectors: Tensor

    def __init__(
        self,
        means: Float[Tensor, "k d"],
        covariances: Float[Tensor, "k d d"],
        weights: Float[Tensor, " k"],
        process: GaussianProcess,
    ) -> None:
        super().__init__()
        means, covariances, weights = (value.detach().double() for value in (means, covariances, weights))
        if not bool((weights > 0).all()):
            raise ValueError(f"GaussianMixture weights must be > 0, not {weights.tolist()}")
        if not torch.allclose(covariances, covariances.mT, rtol=1e-8, atol=1e-12):
            raise ValueError("GaussianMixture covariances must be symmetric")
        spectrum, vectors = torch.linalg.eigh(covariances)
        if bool((spectrum < -1e-10 * spectrum.abs().amax().clamp_min(1e-300)).any()):
            raise ValueError(f"a covariance has the negative eigenvalue {float(spectrum.min()):g}; it must be >= 0")
        self.process = process
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("_spectrum", spectrum.clamp_min(0))
        self.register_buffer("_vectors", vectors)

    @property
    def weights(self) -> Float[Tensor, " k"]:
        """Normalised weights of the components."""
        return self.log_weights.exp()

    def forward(self, xt: Tensor, t: Time, cond: Tensor | None = None) -> Pred:
        """Return the posterior at x_t; computed in float64, returned in x_t's dtype (at least float32).

        Raises:
            ValueError: x_t has another number of dimensions than the mixture, or s = 0 meets a singular covariance.
        """
        coeffs = self.process.at(t, xt.double())
        flat, (a, s) = self._flat(xt), (_row(coeffs.a), _row(coeffs.s))
        projected, variance = self._project(flat, a, s)
        share = torch.softmax(self._joint(projected, variance, cond), dim=1)
        whitened = projected / variance
        x0 = self.means + a * self._rotate(whitened * self._spectrum)
        eps = s * self._rotate(whitened)
        x0, eps = (torch.einsum("bk,bkd->bd", share, value) for value in (x0, eps))
        wide = torch.promote_types(xt.dtype, torch.float32)
        # v is the coordinate that no end of a schedule makes singular
        v = (_flat_row(coeffs.a) * eps - _flat_row(coeffs.s) * x0).reshape(xt.shape)
        return Pred(v.to(wide), xt.to(wide), self.process.at(t, xt), Prediction.V)

    def sample(
        self, n: int, generator: torch.Generator | None, components: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n d"]:
        """Draw n clean samples in float64, of given components or of components drawn by their weights."""
        if components is None:
            cumulative = self.weights.cumsum(0)
            draw = uniform((n,), generator, cumulative.device) * cumulative[-1]
            components = torch.searchsorted(cumulative, draw, right=True).clamp(max=len(cumulative) - 1)
        noise = randn((n, self.means.shape[1]), generator, self.means.device, torch.float64)
        scaled = noise * self._spectrum[components].sqrt()
        return self.means[components] + torch.einsum("nij,nj->ni", self._vectors[components], scaled)

    def log_prob(self, x: Float[Tensor, "b *d"], t: Time = 0.0) -> Float[Tensor, " b"]:
        """Return the log-density of the marginal at t (0: clean data, s taken as 0) in float64."""
        coeffs = self.process.landing(t, x.double())
        projected, variance = self._project(self._flat(x), _row(coeffs.a), _row(coeffs.s))
        return torch.logsumexp(self._joint(projected, variance, None), dim=1)

    def tilt(
        self, linear: Float[Tensor, " d"] | None = None, quadratic: Float[Tensor, "d d"] | None = None
    ) -> GaussianMixture:
        """Return the law p(x)·exp(r(x))/Z with r(x) = linear·x - ½·xᵀ·quadratic·x, again a mixture.

        Raises:
            ValueError: quadratic is not symmetric, or a tilted precision is not positive definite (Z is infinite).
        """
        means, covariances, gains = self._tilted(linear, quadratic)
        log_weights = self.log_weights + gains
        weights = torch.exp(log_weights - log_weights.max())
        return GaussianMixture(means, covariances, weights.clamp_min(1e-300), self.process)

    def log_normaliser(
        self, linear: Float[Tensor, " d"] | None = None, quadratic: Float[Tensor, "d d"] | None = None
    ) -> float:
        """Return log Z = log E[exp(r(x))] of the tilt with these arguments: the optimal soft value."""
        return float(torch.logsumexp(self.log_weights + self._tilted(linear, quadratic)[2], dim=0))

    def _tilted(
        self, linear: Tensor | None, quadratic: Tensor | None
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d d"], Float[Tensor, " k"]]:
        """Means, covariances and log E[exp r] of the tilted components.

        With x = μ + Rz, R = Σ^½: r = r(μ) + g·z - ½zᵀMz, g = R(linear - Qμ), M = RQR.
        """
        size = self.means.shape[1]
        slope = self.means.new_zeros(size) if linear is None else linear.to(self.means)
        curve = self.means.new_zeros(size, size) if quadratic is None else quadratic.to(self.means)
        if slope.shape != (size,) or curve.shape != (size, size):
            raise ValueError(f"tilt needs linear [{size}] and quadratic [{size} {size}]")
        if not torch.allclose(curve, curve.T, rtol=1e-8, atol=1e-12):
            raise ValueError("the quadratic part of a tilt must be symmetric")
        root = (self._vectors * self._spectrum.sqrt()[:, None, :]) @ self._vectors.mT
        inner = torch.eye(size).to(root) + root @ curve @ root
        lowest = torch.linalg.eigvalsh(inner).amin(1)
        if bool((lowest <= 1e-12).any()):
            raise ValueError(
                f"the tilted precision of component {int(lowest.argmin())} is not positive definite (eigenvalue "
                f"{float(lowest.min()):g} times the untilted): exp(r) outgrows the density; use a larger quadratic part"
            )
        gradient = slope - self.means @ curve
        pulled = (root @ gradient[..., None])[..., 0]
        solved = torch.linalg.solve(inner, pulled[..., None])[..., 0]
        means = self.means + (root @ solved[..., None])[..., 0]
        covariances = root @ torch.linalg.solve(inner, root)
        at_mean = self.means @ slope - 0.5 * torch.einsum("ki,ij,kj->k", self.means, curve, self.means)
        gains = at_mean + 0.5 * (pulled * solved).sum(1) - 0.5 * torch.logdet(inner)
        return means, 0.5 * (covariances + covariances.mT), gains

    def _flat(self, x: Tensor) -> Float[Tensor, "b d"]:
        """x as [b d] in float64."""
        flat = x.double().flatten(1)
        if flat.shape[1] != self.means.shape[1]:
            raise ValueError(f"x has {flat.shape[1]} numbers per item but the mixture has {self.means.shape[1]}")
        return flat

    def _project(
        self, flat: Float[Tensor, "b d"], a: Scalar, s: Scalar
    ) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "#b k d"]]:
        """x_t - aμ and the variances of the noisy components, in the components' own axes."""
        residual = flat[:, None, :] - a * self.means
        variance = torch.as_tensor(a * a * self._spectrum[None] + s * s)
        if bool((variance <= 0).any()):
            raise ValueError("a singular covariance has no density at s = 0; ask at t > 0 or add variance")
        return torch.einsum("kji,bkj->bki", self._vectors, residual), variance

    def _rotate(self, value: Float[Tensor, "b k d"]) -> Float[Tensor, "b k d"]:
        """Back from the components' own axes."""
        return torch.einsum("kij,bkj->bki", self._vectors, value)

    def _joint(self, projected: Tensor, variance: Tensor, cond: Tensor | None) -> Float[Tensor, "b k"]:
        """log(weight·density) of every component."""
        size = self.means.shape[1]
        density = -0.5 * (projected.square() / variance + variance.log()).sum(-1) - 0.5 * size * math.log(2 * math.pi)
        joint = self.log_weights + density
        return joint if cond is None else joint + torch.log(cond.to(joint))


class EnumerableTokens(nn.Module):
    """A law over V^n by its table, as a Model of a masked process.

    Its condition is None or non-negative factors [b, V, ..., V] on the table.

    Args:
        table: non-negative weights, one axis of size V per position; normalised here.
        process: masked process with vocab_size V and a mask id beyond the vocabulary.

    Raises:
        ValueError: sizes do not fit, the table is too large (1e6 entries), negative or zero.
    """

    process: MaskedProcess
    table: Tensor
    _states: Tensor

    def __init__(self, table: Float[Tensor, "*v"], process: MaskedProcess) -> None:
        super().__init__()
        size = process.vocab_size
        if table.ndim < 1 or any(n != size for n in table.shape) or table.numel() > _MAX_STATES:
            raise ValueError(
                f"table has shape {tuple(table.shape)}; give [V ... V] with V = {size}, at most 1e6 entries"
            )
        if process.mask_id < size:
            raise ValueError(
                f"mask_id {process.mask_id} lies in the vocabulary; the table has no mask, give id >= {size}"
            )
        table = table.detach().double()
        if not bool((table >= 0).all()) or not float(table.sum()) > 0:
            raise ValueError("table entries must be >= 0 with a positive sum")
        self.process = process
        self.register_buffer("table", table / table.sum())
        axes = torch.meshgrid(*[torch.arange(size) for _ in table.shape], indexing="ij")
        self.register_buffer("_states", torch.stack([axis.reshape(-1) for axis in axes], dim=1))

    @property
    def length(self) -> int:
        """Number of positions n."""
        return self.table.ndim

    def forward(self, xt: Int[Tensor, "b n"], t: Time, cond: Tensor | None = None) -> TokenPred:
        """Return the log-marginals of the clean tokens given the visible ones; they do not depend on t.

        Raises:
            ValueError: the visible tokens of an item have probability 0.
        """
        if xt.shape[1] != self.length:
            raise ValueError(f"x has {xt.shape[1]} positions but the table has {self.length}")
        fits = (self._states[None] == xt[:, None]) | self.process.masked(xt)[:, None]
        weight = self.table.reshape(1, -1) * fits.all(-1)
        if cond is not None:
            weight = weight * cond.to(weight).flatten(1)
        total = weight.sum(1)
        if bool((total <= 0).any()):
            raise ValueError("the visible tokens of an item have probability 0 under the table")
        one_hot = torch.nn.functional.one_hot(self._states, self.process.vocab_size).to(weight)
        marginals = torch.einsum("bs,snv->bnv", weight / total[:, None], one_hot)
        return TokenPred(marginals.log().float(), xt)

    def sample(self, n: int, generator: torch.Generator | None) -> Int[Tensor, "n length"]:
        """Draw n clean sequences."""
        cumulative = self.table.reshape(-1).cumsum(0)
        draw = uniform((n,), generator, cumulative.device) * cumulative[-1]
        return self._states[torch.searchsorted(cumulative, draw, right=True).clamp(max=len(cumulative) - 1)]

    def log_prob(self, x: Int[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """Return the log-probability of clean sequences in float64."""
        return self.table[tuple(x.unbind(1))].log()

    def tilt(self, values: Float[Tensor, "*v"]) -> EnumerableTokens:
        """Return the law p(x)·exp(values[x])/Z; values has the table's shape."""
        if values.shape != self.table.shape:
            raise ValueError(f"values have shape {tuple(values.shape)} but the table has {tuple(self.table.shape)}")
        logits = self.table.log() + values.double()
        return EnumerableTokens(torch.softmax(logits.reshape(-1), 0).reshape(self.table.shape), self.process)


def _row(value: Scalar) -> Scalar:
    """A coefficient [b 1 ...] as [b 1 1], to meet [b k d]."""
    return value.double().reshape(-1, 1, 1) if isinstance(value, Tensor) else value


def _flat_row(value: Scalar) -> Scalar:
    """A coefficient [b 1 ...] as [b 1], to meet [b d]."""
    return value.double().reshape(-1, 1) if isinstance(value, Tensor) else value
