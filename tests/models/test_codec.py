"""MelCodec: shapes, projection, inversion, persistence; spectral front-ends."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.networks.codec import MelCodec
from gencontrol.models.readers.attributes import AttributeNet
from gencontrol.models.readers.spectral import (
    frame_spectra,
    mel_filterbank,
    overlap_spectra,
    pad_clip,
    semitone_filterbank,
    stft,
)


def tones(count: int, samples: int = 32768) -> Tensor:
    """Decaying two-note tones at 16 kHz."""
    clock = torch.arange(samples) / 16000
    generator = torch.Generator().manual_seed(1)
    base = 110 * 2 ** (torch.rand(count, 1, generator=generator) * 4)
    level = 0.2 + 0.6 * torch.rand(count, 1, generator=generator)
    wave = torch.sin(2 * math.pi * base * clock) + 0.5 * torch.sin(2 * math.pi * 2.5 * base * clock)
    return 0.5 * level * wave * torch.exp(-clock * 2)


@pytest.fixture(scope="module")
def codec() -> MelCodec:
    made = MelCodec()
    kept = made.fit(tones(48))
    assert kept["explained_variance"] > 0.98
    return made


def test_latents_have_unit_variance_and_declared_shape(codec: MelCodec) -> None:
    latent = codec.encode(tones(48))
    assert tuple(latent.shape[1:]) == codec.latent_shape == (64, 64)
    assert abs(float(latent.square().mean()) - 1) < 0.01 and abs(float(latent.mean())) < 0.01


def test_half_whitening_flattens_by_the_fourth_root(codec: MelCodec) -> None:
    deviation = codec.encode(tones(48)).std((0, 1))
    eigen = (deviation / codec.gain) ** 2
    ratio = deviation / eigen**0.25
    assert float(ratio[:16].std() / ratio[:16].mean()) < 0.02


def test_decoded_clip_has_the_spectrogram_of_the_original(codec: MelCodec, fenced_rng: None) -> None:
    wave = tones(4)
    decoded = codec.decode(codec.encode(wave))
    assert decoded.shape == wave.shape and decoded.dtype == torch.float32
    distance = 20 / math.log(10) * (codec.log_mel(wave) - codec.log_mel(decoded)).square().mean(-1).sqrt().mean()
    assert float(distance) < 3.0


def test_decoding_does_not_depend_on_the_batch(codec: MelCodec) -> None:
    latent = codec.encode(tones(3))
    torch.testing.assert_close(codec.decode(latent)[1:2], codec.decode(latent[1:2]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("samples", [1024, 5 * 512, 40000 // 512 * 512])
def test_other_lengths(codec: MelCodec, samples: int) -> None:
    wave = tones(2, samples)
    latent = codec.encode(wave)
    assert latent.shape == (2, samples // 512, 64) and codec.decode(latent).shape == wave.shape


@pytest.mark.parametrize("samples", [500, 32000, 512])
def test_wrong_length_is_a_clear_error(codec: MelCodec, samples: int) -> None:
    with pytest.raises(UsageError, match="multiple of 512"):
        codec.encode(torch.zeros(1, samples))


def test_silence_and_wild_latents_stay_finite(codec: MelCodec) -> None:
    silence = codec.decode(codec.encode(torch.zeros(1, 32768)))
    assert float(silence.abs().max()) < 0.02
    wild = codec.decode(50 * torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert bool(torch.isfinite(wild).all()) and float(wild.abs().max()) <= 1


def test_save_and_load(codec: MelCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = MelCodec.from_pretrained(tmp_path)
    wave = tones(1)
    assert torch.equal(again.encode(wave), codec.encode(wave)) and again.sampling_rate == 16000
    with pytest.raises(UsageError, match="config.json"):
        MelCodec.from_pretrained(tmp_path / "none")


def test_another_models_folder_is_refused(codec: MelCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path / "codec")
    with pytest.raises(UsageError, match="does not describe a model of class AttributeNet"):
        AttributeNet.from_pretrained(tmp_path / "codec")
    with pytest.raises(UsageError, match=r"no MelCodec at .*config.json is missing"):
        MelCodec.from_pretrained(tmp_path)


def test_stft_inverts_and_normalises() -> None:
    wave = tones(2, 8192)
    window = torch.hann_window(1024)
    padded = pad_clip(wave, 1024, 256)
    spectrum = frame_spectra(padded, window, 256)
    assert spectrum.shape == (2, 32, 513)
    torch.testing.assert_close(spectrum.transpose(1, 2), stft(padded, window, 256), atol=1e-6, rtol=0)
    side = (1024 - 256) // 2
    torch.testing.assert_close(overlap_spectra(spectrum, window, 256)[:, side:-side], wave, atol=1e-5, rtol=0)
    sine = torch.sin(2 * math.pi * 1000 * torch.arange(8192) / 16000)[None]
    assert abs(float(stft(sine, window, 256).abs().max()) - 0.5) < 0.01


def test_filterbanks_cover_the_band() -> None:
    mel = mel_filterbank(80, 1024, 16000, 30.0, 8000.0)
    assert mel.shape == (80, 513) and bool((mel.sum(1) > 0).all()) and float(mel.max()) <= 1
    centres = np.argmax(mel.numpy(), 1)
    assert (np.diff(centres) >= 0).all()
    tone = semitone_filterbank(160, 24, 2048, 16000, 62.0)
    assert tone.shape == (160, 1025)
    torch.testing.assert_close(tone.sum(1), torch.ones(160))
