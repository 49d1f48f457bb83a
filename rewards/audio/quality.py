"""Reference-free technical quality of a clip in [0, 1]; signal-based, ours, not trained on ratings.

The score is the product of seven factors in (0, 1], each 1 for a clean recording and falling with one fault: clipping,
DC offset, dead silence, hiss, clicks, missing bandwidth, and a level far too low.  It says nothing about whether the
music is any good.  The corner values below were chosen by us on synthesised sound; they are documented, not calibrated.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.rewards.audio.signal import short_term_db
from gencontrol.rewards.base import checked
from gencontrol.rewards.inputs import audio_batch
from gencontrol.types import RewardContext, RewardOut

_RATE = 16_000


def falling(values: Float[Tensor, " b"], good: float, bad: float) -> Float[Tensor, " b"]:
    """A factor that is 1 at `good`, 1/2 at `bad` and goes on towards 0: 1/(1 + u²) with u = 0 at good, 1 at bad."""
    excess = ((values - good) / (bad - good)).clamp_min(0)
    return 1.0 / (1.0 + excess.square())


def clipped_share(wave: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Share of samples in flat runs at the clip's own extremes (|x| within 0.1 % of the peak, neighbour too)."""
    peak = wave.abs().amax(1, keepdim=True).clamp_min(1e-6)
    at_top = wave.abs() >= 0.999 * peak
    return (at_top[:, 1:] & at_top[:, :-1]).float().mean(1)


def hiss_level(power: Float[Tensor, "b f t"], hertz: Float[Tensor, " f"]) -> Float[Tensor, " b"]:
    """dB of the steady noise floor above 2 kHz relative to the whole signal's power.

    The floor is the 10th percentile over time and bands of the power spectrum: a tone leaves most bands empty, hiss
    fills all of them all the time.  It is scaled up as if it filled every band.
    """
    band = power[:, hertz >= 2000.0].flatten(1)
    floor = torch.quantile(band, 0.10, dim=1) * power.shape[1]
    return 10.0 * torch.log10((floor + 1e-14) / (power.sum(1).mean(1) + 1e-12))


def click_rate(wave: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Clicks per second at 16 kHz: isolated, audible jumps of the second difference.

    A click stands out of its own block of 64 samples (12 times the median: an attack raises many neighbouring
    differences together) and of the blocks around it (3 times the 90th percentile of their maxima over 0.2 s: the
    edges of a saw or square wave come back every period).  Jumps more frequent than about 25 per second are therefore
    timbre, not clicks.
    """
    jumps = (wave[:, 2:] - 2 * wave[:, 1:-1] + wave[:, :-2]).abs()
    blocks = jumps[:, : jumps.shape[1] // 64 * 64].unflatten(1, (-1, 64))
    if blocks.shape[1] == 0:
        return torch.zeros(wave.shape[0], device=wave.device)
    peaks = blocks.amax(2)
    around = torch.nn.functional.pad(peaks[:, None], (25, 25), mode="replicate")[:, 0].unfold(1, 51, 1)
    usual = torch.quantile(around, 0.9, dim=2)
    audible = 0.1 * wave.abs().amax(1)[:, None]
    clicks = (peaks > 12 * blocks.median(2).values + 1e-4) & (peaks > 3 * usual) & (peaks > audible)
    return clicks.float().sum(1) * (_RATE / wave.shape[1])


def bandwidth_octaves(power: Float[Tensor, "b f t"], hertz: Float[Tensor, " f"]) -> Float[Tensor, " b"]:
    """log2 of the frequency in Hz under which 99 % of the power lies."""
    spectrum = power.sum(2)
    below = spectrum.cumsum(1) < 0.99 * spectrum.sum(1, keepdim=True)
    return torch.log2(hertz[below.sum(1).clamp_max(len(hertz) - 1)].clamp_min(20.0))


class QualityReward:
    """Item reward: technical quality in [0, 1]; the factors are in `extras["factors"]`.  Not differentiable."""

    title = "absence of clipping, silence and clicks"
    paper = ""
    medium = "audio"
    kind: Literal["item", "set"] = "item"
    differentiable = False

    def __init__(self) -> None:
        """No settings: the corners are part of the definition."""
        self.name = "quality"

    def factors(self, wave: Float[Tensor, "b n"], rate: int) -> dict[str, Float[Tensor, " b"]]:
        """The seven factors in (0, 1], of a mono batch."""
        from gencontrol.data.audio import resample

        clipped, offset = clipped_share(wave), wave.mean(1).abs()
        wave = resample(wave - wave.mean(1, keepdim=True), rate, _RATE)
        wave = torch.nn.functional.pad(wave, (0, max(0, 512 - wave.shape[1])))
        levels = short_term_db(wave, _RATE, 0.1, 0.05)
        spectrum = torch.stft(wave, 512, 256, window=torch.hann_window(512, device=wave.device), return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        hertz = torch.linspace(0, _RATE / 2, power.shape[1], device=wave.device)
        dead = (levels < -60.0).float().mean(1)
        return {
            "clipping": falling(clipped, 0.0005, 0.01),
            "offset": falling(offset, 0.003, 0.05),
            "silence": falling(dead, 0.3, 0.7),
            "hiss": falling(hiss_level(power, hertz), -50.0, -25.0),
            "clicks": falling(click_rate(wave), 1.0, 8.0),
            "bandwidth": falling(-bandwidth_octaves(power, hertz), -9.0, -7.5),
            "level": falling(-levels.amax(1), 30.0, 50.0),
        }

    @torch.no_grad()
    def __call__(self, samples: Float[Tensor, "b *c n"], context: RewardContext) -> RewardOut:
        """Product of the factors per clip."""
        wave, finite, rate = audio_batch(samples, context, self.name)
        factors = self.factors(wave, rate)
        values = torch.stack(list(factors.values())).prod(0)
        out = checked(self.name, values, wave.shape[0], finite)
        return RewardOut(out.values, out.valid, {"factors": factors})
