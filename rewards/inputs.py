"""Audio as rewards receive it: checked, mono, float32, with non-finite clips marked instead of spread."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.types import RewardContext


def audio_batch(
    samples: Any, context: RewardContext, name: str
) -> tuple[Float[Tensor, "b n"], Bool[Tensor, " b"], int]:
    """Mono float32 batch, which rows are finite (the others are set to silence), and the rate in Hz.

    Raises:
        UsageError: samples that are not audio, or a context without sampling rate.
    """
    from gencontrol.data.audio import to_mono

    if context.sampling_rate is None:
        raise UsageError(f"reward '{name}' scores audio and needs RewardContext(sampling_rate=…) in Hz.")
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise UsageError(f"reward '{name}' takes a float tensor [b n] or [b channels n], not {type(samples).__name__}.")
    wave = to_mono(samples).float()
    finite = torch.isfinite(wave.detach()).all(dim=1)
    return torch.where(finite[:, None], wave, 0.0), finite, int(context.sampling_rate)
