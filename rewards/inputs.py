"""Audio and images as rewards receive them: checked, float32, with non-finite items marked instead of spread."""

from __future__ import annotations

from collections.abc import Sequence
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


def image_batch(samples: Any, name: str, channels: int = 3) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, " b"]]:
    """Float32 images in [0, 1] and which of them are finite (the others are set to grey 0.5); gradients pass.

    Args:
        samples: float tensor [b c h w] in [0, 1], or a list of PIL images of one size.
        name: of the reward, for messages.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        UsageError: something else, or values outside [0, 1] (0.01 of slack for interpolation; then clipped).
    """
    images = samples if isinstance(samples, Tensor) else _from_pil(samples, name, channels)
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise UsageError(
            f"reward '{name}' takes images as a float tensor [b {channels} h w] in [0, 1], not "
            f"{list(images.shape)} {images.dtype}."
        )
    finite = torch.isfinite(images.detach()).flatten(1).all(1)
    images = torch.where(finite[:, None, None, None], images.float(), 0.5)
    if images.numel() and (float(images.detach().min()) < -0.01 or float(images.detach().max()) > 1.01):
        low, high = float(images.detach().min()), float(images.detach().max())
        raise UsageError(
            f"reward '{name}' takes images in [0, 1], as a pipeline's decode() gives them; these reach from {low:.3g} "
            f"to {high:.3g}."
        )
    return images.clamp(0.0, 1.0), finite


def _from_pil(samples: Any, name: str, channels: int) -> Tensor:
    """Stack PIL images of one size as [b c h w] in [0, 1]."""
    import numpy as np
    from PIL.Image import Image

    if not isinstance(samples, Sequence) or not samples or not all(isinstance(image, Image) for image in samples):
        raise UsageError(
            f"reward '{name}' takes images as a float tensor [b {channels} h w] in [0, 1] or a list of PIL images, not "
            f"{type(samples).__name__}."
        )
    if len(sizes := {image.size for image in samples}) > 1:
        raise UsageError(f"reward '{name}' got PIL images of {len(sizes)} sizes in one batch; resize them to one.")
    mode = "RGB" if channels == 3 else "L"
    stacked = torch.from_numpy(np.stack([np.asarray(image.convert(mode)) for image in samples]))
    return (stacked.permute(0, 3, 1, 2) if channels == 3 else stacked[:, None]).float() / 255.0
