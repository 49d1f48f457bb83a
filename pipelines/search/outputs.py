"""What a search returns: samples with their rewards, what they cost, and the tree or particles they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gencontrol.pipelines.outputs import PipelineOutput
from gencontrol.sampling.particles.population import Particles
from gencontrol.sampling.tree.tree import DiffusionTree


@dataclass(frozen=True)
class ImageSearchOutput(PipelineOutput):
    """Images of one search; sample i·n + j is the j-th of prompt i.

    Args:
        images: PIL images; or [b c h w] (tensor) or [b h w c] (array), in [0, 1]; or latents [b *d].
        rewards: of these images, [b] float64.
        nfe: model calls of this search, all prompts together; a guided call counts once.
        reward_calls: samples scored by this search, all prompts together.
        log_z: estimate of log E[exp(reward/temperature)] under the base model, one per prompt, from importance weights;
            NaN where there is none.
        tree: the forest, one root per prompt, to read out, save, retilt or grow further; None for particle samplers.
        particles: one population per prompt; None for trees.
    """

    images: list[Any] | Tensor | np.ndarray
    rewards: Float[Tensor, " b"]
    nfe: int
    reward_calls: int
    log_z: tuple[float, ...]
    tree: DiffusionTree | None
    particles: tuple[Particles, ...] | None


@dataclass(frozen=True)
class AudioSearchOutput(PipelineOutput):
    """Sounds of one search; sample i·n + j is the j-th of prompt i.

    Args:
        audios: [b n] (mono models) or [b c n], in [-1, 1], as a tensor or an array; or latents [b *d].
        sampling_rate: Hz.
        rewards, nfe, reward_calls, log_z, tree, particles: as in `ImageSearchOutput`.
    """

    audios: Tensor | np.ndarray
    sampling_rate: int
    rewards: Float[Tensor, " b"]
    nfe: int
    reward_calls: int
    log_z: tuple[float, ...]
    tree: DiffusionTree | None
    particles: tuple[Particles, ...] | None
