"""Audio encoders of the distribution rewards: a clip → several frame embeddings, and one embedding of the whole clip.

"clap": embeddings of overlapping chunks by the audio tower of a CLAP model, in the space of its text tower, so that the
reference may be text.  "attributes": frames of the bundled attribute classifier (independent of CLAP).  "mel": cepstral
means and deviations of chunks; needs no weights at all.  An encoder's `name` is its fingerprint: it contains every
setting that changes the numbers, and statistics carry it, because a mismatch between reference and samples is silent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.rewards.audio.clap import ClapReward
from gencontrol.rewards.audio.clap_features import ClapLogMel, LogMelConfig
from gencontrol.rewards.pretrained import pick_device, weights_digest
from gencontrol.weights import bundled_path

#: Names of the encoders that `make_encoder` knows.
ENCODERS = ("clap", "attributes", "mel")


class Encoder(Protocol):
    """Frozen, deterministic audio encoder."""

    name: str

    def frames(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b f d"]:
        """Embeddings of the parts of each clip; f depends on the length alone."""
        ...

    def clips(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b e"]:
        """One unit embedding per clip, for similarity between clips."""
        ...

    def captions(self, texts: Sequence[str]) -> Float[Tensor, "m d"]:
        """Embeddings of texts in the space of `frames`; UsageError where there is none."""
        ...


def _no_text(name: str) -> UsageError:
    """The error of an encoder without a text tower."""
    return UsageError(f"encoder '{name}' has no text space; a caption file as reference needs encoder='clap'.")


class ClapEncoder:
    """Chunk embeddings of a CLAP audio tower (unit vectors in the joint space)."""

    def __init__(self, clap: ClapReward, chunk_s: float | None = None, hop_s: float | None = None) -> None:
        """Cut clips into chunks of `chunk_s` every `hop_s` seconds (defaults: a third of CLAP's window, half of
        it).

        Raises:
            UsageError: lengths that are not positive, or chunks longer than CLAP's window.
        """
        window = clap.backend.max_seconds
        self.chunk_s = window / 3 if chunk_s is None else chunk_s
        self.hop_s = self.chunk_s / 2 if hop_s is None else hop_s
        if not 0 < self.chunk_s <= window or self.hop_s <= 0:
            raise UsageError(f"chunk_s is in (0, {window:g}] and hop_s positive, not {self.chunk_s} and {self.hop_s}.")
        self.name = f"{clap.backend.name},chunk={self.chunk_s:g},hop={self.hop_s:g}"
        self._clap = clap

    def frames(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b f d"]:
        """One embedding per chunk; the last chunk ends with the clip."""
        from gencontrol.data.audio import chunk_starts, chunks

        size, hop = max(1, round(self.chunk_s * rate)), max(1, round(self.hop_s * rate))
        parts = chunks(wave, chunk_starts(wave.shape[1], size, hop), size)
        return self._clap.audio_embeddings(parts.flatten(0, 1), rate).unflatten(0, parts.shape[:2])

    def clips(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b e"]:
        """The CLAP embedding of the whole clip."""
        return self._clap.audio_embeddings(wave, rate)

    def captions(self, texts: Sequence[str]) -> Float[Tensor, "m d"]:
        """Text embeddings of the same model."""
        return self._clap.text_embeddings(texts)


def bundled_attributes() -> Path:
    """Folder of the bundled attribute classifier.

    Raises:
        EnvironmentMissing: this installation does not hold it.
    """
    remedy = "reinstall gencontrol, or use the encoder 'clap'"
    return bundled_path("attributes/config.json", "bundled attribute model", remedy).parent


class AttributeEncoder:
    """Frames of the attribute classifier `gencontrol.models.readers.attributes` (128 numbers per 64 ms)."""

    _window = 32_768  # samples the classifier was trained on; its group norms look at the whole input

    def __init__(self, folder: str | Path | None = None, device: str | torch.device | None = None) -> None:
        """Load a folder of `AttributeNet` (None: the bundled one); `device` None takes the GPU when there is one."""
        from gencontrol.models.readers.attributes import AttributeNet

        chosen = pick_device(device)
        self._model = AttributeNet.from_pretrained(bundled_attributes() if folder is None else folder)
        self._model.to(chosen).eval().requires_grad_(False)
        self._device = torch.device(chosen)
        self.name = f"attributes:{weights_digest(self._model)}"

    def frames(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b f d"]:
        """Frame embeddings; clips longer than the training window are cut into windows."""
        from gencontrol.data.audio import chunk_starts, chunks, resample

        config = self._model.config
        wave = resample(wave.to(self._device), rate, config.sampling_rate)
        wave = torch.nn.functional.pad(wave, (0, max(0, config.n_fft - wave.shape[1])))
        parts = chunks(wave, chunk_starts(wave.shape[1], self._window, self._window), self._window)
        with torch.autocast(wave.device.type, enabled=False):
            frames = torch.cat([self._model.embed(part) for part in parts.flatten(0, 1).split(32)])
        return frames.unflatten(0, parts.shape[:2]).flatten(1, 2)

    def clips(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b e"]:
        """Mean frame, scaled to length 1."""
        return torch.nn.functional.normalize(self.frames(wave, rate).mean(1), dim=-1)

    def captions(self, texts: Sequence[str]) -> Float[Tensor, "m d"]:
        """There is no text space: raises UsageError."""
        raise _no_text(self.name)


class MelEncoder:
    """Cepstral means and deviations of log-mel chunks at 16 kHz; needs no weights.

    Per chunk: the first `coefficients` cosine coefficients (orthonormal DCT-II over 64 bands, in units of 10 dB) of
    the mean and of the standard deviation over time, 2·coefficients numbers.  A hand-made space: differences of timbre
    and loudness show in it, musical content does not.
    """

    _rate = 16_000

    def __init__(self, coefficients: int = 32, chunk_s: float = 0.5, hop_s: float = 0.25) -> None:
        """Fix the layout.

        Raises:
            UsageError: values out of range.
        """
        if not 2 <= coefficients <= 64 or chunk_s < 0.05 or hop_s <= 0:
            raise UsageError(
                f"the mel encoder takes 2 to 64 coefficients, chunk_s ≥ 0.05 and hop_s > 0, not {coefficients}, "
                f"{chunk_s} and {hop_s}."
            )
        self.name = f"mel:{coefficients},chunk={chunk_s:g},hop={hop_s:g}"
        self._mel = ClapLogMel(LogMelConfig(64, self._rate, 160, 512, 10, 40, 8000, "rand_trunc"))
        band = torch.arange(64, dtype=torch.float64) + 0.5
        basis = torch.cos(math.pi / 64 * band[:, None] * torch.arange(coefficients, dtype=torch.float64))
        self._basis = basis * torch.full((coefficients,), (2 / 64) ** 0.5).index_fill(0, torch.tensor([0]), 64**-0.5)
        self._chunk, self._hop = round(chunk_s * self._rate), round(hop_s * self._rate)

    def frames(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b f d"]:
        """Cepstral statistics per chunk."""
        from gencontrol.data.audio import chunk_starts, chunks, resample

        wave = resample(wave, rate, self._rate)
        wave = torch.nn.functional.pad(wave, (0, max(0, self._chunk - wave.shape[1])))
        parts = chunks(wave, chunk_starts(wave.shape[1], self._chunk, self._hop), self._chunk)
        mel = self._mel.to(wave.device).log_mel(parts.flatten(0, 1)) / 10.0
        deviation = (mel.var(1, unbiased=False) + 1e-8).sqrt()
        basis = self._basis.to(mel)
        return torch.cat([mel.mean(1) @ basis, deviation @ basis], dim=-1).unflatten(0, parts.shape[:2])

    def clips(self, wave: Float[Tensor, "b n"], rate: int) -> Float[Tensor, "b e"]:
        """Mean frame without the overall level (coefficient 0 of the mean), scaled to length 1."""
        return torch.nn.functional.normalize(self.frames(wave, rate).mean(1)[:, 1:], dim=-1)

    def captions(self, texts: Sequence[str]) -> Float[Tensor, "m d"]:
        """There is no text space: raises UsageError."""
        raise _no_text(self.name)


def make_encoder(
    encoder: str,
    *,
    reward_model: str | Path = "bundled",
    device: str | torch.device | None = None,
    chunk_s: float | None = None,
    hop_s: float | None = None,
) -> Encoder:
    """Return the encoder of that name ("clap", "attributes" or "mel").

    Args:
        reward_model: CLAP model, for "clap" (see `ClapReward`).
        chunk_s, hop_s: seconds of a frame and between frames, for "clap" and "mel"; None takes the encoder's default.

    Raises:
        UsageError: unknown name, or an option that the encoder does not have.
    """
    if encoder not in ENCODERS:
        raise UsageError(f"unknown encoder '{encoder}'.{nearest(encoder, ENCODERS)} Known: {', '.join(ENCODERS)}.")
    if encoder != "clap" and str(reward_model) != "bundled":
        raise UsageError(f"reward_model '{reward_model}' has no meaning for encoder '{encoder}'; leave it out.")
    if encoder == "clap":
        return ClapEncoder(ClapReward(reward_model, device), chunk_s, hop_s)
    if encoder == "attributes":
        if chunk_s is not None or hop_s is not None:
            raise UsageError("encoder 'attributes' has frames of a fixed length; leave chunk_s and hop_s out.")
        return AttributeEncoder(device=device)
    return MelEncoder(chunk_s=0.5 if chunk_s is None else chunk_s, hop_s=0.25 if hop_s is None else hop_s)
