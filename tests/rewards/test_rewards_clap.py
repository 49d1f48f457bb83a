"""CLAP: feature equality with transformers, real loading code on tiny random models, cosine, gradient, laion-clap."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from gencontrol.data.audio import resample
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.rewards import load_reward, load_rewards
from gencontrol.rewards.audio.clap import ClapReward
from gencontrol.rewards.audio.clap_backend import clap_backend
from gencontrol.rewards.audio.clap_features import ClapLogMel, LogMelConfig
from gencontrol.rewards.pretrained import embedding_of
from gencontrol.types import RewardContext
from tests.helpers.fixtures_models import roberta_tokenizer, seeded

RATE = 16_000


def waves(count: int, samples: int, seed: int = 0) -> torch.Tensor:
    """Tones with a little noise; the last is nearly silent, where the logarithm is most sensitive."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / RATE
    pitch = 200 + 1500 * torch.rand(count, 1, generator=generator)
    out = 0.4 * torch.sin(2 * torch.pi * pitch * time) + 0.01 * torch.randn(count, samples, generator=generator)
    out[-1] *= 1e-4
    return out


def save_tiny_clap(folder: Path, *, fusion: bool = False, seed: int = 0) -> Path:
    """A random CLAP of the real classes in the hub's layout."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    tokenizer = roberta_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "max_position_embeddings": 34, "projection_dim": 12}
    audio = {"num_mel_bins": 64, "spec_size": 64, "patch_size": 8, "patch_stride": [8, 8], "window_size": 4}
    audio |= {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2]}
    audio |= {"num_hidden_layers": 2, "projection_dim": 12, "num_classes": 4, "enable_fusion": fusion}
    with seeded(seed):
        model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ClapFeatureExtractor(
        sampling_rate=RATE, hop_length=508, fft_window_size=512, max_length_s=2, frequency_min=50, frequency_max=8000,
        truncation="fusion" if fusion else "rand_trunc",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clap(tmp_path_factory.mktemp("clap"))


def context(prompts: list[str], rate: int = RATE) -> RewardContext:
    return RewardContext(prompts=prompts, sampling_rate=rate)


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_features_equal_the_extractor_of_transformers(truncation: str, padding: str) -> None:
    from transformers import ClapFeatureExtractor

    for extra in (
        {},
        {"sampling_rate": RATE, "hop_length": 188, "max_length_s": 3, "frequency_min": 50, "frequency_max": 8000},
    ):
        extractor = ClapFeatureExtractor(truncation=truncation, padding=padding, **extra)
        ours = ClapLogMel(LogMelConfig.from_mapping(extractor.to_dict()))
        for samples in (extractor.sampling_rate // 3, extractor.nb_max_samples):
            wave = waves(2, samples)
            theirs = extractor(list(wave.numpy()), sampling_rate=extractor.sampling_rate, return_tensors="pt")
            got = ours(wave)
            assert got.shape == theirs["input_features"].shape
            torch.testing.assert_close(got, theirs["input_features"], atol=1e-3, rtol=0)


def test_features_agree_with_the_ones_the_bundled_model_is_trained_on() -> None:
    from gencontrol.models.readers.clap import clap_features, small_extractor

    extractor = small_extractor()
    wave = waves(3, 32768)
    ours = ClapLogMel(LogMelConfig.from_mapping(extractor.to_dict()))(wave)
    torch.testing.assert_close(ours, clap_features(wave, extractor), atol=1e-3, rtol=0)


def test_features_have_a_gradient_and_are_full_precision_under_autocast() -> None:
    mel = ClapLogMel(LogMelConfig(8, 400, 40, 64, 1, 10, 200, "rand_trunc"))
    wave = torch.randn(1, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mel(wave).sum().backward()
    assert wave.grad is not None and bool(torch.isfinite(wave.grad).all()) and bool((wave.grad != 0).any())
    with torch.autocast("cpu", torch.bfloat16):
        low = mel(wave)
    assert torch.equal(low, mel(wave))


def test_longer_clips_are_cut_without_chance() -> None:
    mel = ClapLogMel(LogMelConfig(8, 100, 10, 32, 1, 10, 50, "rand_trunc"))
    wave = torch.arange(250.0)[None]
    assert mel.crops(wave, "first")[0, :, 0].tolist() == [0]
    assert mel.crops(wave, "center")[0, :, 0].tolist() == [75]
    covering = mel.crops(wave, "mean")[0]
    assert covering[:, 0].tolist() == [0, 75, 150] and covering[:, -1].tolist() == [99, 174, 249]
    assert mel.crops(wave[:, :60], "mean").shape == (1, 1, 60)
    with pytest.raises(UsageError, match="crops"):
        mel(wave)


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="truncation"):
        LogMelConfig(truncation="middle")
    with pytest.raises(UsageError, match="padding"):
        LogMelConfig(padding="mirror")
    with pytest.raises(UsageError, match="preprocessor_config"):
        LogMelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("fusion", [False, True])
def test_score_is_the_cosine_that_transformers_computes(tmp_path: Path, fusion: bool) -> None:
    """Same model through the classes of transformers, with its numpy extractor; float32 tolerance."""
    from transformers import ClapFeatureExtractor, ClapModel

    path = save_tiny_clap(tmp_path, fusion=fusion)
    wave, prompts = waves(3, 2 * RATE), ["a b", "c d e", "f"]
    out = load_reward("clap", reward_model=str(path), device="cpu")(wave, context(prompts))
    model, tokens = (
        ClapModel.from_pretrained(path).eval(),
        roberta_tokenizer()(prompts, padding=True, return_tensors="pt"),
    )
    features = ClapFeatureExtractor.from_pretrained(path)(list(wave.numpy()), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        audio = model.get_audio_features(features["input_features"], is_longer=torch.zeros(3, 1, dtype=torch.bool))
        text = model.get_text_features(**tokens)
        expected = torch.cosine_similarity(embedding_of(audio), embedding_of(text))
    torch.testing.assert_close(out.values, expected, atol=1e-4, rtol=0)
    assert out.valid.all() and out.extras["audio_embeddings"].shape == (3, 12)


def test_embeddings_of_transformers_four_and_five_are_both_understood() -> None:
    tensor = torch.ones(2, 3)
    assert embedding_of(tensor) is tensor
    assert embedding_of(types.SimpleNamespace(pooler_output=tensor)) is tensor


def test_score_does_not_depend_on_batch_channels_or_chance(folder: Path, fenced_rng: None) -> None:
    reward = ClapReward(folder, "cpu", batch_size=2)
    wave, prompts = waves(5, 5 * RATE), list("abcde")
    whole = reward(wave, context(prompts)).values
    assert torch.equal(whole, reward(wave, context(prompts)).values)
    torch.testing.assert_close(reward(wave[3:4], context(["d"])).values, whole[3:4], atol=1e-5, rtol=0)
    stereo = torch.stack([wave, wave], 1)
    torch.testing.assert_close(reward(stereo, context(prompts)).values, whole, atol=1e-5, rtol=0)
    first = ClapReward(folder, "cpu", long_clips="first")
    torch.testing.assert_close(
        first(wave, context(prompts)).values, first(wave[:, : 2 * RATE], context(prompts)).values, atol=1e-5, rtol=0
    )


def test_other_rates_are_resampled(folder: Path) -> None:
    reward, wave = ClapReward(folder, "cpu"), waves(2, 2 * RATE)
    high = resample(wave, RATE, 44_100)
    torch.testing.assert_close(
        reward(high, context(["a", "b"], 44_100)).values, reward(wave, context(["a", "b"])).values, atol=2e-2, rtol=0
    )  # the band just under 8 kHz is lost on the way up and down


def test_gradient_reaches_the_audio_only(folder: Path) -> None:
    reward = ClapReward(folder, "cpu")
    wave = (0.3 * torch.randn(2, RATE, generator=torch.Generator().manual_seed(0))).requires_grad_()
    out = reward(wave, context(["a", "b"]))
    out.values.sum().backward()
    gradient = wave.grad
    assert gradient is not None and reward.differentiable
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward(wave + s * 2e-3 * direction, context(["a", "b"])).values.sum() for s in (1, -1))
    assert float(ahead - behind) / 4e-3 == pytest.approx(float(gradient.norm()), rel=0.1)
    assert all(not p.requires_grad and p.grad is None for p in reward.backend._model.parameters())
    assert not reward(wave.detach(), context(["a", "b"])).values.requires_grad


def test_bad_clips_are_invalid_and_harmless(folder: Path) -> None:
    reward, wave = ClapReward(folder, "cpu"), waves(3, RATE)
    clean = reward(wave, context(["a", "b", "c"])).values
    wave[1, 5] = float("inf")
    out = reward(wave, context(["a", "b", "c"]))
    assert out.valid.tolist() == [True, False, True] and out.values[1].isnan()
    torch.testing.assert_close(out.values[[0, 2]], clean[[0, 2]])


def test_prompts_must_match_the_samples(folder: Path) -> None:
    reward, wave = ClapReward(folder, "cpu"), waves(2, RATE)
    for prompts in (None, ["a"]):
        with pytest.raises(UsageError, match="one prompt per sample"):
            reward(wave, RewardContext(prompts=prompts, sampling_rate=RATE))
    with pytest.raises(UsageError, match="non-empty list"):
        reward.text_embeddings("text")


def test_text_embeddings_are_cached_and_long_texts_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = ClapReward(folder, "cpu")
    asked: list[str] = []
    real = reward.backend.text
    monkeypatch.setattr(reward.backend, "text", lambda texts: asked.extend(texts) or real(texts))
    first = reward.text_embeddings(["a", "b", "a", "x" * 500])
    again = reward.text_embeddings(["b", "a"])
    assert asked == ["a", "b", "x" * 500]
    assert torch.equal(first[[1, 0]], again)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4))


def test_the_fingerprint_changes_with_the_weights_and_not_with_the_place(folder: Path, tmp_path: Path) -> None:
    name = ClapReward(folder, "cpu").backend.name
    assert ClapReward(save_tiny_clap(tmp_path / "same"), "cpu").backend.name == name
    assert ClapReward(save_tiny_clap(tmp_path / "other", seed=1), "cpu").backend.name != name


def test_rewards_of_one_model_share_it(folder: Path) -> None:
    assert ClapReward(folder, "cpu").backend is ClapReward(folder, "cpu").backend
    reward = load_rewards(["clap:0.5", "vendi:0.5"], reward_model=str(folder), device="cpu")
    assert reward.kind == "set"


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tiny_clap(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError):
        ClapReward(tmp_path, "cpu")
    from transformers import ClapModel

    from gencontrol.rewards.audio.clap_backend import TransformersClap

    model = ClapModel.from_pretrained(save_tiny_clap(tmp_path / "b"))
    with pytest.raises(UsageError, match="tokenizer of 'x' has 5 tokens"):
        TransformersClap(model, "12345", LogMelConfig(), "x", torch.device("cpu"))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_clap(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("audio_projection.linear1.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="audio_projection"):
        ClapReward(tmp_path, "cpu")


def test_models_that_cannot_be_had_give_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such/clap.*bundled") as caught:
        ClapReward("no-such/clap", "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be loaded from its folder"):
        ClapReward(tmp_path, "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="'bert' model"):
        ClapReward(tmp_path, "cpu")
    with pytest.raises(UsageError, match="long_clips"):
        ClapReward(long_clips="random")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="audio_tower"):
        clap_backend(audio_tower="HTSAT-huge")


class FakeLaion(torch.nn.Module):
    """Stands in for `laion_clap.CLAP_Module` 1.1.7: same constructor, loader and embedding calls."""

    tokens = "full"

    def __init__(self, enable_fusion=False, device=None, amodel="HTSAT-tiny", tmodel="roberta"):
        super().__init__()
        self.made_with = (enable_fusion, device, amodel)
        self.tokenize = "a" * (5 if "empty" in FakeLaion.tokens else 50)  # only its length is looked at
        self.weight = torch.nn.Parameter(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))

    def load_ckpt(self, ckpt=None, model_id=-1, verbose=True):
        if "HTSAT-base" in Path(ckpt).read_text() and self.made_with[2] != "HTSAT-base":
            raise RuntimeError("Error(s) in loading state_dict for CLAP:\n size mismatch")

    def get_audio_embedding_from_data(self, x, use_tensor=False):
        assert use_tensor and all(w.ndim == 1 and len(w) <= 480_000 for w in x)
        return torch.stack([w[:100] @ self.weight for w in x])

    def get_text_embedding(self, x, tokenizer=None, use_tensor=False):
        assert use_tensor and isinstance(x, list)
        return torch.stack([torch.full((6,), float(len(t))) for t in x])


def test_laion_checkpoints_go_through_the_packages_own_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "laion_clap", types.SimpleNamespace(CLAP_Module=FakeLaion))
    path = tmp_path / "music_audioset.pt"
    path.write_text("HTSAT-base")
    reward = ClapReward(path, "cpu")
    assert reward.backend._module.made_with == (False, "cpu", "HTSAT-base")
    wave = waves(2, 25 * 48_000).requires_grad_()
    out = reward(wave, context(["a", "bc"], 48_000))
    out.values.sum().backward()
    assert out.values.shape == (2,) and wave.grad is not None and bool((wave.grad != 0).any())
    assert float(out.values.detach().abs().max()) <= 1 + 1e-6
    with pytest.raises(UsageError, match="audio_tower"):
        ClapReward(path, "cpu", audio_tower="HTSAT-tiny")
    with pytest.raises(UsageError, match="does not exist"):
        ClapReward(tmp_path / "none.pt", "cpu")
    monkeypatch.setattr(FakeLaion, "tokens", "empty")
    (tmp_path / "z.pt").write_text("")
    with pytest.raises(EnvironmentMissing, match="5 tokens"):
        ClapReward(tmp_path / "z.pt", "cpu")


def test_a_missing_laion_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "laion_clap", None)
    (tmp_path / "x.pt").write_text("")
    with pytest.raises(EnvironmentMissing, match=r"gencontrol\[clap\]"):
        ClapReward(tmp_path / "x.pt", "cpu")


def test_a_missing_text_model_of_laion_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(**_: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setitem(sys.modules, "laion_clap", types.SimpleNamespace(CLAP_Module=offline))
    (tmp_path / "y.pt").write_text("")
    with pytest.raises(EnvironmentMissing, match="roberta-base"):
        ClapReward(tmp_path / "y.pt", "cpu")


def test_numpy_noise_is_not_used(folder: Path) -> None:
    before = np.random.get_state()[1].copy()  # the global state itself is what is looked at
    ClapReward(folder, "cpu")(waves(1, 5 * RATE), context(["a"]))
    assert (before == np.random.get_state()[1]).all()


def test_the_bundled_model_hears_what_the_caption_says() -> None:
    """Clips of our own numpy voices against their captions: matching pairs score far above shuffled ones."""
    from gencontrol.recipes.sound.data.effects import finish
    from gencontrol.recipes.sound.data.grammar import SoundSpec
    from gencontrol.recipes.sound.data.synth import render_synth

    specs = [
        SoundSpec("square lead", "major", "fast", "high", "loud", "dry", "arpeggio", 76, 1),
        SoundSpec("sub-bass drone", "none", "slow", "low", "soft", "dry", "sustained", 38, 2),
        SoundSpec("wind", "none", "slow", "middle", "crescendo", "dry", "sustained", 60, 3),
        SoundSpec("FM bell", "minor", "medium", "middle", "loud", "echo", "melody", 60, 4),
    ]
    wave = torch.stack([torch.from_numpy(finish(render_synth(spec), spec)) for spec in specs])
    prompts = [f"a {spec.instrument}" for spec in specs]
    reward = load_reward("clap", device="cpu")
    matched = reward(wave, context(prompts)).values
    shuffled = reward(wave, context(prompts[1:] + prompts[:1])).values
    assert bool((matched > shuffled + 0.1).all()), (matched, shuffled)
