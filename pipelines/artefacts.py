"""Bytes for people: a WAV file and a picture of its spectrogram."""

from __future__ import annotations

import io
import math

import torch
from jaxtyping import Float
from torch import Tensor

_PIXELS_HIGH = 144
#: highest over lowest frequency of the picture
_FREQUENCY_RANGE = 160.0
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
    """Draw power over time (left to right) and frequency (bottom to top) as PNG, from its peak down to -80 dB.

    Frequency is logarithmic, from 1/160 of half the sampling rate (50 Hz at 16 kHz) upwards, as pitch is heard.
    """
    from PIL import Image

    window = 1024
    padded = torch.nn.functional.pad(wave.float(), (0, max(0, window - wave.shape[-1])))
    hop = max(1, padded.shape[-1] // 512)
    spectrum = torch.stft(padded, window, hop, window=torch.hann_window(window), return_complex=True).abs() ** 2
    bands = _log_bands(spectrum)
    level = 10 * torch.log10(bands.clamp_min(1e-12) / bands.max().clamp_min(1e-12))
    height = (level / _FLOOR_DB).clamp(0, 1).mul(-1).add(1).flip(0)
    position = height * (len(_COLOURS) - 1)
    low = position.floor().long().clamp(max=len(_COLOURS) - 2)
    mix = (position - low)[..., None]
    picture = (_COLOURS[low] * (1 - mix) + _COLOURS[low + 1] * mix).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _log_bands(spectrum: Float[Tensor, "f t"]) -> Float[Tensor, "h t"]:
    """Mean power in bands of equal musical width: the integral of the spectrum between the edges, by interpolation."""
    top = spectrum.shape[0]
    edges = torch.logspace(-math.log10(_FREQUENCY_RANGE), 0, _PIXELS_HIGH + 1, dtype=torch.float64) * top
    total = torch.nn.functional.pad(spectrum.double().cumsum(0), (0, 0, 1, 0))
    low = edges.floor().long().clamp(max=top - 1)
    at_edges = total[low] + (edges - low)[:, None] * (total[low + 1] - total[low])
    return ((at_edges[1:] - at_edges[:-1]).clamp_min(0) / (edges[1:] - edges[:-1])[:, None]).float()
