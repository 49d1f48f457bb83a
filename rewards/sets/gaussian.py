"""Fréchet distance between Gaussian statistics, in the symmetric form that cannot become complex or negative.

d² = ‖μ₁ − μ₂‖² + Tr C₁ + Tr C₂ − 2 Tr (R C₁ R)^{1/2},  R = C₂^{1/2}  (Dowson & Landau 1982; symmetric form as proposed
in mseitzer/pytorch-fid issue 117).  Everything is float64; R is computed once per reference; the trace of the root is
the sum of roots of eigenvalues of a symmetric matrix, clipped at 0, so that fewer samples than dimensions (a singular
covariance) are allowed.  With n ≤ d samples the same eigenvalues come from the n×n matrix X C₂ Xᵀ/(n − 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError

Array = Tensor | np.ndarray


def as_double(values: Array) -> Tensor:
    """A detached float64 CPU copy of a tensor or array."""
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    return tensor.detach().to("cpu", torch.float64)


def root_sum(matrices: Float[Tensor, "*b d d"]) -> Float[Tensor, "*b"]:
    """Sum of the square roots of the eigenvalues of symmetric PSD matrices; rounding below 0 counts as 0.

    Eigenvalues under d·ε·λ_max are rounding and are dropped too, which keeps the gradient finite on singular matrices.
    """
    values = torch.linalg.eigvalsh((matrices + matrices.mT) / 2)
    floor = values[..., -1:].detach().abs() * (values.shape[-1] * torch.finfo(values.dtype).eps)
    kept = values > floor
    return torch.where(kept, torch.where(kept, values, 1.0).sqrt(), 0.0).sum(-1)


def psd_root(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Symmetric square root of a symmetric PSD matrix; eigenvalues under d·ε·λ_max (rounding) count as 0."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    floor = values[-1].abs() * (len(values) * torch.finfo(values.dtype).eps)
    return (vectors * torch.where(values > floor, values, 0.0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of `n` embeddings, in float64; `root` = cov^{1/2} is cached.

    Args:
        mean: [d].
        cov: [d d], unbiased (divided by n − 1).
        n: number of embeddings behind it.
        encoder: fingerprint of the encoder that made them; statistics of different encoders are never compared.
    """

    mean: Float[Tensor, " d"]
    cov: Float[Tensor, "d d"]
    n: int
    encoder: str = ""
    root: Float[Tensor, "d d"] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check shapes and finiteness, cache the root."""
        size = self.mean.shape[0]
        if self.mean.ndim != 1 or self.cov.shape != (size, size):
            raise UsageError(f"mean {list(self.mean.shape)} and covariance {list(self.cov.shape)} do not fit.")
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.cov).all()):
            raise UsageError("the mean or covariance of an embedding set holds NaN or infinity.")
        object.__setattr__(self, "root", psd_root(self.cov))

    @classmethod
    def of(cls, embeddings: Array, encoder: str = "") -> Gaussian:
        """Statistics of embeddings [n d].

        Raises:
            UsageError: fewer than two embeddings, or not a matrix.
        """
        rows = as_double(embeddings)
        if rows.ndim != 2 or rows.shape[0] < 2:
            raise UsageError(f"a covariance needs embeddings [n d] with n ≥ 2, not {list(rows.shape)}.")
        mean = rows.mean(0)
        centred = rows - mean
        return cls(mean, centred.T @ centred / (rows.shape[0] - 1), rows.shape[0], encoder)

    def distance(self, other: Gaussian) -> float:
        """Fréchet distance (squared 2-Wasserstein distance of the two Gaussians), ≥ 0."""
        if self.mean.shape != other.mean.shape:
            raise UsageError(f"embeddings of {len(self.mean)} and {len(other.mean)} dimensions cannot be compared.")
        cross = torch.linalg.svdvals(self.root @ other.root).sum()  # = Tr (R C R)^{1/2}, more exact near singularity
        value = (self.mean - other.mean).square().sum() + self.cov.trace() + other.cov.trace() - 2 * cross
        return max(0.0, float(value))

    def clip_distances(self, frames: Float[Tensor, "b f d"]) -> Float[Tensor, " b"]:
        """Fréchet distance of each clip's own frames to this Gaussian, batched, with gradient.

        f < d always leaves a singular covariance per clip; its non-zero spectrum comes from an f×f (or d×d) problem.

        Raises:
            UsageError: fewer than two frames per clip, or another dimension.
        """
        count, size = frames.shape[1:]
        if count < 2 or size != self.mean.shape[0]:
            raise UsageError(
                f"a clip needs at least 2 frames of {self.mean.shape[0]} dimensions, not {count} of {size}; use longer "
                "clips or a shorter chunk."
            )
        rows = frames.double()
        mean = rows.mean(1)
        centred = (rows - mean[:, None]) / (count - 1) ** 0.5
        shaped = centred @ self.root.to(rows.device)
        cross = root_sum(shaped @ shaped.mT if count <= size else shaped.mT @ shaped)
        spread = centred.square().sum((1, 2)) + self.cov.trace().to(rows.device) - 2 * cross
        return (mean - self.mean.to(rows.device)).square().sum(1) + spread

    def save(self, path: str | Path) -> None:
        """Write mean, cov and n to a safetensors file; the encoder's name goes into its header."""
        from safetensors.torch import save_file

        tensors = {"mean": self.mean.contiguous(), "cov": self.cov.contiguous(), "n": torch.tensor([self.n])}
        save_file(tensors, str(path), metadata={"encoder": self.encoder})

    @classmethod
    def load(cls, path: str | Path) -> Gaussian:
        """Read what `save` wrote.

        Raises:
            UsageError: not such a file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                mean, cov, n = (file.get_tensor(key) for key in ("mean", "cov", "n"))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"'{path}' does not hold reference statistics (mean, cov, n): {error}") from error
        return cls(mean.double(), cov.double(), int(n[0]), metadata.get("encoder", ""))


def frechet_distance(mu1: Array, cov1: Array, mu2: Array | None = None, cov2: Array | None = None) -> float:
    """Fréchet distance of two Gaussians, or of two embedding sets; ≥ 0, float64, torch or numpy inputs.

    Call it with (mu1 [d], cov1 [d d], mu2 [d], cov2 [d d]), or with two embedding sets (x [n d], y [m d]), whose mean
    and unbiased covariance are taken.  Fewer samples than dimensions give a singular covariance: the result is still
    the exact distance of those statistics (root of a PSD matrix, never complex), but it is biased upward as an
    estimate; compare only equal n.

    Raises:
        UsageError: three arguments, shapes that do not fit, fewer than two embeddings, NaN.
    """
    if (mu2 is None) != (cov2 is None):
        raise UsageError("give frechet_distance two embedding sets, or mu1, cov1, mu2, cov2.")
    if mu2 is None or cov2 is None:
        return Gaussian.of(mu1).distance(Gaussian.of(cov1))
    first = Gaussian(torch.atleast_1d(as_double(mu1)), torch.atleast_2d(as_double(cov1)), 0)
    return first.distance(Gaussian(torch.atleast_1d(as_double(mu2)), torch.atleast_2d(as_double(cov2)), 0))
