"""A sound as files to listen to and look at: 16-bit wav and a spectrogram picture."""

from __future__ import annotations

import io

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

#: colours from silence to loud, sRGB; a dark-to-light ramp that reads alike in grey
_RAMP = ((13, 8, 35), (62, 18, 97), (137, 40, 129), (206, 70, 110), (249, 133, 86), (253, 205, 118), (252, 253, 214))
WIDTH, HEIGHT, RANGE_DB = 512, 160, 70.0


def sound_files(stem: str, sound: Float[Tensor, "*c n"], sampling_rate: int) -> dict[str, bytes]:
    """Return {"stem.wav": …, "stem.png": …} of one sound in [-1, 1]."""
    from gencontrol.data.audio import wav_bytes

    return {f"{stem}.wav": wav_bytes(sound, sampling_rate), f"{stem}.png": spectrogram_png(sound, sampling_rate)}


def spectrogram_png(sound: Float[Tensor, "*c n"], sampling_rate: int) -> bytes:
    """Return a PNG of the level in dB: time to the right, frequency upwards (logarithmic, 50 Hz to half the rate)."""
    from PIL import Image

    level = _levels(sound.detach().float().cpu().reshape(-1, sound.shape[-1]).mean(0), sampling_rate)
    place = level.clamp(0, 1).numpy() * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    ramp = np.asarray(_RAMP, dtype=np.float32)
    colour = ramp[low] + (place - low)[..., None] * (ramp[low + 1] - ramp[low])
    image = Image.fromarray(colour.round().astype(np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _levels(sound: Float[Tensor, " n"], sampling_rate: int) -> Float[Tensor, "h w"]:
    """Level of each picture element in [0, 1]: 1 is the loudest, 0 is `RANGE_DB` below it."""
    size = 1024
    padded = torch.nn.functional.pad(sound, (0, max(0, size - len(sound))))
    hop = max(1, len(padded) // WIDTH)
    spectrum = torch.stft(padded, size, hop, window=torch.hann_window(size), return_complex=True).abs()
    edges = torch.logspace(np.log10(50.0), np.log10(sampling_rate / 2), HEIGHT + 1) * size / sampling_rate
    rows = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        first, last = int(low), max(int(low) + 1, int(high))
        rows.append(spectrum[first : last + 1].amax(0))
    level = 20 * torch.log10(torch.stack(rows).flip(0).clamp_min(1e-6))
    scaled = 1 + (level - level.max().clamp_min(-60.0)) / RANGE_DB
    return torch.nn.functional.interpolate(scaled[None, None], (HEIGHT, WIDTH), mode="bilinear")[0, 0]
