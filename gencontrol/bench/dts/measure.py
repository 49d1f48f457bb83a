"""What the parts of `bench dts` share: weighted laws, MMD², peers at a budget, anytime growth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.models.exact import GaussianMixture
from gencontrol.sampling.chain import Chain
from gencontrol.sampling.particles import Target, spend
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.stats import Estimate, student_t


@dataclass(frozen=True)
class Law:
    """Points x [n d] with weights [n] that sum to one, both float64: the law that a method's samples are drawn from."""

    x: Float[Tensor, "n d"]
    weights: Float[Tensor, " n"]

    @classmethod
    def of(cls, x: Float[Tensor, "n *d"], log_weights: Float[Tensor, " n"]) -> Law:
        """Normalise; points without weight are dropped."""
        weights = torch.softmax(log_weights.double(), 0).cpu()
        kept = weights > 0
        return cls(x.flatten(1).double().cpu()[kept], weights[kept])

    @property
    def ess(self) -> float:
        """1/Σw²."""
        return float(1.0 / self.weights.square().sum())


#: DTS settings of the parts "mixture" and "digits": widening by label, and the rules that each tree is read by, by what
#: they add to the label
WIDENED = {"DTS (C=2, α=.8)": "paper", "DTS (C=1, α=.5)": "small"}
READ_BY = {"": "boltzmann", ", robust": "robust"}
PAPER, SMALL = WIDENED
TREE_ROWS = tuple(label + suffix for label in WIDENED for suffix in READ_BY)


def tree_law(tree: DiffusionTree, root: int, rule: str = "boltzmann") -> Law:
    """The law of reading samples out of a tree by a rule, without the noise of drawing them."""
    leaves, law = tree.leaf_law(root, rule)
    return Law.of(tree.gather(leaves).x, torch.from_numpy(law).log())


def sample_mmd2(law: Law, reference: Law, bandwidths: Sequence[float]) -> float:
    """MMD² of a law to samples of the target, mean over kernels exp(−‖x − y‖²/(2h²)) (Gretton et al. 2012).

    The law's own term is exact (it is a discrete law: what the unbiased estimate from draws expects).  The reference's
    term leaves out its diagonal, so that a finite reference adds no bias; a value may lie a little below zero.
    """
    own = _mean_kernel(law.x, law.weights, law.x, law.weights, bandwidths)
    across = _mean_kernel(law.x, law.weights, reference.x, reference.weights, bandwidths)
    return own - 2 * across + reference_term(reference, bandwidths)


def reference_term(reference: Law, bandwidths: Sequence[float]) -> float:
    """E k(y, y') over different points of a weighted sample; remembered on the sample, which is used many times."""
    key = ("_term", tuple(bandwidths))
    cache: dict[Any, float] = reference.__dict__.setdefault("_cache", {})
    if key not in cache:
        w = reference.weights
        square = float(w.square().sum())
        cache[key] = (_mean_kernel(reference.x, w, reference.x, w, bandwidths) - square) / (1 - square)
    return cache[key]


def mixture_mmd2(law: Law, target: GaussianMixture, bandwidths: Sequence[float]) -> float:
    """MMD² of a law to a Gaussian mixture in closed form: expectations of Gaussian kernels are Gaussian (derived).

    With N(μ, Σ): E k_h(x, Y) = h^d·|Σ + h²I|^(−½)·exp(−½(x − μ)ᵀ(Σ + h²I)⁻¹(x − μ)).
    """
    total = 0.0
    for h in bandwidths:
        across = law.weights @ _smoothed(law.x, target, target.covariances, h)
        spread = target.covariances[:, None] + target.covariances[None]
        own = sum(
            target.weights[i] * _smoothed(target.means[i : i + 1], target, spread[i], h)[0]
            for i in range(len(target.means))
        )
        total += float(own - 2 * across)
    return total / len(bandwidths) + _mean_kernel(law.x, law.weights, law.x, law.weights, bandwidths)


def _smoothed(
    x: Float[Tensor, "n d"], target: GaussianMixture, covariances: Float[Tensor, "k d d"], h: float
) -> Float[Tensor, " n"]:
    """Σ_k weight_k·E k_h(x, N(μ_k, covariance_k))."""
    size = x.shape[1]
    wide = covariances + h * h * torch.eye(size, dtype=torch.float64)
    gap = x[:, None] - target.means
    exponent = -0.5 * (gap * torch.linalg.solve(wide, gap[..., None])[..., 0]).sum(-1)
    scale = size * math.log(h) - 0.5 * torch.logdet(wide)
    return torch.exp(exponent + scale + target.log_weights).sum(1)


def _mean_kernel(x: Tensor, v: Tensor, y: Tensor, w: Tensor, bandwidths: Sequence[float], rows: int = 2048) -> float:
    """Σ v_i w_j k(x_i, y_j), mean over bandwidths, in blocks of rows."""
    total = 0.0
    for part, weight in zip(x.split(rows), v.split(rows), strict=True):
        square = torch.cdist(part, y).square()
        for h in bandwidths:
            total += float(weight @ (torch.exp(square / (-2 * h * h)) @ w))
    return total / len(bandwidths)


def median_scaled(points: Float[Tensor, "n d"]) -> tuple[float, ...]:
    """Bandwidths (½, 1, 2) times the median distance of up to 1000 points."""
    x = points[:1000].double()
    distance = torch.cdist(x, x)[torch.triu(torch.ones(len(x), len(x)), 1) > 0]
    median = float(distance.median())
    return (0.5 * median, median, 2 * median)


def grow(tree: DiffusionTree, nfe: int, after: Callable[[], bool] | None = None) -> None:
    """Spend model calls until every root has used `nfe`; `after` every round, which ends the growth by True."""
    for _ in tree.build(nfe, total=True, idle=1000):
        if after is not None and after():
            return


@dataclass(frozen=True)
class Peer:
    """A particle sampler at a budget: name in the tables, name in the registry, its options, rows per call."""

    label: str
    name: str
    options: Mapping[str, Any]
    batch: int = 1024

    def run(self, chain: Chain, reward: Any, nfe: int, *, temperature: float, seed: int, **scoring: Any) -> Any:
        """Return its Particles; `scoring` are options of the Scorer."""
        scorer = Scorer(reward, batch=self.batch, **scoring)
        return spend(self.name, Target(chain, scorer, temperature, seed, self.batch), nfe, **self.options)


def one_root(chain: Chain) -> Chain:
    """The chain of a forest without a condition, as particles want it: one prompt."""
    return replace(chain, roots=1)


def over(values: Iterable[float]) -> Estimate:
    """Mean over seeds with its Student t interval."""
    return student_t(list(values))
