"""Bytes for people: a WAV file and a picture of its spectrogram."""

from __future__ import annotations

import io

import torch
from jaxtyping import Float
from torch import Tensor

_PIXELS_HIGH = 128
_FLOOR_DB = -80.0
#: black → violet → red → yellow → white, evenly spaced
_COLOURS = torch.tensor(
    [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], dtype=torch.float32
)


def sound_artefacts(stem: str, sample: Float[Tensor, "*c n"], sampling_rate: int) -> dict[str, bytes]:
    """Return {"<stem>.wav", "<stem>.png"} of one sound; a sound with NaN or infinity gives "<stem>.txt" saying so."""
    from gencontrol.data.audio import wav_bytes

    sample = sample.detach().float().cpu()
    if not bool(torch.isfinite(sample).all()):
        return {f"{stem}.txt": b"this sample holds NaN or infinite values\n"}
    mono = sample if sample.ndim == 1 else sample.mean(0)
    return {f"{stem}.wav": wav_bytes(sample, sampling_rate), f"{stem}.png": spectrogram_png(mono)}


def spectrogram_png(wave: Float[Tensor, " n"]) -> bytes:
    """Draw power over time (left to right) and linear frequency (upwards), 0 to -80 dB below its peak, as PNG."""
    from PIL import Image

    window = 2 * (_PIXELS_HIGH - 1) * 4
    padded = torch.nn.functional.pad(wave.float(), (0, max(0, window - wave.shape[-1])))
    hop = max(1, padded.shape[-1] // 512)
    spectrum = torch.stft(padded, window, hop, window=torch.hann_window(window), return_complex=True).abs() ** 2
    bands = torch.nn.functional.adaptive_avg_pool1d(spectrum.T, _PIXELS_HIGH).T
    level = 10 * torch.log10(bands.clamp_min(1e-12) / bands.max().clamp_min(1e-12))
    height = (level / _FLOOR_DB).clamp(0, 1).mul(-1).add(1).flip(0)
    position = height * (len(_COLOURS) - 1)
    low = position.floor().long().clamp(max=len(_COLOURS) - 2)
    mix = (position - low)[..., None]
    picture = (_COLOURS[low] * (1 - mix) + _COLOURS[low + 1] * mix).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
