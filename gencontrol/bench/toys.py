"""Small worlds for benchmarks and tests: a flow by a little MLP, tasks without text, hand-made embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gencontrol.algorithms.online.rollout import denoising_error
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rewards.base import Features, SetState, broadcast, checked
from gencontrol.rewards.sets.gaussian import Gaussian
from gencontrol.rewards.sets.states import FrechetState
from gencontrol.rng import stream, stream_seed
from gencontrol.types import Cond, Prediction, RewardContext, RewardOut


class ToyNetwork(nn.Module):
    """Three hidden layers over (x, features of t, condition [b c] or a learned linear embedding of it)."""

    frequencies: Tensor

    def __init__(self, size: int, conditions: int, width: int, seed: int, embedding: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "toy/init"))
            layers: list[nn.Module] = [nn.Linear(size + (embedding or conditions) + 8, width), nn.SiLU()]
            for _ in range(2):
                layers += [nn.Linear(width, width), nn.SiLU()]
            self.body = nn.Sequential(*layers, nn.Linear(width, size))
            self.embedding = nn.Parameter(torch.randn(conditions, embedding)) if embedding else None
        self.register_buffer("frequencies", torch.tensor([0.5, 1.0, 2.0, 4.0]) * torch.pi)

    def forward(self, xt: Float[Tensor, "b *d"], t: Float[Tensor, " b"], cond: Cond = None) -> Float[Tensor, "b *d"]:
        """Predict the velocity."""
        angles = t[:, None] * self.frequencies
        parts = [xt.flatten(1), angles.sin(), angles.cos()]
        if cond is not None:
            parts.append(cond if self.embedding is None else cond @ self.embedding)
        return self.body(torch.cat(parts, dim=1)).view_as(xt)


def toy_flow(size: int, *, conditions: int = 0, width: int = 128, seed: int = 0, embedding: int = 0) -> Denoiser:
    """Return an untrained rectified flow on vectors [size]; `embedding` > 0 is the width of the condition's."""
    network = ToyNetwork(size, conditions, width, seed, embedding)
    return Denoiser(network, GaussianProcess(Linear()), Prediction.VELOCITY)


def fit_flow(
    denoiser: Denoiser,
    data: Callable[[torch.Generator], tuple[Tensor, Cond]],
    *,
    steps: int,
    lr: float,
    seed: int,
) -> float:
    """Train a flow on batches of `data(generator)`, AdamW with a cosine rate; returns the last tenth's mean loss."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, last = stream(seed, "toy/fit"), 0.0
    for step in range(steps):
        x0, cond = data(generator)
        t = torch.rand(len(x0), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = denoising_error(denoiser, x0, t, noise, cond).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        last += loss.item() if step >= steps - max(1, steps // 10) else 0.0
    return last / max(1, steps // 10)


def _no_artefacts(stem: str, sample: Tensor) -> dict[str, bytes]:
    return {f"{stem}.txt": " ".join(f"{v:.4f}" for v in sample.flatten().tolist()).encode()}


def _save_nothing(folder: Path) -> None:
    """A toy has no loadable form."""


def toy_task(
    denoiser: Denoiser,
    size: int,
    *,
    prompts: Sequence[str] = ("toy",),
    eval_prompts: Sequence[str] = ("toy",),
    encode: Callable[[Sequence[str]], Cond] | None = None,
) -> PromptTask:
    """Return a task on vectors: decode is the identity, and the condition is None unless `encode` gives one."""
    return PromptTask(
        denoiser=denoiser,
        latent_shape=(size,),
        encode=encode or (lambda texts: None),
        uncond=None,
        decode=lambda latents: latents,
        prompts=list(prompts),
        eval_prompts=list(eval_prompts),
        artefacts=_no_artefacts,
        save_final=_save_nothing,
    )


class EmbeddedFrechet:
    """Set reward −FD of all frames of a set under an embedding, against reference statistics."""

    kind: Literal["item", "set"] = "set"
    differentiable = False

    def __init__(self, embed: Callable[[Tensor], Float[Tensor, "b f d"]], reference: Tensor) -> None:
        """Take the statistics of the reference samples."""
        self.name, self.embed = "toy-fad-set", embed
        self.law = Gaussian.of(embed(reference).flatten(0, 1))

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """The set's value on every item."""
        features = self.features(samples, context)
        return broadcast(self.name, self.evaluate(features), features, {})

    def features(self, samples: Tensor, context: RewardContext) -> dict[str, Tensor]:
        """Frames and validity."""
        frames = self.embed(samples)
        return {"frames": frames, "valid": frames.isfinite().flatten(1).all(1)}

    def evaluate(self, features: Features) -> float:
        """−FD of the valid rows."""
        return -Gaussian.of(features["frames"][features["valid"]].flatten(0, 1)).distance(self.law)

    def state(self, pool: Features, chosen: Int64[Tensor, " n"]) -> SetState:
        """The library's incremental Fréchet state."""
        return FrechetState(pool["frames"], pool["valid"], chosen, self.law)


class EmbeddedFrechetItem:
    """Item reward −FD of one sample's frames to the reference; one frame counts as a point mass."""

    kind: Literal["item", "set"] = "item"
    differentiable = False

    def __init__(self, whole: EmbeddedFrechet) -> None:
        """Share embedding and reference with the set reward."""
        self.name, self.whole = "toy-fad", whole

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """One value per sample."""
        frames, law = self.whole.embed(samples), self.whole.law
        if frames.shape[1] > 1:
            return checked(self.name, -law.clip_distances(frames), len(samples))
        distance = (frames[:, 0].double() - law.mean).square().sum(1) + law.cov.trace()
        return checked(self.name, -distance, len(samples))
