"""CLAP score: cosine of the audio embedding of a sample and the text embedding of its prompt.

Wu et al. 2023, arXiv 2211.06687; used as a reward in DRAGON (arXiv 2504.15217).  Values lie in [−1, 1].  Clips are
mixed to mono, resampled and cut deterministically (`clap_features`); text embeddings are cached by text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.audio.clap_backend import ClapBackend, clap_backend
from gencontrol.rewards.audio.clap_features import LongClips
from gencontrol.rewards.base import checked
from gencontrol.rewards.inputs import audio_batch
from gencontrol.rewards.pretrained import TextCache, one_prompt_each
from gencontrol.types import RewardContext, RewardOut


class ClapReward:
    """Item reward cos(E_audio(x), E_text(prompt)) in [−1, 1]; differentiable with respect to the audio."""

    title = "cosine of the CLAP embeddings of the sound and of its prompt, in [−1, 1]"
    paper = "arXiv:2211.06687"
    medium = "audio"
    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __init__(
        self,
        reward_model: str | Path = "bundled",
        device: str | torch.device | None = None,
        long_clips: LongClips = "mean",
        batch_size: int = 32,
        audio_tower: str = "auto",
    ) -> None:
        """Load the model (once per process; rewards of the same model share it).

        Args:
            reward_model: "bundled", a folder or hub id of a transformers CLAP model, or a laion-clap `.pt` file.
            device: of the reward model; None takes the GPU when there is one.
            long_clips: how clips longer than the model's window are cut: "mean" of chunks, "center" or "first".
            batch_size: clips in one forward pass.
            audio_tower: for laion-clap files: "auto", "HTSAT-tiny" or "HTSAT-base".

        Raises:
            UsageError, EnvironmentMissing: the model cannot be loaded.
        """
        if long_clips not in ("mean", "center", "first"):
            raise UsageError(f"long_clips is 'mean', 'center' or 'first', not '{long_clips}'.")
        if batch_size < 1:
            raise UsageError(f"batch_size is at least 1, not {batch_size}.")
        self.name = "clap"
        self.backend: ClapBackend = clap_backend(reward_model, device, audio_tower)
        self._long_clips: LongClips = long_clips
        self._batch_size = batch_size
        #: unit text embeddings [b d] on the CPU, cached by text
        self.text_embeddings = TextCache(lambda texts: self.backend.text(texts), batch_size)

    def audio_embeddings(self, samples: Float[Tensor, "b *c n"], rate: int) -> Float[Tensor, "b d"]:
        """Unit audio embeddings on the samples' device; the graph is kept when the samples require a gradient."""
        from gencontrol.data.audio import resample, to_mono

        parts = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and samples.requires_grad):
            for part in to_mono(samples).float().split(self._batch_size):
                wave = resample(part.to(self.backend.device), rate, self.backend.sampling_rate)
                parts.append(self.backend.audio(wave, self._long_clips).to(samples.device))
        return torch.cat(parts)

    def __call__(self, samples: Float[Tensor, "b *c n"], context: RewardContext) -> RewardOut:
        """Cosine per sample; `extras["audio_embeddings"]` [b d] holds the detached embeddings.

        Raises:
            UsageError: no prompts, a wrong count of them, no sampling rate, or samples that are not audio.
        """
        wave, finite, rate = audio_batch(samples, context, self.name)
        prompts = one_prompt_each(context.prompts, wave.shape[0], self.name)
        audio = self.audio_embeddings(wave, rate)
        values = (audio * self.text_embeddings(prompts).to(audio.device)).sum(-1)
        out = checked(self.name, values, wave.shape[0], finite)
        return RewardOut(out.values, out.valid, {"audio_embeddings": audio.detach()})
