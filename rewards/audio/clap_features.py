"""Log-mel input of CLAP in batched torch: equal to transformers' `ClapFeatureExtractor`, differentiable, never random.

The extractor of transformers works clip by clip in numpy, has no gradient, and cuts longer clips at a random place.
Here the same numbers (to 1e-3 dB) come from one batched STFT; a longer clip is cut deterministically: its first or its
centre part, or evenly spaced chunks that cover it, whose embeddings the caller averages.  The spectrum is computed in
float64 because the log of a nearly silent band magnifies float32 rounding to whole decibels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.errors import UsageError

LongClips = Literal["mean", "center", "first"]


def hertz_to_mel(hertz: Float[Tensor, " n"], scale: Literal["htk", "slaney"]) -> Float[Tensor, " n"]:
    """Convert Hz to mels: HTK 2595·log10(1 + f/700), or Slaney (linear below 1 kHz, logarithmic above)."""
    if scale == "htk":
        return 2595.0 * torch.log10(1.0 + hertz / 700.0)
    log_part = 15.0 + torch.log(hertz.clamp_min(1e-10) / 1000.0) * (27.0 / torch.log(torch.tensor(6.4).double()))
    return torch.where(hertz >= 1000.0, log_part, 3.0 * hertz / 200.0)


def mel_to_hertz(mels: Float[Tensor, " n"], scale: Literal["htk", "slaney"]) -> Float[Tensor, " n"]:
    """Convert mels to Hz, the inverse of `hertz_to_mel`."""
    if scale == "htk":
        return 700.0 * (torch.pow(10.0, mels / 2595.0) - 1.0)
    log_part = 1000.0 * torch.exp((mels - 15.0) * (torch.log(torch.tensor(6.4).double()) / 27.0))
    return torch.where(mels >= 15.0, log_part, 200.0 * mels / 3.0)


def mel_filters(
    bins: int, mels: int, low_hz: float, high_hz: float, rate: int, scale: Literal["htk", "slaney"]
) -> Float[Tensor, "bins mels"]:
    """Triangular filter bank in float64; "slaney" also divides by the band width (equal area), "htk" does not."""
    ends = hertz_to_mel(torch.tensor([low_hz, high_hz], dtype=torch.float64), scale)
    corners = mel_to_hertz(torch.linspace(float(ends[0]), float(ends[1]), mels + 2, dtype=torch.float64), scale)
    grid = torch.linspace(0, rate // 2, bins, dtype=torch.float64)[:, None]
    rising = (grid - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - grid) / (corners[2:] - corners[1:-1])
    bank = torch.minimum(rising, falling).clamp_min(0)
    return bank * (2.0 / (corners[2:] - corners[:-2])) if scale == "slaney" else bank


@dataclass(frozen=True)
class LogMelConfig:
    """The fields of a CLAP `preprocessor_config.json` that decide the numbers; same names, same defaults.

    Args:
        feature_size: number of mel bands.
        sampling_rate: Hz.
        hop_length, fft_window_size: samples.
        max_length_s: seconds of one clip.
        frequency_min, frequency_max: Hz.
        truncation: "fusion" (four equal channels, HTK bands) or "rand_trunc" (one channel, Slaney bands).
        padding: of shorter clips: "repeatpad", "repeat" or "pad".
    """

    feature_size: int = 64
    sampling_rate: int = 48_000
    hop_length: int = 480
    fft_window_size: int = 1024
    max_length_s: float = 10
    frequency_min: float = 0.0
    frequency_max: float = 14_000.0
    truncation: str = "fusion"
    padding: str = "repeatpad"

    def __post_init__(self) -> None:
        """Raise UsageError for a pattern that CLAP does not have."""
        if self.truncation not in ("fusion", "rand_trunc"):
            raise UsageError(f"CLAP truncation is 'fusion' or 'rand_trunc', not '{self.truncation}'.")
        if self.padding not in ("repeatpad", "repeat", "pad"):
            raise UsageError(f"CLAP padding is 'repeatpad', 'repeat' or 'pad', not '{self.padding}'.")

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> LogMelConfig:
        """Take the known fields of a feature extractor's dictionary."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    @classmethod
    def from_folder(cls, folder: str | Path) -> LogMelConfig:
        """Read `preprocessor_config.json` of a saved feature extractor.

        Raises:
            UsageError: the file is missing.
        """
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            raise UsageError(f"'{folder}' has no preprocessor_config.json; save the CLAP feature extractor there too.")
        return cls.from_mapping(json.loads(path.read_text()))

    @property
    def max_samples(self) -> int:
        """Samples of one clip."""
        return int(self.max_length_s * self.sampling_rate)


class ClapLogMel(nn.Module):
    """Waveforms at the model's rate → CLAP input features, in dB."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: LogMelConfig) -> None:
        """Precompute window and filter bank."""
        super().__init__()
        self.config = config
        scale: Literal["htk", "slaney"] = "htk" if config.truncation == "fusion" else "slaney"
        bins = config.fft_window_size // 2 + 1
        bank = mel_filters(
            bins, config.feature_size, config.frequency_min, config.frequency_max, config.sampling_rate, scale
        )
        window = torch.hann_window(config.fft_window_size, periodic=True, dtype=torch.float64)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", bank, persistent=False)

    def pad(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b m"]:
        """Lengthen clips to `max_samples` by the configured pattern; longer clips are an error.

        Raises:
            UsageError: empty clips, or longer than `max_samples` (cut them with `crops` first).
        """
        size, length = self.config.max_samples, wave.shape[-1]
        if length == 0 or length > size:
            raise UsageError(f"CLAP takes clips of 1 to {size} samples, not {length}; cut longer ones with crops().")
        if length < size and self.config.padding != "pad":
            whole = size // length + (1 if self.config.padding == "repeat" else 0)
            wave = wave.repeat(1, whole)[:, :size]
        return nn.functional.pad(wave, (0, size - wave.shape[-1]))

    def crops(self, wave: Float[Tensor, "b n"], long_clips: LongClips = "mean") -> Float[Tensor, "b k m"]:
        """Cut clips longer than `max_samples`: k evenly spaced chunks that cover them, or the centre or first part."""
        size, length = self.config.max_samples, wave.shape[-1]
        if length <= size:
            return wave[:, None]
        count = -(-length // size) if long_clips == "mean" else 1
        if count > 1:
            starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
        else:
            starts = [(length - size) // 2 if long_clips == "center" else 0]
        return torch.stack([wave[:, start : start + size] for start in starts], dim=1)

    def log_mel(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b frames mels"]:
        """Power mel spectrogram in dB (10·log10, floor −100 dB) of centred, reflected frames; float32."""
        with torch.autocast(wave.device.type, enabled=False):
            size = self.config.fft_window_size
            spectrum = torch.stft(
                wave.double(), size, self.config.hop_length, window=self.window, center=True,
                pad_mode="reflect", return_complex=True,
            )  # fmt: skip
            power = spectrum.real.square() + spectrum.imag.square()
            mel = (power.transpose(1, 2) @ self.filters).clamp_min(1e-10)
            return (10.0 * torch.log10(mel)).float()

    def forward(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b channels frames mels"]:
        """Input features of clips no longer than `max_samples`: 4 equal channels for fusion models, else 1."""
        mel = self.log_mel(self.pad(wave))[:, None]
        return mel.expand(-1, 4, -1, -1) if self.config.truncation == "fusion" else mel
