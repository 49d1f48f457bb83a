"""Audio files, resampling, and the rewards that read the signal: quality, loudness range, spectral centroid."""

from __future__ import annotations

import io
import math
import sys
import wave

import numpy as np
import pytest
import scipy.signal
import torch

from gencontrol.data.audio import (
    chunk_starts,
    chunks,
    list_audio,
    read_audio,
    resample,
    to_mono,
    wav_bytes,
    write_audio,
)
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.rewards import load_reward
from gencontrol.types import RewardContext

RATE = 16_000


def tone(hertz: float, seconds: float = 2.0, rate: int = RATE) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate), dtype=torch.float64) / rate).float()


def music(seed: int) -> torch.Tensor:
    """Two seconds of decaying harmonic notes with soft attacks."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(2 * RATE) / RATE
    out = torch.zeros(2 * RATE)
    for start in (0.0, 0.45, 0.9, 1.4):
        pitch = 150 * 2 ** (2 * float(torch.rand(1, generator=generator)))
        local = (time - start).clamp_min(0)
        envelope = (1 - torch.exp(-local / 0.005)) * torch.exp(-3 * local)
        for harmonic in range(1, 9):
            out += 0.12 / harmonic * envelope * torch.sin(2 * math.pi * pitch * harmonic * local)
    return out


def context(prompts: list[str] | None = None, rate: int | None = RATE) -> RewardContext:
    return RewardContext(prompts=prompts, sampling_rate=rate)


def test_wav_bytes_are_sixteen_bit_pcm_and_need_no_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    data = wav_bytes(torch.tensor([[0.0, 1.0, -1.0, 2.0], [0.5, 0.5, 0.5, 0.5]]), 8000)
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (2, 2, 8000, 4)
        frames = np.frombuffer(file.readframes(4), "<i2").reshape(4, 2)
    assert frames[:, 0].tolist() == [0, 32767, -32768, 32767]
    with pytest.raises(EnvironmentMissing, match=r"gencontrol\[audio\]"):
        read_audio(__file__)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(1, 2, 3), torch.tensor([float("nan")])])
def test_wav_bytes_refuse_what_is_no_sound(bad: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        wav_bytes(bad, 8000)


@pytest.mark.parametrize(("ending", "tolerance"), [("wav", 2e-5), ("flac", 4e-5), ("ogg", 0.1), ("mp3", 0.1)])
def test_files_survive_writing_and_reading(tmp_path, ending: str, tolerance: float) -> None:
    """Lossless formats to 16-bit rounding; lossy ones to a tenth, in the middle (encoder delay is compensated)."""
    sound = torch.stack([0.5 * tone(440), 0.2 * tone(300)])
    write_audio(tmp_path / f"a.{ending}", sound, RATE)
    back, rate = read_audio(tmp_path / f"a.{ending}")
    assert rate == RATE and back.shape[0] == 2
    assert float((back[:, 4000:20000] - sound[:, 4000:20000]).abs().max()) < tolerance
    short, _ = read_audio(tmp_path / f"a.{ending}", max_seconds=0.5)
    assert short.shape[1] == RATE // 2


def test_wrong_files_are_named(tmp_path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFFnothing")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    write_audio(tmp_path / "sub" / "Z.FLAC", tone(100), RATE)
    for name in ("bad.wav", "empty.wav", "missing.wav"):
        with pytest.raises(UsageError, match=name):
            read_audio(tmp_path / name)
    assert [path.name for path in list_audio(tmp_path)] == ["bad.wav", "empty.wav", "Z.FLAC"]
    with pytest.raises(UsageError, match="not a folder"):
        list_audio(tmp_path / "bad.wav")
    with pytest.raises(UsageError, match="ending"):
        write_audio(tmp_path / "a.xyz", tone(100), RATE)


@pytest.mark.parametrize("new_rate", [48_000, 44_100, 22_050, 11_025, 8_000])
def test_resampling_keeps_a_tone_and_its_length(new_rate: int) -> None:
    got = resample(tone(1000)[None], RATE, new_rate)[0]
    assert len(got) == 2 * new_rate
    middle = slice(new_rate // 10, -new_rate // 10)
    torch.testing.assert_close(got[middle], tone(1000, rate=new_rate)[middle], atol=1e-5, rtol=0)  # stop band −100 dB


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    assert float(resample(tone(6000)[None], RATE, 8000)[0, 500:-500].abs().max()) < 1e-4


def test_resampling_agrees_with_the_ideal_band_limited_one() -> None:
    """A sum of low tones, periodic in the clip, against scipy's Fourier resampling, which is exact for it."""
    sound = (tone(100) + tone(1300) + tone(2750.5)).double()
    expected = torch.from_numpy(scipy.signal.resample(sound.numpy(), 2 * 12_000))
    got = resample(sound[None], RATE, 12_000)[0]
    torch.testing.assert_close(got[1500:-1500], expected[1500:-1500], atol=1e-4, rtol=0)


