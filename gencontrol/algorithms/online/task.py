"""What a prompt-conditioned fine-tuning algorithm works on: a denoiser with its prompts, encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gencontrol.models.denoiser import Denoiser
from gencontrol.types import Cond


@dataclass(frozen=True)
class PromptTask:
    """A text-to-X model seen by an algorithm; built by a pipeline's `task()`.

    Args:
        denoiser: network + process + prediction; its network is the module that the roles hold.
        latent_shape: shape of one latent, without the batch axis.
        encode: prompts → condition with the batch axis first (frozen encoders, cached by the pipeline).
        uncond: condition of batch 1 for classifier-free guidance, or None where the model has none.
        decode: latents [b *d] → samples (audio [b n] in [-1, 1], or images [b 3 h w] in [0, 1]).
        prompts, eval_prompts: training prompts and fixed held-out prompts.
        artefacts: (file stem, one sample) → {file name: bytes} for people to look at or listen to.
        save_final: (folder) writes everything that `from_pretrained` needs, with the current weights.
        sampling_rate: Hz for audio, else None.
        encode_samples: samples, as `decode` gives them, → latents [b *d] without gradient (the mode of a VAE's
            posterior, the map to [-1, 1] of a pixel model), for training on files; None where the model has none.
    """

    denoiser: Denoiser
    latent_shape: tuple[int, ...]
    encode: Callable[[Sequence[str]], Cond]
    uncond: Cond
    decode: Callable[[Tensor], Tensor]
    prompts: Sequence[str]
    eval_prompts: Sequence[str]
    artefacts: Callable[[str, Tensor], dict[str, bytes]]
    save_final: Callable[[Path], None]
    sampling_rate: int | None = None
    encode_samples: Callable[[Tensor], Tensor] | None = None
