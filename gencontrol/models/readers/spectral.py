"""Spectral front-ends in torch that audio models share: filterbanks, the short-time transform and its inverse.

Frames are centred without an extra one: n samples give n / hop frames (the signal is padded by (n_fft - hop) / 2 on
both sides), so lengths stay multiples of the hop.  Magnitudes are divided by the window's sum: a full-scale sine
reads 0.5.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F


def hz_to_mel(hertz: float) -> float:
    """The mel scale of HTK: 2595·log10(1 + f/700)."""
    return 2595.0 * math.log10(1.0 + hertz / 700.0)


def mel_filterbank(bins: int, n_fft: int, sampling_rate: int, low_hz: float, high_hz: float) -> Float[Tensor, "m f"]:
    """Triangular filters [bins, n_fft/2 + 1] spaced evenly on the mel scale, each with peak 1."""
    mels = torch.linspace(hz_to_mel(low_hz), hz_to_mel(high_hz), bins + 2, dtype=torch.float64)
    return _triangles(700.0 * (10.0 ** (mels / 2595.0) - 1.0), n_fft, sampling_rate, 0.0)


def semitone_filterbank(
    bins: int, per_octave: int, n_fft: int, sampling_rate: int, low_hz: float
) -> Float[Tensor, "m f"]:
    """Triangular filters [bins, n_fft/2 + 1] spaced evenly on the log-frequency axis, each summing to 1.

    Where the transform is coarser than the spacing, a filter is at least one bin wide and so interpolates.
    """
    centres = low_hz * 2.0 ** (torch.arange(-1, bins + 1, dtype=torch.float64) / per_octave)
    bank = _triangles(centres, n_fft, sampling_rate, sampling_rate / n_fft)
    return bank / bank.sum(1, keepdim=True).clamp_min(1e-6)


def _triangles(edges: Tensor, n_fft: int, sampling_rate: int, least_hz: float) -> Tensor:
    """Triangles on consecutive triples of `edges` (Hz), each side at least `least_hz` wide."""
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sampling_rate / n_fft
    centre = edges[1:-1, None]
    left = (centre - edges[:-2, None]).clamp_min(max(least_hz, 1e-9))
    right = (edges[2:, None] - centre).clamp_min(max(least_hz, 1e-9))
    offset = frequencies[None] - centre
    return torch.minimum(1 + offset / left, 1 - offset / right).clamp_min(0).float()


def pad_clip(wave: Float[Tensor, "b n"], n_fft: int, hop: int) -> Float[Tensor, "b padded"]:
    """Reflect (n_fft - hop) / 2 samples at both ends, so that n samples give n / hop frames."""
    side = (n_fft - hop) // 2
    return F.pad(wave[:, None], (side, side), mode="reflect")[:, 0]


def stft(padded: Float[Tensor, "b p"], window: Float[Tensor, " w"], hop: int) -> Complex[Tensor, "b f t"]:
    """Short-time transform of an already padded signal, divided by the window's sum."""
    n_fft = len(window)
    frames = torch.stft(padded, n_fft, hop, n_fft, window, center=False, return_complex=True)
    return frames / window.sum()


def frame_spectra(padded: Float[Tensor, "b p"], window: Float[Tensor, " w"], hop: int) -> Complex[Tensor, "b t f"]:
    """`stft` with each frame's spectrum contiguous, the faster layout for an iteration."""
    return torch.fft.rfft(padded.unfold(1, len(window), hop) * (window / window.sum()), dim=-1)


def overlap_spectra(spectrum: Complex[Tensor, "b t f"], window: Float[Tensor, " w"], hop: int) -> Float[Tensor, "b p"]:
    """Least-squares inverse of `frame_spectra` by weighted overlap-add; the hop divides the window's length."""
    pieces = torch.fft.irfft(spectrum, len(window), dim=-1) * (window * window.sum())
    weights = (window**2).expand(1, spectrum.shape[1], len(window))
    return _overlap_add(pieces, hop) / _overlap_add(weights, hop).clamp_min(1e-3)


def _overlap_add(pieces: Float[Tensor, "b t w"], hop: int) -> Float[Tensor, "b p"]:
    b, frames, width = pieces.shape
    parts = pieces.reshape(b, frames, width // hop, hop)
    signal = pieces.new_zeros(b, frames + parts.shape[2] - 1, hop)
    for index in range(parts.shape[2]):
        signal[:, index : index + frames] += parts[:, :, index]
    return signal.view(b, -1)
