"""Rewards computed from the signal alone: loudness range and spectral centroid; batched, differentiable, no weights.

Both are useful to try a method in seconds, and as controls: what they ask for is plainly audible.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.base import checked
from gencontrol.rewards.inputs import audio_batch
from gencontrol.types import RewardContext, RewardOut

#: Level in dB full scale below which a stretch counts as silence.
SILENCE_DB = -70.0


def short_term_db(wave: Float[Tensor, "b n"], rate: int, window_s: float, hop_s: float) -> Float[Tensor, "b w"]:
    """RMS level in dB full scale of overlapping windows, floor `SILENCE_DB`; one window for a shorter clip."""
    size = min(wave.shape[1], max(1, round(window_s * rate)))
    power = wave.unfold(1, size, max(1, round(hop_s * rate))).square().mean(-1)
    return 10.0 * torch.log10(power.clamp_min(10 ** (SILENCE_DB / 10)))


def _towards(values: Tensor, target: float | None) -> Tensor:
    """The values themselves, or minus their distance to a target."""
    return values if target is None else -(values - target).abs()


class LoudnessRange:
    """Item reward: dB between the 95th and 10th percentile of short-term loudness (unweighted RMS), or closeness to it.

    After EBU Tech 3342, simplified: no K-weighting, no relative gate, shorter windows, because generated clips are
    short.
    """

    title = "loudness range"
    paper = ""
    medium = "audio"
    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __init__(self, target: float | None = None, window_s: float = 0.2, hop_s: float = 0.05) -> None:
        """Choose what is asked for.

        Args:
            target: dB; None rewards a larger range, a number rewards −|range − target|.
            window_s, hop_s: seconds of a loudness window and between windows.

        Raises:
            UsageError: windows that are not positive, or a negative target.
        """
        if window_s <= 0 or hop_s <= 0 or (target is not None and target < 0):
            raise UsageError(f"window_s and hop_s are positive and target ≥ 0 dB, not {window_s}, {hop_s}, {target}.")
        self.name = "loudness-range"
        self._target, self._window_s, self._hop_s = target, window_s, hop_s

    def __call__(self, samples: Float[Tensor, "b *c n"], context: RewardContext) -> RewardOut:
        """Range in dB per clip; a clip of silence is invalid."""
        wave, finite, rate = audio_batch(samples, context, self.name)
        levels = short_term_db(wave - wave.mean(1, keepdim=True), rate, self._window_s, self._hop_s)
        marks = torch.quantile(levels, torch.tensor([0.95, 0.10], device=levels.device), dim=1)
        sounding = levels.detach().amax(1) > SILENCE_DB
        return checked(self.name, _towards(marks[0] - marks[1], self._target), wave.shape[0], finite & sounding)


class SpectralCentroid:
    """Item reward: power-weighted mean frequency of a clip in octaves above 1 Hz or in Hz, or closeness to a target."""

    title = "brightness"
    paper = ""
    medium = "audio"
    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __init__(self, target_hz: float | None = None, unit: Literal["octaves", "hz"] = "octaves") -> None:
        """Choose what is asked for.

        Args:
            target_hz: Hz; None rewards a brighter sound, a number rewards minus the distance to it, in the unit.
            unit: "octaves" (log2 of Hz: equal steps for the ear) or "hz".

        Raises:
            UsageError: unknown unit, or a target that is not positive.
        """
        if unit not in ("octaves", "hz") or (target_hz is not None and target_hz <= 0):
            raise UsageError(f"unit is 'octaves' or 'hz' and target_hz positive, not '{unit}' and {target_hz}.")
        self.name = "spectral-centroid"
        self._unit = unit
        self._target = target_hz if target_hz is None or unit == "hz" else math.log2(target_hz)

    def __call__(self, samples: Float[Tensor, "b *c n"], context: RewardContext) -> RewardOut:
        """Centroid per clip; a clip of silence has none and is invalid."""
        wave, finite, rate = audio_batch(samples, context, self.name)
        wave = wave - wave.mean(1, keepdim=True)
        size = min(1024, wave.shape[1])
        window = torch.hann_window(size, device=wave.device)
        padded = torch.nn.functional.pad(wave, (0, -(wave.shape[1] - size) % (size // 4 or 1)))
        spectrum = torch.stft(padded, size, max(1, size // 4), window=window, center=False, return_complex=True)
        power = (spectrum.real.square() + spectrum.imag.square()).sum(-1)
        hertz = torch.linspace(0, rate / 2, power.shape[1], device=wave.device)
        total = power.sum(1)
        sounding = wave.detach().square().mean(1) > 10 ** (SILENCE_DB / 10)
        centroid = (power * hertz).sum(1) / torch.where(sounding, total, 1.0)
        if self._unit == "octaves":
            centroid = torch.log2(centroid.clamp_min(1.0))
        return checked(self.name, _towards(centroid, self._target), wave.shape[0], finite & sounding)