def test_resampling_is_linear_and_has_a_gradient() -> None:
    sound = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert resample(sound, 16_000, 44_100).shape == (2, 3, 552)
    assert torch.autograd.gradcheck(lambda x: resample(x, 3, 2), (sound[:1, :1, :30],))
    assert resample(sound, 8000, 8000) is sound
    with pytest.raises(UsageError, match="whole numbers"):
        resample(sound, 0, 8000)


def test_chunks_cover_the_clip() -> None:
    assert chunk_starts(10, 4, 3) == [0, 3, 6]
    assert chunk_starts(11, 4, 3) == [0, 3, 6, 7]
    assert chunk_starts(3, 4, 3) == [0]
    sound = torch.arange(22.0).reshape(2, 11)
    assert chunks(sound, [0, 7], 4)[1].tolist() == [[11, 12, 13, 14], [18, 19, 20, 21]]


def test_mono_is_the_mean_of_channels() -> None:
    assert to_mono(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).tolist() == [[0.5, 0.5]]
    with pytest.raises(UsageError):
        to_mono(torch.zeros(3))


@pytest.mark.parametrize("name", ["quality", "loudness-range", "spectral-centroid"])
def test_signal_rewards_mark_bad_clips_and_need_a_rate(name: str) -> None:
    samples = torch.stack([music(0), music(1), music(2)])
    samples[1, 7] = float("nan")
    out = load_reward(name)(samples, context())
    assert out.valid.tolist() == [True, False, True] and out.values[1].isnan()
    alone = load_reward(name)(samples[[0, 2]], context())
    torch.testing.assert_close(out.values[[0, 2]], alone.values)  # the bad clip changes nothing for the others
    stereo = torch.stack([samples[[0, 2]]] * 2, dim=1)
    torch.testing.assert_close(load_reward(name)(stereo, context()).values, alone.values)
    with pytest.raises(UsageError, match="sampling_rate"):
        load_reward(name)(samples, context(rate=None))
    with pytest.raises(UsageError, match="float tensor"):
        load_reward(name)([1, 2], context())


