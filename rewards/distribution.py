"""Rewards of distributions: Fréchet audio distance per clip and per set, and the Vendi score of a set.

Families of DRAGON (arXiv 2504.15217): `fad` compares the frames of one clip with a reference law, `fad-set` the frames
of the whole set, `vendi` measures the diversity of the set without any reference.  Rewards are minus the distance, or
the score itself.  Fréchet distance and Vendi score are biased in the number of items: compare sets of equal size only;
`extras["set_size"]` carries it, and `metric_name` writes it into the metric's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.audio.encoders import make_encoder
from gencontrol.rewards.base import Features, OfSets, SetState, check_chosen, checked
from gencontrol.rewards.inputs import audio_batch
from gencontrol.rewards.sets.gaussian import Array, Gaussian, as_double, frechet_distance
from gencontrol.rewards.sets.reference import load_reference
from gencontrol.rewards.sets.states import FrechetState, VendiState, entropy_score, unit_rows
from gencontrol.types import RewardContext, RewardOut

__all__ = ["FadReward", "SetFadReward", "VendiReward", "frechet_distance", "metric_name", "vendi_score"]


def vendi_score(embeddings: Array, *, form: Literal["auto", "primal", "dual"] = "auto") -> float:
    """Vendi score of embeddings [n d] with the cosine kernel: exp of the entropy of the spectrum of K/n, in [1, n].

    Args:
        form: "primal" takes the eigenvalues of K/n (n×n), "dual" those of Σ e eᵀ/n (d×d); they agree up to zeros;
            "auto" takes the smaller.

    Raises:
        UsageError: not a matrix with at least one row.
        RewardError: a zero or NaN row.
    """
    rows = as_double(embeddings)
    if rows.ndim != 2 or rows.shape[0] < 1:
        raise UsageError(f"the Vendi score needs embeddings [n d] with n ≥ 1, not {list(rows.shape)}.")
    unit = unit_rows(rows)
    primal = form == "primal" or (form == "auto" and rows.shape[0] <= rows.shape[1])
    return float(entropy_score(torch.linalg.eigvalsh(unit @ unit.T if primal else unit.T @ unit)))


def metric_name(out: RewardOut, name: str) -> str:
    """Name of a set metric with its set size, e.g. "vendi@64": values of other sizes are not comparable."""
    return f"{name}@{out.extras['set_size']}"


class _ToReference:
    """A reward that compares frames with a reference law."""

    def __init__(
        self,
        reference: str | Path | Gaussian = "bundled",
        encoder: str = "clap",
        reward_model: str | Path = "bundled",
        device: str | torch.device | None = None,
        chunk_s: float | None = None,
        hop_s: float | None = None,
    ) -> None:
        """Load the encoder and the reference statistics.

        Args:
            reference: see `load_reference`.
            encoder, reward_model, device, chunk_s, hop_s: see `make_encoder`.

        Raises:
            UsageError, EnvironmentMissing: one of them cannot be had.
        """
        self.encoder = make_encoder(encoder, reward_model=reward_model, device=device, chunk_s=chunk_s, hop_s=hop_s)
        self.reference = load_reference(reference, self.encoder)


class FadReward(_ToReference):
    """Item reward: minus the Fréchet distance of one clip's frames to the reference; never reaches 0."""

    title = "minus the Fréchet distance between embeddings of one sound's frames and of the reference"
    paper = "arXiv:2504.15217"
    medium = "audio"
    name = "fad"
    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __call__(self, samples: Float[Tensor, "b *c n"], context: RewardContext) -> RewardOut:
        """−FD per clip; needs at least two frames per clip.

        Raises:
            UsageError: clips too short for two frames, or samples that are not audio.
        """
        wave, finite, rate = audio_batch(samples, context, self.name)
        with torch.set_grad_enabled(torch.is_grad_enabled() and wave.requires_grad):
            values = -self.reference.clip_distances(self.encoder.frames(wave, rate))
        return checked(self.name, values, wave.shape[0], finite)


class SetFadReward(_ToReference, OfSets):
    """Set reward: minus the Fréchet distance of all frames of all clips to the reference."""

    title = "minus the Fréchet distance between embeddings of a set of sounds and of the reference"
    paper = "arXiv:2504.15217"
    medium = "audio"
    name = "fad-set"

    @torch.no_grad()
    def features(self, samples: Float[Tensor, "b *c n"], context: RewardContext) -> dict[str, Tensor]:
        """Return "frames" [b f d] and "valid" [b]."""
        wave, finite, rate = audio_batch(samples, context, self.name)
        frames = self.encoder.frames(wave, rate)
        return {"frames": frames, "valid": finite & torch.isfinite(frames).flatten(1).all(1)}

    def evaluate(self, features: Features) -> float:
        """Minus the Fréchet distance of the valid rows' frames.

        Raises:
            RewardError: no valid row.
            UsageError: fewer than two frames in all.
        """
        check_chosen(features["valid"], features["valid"].nonzero().flatten())
        rows = features["frames"][features["valid"]].flatten(0, 1)
        return -Gaussian.of(rows).distance(self.reference)

    def state(self, pool: Features, chosen: Int64[Tensor, " n"]) -> SetState:
        """Incremental state; one d×d eigenvalue problem per proposal."""
        return FrechetState(pool["frames"], pool["valid"], chosen, self.reference)


class VendiReward(OfSets):
    """Set reward: Vendi score (effective number of different clips, in [1, n]) in the encoder's clip space."""

    title = "effective number of different sounds in a set (Vendi score)"
    paper = "arXiv:2210.02410"
    medium = "audio"
    name = "vendi"

    def __init__(
        self,
        encoder: str = "clap",
        reward_model: str | Path = "bundled",
        device: str | torch.device | None = None,
    ) -> None:
        """Load the encoder; see `make_encoder`."""
        self.encoder = make_encoder(encoder, reward_model=reward_model, device=device)

    @torch.no_grad()
    def features(self, samples: Float[Tensor, "b *c n"], context: RewardContext) -> dict[str, Tensor]:
        """Return "embeddings" [b e] and "valid" [b]; silent clips without a direction are invalid."""
        wave, finite, rate = audio_batch(samples, context, self.name)
        rows = self.encoder.clips(wave, rate)
        return {"embeddings": rows, "valid": finite & torch.isfinite(rows).all(1) & (rows.norm(dim=1) > 0)}

    def evaluate(self, features: Features) -> float:
        """Vendi score of the valid rows.

        Raises:
            RewardError: no valid row.
        """
        check_chosen(features["valid"], features["valid"].nonzero().flatten())
        return vendi_score(features["embeddings"][features["valid"]])

    def state(self, pool: Features, chosen: Int64[Tensor, " n"]) -> SetState:
        """Incremental state; one eigenvalue problem of size min(n, d) per proposal."""
        return VendiState(pool["embeddings"], pool["valid"], chosen)
