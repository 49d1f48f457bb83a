"""Encoders and reference sets: folders with broken files, captions, statistics files, and the rewards that use them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gencontrol.data.audio import resample, write_audio
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.rewards import load_reward
from gencontrol.rewards.audio.encoders import AttributeEncoder, ClapEncoder, MelEncoder, make_encoder
from gencontrol.rewards.base import SetReward
from gencontrol.rewards.distribution import FadReward, SetFadReward, VendiReward, frechet_distance, vendi_score
from gencontrol.rewards.sets.gaussian import Gaussian
from gencontrol.rewards.sets.reference import from_captions, from_clips, from_folder, load_reference
from gencontrol.types import RewardContext

RATE = 16_000
CONTEXT = RewardContext(sampling_rate=RATE)


def note(pitch: float, noise: float = 0.001, seed: int = 0, seconds: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * RATE)) / RATE
    tone = sum(torch.sin(2 * math.pi * pitch * k * time) / k for k in range(1, 6))
    return 0.2 * tone * torch.exp(-time) + noise * torch.randn(len(time), generator=generator)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 clean notes, one at another rate, one stereo, and three broken files."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(12):
        write_audio(folder / f"{i:02}.wav", note(150 + 40 * i, seed=i), RATE)
    write_audio(folder / "high.flac", resample(note(333), RATE, 44_100), 44_100)
    write_audio(folder / "stereo.wav", torch.stack([note(222), note(222)]), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF\x00\x00")
    (folder / "empty.mp3").write_bytes(b"")
    (folder / "text.flac").write_text("not sound")
    (folder / "notes.txt").write_text("ignored")
    return folder


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from test_rewards_clap import save_tiny_clap

    return save_tiny_clap(tmp_path_factory.mktemp("clap"))


def test_broken_files_are_skipped_counted_and_named(sounds: Path) -> None:
    encoder = MelEncoder()
    with pytest.warns(UserWarning, match="skipped 3 of 17 files: broken.wav, empty.mp3, text.flac"):
        statistics, broken = from_folder(sounds, encoder)
    assert [path.name for path in broken] == ["broken.wav", "empty.mp3", "text.flac"]
    assert statistics.n == 14 * 7 and statistics.encoder == encoder.name  # 7 half-second frames in 2 s


def test_folder_statistics_are_those_of_all_frames(tmp_path: Path) -> None:
    clips = [(note(200 + 50 * i) * 32768).round() / 32768 for i in range(6)]
    for i, clip in enumerate(clips):
        write_audio(tmp_path / f"{i}.wav", clip, RATE)
    encoder = MelEncoder(coefficients=4)
    frames = torch.cat([encoder.frames(clip[None], RATE)[0] for clip in clips])
    assert load_reference(tmp_path, encoder).distance(Gaussian.of(frames)) < 1e-6


def test_folders_without_usable_sound_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no sound"):
        from_folder(tmp_path, MelEncoder())
    (tmp_path / "a.wav").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"none of the 1 sound files.*a\.wav"):
        from_folder(tmp_path, MelEncoder())
    with pytest.raises(UsageError, match="neither 'bundled'"):
        load_reference(tmp_path / "nowhere", MelEncoder())


def test_too_few_examples_are_warned_about(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", note(200), RATE)
    with pytest.warns(UserWarning, match="7 embeddings of 64 dimensions"):
        assert from_folder(tmp_path, MelEncoder())[0].n == 7


def test_statistics_files_remember_their_encoder(sounds: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="skipped"):
        statistics = load_reference(sounds, MelEncoder())
    statistics.save(tmp_path / "s.safetensors")
    assert torch.equal(load_reference(tmp_path / "s.safetensors", MelEncoder()).cov, statistics.cov)
    with pytest.raises(UsageError, match="made by encoder 'mel:32"):
        load_reference(tmp_path / "s.safetensors", MelEncoder(coefficients=16))


@pytest.mark.filterwarnings("ignore:reference")
def test_bundled_statistics_are_found_by_the_encoders_kind(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr("gencontrol.weights.BUNDLED", tmp_path / "bundled")
    with pytest.raises(EnvironmentMissing, match="no bundled reference"):
        FadReward(encoder="mel")
    (tmp_path / "bundled" / "reference").mkdir(parents=True)
    load_reference(sounds, MelEncoder()).save(tmp_path / "bundled" / "reference" / "mel.safetensors")
    assert FadReward(encoder="mel").reference.n == 14 * 7


@pytest.mark.parametrize("encoder", ["clap", "mel", "attributes"])
def test_bundled_statistics_belong_to_the_bundled_encoders(encoder: str) -> None:
    """Fails when an encoder is trained again without its statistics (see gencontrol/bundled/reference/README.md)."""
    if encoder == "clap":
        pytest.importorskip("transformers")
    reward = FadReward(encoder=encoder)
    clip = note(300, seconds=2.048)[None]
    assert reward.reference.n >= 10 * len(reward.reference.mean)
    assert reward(clip, CONTEXT).valid.all()


def test_clip_statistics_are_those_of_all_frames() -> None:
    clips, encoder = torch.stack([note(200 + 50 * i) for i in range(5)]), MelEncoder(coefficients=4)
    frames = encoder.frames(clips, RATE).flatten(0, 1)
    assert from_clips(clips, RATE, encoder, batch_size=2).distance(Gaussian.of(frames)) < 1e-9


@pytest.mark.filterwarnings("ignore:reference")
def test_clips_like_the_reference_score_higher(sounds: Path) -> None:
    reward = load_reward("fad", reference=str(sounds), encoder="mel")
    samples = torch.stack([note(310, seed=50), note(310, 0.2, seed=51), note(2900, seed=52)])
    out = reward(samples, CONTEXT)
    assert out.valid.all() and bool((out.values < 0).all())
    assert out.values.argmax() == 0
    frames = reward.encoder.frames(samples[:1], RATE)[0]
    assert float(out.values[0]) == pytest.approx(-Gaussian.of(frames).distance(reward.reference), rel=1e-4)


@pytest.mark.filterwarnings("ignore:reference")
def test_fad_passes_a_gradient_and_bad_clips_are_invalid(sounds: Path) -> None:
    reward = FadReward(sounds, "mel")
    samples = torch.stack([note(310, 0.02, seed=50), note(310, 0.2, seed=51)]).requires_grad_()
    reward(samples, CONTEXT).values.sum().backward()
    assert samples.grad is not None and bool(torch.isfinite(samples.grad).all()) and bool((samples.grad != 0).any())
    spoiled = samples.detach().clone()
    spoiled[0, 0] = float("nan")
    assert reward(spoiled, CONTEXT).valid.tolist() == [False, True]
    with pytest.raises(UsageError, match="at least 2 frames"):
        reward(samples[:, : RATE // 4], CONTEXT)


@pytest.mark.filterwarnings("ignore:reference")
def test_set_fad_is_the_distance_of_all_frames_and_its_state_agrees(sounds: Path) -> None:
    reward = SetFadReward(sounds, "mel")
    assert isinstance(reward, SetReward)
    samples = torch.stack([note(180 + 70 * i, 0.01 * i, seed=i) for i in range(6)])
    samples[5, 3] = float("nan")
    features = reward.features(samples, CONTEXT)
    assert features["valid"].tolist() == [True] * 5 + [False]
    frames = reward.encoder.frames(samples[:5], RATE).flatten(0, 1)
    expected = -Gaussian.of(frames).distance(reward.reference)
    assert reward.evaluate(features) == pytest.approx(expected, rel=1e-6)
    out = reward(samples, CONTEXT)
    assert out.values[:5].tolist() == pytest.approx([expected] * 5, rel=1e-5) and not out.valid[5]
    assert out.extras["set_size"] == 5
    state = reward.state(features, torch.arange(5))
    assert state.value() == pytest.approx(expected, rel=1e-6)
    state.swap(0, 3)
    assert state.value() != pytest.approx(expected, rel=1e-6)


def test_vendi_sees_variety() -> None:
    reward = VendiReward("mel")
    same = torch.stack([note(300, seed=i) for i in range(5)])
    varied = torch.stack([note(120 * 2**i, 0.02 * i, seed=i) for i in range(5)])
    low, high = (reward(x, CONTEXT).extras["set_value"] for x in (same, varied))
    assert 1.0 <= low < 1.05 < high <= 5
    features = reward.features(varied, CONTEXT)
    assert high == pytest.approx(vendi_score(features["embeddings"]))
    assert reward.state(features, torch.arange(5)).value() == pytest.approx(high)


def test_mel_frames_are_a_function_of_their_part_of_the_sound() -> None:
    encoder = MelEncoder()
    clip = note(300)
    frames = encoder.frames(clip[None], RATE)
    assert frames.shape == (1, 7, 64)
    again = encoder.frames(clip[None, RATE // 4 : RATE // 4 + RATE // 2], RATE)
    torch.testing.assert_close(frames[:, 1], again[:, 0])
    louder = encoder.frames(10 * clip[None], RATE) - frames
    assert float(louder[0, 0, 0]) == pytest.approx(2.0 * 8, rel=1e-3)  # +20 dB in units of 10 dB, times √64
    torch.testing.assert_close(encoder.clips(10 * clip[None], RATE), encoder.clips(clip[None], RATE), atol=1e-3, rtol=0)


def test_clap_frames_are_chunk_embeddings_in_the_space_of_text(clap: Path, tmp_path: Path) -> None:
    encoder = make_encoder("clap", reward_model=clap, device="cpu", chunk_s=0.5, hop_s=0.5)
    assert isinstance(encoder, ClapEncoder) and "chunk=0.5,hop=0.5" in encoder.name
    clip = note(300)
    frames = encoder.frames(clip[None], RATE)
    assert frames.shape == (1, 4, 12)
    torch.testing.assert_close(
        frames[0, 2], encoder.clips(clip[None, RATE : RATE + RATE // 2], RATE)[0], atol=1e-5, rtol=0
    )
    captions = tmp_path / "captions.txt"
    captions.write_text("a b c\n\nd e f\na b c\n g h \n")
    with pytest.warns(UserWarning, match="3 embeddings of 12 dimensions"):
        statistics = from_captions(captions, encoder)
    texts = encoder.captions(["a b c", "d e f", "g h"])
    assert statistics.n == 3 and statistics.distance(Gaussian.of(texts)) < 1e-9
    with pytest.warns(UserWarning, match="singular"):
        reward = load_reward("fad", reference=str(captions), reward_model=str(clap), device="cpu", chunk_s=0.5)
    assert reward(clip[None], CONTEXT).valid.all()


def test_captions_need_text_and_a_text_space(clap: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("one line only\n")
    with pytest.raises(UsageError, match="1 different captions"):
        from_captions(path, make_encoder("clap", reward_model=clap, device="cpu"))
    path.write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="no text space"):
        load_reference(path, MelEncoder())
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        load_reference(path, MelEncoder())


def test_attribute_encoder_gives_frames_of_the_classifier(tmp_path: Path) -> None:
    from gencontrol.models.readers.attributes import build_attribute_net

    build_attribute_net(0, {"mode": ("major", "minor")}).save_pretrained(tmp_path)
    encoder = AttributeEncoder(tmp_path, "cpu")
    clip = note(300, seconds=2.048)
    frames = encoder.frames(clip[None], RATE)
    assert frames.shape == (1, 32, 128)
    long = encoder.frames(torch.cat([clip, clip])[None], RATE)  # two training windows, each as if alone
    torch.testing.assert_close(long, torch.cat([frames, frames], 1), atol=1e-5, rtol=0)
    assert encoder.frames(clip[None, :500], RATE).shape[2] == 128
    torch.testing.assert_close(encoder.clips(clip[None], RATE).norm(dim=1), torch.ones(1))


def test_encoder_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'clap'"):
        make_encoder("clab")
    with pytest.raises(UsageError, match="reward_model"):
        make_encoder("mel", reward_model="some/model")
    with pytest.raises(UsageError, match="fixed length"):
        make_encoder("attributes", chunk_s=1.0)
    with pytest.raises(UsageError, match="mel encoder"):
        make_encoder("mel", chunk_s=0.0)


def test_public_names_of_the_distribution_module() -> None:
    assert frechet_distance(torch.eye(3), torch.eye(3)) == pytest.approx(0, abs=1e-6)
    assert vendi_score(torch.eye(3)) == pytest.approx(3)