def test_loudness_range_of_two_levels_is_their_difference() -> None:
    steady = 0.5 * tone(440)
    stepped = steady * torch.where(torch.arange(len(steady)) < len(steady) // 2, 1.0, 0.1)
    out = load_reward("loudness-range")(torch.stack([steady, stepped, torch.zeros_like(steady)]), context())
    assert float(out.values[0]) == pytest.approx(0.0, abs=0.1)
    assert float(out.values[1]) == pytest.approx(20.0, abs=0.2)  # a tenth of the amplitude is 20 dB
    assert not out.valid[2]  # silence has no range
    near = load_reward("loudness-range", target=20.0)(torch.stack([steady, stepped]), context())
    assert near.values[1] > near.values[0] and float(near.values[0]) == pytest.approx(-20.0, abs=0.2)


def test_loudness_range_lies_between_the_tenth_and_ninety_fifth_percentile() -> None:
    ramp = torch.linspace(-40, 0, 2 * RATE)
    out = load_reward("loudness-range")((10 ** (ramp / 20) * tone(440))[None], context())
    assert float(out.values[0]) == pytest.approx(0.85 * 36, abs=0.5)  # window centres span 36 of the 40 dB


def test_spectral_centroid_of_a_tone_is_its_frequency() -> None:
    samples = torch.stack([tone(500), tone(2000) + 0.3, 0.5 * tone(1000) + 0.5 * tone(3000), torch.zeros(2 * RATE)])
    hertz = load_reward("spectral-centroid", unit="hz")(samples, context())
    torch.testing.assert_close(hertz.values[:3], torch.tensor([500.0, 2000.0, 2000.0]), atol=5.0, rtol=0)
    assert not hertz.valid[3]
    octaves = load_reward("spectral-centroid")(samples, context())
    assert float(octaves.values[1] - octaves.values[0]) == pytest.approx(2.0, abs=0.02)
    near = load_reward("spectral-centroid", target_hz=2000.0)(samples, context())
    assert near.values[:3].argmax() > 0 and float(near.values[0]) == pytest.approx(-2.0, abs=0.02)
    with pytest.raises(UsageError, match="unit"):
        load_reward("spectral-centroid", unit="mels")


@pytest.mark.parametrize("name", ["loudness-range", "spectral-centroid"])
def test_signal_rewards_have_the_gradient_of_finite_differences(name: str) -> None:
    samples = torch.stack([music(0), music(1)]).requires_grad_()
    reward = load_reward(name)
    reward(samples, context()).values.sum().backward()
    gradient = samples.grad
    assert gradient is not None
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up = reward(samples + 3e-3 * direction, context()).values.sum()
        down = reward(samples - 3e-3 * direction, context()).values.sum()
    assert float(up - down) / 6e-3 == pytest.approx(float(gradient.norm()), rel=0.05)


FAULTS = {
    "hiss": lambda x, noise: x + 0.02 * noise,
    "strong hiss": lambda x, noise: x + 0.1 * noise,
    "clipping": lambda x, noise: (4 * x / x.abs().max()).clamp(-1, 1),
    "offset": lambda x, noise: x + 0.1,
    "clicks": lambda x, noise: x + 0.8 * (torch.arange(len(x)) % 800 == 5),
    "mostly silent": lambda x, noise: x * (torch.arange(len(x)) < len(x) // 5),
    "muffled": lambda x, noise: resample(resample(x[None], 16_000, 600), 600, 16_000)[0][: len(x)],
    "faint": lambda x, noise: 0.002 * x,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_quality_ranks_every_clean_clip_above_its_damaged_copy(fault: str) -> None:
    clean = torch.stack([music(seed) for seed in range(8)])
    noise = torch.randn(len(clean), 2 * RATE, generator=torch.Generator().manual_seed(0))
    damaged = torch.stack([FAULTS[fault](x, n) for x, n in zip(clean, noise, strict=True)])
    reward = load_reward("quality")
    good, bad = reward(clean, context()).values, reward(damaged, context()).values
    assert bool((good > bad + 0.02).all()), (good, bad)
    assert float(good.min()) > 0.7 and 0 <= float(bad.min()) and float(good.max()) <= 1


def test_quality_falls_steadily_with_the_noise() -> None:
    clean = music(3)
    noise = torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0))
    values = load_reward("quality")(torch.stack([clean + s * noise for s in (0.0, 0.01, 0.03, 0.1)]), context()).values
    assert bool((values[1:] < values[:-1]).all())


def test_quality_does_not_take_the_edges_of_a_saw_wave_for_clicks() -> None:
    time = torch.arange(2 * RATE) / RATE
    saw = torch.stack([0.5 * (2 * ((pitch * time) % 1) - 1) for pitch in (65.4, 110.0, 440.0)])
    clean = load_reward("quality")(saw, context()).extras["factors"]["clicks"]
    assert bool((clean == 1).all())
