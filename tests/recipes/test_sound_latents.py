"""The latent cache: what is in it, and when it is made anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.models.conditions.text import encode_text, null_text
from gencontrol.recipes.sound.data.dataset import SoundDataset, _write_rows
from gencontrol.recipes.sound.latents import prepare_sound_latents
from tests.helpers.fixtures_models import clap_text_encoder, roberta_tokenizer, tiny_codec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of five clips of noise with real captions."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.integers(-9000, 9000, (5, 2048)).astype(np.int16))
    _write_rows(tmp_path / "train.jsonl", "train", 5, 0)
    (tmp_path / "recipe.json").write_text(json.dumps({"version": 1}))
    return tmp_path


def test_cache_holds_latents_and_conditions(folder: Path) -> None:
    codec, text, tokenizer = tiny_codec(), clap_text_encoder(), roberta_tokenizer()
    cached = prepare_sound_latents(folder, codec, text, tokenizer, folder / "cache", chunk=2)
    source = SoundDataset.load(folder, "train")
    assert len(cached) == 5 and cached.variants == 3 and cached.latents.dtype == torch.float16
    assert len(cached.texts) == len({t for captions in source.captions for t in captions})
    x0, cond = cached.read([4, 1], [2, 0])
    torch.testing.assert_close(x0, codec.encode(source.waveforms([4, 1])), atol=4e-3, rtol=2e-3)  # fp16
    texts = [source.captions[4][2], source.captions[1][0]]
    assert [cached.text(4, 2), cached.text(1)] == texts
    expected = encode_text(text, tokenizer, texts)
    assert set(cond) == set(expected)
    for key, value in expected.items():
        assert cond[key].dtype == value.dtype and cond[key].shape == value.shape
        torch.testing.assert_close(cond[key], value, atol=4e-3, rtol=2e-3)


def test_cache_is_kept_until_something_changes(folder: Path) -> None:
    codec, text, tokenizer = tiny_codec(), clap_text_encoder(), roberta_tokenizer()
    target = folder / "cache" / "train.safetensors"

    def stamp() -> int:
        prepare_sound_latents(folder, codec, text, tokenizer, folder / "cache")
        return target.stat().st_mtime_ns

    first = stamp()
    assert stamp() == first
    with torch.no_grad():
        next(text.parameters()).add_(0.1)
    second = stamp()
    assert second != first
    codec.gain.mul_(2.0)
    third = stamp()
    assert third != second
    (folder / "recipe.json").write_text(json.dumps({"version": 2}))
    fourth = stamp()
    assert fourth != third
    target.write_bytes(target.read_bytes()[:100])  # a torn file
    assert stamp() != fourth
    target.with_suffix(".json").unlink()
    assert target.with_suffix(".json").exists() or stamp()
    assert not list((folder / "cache").glob("*.tmp"))


def test_text_condition_is_independent_of_the_batch() -> None:
    text, tokenizer = clap_text_encoder(), roberta_tokenizer()
    pair = encode_text(text, tokenizer, ["a short one", "another text that is much longer"])
    alone = encode_text(text, tokenizer, ["a short one"])
    for key, value in alone.items():
        torch.testing.assert_close(pair[key][:1], value, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone["pooled"].square().mean(), torch.tensor(1.0))
    assert alone["tokens"].shape[1] == 32 and 3 < int(alone["mask"].sum()) < 32
    null = null_text(pair)
    assert bool(null["drop"].all()) and not bool(pair["drop"].any()) and null.keys() == pair.keys()
