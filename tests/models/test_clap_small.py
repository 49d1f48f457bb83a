"""Small CLAP: hub layout, torch features equal to the extractor's, contrastive loss; the attribute judge."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.models.readers.attributes import AttributeNet, build_attribute_net
from gencontrol.recipes.sound.attributes import attribute_losses
from gencontrol.recipes.sound.attributes import augment as augment_bands
from gencontrol.recipes.sound.clap import SILENCE_DB, augment, contrastive_loss, info_nce, set_input_norm
from gencontrol.recipes.sound.data import ATTRIBUTES, sample_captions
from gencontrol.recipes.sound.retrieval import retrieval_at_one

pytest.importorskip("transformers")
from gencontrol.models.readers.clap import (
    audio_embeddings,
    build_clap,
    clap_features,
    load_clap,
    save_clap,
    small_extractor,
    text_embeddings,
    train_tokenizer,
)


def clips(count: int, samples: int = 32768) -> torch.Tensor:
    """Noisy chirps, the last one nearly silent."""
    generator = torch.Generator().manual_seed(0)
    clock = torch.arange(samples) / 16000
    rate = 200 + 2000 * torch.rand(count, 1, generator=generator)
    wave = 0.5 * torch.sin(2 * math.pi * rate * clock * (1 + 0.3 * clock))
    wave = wave * torch.exp(-2 * clock) + 0.001 * torch.randn(count, samples, generator=generator)
    wave[-1] *= 1e-4
    return wave


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(sample_captions(800, 0, "train"))
    path = tmp_path_factory.mktemp("clap")
    save_clap(path, build_clap(0, len(tokenizer)), tokenizer, small_extractor())
    return path


def test_folder_loads_as_any_clap_of_the_hub(folder: Path, fenced_rng: None) -> None:
    from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, AutoTokenizer, ClapModel

    model = ClapModel.from_pretrained(folder)
    assert isinstance(AutoModel.from_pretrained(folder), ClapModel)
    assert sum(p.numel() for p in model.parameters()) < 4e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "a fast, bright arpeggio on the marimba"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 0 and ids[-1] == 2 and len(ids) < 16
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer("naïve 鐘 ½")["input_ids"], skip_special_tokens=True) == "naïve 鐘 ½"
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "ClapProcessor"
    inputs = AutoFeatureExtractor.from_pretrained(folder)(clips(1)[0].numpy(), sampling_rate=16000, return_tensors="pt")
    assert model.get_audio_features(**inputs).pooler_output.shape == (1, 128)


@pytest.mark.parametrize("samples", [32768, 16000, 48000])
@pytest.mark.parametrize("padding", ["pad", "repeat", "repeatpad"])
def test_torch_features_equal_the_extractor(samples: int, padding: str) -> None:
    extractor = small_extractor()
    extractor.padding = padding
    wave = clips(3, samples)
    expected = extractor([w.numpy() for w in wave], sampling_rate=16000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(clap_features(wave, extractor), expected.float(), atol=1e-3, rtol=0)


def test_torch_features_equal_a_hub_extractor() -> None:
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="rand_trunc")  # 48 kHz, 10 s: laion/clap-htsat-unfused
    wave = clips(2, 96000)
    expected = extractor([w.numpy() for w in wave], sampling_rate=48000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(clap_features(wave, extractor), expected.float(), atol=1e-3, rtol=0)


def test_features_are_differentiable_and_long_clips_are_cut_at_their_middle() -> None:
    wave = clips(2, 48000).requires_grad_()
    clap_features(wave, small_extractor()).sum().backward()
    assert wave.grad is not None and bool(torch.isfinite(wave.grad).all())
    longer = torch.nn.functional.pad(clips(2, 48000), (100, 100))
    torch.testing.assert_close(
        clap_features(longer, small_extractor()), clap_features(clips(2, 48000), small_extractor())
    )


def test_embeddings_survive_saving_and_have_unit_length(folder: Path) -> None:
    model, tokenizer, extractor = load_clap(folder)
    again, _, _ = load_clap(folder)
    wave, texts = clips(3), sample_captions(3, 1, "test")
    audio, text = audio_embeddings(model, extractor, wave), text_embeddings(model, tokenizer, texts)
    torch.testing.assert_close(audio, audio_embeddings(again, extractor, wave))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    alone = text_embeddings(model, tokenizer, texts[:1])
    torch.testing.assert_close(alone, text[:1], atol=1e-5, rtol=0)  # padding changes nothing


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    from transformers import ClapModel

    tokenizer = train_tokenizer(sample_captions(100, 0, "train"), vocabulary=400)
    model = build_clap(0, len(tokenizer))
    save_clap(tmp_path, model.half(), tokenizer, small_extractor())
    assert (tmp_path / "model.safetensors").stat().st_size < 7e6
    again = ClapModel.from_pretrained(tmp_path)
    assert again.dtype == torch.float32 and again.audio_model.dtype == torch.float32
    torch.testing.assert_close(again.audio_projection.linear1.weight, model.audio_projection.linear1.weight.float())


def test_info_nce_against_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(7.0)
    weights = torch.exp(7.0 * audio @ text.T)
    own = weights.diagonal()
    expected = -0.5 * (torch.log(own / weights.sum(1)) + torch.log(own / weights.sum(0)))
    torch.testing.assert_close(info_nce(audio, text, scale, scale), expected)


def test_contrast_reaches_both_towers_and_goes_down_its_gradient(folder: Path) -> None:
    model, tokenizer, extractor = load_clap(folder)
    features = clap_features(clips(6), extractor)
    set_input_norm(model, features)
    tokens = tokenizer(sample_captions(6, 2, "train"), padding=True, return_tensors="pt")

    def loss() -> torch.Tensor:
        return contrastive_loss(model, features, tokens["input_ids"], tokens["attention_mask"]).mean()

    before = loss()
    before.backward()
    for tower in (model.audio_model, model.text_model):
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in tower.parameters())
    squared = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None)
    step = 0.02 / squared  # first order: the loss falls by 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(step * parameter.grad)
        assert 0.01 < before.item() - loss().item() < 0.03


def test_augmentation_delays_and_scales_in_decibels() -> None:
    features = torch.linspace(-50, 0, 20)[None, None, :, None].expand(4, 1, 20, 3).contiguous()
    moved = augment(features, torch.Generator().manual_seed(0), gain_db=2.0, shift=4)
    assert moved.shape == features.shape and float(moved.min()) >= SILENCE_DB
    for item in moved:
        delay = int((item[0, :, 0] == SILENCE_DB).sum())
        gain = item[0, delay:, 0] - features[0, 0, : 20 - delay, 0]
        assert delay <= 4 and float(gain.abs().max()) <= 2 and float(gain.std()) < 1e-4
    bands = torch.arange(10.0).expand(2, 1, 3, 10).contiguous()
    assert augment_bands(bands, torch.Generator().manual_seed(0), gain=0.1, shift=3).shape == bands.shape


def test_retrieval_counts_hits() -> None:
    right = torch.eye(30)
    assert retrieval_at_one(right, right, candidates=20, seed=0) == 1.0
    assert retrieval_at_one(right, right.roll(1, 0), candidates=20, seed=0) == 0.0
    noise = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    assert abs(retrieval_at_one(noise, noise.flip(0), candidates=20, seed=0) - 0.05) < 0.04


def test_attribute_net_shapes_losses_and_persistence(tmp_path: Path, fenced_rng: None) -> None:
    net = build_attribute_net(0, ATTRIBUTES)
    wave = clips(3)
    assert net.embed(wave).shape == (3, 32, 128) and net.embed_clip(wave).shape == (3, 128)
    logits = {name: values.detach() for name, values in net(wave).items()}
    assert {name: values.shape[1] for name, values in logits.items()} == {k: len(v) for k, v in ATTRIBUTES.items()}
    labels = {name: torch.zeros(3, dtype=torch.long) for name in ATTRIBUTES}
    every = attribute_losses(logits, labels, 0.0)
    labels["mode"] = torch.tensor([0, -1, 0])
    fewer = attribute_losses(logits, labels, 0.0)
    assert torch.equal(every[[0, 2]], fewer[[0, 2]]) and bool(fewer[1] < every[1])
    net.save_pretrained(tmp_path, dtype=torch.float16)
    again = AttributeNet.from_pretrained(tmp_path)
    assert next(again.parameters()).dtype == torch.float32
    np.testing.assert_allclose(again.embed_clip(wave).detach(), net.embed_clip(wave).detach(), atol=5e-2)
