"""MelCodec: the bundled audio model's linear "VAE", waveform [b, n] <-> latent tokens [b, n/512, 64].

Encoder: log-mel frames, two to a token, projected on the leading principal components of the training data; each
component is scaled by λ^(-1/4) (half whitening: the latent's spectrum is flatter than the data's, yet coarse
structure stays louder than detail) and all by one number to unit variance.  Decoder: the inverse map, a non-negative
inversion of the filterbank (multiplicative updates of Lee and Seung 2001) and fast Griffin-Lim (Perraudin, Balazs and
Sondergaard 2013) from a fixed initial phase.  There is nothing to train by gradient; `fit` computes the buffers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.models.folders import read_config, read_weights, write_model
from gencontrol.models.readers.spectral import frame_spectra, mel_filterbank, overlap_spectra, pad_clip, stft

_CLIPS_IN_CACHE = 8


@dataclass(frozen=True)
class MelCodecConfig:
    """Settings of the codec; `floor` is added to mel magnitudes before the logarithm (a full-scale sine reads 0.5)."""

    sampling_rate: int = 16000
    n_fft: int = 1024
    hop: int = 256
    mel_bins: int = 80
    low_hz: float = 30.0
    frames_per_token: int = 2
    channels: int = 64
    clip_samples: int = 32768
    floor: float = 1e-4
    inversion_steps: int = 8
    griffin_lim_steps: int = 16
    momentum: float = 0.99


class MelCodec(nn.Module):
    """Deterministic codec between waveforms at 16 kHz in [-1, 1] and unit-variance latent tokens."""

    filters: Tensor
    inverse_filters: Tensor
    window: Tensor
    mean: Tensor
    basis: Tensor
    gain: Tensor

    def __init__(self, config: MelCodecConfig | None = None) -> None:
        super().__init__()
        self.config = config or MelCodecConfig()
        c = self.config
        filters = mel_filterbank(c.mel_bins, c.n_fft, c.sampling_rate, c.low_hz, c.sampling_rate / 2)
        wide = c.mel_bins * c.frames_per_token
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("inverse_filters", torch.linalg.pinv(filters.double()).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(c.n_fft), persistent=False)
        self.register_buffer("mean", torch.zeros(wide))
        self.register_buffer("basis", torch.eye(wide)[: c.channels].clone())
        self.register_buffer("gain", torch.ones(c.channels))

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the waveforms."""
        return self.config.sampling_rate

    @property
    def samples_per_token(self) -> int:
        """Waveform samples that one latent token stands for."""
        return self.config.hop * self.config.frames_per_token

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, channels) of a clip of the nominal length."""
        return self.config.clip_samples // self.samples_per_token, self.config.channels

    def log_mel(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b frames mel"]:
        """Natural logarithm of mel magnitudes plus the floor; n / 256 frames."""
        c = self.config
        if wave.ndim != 2 or wave.shape[1] % self.samples_per_token or wave.shape[1] < c.n_fft:
            raise UsageError(
                f"waveform has shape {tuple(wave.shape)}; expected [batch, n] with n a multiple of "
                f"{self.samples_per_token} and at least {c.n_fft}: pad or cut it."
            )
        with torch.autocast(wave.device.type, enabled=False):
            magnitude = stft(pad_clip(wave.float(), c.n_fft, c.hop), self.window, c.hop).abs()
            return torch.log(self.filters @ magnitude + c.floor).transpose(1, 2)

    def _tokens(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b tokens wide"]:
        mel = self.log_mel(wave)
        return mel.reshape(len(mel), -1, self.config.frames_per_token * self.config.mel_bins)

    def encode(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b tokens channels"]:
        """Latent tokens of waveforms."""
        return (self._tokens(wave) - self.mean) @ self.basis.T * self.gain

    def decode_mel(self, latent: Float[Tensor, "b tokens channels"]) -> Float[Tensor, "b frames mel"]:
        """The log-mel frames that a latent stands for."""
        wide = (latent.float() / self.gain) @ self.basis + self.mean
        return wide.reshape(len(latent), -1, self.config.mel_bins)

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b tokens channels"]) -> Float[Tensor, "b n"]:
        """Waveforms in [-1, 1] of latent tokens; float32, deterministic, each item independent of its batch."""
        with torch.autocast(latent.device.type, enabled=False):
            top = self.decode_mel(latent).clamp(max=1.0)
            mel = (top.exp() - self.config.floor).clamp_min(0).transpose(1, 2)
            return self._griffin_lim(self._invert_filters(mel)).clamp(-1, 1)

    def _invert_filters(self, mel: Float[Tensor, "b mel t"]) -> Float[Tensor, "b f t"]:
        """Non-negative magnitudes whose mel projection is close to `mel`, by multiplicative updates."""
        magnitude = (self.inverse_filters @ mel).clamp_min(1e-6)
        target = self.filters.T @ mel
        for _ in range(self.config.inversion_steps):
            magnitude = magnitude * target / (self.filters.T @ (self.filters @ magnitude)).clamp_min(1e-9)
        return magnitude

    def _griffin_lim(self, magnitude: Float[Tensor, "b f t"]) -> Float[Tensor, "b n"]:
        """Phases by alternating projections with momentum, from a fixed random initial phase.

        Frames lie contiguously ([b t f]) and few clips are done at a time, so that they stay in the cache.
        """
        c = self.config
        generator = torch.Generator().manual_seed(0)
        phase = torch.rand(magnitude.shape[1:], generator=generator).to(magnitude.device) * (2 * torch.pi)
        start = torch.polar(torch.ones_like(phase), phase).T.contiguous()
        parts = []
        for target in magnitude.transpose(1, 2).split(_CLIPS_IN_CACHE):
            target, angle = target.contiguous(), start.expand(target.shape)
            before = torch.zeros_like(target, dtype=start.dtype)
            for _ in range(c.griffin_lim_steps):
                now = frame_spectra(overlap_spectra(target * angle, self.window, c.hop), self.window, c.hop)
                mixed = torch.lerp(before, now, 1 + c.momentum)
                before, angle = now, mixed / mixed.abs().clamp_min(1e-9)
            parts.append(overlap_spectra(target * angle, self.window, c.hop))
        side = (c.n_fft - c.hop) // 2
        return torch.cat(parts)[:, side:-side]

    @torch.no_grad()
    def fit(self, waveforms: Float[Tensor, "b n"], *, chunk: int = 128) -> dict[str, float]:
        """Compute mean, basis and gain from training clips; returns the share of variance that is kept."""
        wide = len(self.mean)
        total, square, count = torch.zeros(wide).double(), torch.zeros(wide, wide).double(), 0
        for part in waveforms.split(chunk):
            rows = self._tokens(part).reshape(-1, wide).double()
            total, square, count = total + rows.sum(0), square + rows.T @ rows, count + len(rows)
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        order = torch.arange(wide - 1, wide - 1 - self.config.channels, -1)
        kept = values[order].clamp_min(1e-8)
        basis = vectors[:, order].T
        basis = basis * torch.sign(basis.sum(1, keepdim=True) + 1e-12)  # a fixed sign for each component
        gain = kept**-0.25
        gain = gain / (gain**2 * kept).mean().sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.gain.copy_(gain)
        return {"explained_variance": float(kept.sum() / values.sum()), "tokens": float(count)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        write_model(folder, "MelCodec", asdict(self.config), self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MelCodec:
        """Load a folder that `save_pretrained` wrote.

        Raises:
            UsageError: no such folder, or that of another class.
        """
        codec = cls(MelCodecConfig(**read_config(folder, "MelCodec")))
        codec.load_state_dict(read_weights(folder))
        return codec.eval()
